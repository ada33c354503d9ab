import pytest
import torch
from torch.nn.functional import layer_norm

from robopolicy.errors import UserError
from robopolicy.nets.context import Context, ContextSize
from robopolicy.nets.dit import MODULATIONS, DiffusionTransformer, DitBlock, modulated

HORIZON, DIM, LAYERS = 6, 16, 2


def dit(**options):
    torch.manual_seed(0)
    return DiffusionTransformer(
        action_dim=2,
        horizon=HORIZON,
        size=ContextSize(n_obs_steps=2, step=4, goal=3, task=2),
        **{"dim": DIM, "layers": LAYERS, "heads": 4, "hidden": 32, **options},
    )


def awake(**options):
    """A network that is no longer fresh: its gates and its head are open."""
    net = dit(**options)
    for p in net.parameters():
        p.data.normal_(std=0.3)
    return net


def context(rows):
    return Context(torch.randn(rows, 2, 4), torch.randn(rows, 3), torch.randn(rows, 2), torch.zeros(rows).long())


def call(net, x, level, context):
    return net(x, net.embed(level), net.condition(context))


def test_a_fresh_network_predicts_zero_and_its_blocks_pass_everything_on():
    net = dit()
    x, level, given = torch.randn(3, HORIZON, 2), torch.tensor([1.0, 50.0, 99.0]), context(3)
    assert (call(net, x, level, given) == 0).all()
    modulation = (net.embed(level)[:, 1:] + net.condition(given)[1]).split(1, dim=1)
    tokens = torch.randn(3, 9, DIM)
    for i, block in enumerate(net.blocks):
        assert torch.equal(block(tokens, modulation[MODULATIONS * i : MODULATIONS * (i + 1)]), tokens)


def test_a_fresh_network_starts_to_learn():
    """The head moves first, then all that it reads."""
    net = dit()
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-2)
    for _ in range(4):
        loss = (call(net, torch.randn(5, HORIZON, 2), 20 * torch.arange(5), context(5)) - 1).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert [name for name, p in net.named_parameters() if not p.grad.abs().sum() > 0] == []


def test_every_parameter_gets_a_gradient():
    net = awake()
    call(net, torch.randn(5, HORIZON, 2), 20 * torch.arange(5), context(5)).square().mean().backward()
    assert [name for name, p in net.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0] == []


@pytest.mark.parametrize("part", ["steps", "goal", "task", "level"])
def test_every_action_sees_the_whole_context_and_the_noise_level(part):
    net = awake()
    x, level, given = torch.randn(1, HORIZON, 2), torch.tensor([50.0]), context(1)
    changed = {name: getattr(given, name) for name in ("steps", "goal", "task")} | {"level": level}
    changed[part] = changed[part] + 1
    other = Context(changed["steps"], changed["goal"], changed["task"], given.task_index)
    difference = (call(net, x, level, given) - call(net, x, changed["level"], other)).abs().amax(dim=(0, 2))
    assert (difference > 1e-4).all()


@pytest.mark.parametrize("changed", [0, 3, HORIZON - 1])
def test_actions_see_each_other_in_both_directions(changed):
    net = awake()
    x, level, given = torch.randn(1, HORIZON, 2), torch.tensor([50.0]), context(1)
    other = x.clone()
    other[:, changed] += 1
    difference = (call(net, x, level, given) - call(net, other, level, given)).abs().amax(dim=(0, 2))
    assert (difference > 1e-4).all()


def test_rows_do_not_mix():
    net = awake()
    x, level, given = torch.randn(4, HORIZON, 2), 20 * torch.arange(4), context(4)
    alone = Context(given.steps[2:3], given.goal[2:3], given.task[2:3], given.task_index[2:3])
    whole, one = call(net, x, level, given), call(net, x[2:3], level[2:3], alone)
    torch.testing.assert_close(whole[2:3], one, rtol=1e-4, atol=1e-4)


def test_one_noise_row_stands_for_all():
    net = awake()
    x, cond = torch.randn(3, HORIZON, 2), net.condition(context(3))
    broadcast, rows = net.embed(torch.tensor([7.0])), net.embed(torch.full((3,), 7.0))
    torch.testing.assert_close(net(x, broadcast, cond), net(x, rows, cond), rtol=1e-4, atol=1e-4)


def test_modulations_are_computed_once_for_a_schedule_and_once_for_a_chunk():
    net = awake()
    levels = torch.tensor([-1300.0, -20.0, 0.0, 400.0])
    calls = []
    net.noise_modulation.register_forward_hook(lambda *_: calls.append("level"))
    net.context_modulation.register_forward_hook(lambda *_: calls.append("context"))
    noises, cond = net.at_levels(levels), net.condition(context(3))
    for noise in noises:
        net(torch.randn(3, HORIZON, 2), noise, cond)
    assert calls == ["level", "context"]
    for noise, level in zip(noises, levels, strict=True):
        assert noise.shape == (1, 1 + MODULATIONS * LAYERS + 2, DIM)
        torch.testing.assert_close(noise, net.embed(level[None]), rtol=1e-4, atol=1e-4)


def test_adaptive_layer_norm_is_the_formula():
    x, shift, scale = torch.randn(2, 5, 8), torch.randn(2, 1, 8), torch.randn(1, 1, 8)
    torch.testing.assert_close(modulated(x, shift, scale), layer_norm(x, (8,), eps=1e-6) * (1 + scale) + shift)


def test_the_residual_is_the_stream_before_its_modulation():
    """DiT, equation of figure 3: x + gate * branch(modulated(x))."""
    torch.manual_seed(0)
    block = DitBlock(16, 4, 32)
    x = 10 * torch.randn(2, 5, 16) + 3
    a, b, gate, c, d, mlp_gate = (torch.randn(2, 1, 16) for _ in range(MODULATIONS))
    closed = torch.zeros(2, 1, 16)
    assert torch.equal(block(x, (a, b, closed, c, d, closed)), x)
    middle = x + gate * block.attention(modulated(x, a, b))
    torch.testing.assert_close(block(x, (a, b, gate, c, d, closed)), middle)
    wanted = middle + mlp_gate * block.mlp(modulated(middle, c, d))
    torch.testing.assert_close(block(x, (a, b, gate, c, d, mlp_gate)), wanted)


def test_impossible_sizes_are_refused():
    with pytest.raises(UserError, match="heads=5 must divide dim=16"):
        dit(heads=5)
