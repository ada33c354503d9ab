"""SDP: task routers over shared experts, and the statistics of their information loss."""

import numpy as np
import pytest
import torch

from robopolicy.data.normalize import AffineNormalizer, Normalizer, fit_normalizer
from robopolicy.errors import UserError
from robopolicy.nets.task_experts import WARM_UP, mean_usage
from robopolicy.policies.bundle import load_bundle, save_bundle
from robopolicy.policies.registry import build_policy
from robopolicy.spec import KeySpec, PolicySpec, TaskSpec
from robopolicy.training.config import OptimConfig
from robopolicy.training.step import LossModule, build_optimizer, step_generator, train_step

HORIZON = 4
SMALL = {"dim": 32, "layers": 1, "heads": 2, "mlp_ratio": 2, "dropout": 0.0, "experts": 4}
SAMPLE = {"process": {"name": "ddpm", "prediction": "sample"}, "sampler": {"name": "ddim", "steps": 4}}


def make(tasks=2, goals=False, **config):
    torch.manual_seed(0)
    state = KeySpec("observation.state", (2,), unit="m")
    spec = PolicySpec(
        (state,),
        KeySpec("action", (2,), role="action", unit="m"),
        fps=10,
        n_obs_steps=2,
        horizon=HORIZON,
        n_action_steps=2,
        goals=(state,) if goals else (),
        tasks=tuple(TaskSpec(f"task {i}", domain=i) for i in range(tasks)),
    )
    part = fit_normalizer(np.array([[-1.0, -1.0], [1.0, 1.0]]), "minmax")
    parts = {key: AffineNormalizer.stack([part] * spec.domains) for key in ("observation.state", "action")}
    return build_policy("sdp", SMALL | SAMPLE | config, spec, Normalizer.from_parts(parts))


def opposite(rows=64):
    """The same states in two tasks: to go along, and to go back."""
    states = torch.rand(rows, 2, generator=torch.Generator().manual_seed(1)) * 1.6 - 0.8
    task = torch.arange(rows) % 2
    action = states * (1 - 2 * task[:, None])
    return {
        "observation.state": states[:, None].repeat(1, 2, 1),
        "action": action[:, None].repeat(1, HORIZON, 1),
        "task": task,
    }


def fit(policy, batch, steps, lr=2e-2):
    policy.train()
    optimizer, module = build_optimizer(policy, OptimConfig()), LossModule(policy)
    for step in range(steps):
        draws = policy.draw(len(batch["action"]), step_generator(0, step))
        train_step(module, optimizer, batch, draws, lr=lr * (1 - step / steps), clip_norm=1.0)
    return policy.eval()


def generators(rows):
    return [torch.Generator().manual_seed(i) for i in range(rows)]


def act(policy, batch):
    texts = [policy.spec.tasks[i].instruction for i in batch["task"].tolist()]
    observations = {"observation.state": batch["observation.state"].numpy(), "instruction": texts}
    return policy.act(observations, generators(len(texts)))


def information(policy, batch):
    """I(task; expert) of a batch, in nats, from the routers' mean probabilities."""
    policy.eval()
    with torch.no_grad():
        seen = policy.noised(batch, policy.draw(len(batch["action"]), step_generator(0, 0)))
        _, routed = policy.denoiser.denoise(seen.x, policy.denoiser.embed(seen.level), seen.cond)
    usage = mean_usage(routed, policy.config.experts)
    joint = usage / usage.sum((1, 2), keepdim=True)
    return (joint * (joint / joint.sum(1, keepdim=True) / joint.sum(2, keepdim=True)).log()).sum().item()


def test_tasks_are_told_apart_by_their_routers_alone():
    policy, batch = make(), opposite()
    assert policy.encoder.size.task == 0  # no other way in
    fit(policy, batch, 250)
    chunk = act(policy, batch)
    assert np.abs(chunk[:, 0] - batch["action"][:, 0].numpy()).mean() < 0.15


def test_training_raises_the_information_of_task_and_expert():
    """Two tasks that are the same give the routers no reason to differ but this loss."""
    batch = opposite()
    batch["action"] = batch["observation.state"].repeat(1, HORIZON // 2, 1)
    found = {}
    for weight in (0.0, 0.5):
        policy = make(information_weight=weight)
        policy.denoiser.usage.batches.fill_(WARM_UP)
        policy.denoiser.usage.running.fill_(1 / 4)
        found[weight] = information(fit(policy, batch, 60), batch)
    assert found[0.5] > found[0.0] + 0.2


def test_validation_leaves_the_running_usage_alone():
    policy, batch = make().eval(), opposite()
    draws = policy.draw(64, step_generator(0, 0))
    before = {name: value.clone() for name, value in policy.denoiser.usage.named_buffers()}
    plain = policy.loss(batch, draws)
    assert all(torch.equal(value, before[name]) for name, value in policy.denoiser.usage.named_buffers())
    policy.train()
    assert torch.equal(policy.loss(batch, draws), plain)  # the information loss is still off
    assert policy.denoiser.usage.batches.tolist() == [1, 1]


def test_information_loss_joins_after_the_warm_up_and_reaches_the_routers():
    policy, batch = make(information_weight=1.0), opposite()
    draws = policy.draw(64, step_generator(0, 0))
    policy.denoiser.usage.batches.fill_(WARM_UP)
    policy.denoiser.usage.running.copy_(torch.tensor([[0.4, 0.3, 0.2, 0.1], [0.1, 0.2, 0.3, 0.4]]))
    denoising = policy.eval().loss(batch, draws)
    added = policy.train().loss(batch, draws) - denoising
    gradients = torch.autograd.grad(added, list(policy.denoiser.blocks[0].experts.routers.parameters()))
    assert all(g.abs().sum() > 0 for g in gradients)


def test_a_batch_of_one_task_trains_only_what_that_task_used():
    policy, batch = make(), opposite()
    batch["task"] = torch.zeros_like(batch["task"])
    policy.loss(batch, policy.draw(64, step_generator(0, 0))).backward()
    mine, other = policy.denoiser.blocks[0].experts.routers
    assert all(p.grad.abs().sum() > 0 for p in mine.parameters())
    assert all(p.grad.abs().sum() == 0 for p in other.parameters())
    assert policy.denoiser.usage.batches.tolist() == [1, 0]


def test_mixed_tasks_sample_what_each_task_samples_alone():
    policy, batch = make().eval(), opposite(8)
    together = act(policy, batch)
    texts = [f"task {i}" for i in batch["task"].tolist()]
    for row in range(8):
        state = batch["observation.state"][row : row + 1].numpy()
        alone = policy.act({"observation.state": state, "instruction": texts[row : row + 1]}, generators(8)[row:][:1])
        np.testing.assert_allclose(together[row], alone[0], atol=1e-4)


def test_dropout_is_part_of_the_draws_and_off_at_inference():
    policy, batch = make(dropout=0.3), opposite()
    draws = policy.draw(64, step_generator(0, 0))
    assert draws["kept"].shape[0] == 64
    dropped = policy.loss(batch, draws)
    assert torch.equal(dropped, policy.loss(batch, draws))
    assert not torch.equal(dropped, policy.eval().loss(batch, draws))


def test_a_bundle_keeps_the_running_usage(tmp_path):
    policy = fit(make(router_experts=[3, 4]), opposite(), 3)
    loaded, _ = load_bundle(save_bundle(policy, tmp_path / "bundle"))
    assert loaded.config.router_experts == (3, 4)
    assert loaded.denoiser.usage.batches.tolist() == [3, 3]
    assert torch.equal(loaded.denoiser.usage.running, policy.denoiser.usage.running)


def test_what_would_do_nothing_is_refused():
    with pytest.raises(UserError, match="embeds no instruction"):
        make(language={"dim": 8})
    policy = make(goal_dropout=0.1)
    with pytest.raises(UserError, match="needs a policy with goals"):
        policy.check_sampler(type(policy.sampler)("ddim", 4, guidance=2.0))
    policy = make(goals=True, goal_dropout=0.1)
    policy.check_sampler(type(policy.sampler)("ddim", 4, guidance=2.0))


def test_unknown_tasks_are_refused():
    policy, state = make(), np.zeros((1, 2, 2))
    with pytest.raises(UserError, match="not trained for 'task 7'. Did you mean"):
        policy.act({"observation.state": state, "instruction": ["task 7"]}, generators(1))
    with pytest.raises(UserError, match="needs an instruction, one of: 'task 0', 'task 1'"):
        policy.act({"observation.state": state}, generators(1))


def test_router_experts_are_one_number_for_each_task():
    with pytest.raises(UserError, match="router_experts has 3 entries, wanted one for each of 2"):
        make(router_experts=[4, 4, 4])
