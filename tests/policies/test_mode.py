import numpy as np
import pytest
import torch
from torch.nn.functional import mse_loss

from robopolicy.configuration import dataclass_from
from robopolicy.data.normalize import Normalizer, fit_normalizer
from robopolicy.diffusion.process import SamplerConfig
from robopolicy.errors import UserError
from robopolicy.nets.transformer import LinearNoiseEmbedding, SinusoidalNoiseEmbedding
from robopolicy.policies.mode import Mode, ModeConfig
from robopolicy.spec import KeySpec, PolicySpec
from robopolicy.training.config import OptimConfig
from robopolicy.training.step import LossModule, build_optimizer, step_generator, train_step

SMALL = {"dim": 32, "layers": 2, "heads": 2, "expert_hidden": 32, "dropout": 0.0}


def make(goals=False, opinion=False, **config):
    torch.manual_seed(0)
    state, action = KeySpec("observation.state", (2,), unit="m"), KeySpec("action", (2,), role="action", unit="m")
    spec = PolicySpec((state,), action, 10, 2, 8, 4, goals=(state,) if goals else ())
    part = fit_normalizer(np.array([[-1.0, -1.0], [1.0, 1.0]]), "minmax")
    normalizer = Normalizer.from_parts({"observation.state": part, "action": part})
    policy = Mode(dataclass_from(ModeConfig, SMALL | config, "config"), spec, normalizer)
    if opinion:  # a fresh router finds all experts alike
        policy.denoiser.router.hidden.weight.data.mul_(20)
        policy.denoiser.router.out.data.mul_(20)
    return policy


def batch_of(rows, goals=False, seed=0):
    generator = torch.Generator().manual_seed(seed)
    batch = {
        "observation.state": 2 * torch.rand(rows, 2, 2, generator=generator) - 1,
        "action": 2 * torch.rand(rows, 8, 2, generator=generator) - 1,
    }
    return batch | ({"goal.observation.state": 2 * torch.rand(rows, 2, generator=generator) - 1} if goals else {})


def observed(batch):
    return {key: value.numpy() for key, value in batch.items() if key != "action"}


def generators(n):
    return [torch.Generator().manual_seed(i) for i in range(n)]


def fit(policy, batch, steps, lr=3e-3):
    optimizer, module = build_optimizer(policy, OptimConfig()), LossModule(policy)
    for step in range(steps):
        draws = policy.draw(len(batch["action"]), step_generator(0, step))
        train_step(module, optimizer, batch, draws, lr=lr * (1 - step / steps), clip_norm=1.0)
    return policy.eval()


def test_defaults_are_the_paper_s():
    policy = make()
    levels = policy.process.solver(policy.sampler).levels
    expected = torch.tensor([80, 22.8, 6.51, 1.86, 0.53, 0.151, 0.043, 0.012, 0.0035, 0.001])
    torch.testing.assert_close(levels, expected, rtol=0.04, atol=0)
    assert policy.config.goal_dropout == 0.1 and policy.network_calls == 10


@pytest.mark.parametrize("shared", [False, True])
def test_goals_are_reached_with_sampled_experts(shared):
    """The chunk stands still at the goal, half way to the edge."""
    policy = make(goals=True, shared_expert=shared)
    batch = batch_of(64, goals=True)
    batch["action"] = batch["goal.observation.state"][:, None].repeat(1, 8, 1) / 2
    fit(policy, batch, 150)
    chunk = policy.act(observed(batch), generators(64))
    assert np.abs(chunk - batch["action"][:, 1:5].numpy()).mean() < 0.08


@pytest.mark.parametrize("rows", [1, 8])
@pytest.mark.parametrize("guidance", [1.0, 2.0])
def test_a_chunk_is_the_same_with_tabulated_and_with_routed_experts(monkeypatch, rows, guidance):
    policy = make(goals=True, opinion=True).eval()
    policy.sampler = SamplerConfig("euler", 10, guidance)
    observations = observed(batch_of(rows, goals=True))
    tabulated = policy.act(observations, generators(rows))
    monkeypatch.setattr(policy.denoiser, "at_levels", lambda level: policy.denoiser.embed(level).split(1))
    np.testing.assert_allclose(tabulated, policy.act(observations, generators(rows)), atol=1e-5)


def test_one_router_call_serves_all_chunks():
    policy = make(opinion=True).eval()
    calls = []
    policy.denoiser.router.register_forward_hook(lambda *_: calls.append(1))
    for rows in (1, 8, 3):
        policy.act(observed(batch_of(rows)), generators(rows))
    assert len(calls) == 1
    policy.sampler = SamplerConfig("euler", 5)
    policy.act(observed(batch_of(2)), generators(2))
    assert len(calls) == 2


def test_training_samples_experts_from_the_draws_and_balances_them():
    policy, batch = make(opinion=True, load_balance=0.5), batch_of(32)
    draws = policy.draw(32, step_generator(0, 0))
    loss = policy.loss(batch, draws)
    assert torch.equal(loss, policy.loss(batch, policy.draw(32, step_generator(0, 0))))
    other = draws | {"gumbel": policy.draw(32, step_generator(0, 1))["gumbel"]}
    assert not torch.equal(loss, policy.loss(batch, other))
    seen = policy.noised(batch, draws)
    embedding = policy.denoiser.embed(seen.level)
    balance = policy.denoiser.route(embedding, seen.cond, draws["gumbel"]).load_balance()
    policy.config = dataclass_from(ModeConfig, SMALL | {"load_balance": 0.0}, "config")
    torch.testing.assert_close(loss, policy.loss(batch, draws) + 0.5 * balance)


def test_validation_measures_the_most_probable_experts_alone():
    policy, batch = make(opinion=True, dropout=0.2).eval(), batch_of(32)
    draws = policy.draw(32, step_generator(0, 0))
    loss = policy.loss(batch, draws)
    assert torch.equal(loss, policy.loss(batch, draws | {"gumbel": 0 * draws["gumbel"], "kept": 0 * draws["kept"]}))
    seen = policy.noised(batch, draws)
    one_by_one = torch.cat(
        [
            policy.denoiser(
                seen.x[i : i + 1], policy.denoiser.at_levels(seen.level[i : i + 1])[0], (seen.cond[0][i : i + 1],)
            )
            for i in range(32)
        ]
    )
    torch.testing.assert_close(loss, mse_loss(one_by_one, seen.target))


def test_dropout_comes_from_the_draws():
    policy, batch = make(dropout=0.5), batch_of(16)
    draws = policy.draw(16, step_generator(0, 0))
    assert draws["kept"].shape == (16, 2, 2, 32)
    assert torch.equal(policy.loss(batch, draws), policy.loss(batch, draws))
    assert not torch.equal(policy.loss(batch, draws), policy.loss(batch, draws | {"kept": draws["kept"].flip(0)}))


def test_goals_are_dropped_per_sample():
    policy = make(goals=True)
    told = policy.draw(4000, step_generator(0, 0))["told"]
    assert told.shape == (4000,) and told.float().mean().item() == pytest.approx(0.9, abs=0.02)


def test_every_part_learns():
    policy = make(goals=True, route_on_goal=True)
    batch, draws = batch_of(64, goals=True), policy.draw(64, step_generator(0, 0))
    policy.loss(batch, draws).backward()
    assert [name for name, p in policy.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0] == []


@pytest.mark.parametrize(
    ("process", "sampler", "embedding"),
    [
        ("ddpm", "ddim", SinusoidalNoiseEmbedding),
        ("flow", "euler", SinusoidalNoiseEmbedding),
        ("edm", "dpmsolver++", LinearNoiseEmbedding),
    ],
)
def test_works_on_any_process(process, sampler, embedding):
    policy = make(process={"name": process}, sampler={"name": sampler, "steps": 6})
    assert isinstance(policy.denoiser.noise_embedding, embedding)
    batch = batch_of(16)
    batch["action"] = batch["observation.state"][:, 1:].repeat(1, 8, 1) / 2
    policy.loss(batch, policy.draw(16, step_generator(0, 0))).backward()
    chunk = policy.eval().act(observed(batch), generators(16))
    assert np.isfinite(chunk).all() and np.abs(chunk).max() <= 1 + 1e-5


@pytest.mark.parametrize("options", [{}, {"shared_expert": True}, {"goals": True, "route_on_goal": True}])
def test_exported_graphs_choose_experts_for_any_level(options):
    policy = make(opinion=True, **options).eval()
    graphs = policy.export_graphs({k: v for k, v in batch_of(2, goals="goals" in options).items() if k != "action"})
    denoiser = graphs["denoiser"]
    exported = torch.export.export(denoiser.module, denoiser.inputs).module()
    _, _, *cond = denoiser.inputs
    with torch.no_grad():
        for sigma in (80.0, 1.0, 0.001):
            inputs = (torch.randn(2, 8, 2), torch.tensor([sigma]), *cond)
            torch.testing.assert_close(exported(*inputs), denoiser.module(*inputs), rtol=1e-4, atol=1e-5)


def test_trains_compiled_and_in_bfloat16():
    policy, batch = make(opinion=True), batch_of(16)
    draws = policy.draw(16, step_generator(0, 0))
    eager = policy.loss(batch, draws)
    compiled = torch.compile(LossModule(policy), backend="aot_eager")
    for seed in range(4):  # the experts' shares differ from batch to batch
        drawn = policy.draw(16, step_generator(0, seed))
        torch.testing.assert_close(compiled(batch, drawn), policy.loss(batch, drawn), rtol=1e-4, atol=1e-5)
    compiled(batch, draws).backward()
    torch.compiler.reset()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half = policy.loss(batch, draws)
    half.backward()
    assert half.item() == pytest.approx(eager.item(), rel=0.05)
    assert all(p.grad.isfinite().all() for p in policy.parameters())


def test_impossible_values_are_refused():
    with pytest.raises(UserError, match="load_balance=-1"):
        make(load_balance=-1.0)
    with pytest.raises(UserError, match="dropout=1"):
        make(dropout=1.0)
    with pytest.raises(UserError, match="heads=3 must divide dim=32"):
        make(heads=3)
    with pytest.raises(UserError, match="route_on_goal=true needs goals"):
        make(route_on_goal=True)
