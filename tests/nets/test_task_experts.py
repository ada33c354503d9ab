"""The decoder with task experts: routing, masks, the running usage and the information loss."""

import pytest
import torch

from robopolicy.errors import UserError
from robopolicy.nets.context import Context, ContextSize
from robopolicy.nets.task_experts import (
    PROBABILITY_FLOOR,
    WARM_UP,
    ExpertUsage,
    SdpDenoiser,
    TaskExperts,
    attention,
    mean_usage,
)

DIM, HORIZON, OBS, GOAL = 16, 6, 2, 3


@pytest.fixture
def experts():
    """Two tasks, of which the first knows three of the five experts."""
    torch.manual_seed(0)
    module = TaskExperts(DIM, 8, experts=5, router_experts=(3, 5), top_k=2)
    for router in module.routers:
        torch.nn.init.normal_(router.out.weight)  # so that tokens differ in their experts
    return module


@pytest.fixture
def denoiser():
    torch.manual_seed(0)
    size = ContextSize(OBS, step=4, goal=GOAL)
    return SdpDenoiser(
        2, HORIZON, size, dim=DIM, layers=2, heads=2, hidden=8, experts=4, router_experts=(4, 4, 3), top_k=2
    )


def context_of(rows, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return Context(
        torch.randn(rows, OBS, 4, generator=generator),
        torch.randn(rows, GOAL, generator=generator),
        task_index=torch.arange(rows) % 3,
    )


def call(denoiser, x, level, context):
    return denoiser(x, denoiser.embed(level), denoiser.condition(context))


def test_top_k_gates_equal_an_explicit_loop(experts):
    tokens = torch.randn(4, 3, DIM)
    out, _ = experts(tokens, torch.tensor([1, 3]))
    for row, task in enumerate((0, 1, 1, 1)):
        for token, found in zip(tokens[row], out[row], strict=True):
            p = experts.routers[task](token)
            best = p.argsort(descending=True)[:2]
            wanted = sum(p[e] * experts.experts[e](token) for e in best)  # not renormalised
            torch.testing.assert_close(found, wanted)


def test_probabilities_are_over_the_experts_that_the_task_knows(experts):
    _, (first, second) = experts(torch.randn(4, 3, DIM), torch.tensor([1, 3]))
    assert first.shape == (3, 3) and second.shape == (9, 5)
    for p in (first, second):
        torch.testing.assert_close((p - PROBABILITY_FLOOR).sum(1), torch.ones(len(p)))


def test_fixed_shapes_give_the_same_as_dispatched_tokens(experts):
    tokens, task = torch.randn(4, 3, DIM), torch.tensor([0, 1, 1, 1])
    torch.testing.assert_close(experts.dense(tokens, task), experts(tokens, torch.tensor([1, 3]))[0])


def test_every_parameter_has_a_gradient_even_of_tasks_that_are_not_in_the_batch(experts):
    """Distributed training waits for all of them."""
    out, _ = experts(torch.randn(2, 3, DIM), torch.tensor([0, 2]))
    out.sum().backward()
    assert all(p.grad is not None for p in experts.parameters())
    assert all(p.grad.abs().sum() == 0 for p in experts.routers[0].parameters())


def test_adding_experts_and_routers_does_not_change_a_bit(experts):
    longer = TaskExperts(DIM, 8, experts=8, router_experts=(3, 5, 8), top_k=2)
    longer.load_state_dict(experts.state_dict() | longer.state_dict() | experts.state_dict())
    tokens = torch.randn(4, 3, DIM)
    before, after = experts(tokens, torch.tensor([1, 3])), longer(tokens, torch.tensor([1, 3, 0]))
    assert torch.equal(before[0], after[0])


def test_attention_without_drops_equals_the_fused_one():
    q, k, v = torch.randn(3, 2, 5, DIM).unbind()
    visible = torch.ones(5, 5, dtype=torch.bool).tril()
    explicit = attention(q, k, v, 4, visible, torch.ones(2, 4, 5, 5))
    torch.testing.assert_close(explicit, attention(q, k, v, 4, visible))


def test_actions_see_the_past_only(denoiser):
    """Action t: actions and observations up to t, goal and noise always."""
    x = torch.randn(1, HORIZON, 2)
    context = context_of(1)
    base = call(denoiser, x, torch.tensor([50.0]), context)
    changed = x.clone()
    changed[:, 3] += 1
    moved = (call(denoiser, changed, torch.tensor([50.0]), context) - base).abs().sum(-1)[0] > 1e-7
    assert moved.tolist() == [False] * 3 + [True] * 3
    steps = context.steps.clone()
    steps[:, 1] += 1
    later = Context(steps, context.goal, task_index=context.task_index)
    moved = (call(denoiser, x, torch.tensor([50.0]), later) - base).abs().sum(-1)[0] > 1e-7
    assert moved.tolist() == [False] + [True] * 5
    other_goal = Context(context.steps, context.goal + 1, task_index=context.task_index)
    assert ((call(denoiser, x, torch.tensor([50.0]), other_goal) - base).abs().sum(-1) > 1e-7).all()
    assert ((call(denoiser, x, torch.tensor([90.0]), context) - base).abs().sum(-1) > 1e-7).all()


def test_rows_of_a_batch_do_not_mix_whatever_their_order(denoiser):
    x, level, context = torch.randn(7, HORIZON, 2), torch.arange(7) * 10.0, context_of(7)
    together = call(denoiser, x, level, context)
    for row in range(7):
        part = slice(row, row + 1)
        alone = Context(context.steps[part], context.goal[part], task_index=context.task_index[part])
        torch.testing.assert_close(call(denoiser, x[part], level[part], alone), together[part])


def test_one_level_for_all_rows_is_as_good_as_one_each(denoiser):
    x, context = torch.randn(4, HORIZON, 2), context_of(4)
    torch.testing.assert_close(
        call(denoiser, x, torch.tensor([30.0]), context), call(denoiser, x, torch.full((4,), 30.0), context)
    )


def test_dropout_keeps_the_mean(denoiser):
    kept = denoiser.draw_dropout(64, 0.3, torch.Generator().manual_seed(0))
    assert kept.shape == (64, 2, 2, HORIZON, HORIZON + 1 + 1 + OBS)
    torch.testing.assert_close(kept.unique(), torch.tensor([0, 1 / 0.7]))
    assert kept.mean().item() == pytest.approx(1, abs=0.02)


def test_active_parameters_are_those_of_one_task_and_its_chosen_experts(denoiser):
    expert = 2 * (2 * DIM * 8 + 8 + DIM)  # two layers
    others = sum(p.numel() for b in denoiser.blocks for r in list(b.experts.routers)[1:] for p in r.parameters())
    total = sum(p.numel() for p in denoiser.parameters())
    assert denoiser.active_parameters() == total - 2 * expert - others


def test_usage_is_averaged_then_followed_with_momentum():
    usage = ExpertUsage(1, 2, (2, 2))
    values = torch.rand(WARM_UP + 1, 2)
    for i, value in enumerate(values[:-1]):
        usage.update(torch.stack([value, torch.zeros(2)])[None], torch.tensor([True, False]))
        torch.testing.assert_close(usage.running[0, 0], values[: i + 1].mean(0))
    before = usage.running[0, 0].clone()
    usage.update(torch.stack([values[-1], torch.zeros(2)])[None], torch.tensor([True, False]))
    torch.testing.assert_close(usage.running[0, 0], 0.99 * before + 0.01 * values[-1])
    assert usage.running[0, 1].sum() == 0 and usage.batches.tolist() == [WARM_UP + 1, 0]


def information(conditional):
    """I(T; E) of P(e | t) (T, E) with equally likely tasks."""
    joint = conditional / conditional.sum(1, keepdim=True) / len(conditional)
    return (joint * (joint / joint.sum(0) * len(conditional)).clamp_min(1e-12).log()).sum()


def test_information_loss_has_the_gradient_of_minus_the_information():
    """Up to a constant for each task, which a softmax does not feel."""
    conditional = torch.tensor([[0.5, 0.3, 0.2], [0.1, 0.3, 0.6]])
    usage = ExpertUsage(1, 3, (3, 3))
    usage.running.copy_(conditional[None])
    usage.batches.fill_(WARM_UP + 1)
    logits = conditional.log().requires_grad_()
    usage.information_loss(logits.softmax(-1)[None], torch.tensor([True, True])).backward()
    wanted = conditional.log().requires_grad_()
    (-information(wanted.softmax(-1))).backward()
    torch.testing.assert_close(logits.grad, wanted.grad)
    assert logits.grad.abs().max() > 0.01


def test_information_loss_is_off_in_the_warm_up_of_a_task():
    usage = ExpertUsage(1, 3, (3, 2))
    both = torch.tensor([True, True])
    batch = torch.tensor([[[0.6, 0.2, 0.2], [0.5, 0.5, 0.0]]], requires_grad=True)
    usage.update(batch.detach(), both)
    assert usage.information_loss(batch, both) == 0
    usage.batches[1] = WARM_UP + 1
    usage.information_loss(batch, both).backward()
    assert batch.grad.isfinite().all()
    assert (batch.grad[0, 0] == 0).all() and (batch.grad[0, 1, :2] != 0).all() and batch.grad[0, 1, 2] == 0


def test_routers_learn_from_the_information_loss_alone(experts):
    """Their softmax is over the experts: no gradient vanishes, and the information of task and expert grows."""
    tokens, tasks = torch.randn(8, 4, DIM), torch.tensor([4, 4])
    usage, present = ExpertUsage(1, 5, (3, 5)), torch.tensor([True, True])
    for router in experts.routers:
        torch.nn.init.normal_(router.out.weight, std=0.02)
    optimizer = torch.optim.Adam(experts.routers.parameters(), lr=3e-3)
    history = []
    for step in range(WARM_UP + 60):
        seen = mean_usage([experts(tokens, tasks)[1]], 5)
        usage.update(seen.detach(), present)
        optimizer.zero_grad()
        usage.information_loss(seen, present).backward()
        if step == WARM_UP:
            assert all(p.grad.abs().sum() > 0 for p in experts.routers.parameters())
        optimizer.step()
        history.append(information(seen[0].detach()).item())
    assert history[-1] > history[0] + 0.1


def test_impossible_mixtures_are_refused():
    options = {"dim": 16, "layers": 1, "heads": 2, "hidden": 8}
    size = ContextSize(OBS, step=4)
    with pytest.raises(UserError, match=r"top_k=5 must lie in 1..experts=4"):
        SdpDenoiser(2, 4, size, **options, experts=4, router_experts=(4,), top_k=5)
    with pytest.raises(UserError, match=r"router_experts\[1\]=1 must lie in top_k=2..experts=4"):
        SdpDenoiser(2, 4, size, **options, experts=4, router_experts=(4, 1), top_k=2)
