"""The actor's consistency function, its sampler and its loss against closed forms, and the choice by critics."""

import numpy as np
import pytest
import torch

from robopolicy.data.normalize import Normalizer, fit_normalizer
from robopolicy.diffusion.guidance import EnergyGuide
from robopolicy.diffusion.process import SamplerConfig
from robopolicy.diffusion.sampling import guided_estimate
from robopolicy.errors import UserError
from robopolicy.nets.context import Context
from robopolicy.policies.registry import build_policy
from robopolicy.spec import KeySpec, PolicySpec
from robopolicy.training.step import step_generator

STATE, ACTION = KeySpec("observation.state", (2,)), KeySpec("action", (2,), role="action")


def make(images=False, **config):
    torch.manual_seed(0)
    observations = (STATE, KeySpec("observation.image.top", (8, 8, 3), role="image")) if images else (STATE,)
    spec = PolicySpec(observations, ACTION, fps=10, n_obs_steps=2, horizon=4, n_action_steps=2)
    part = fit_normalizer(np.array([[-2.0, -2.0], [2.0, 2.0]]), "minmax")
    parts = Normalizer.from_parts({STATE.key: part, ACTION.key: part})
    return build_policy("consistency_ac", {"hidden_dims": [16, 16], **config}, spec, parts).eval()


def batch_of(rows, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {
        STATE.key: torch.rand(rows, 2, 2, generator=generator) * 4 - 2,
        ACTION.key: torch.rand(rows, 4, 2, generator=generator) * 4 - 2,
    }


def observe(rows):
    return {STATE.key: batch_of(rows)[STATE.key].numpy()}


def generators(rows, first=0):
    return [torch.Generator().manual_seed(first + i) for i in range(rows)]


def without_network(policy):
    """F = 0, so that f(x, t) = c_skip(t) x."""
    torch.nn.init.zeros_(policy.denoiser.rest[-1][-1].weight)
    torch.nn.init.zeros_(policy.denoiser.rest[-1][-1].bias)
    return policy


def c_skip(t):
    return 0.25 / ((t - 0.002) ** 2 + 0.25)


def test_smallest_level_is_the_identity_for_every_network():
    policy = make()
    x, context = torch.randn(3, 4, 2), Context(torch.randn(3, 2, 2))
    assert torch.equal(policy.clean_at(x, torch.full((3,), 0.002), context), x)
    assert not torch.allclose(policy.clean_at(x, torch.full((3,), 0.5), context), x, atol=0.01)


def test_coefficients_of_the_paper():
    process, one = make().process, torch.ones(1, 1, 1)
    for t in (0.002, 0.5, 2.0, 80.0):
        level = torch.tensor([t])
        skip, out = process.clean_estimate(0 * one, one, level), process.clean_estimate(one, 0 * one, level)
        assert skip.item() == pytest.approx(c_skip(t), rel=1e-4)
        assert out.item() == pytest.approx(0.5 * (t - 0.002) / (t**2 + 0.25) ** 0.5, rel=1e-4, abs=1e-9)


@pytest.mark.parametrize(("progress", "levels"), [(0.0, 2), (0.25, 76), (1.0, 150)])
def test_neighbours_on_a_grid_that_gets_finer(progress, levels):
    policy = make()
    t, u = policy.process.draw_neighbours(5000, progress, 150, torch.Generator().manual_seed(0))
    ends = 80 ** (1 / 7), 0.002 ** (1 / 7)
    grid = (torch.linspace(*ends, levels, dtype=torch.float64) ** 7).float()
    torch.testing.assert_close(t.unique().flip(0), grid[:-1], rtol=1e-4, atol=0)
    torch.testing.assert_close(u.unique().flip(0), grid[1:], rtol=1e-4, atol=0)
    assert torch.equal(torch.searchsorted(t.unique(), t) - torch.searchsorted(u.unique(), u), torch.zeros(5000).long())


def test_two_steps_at_80_and_2():
    """With F = 0, a chunk is c_skip(2) (c_skip(80) 80 z + sqrt(2^2 - 0.002^2) z')."""
    policy = without_network(make())
    chunk = policy.propose(Context(torch.zeros(1, 2, 2)), torch.Generator().manual_seed(3))
    generator = torch.Generator().manual_seed(3)
    z, again = torch.randn(1, 4, 2, generator=generator), torch.randn(1, 4, 2, generator=generator)
    first = (c_skip(80) * 80 * z).clamp(-1, 1)
    wanted = (c_skip(2) * (first + (4 - 0.002**2) ** 0.5 * again)).clamp(-1, 1)
    torch.testing.assert_close(chunk, wanted)
    policy.sampler = SamplerConfig("consistency", steps=1)
    torch.testing.assert_close(policy.propose(Context(torch.zeros(1, 2, 2)), torch.Generator().manual_seed(3)), first)


def test_loss_is_weighted_by_the_distance_of_the_levels():
    policy = without_network(make())
    batch, draws = batch_of(64), policy.draw(64, step_generator(0, 0))
    t, u = (draws[name].double().view(-1, 1, 1) for name in ("t", "u"))
    clean, z = batch[ACTION.key].double() / 2, draws["noise"].double()
    difference = c_skip(t) * (clean + t * z) - c_skip(u) * (clean + u * z)
    wanted = (100 / (t - u) * difference**2).mean()
    assert policy.loss(batch, draws).item() == pytest.approx(wanted.item(), rel=1e-3)


def test_only_the_student_gets_a_gradient():
    policy, target = make(), make()
    policy.consistency_loss(batch_of(8), policy.draw(8, step_generator(0, 0)), target).backward()
    assert all(p.grad is None for p in target.parameters())
    assert any(p.grad is not None for p in policy.denoiser.parameters())
    assert all(p.grad is None and not p.requires_grad for p in policy.critic.parameters())


def test_gradient_goes_through_the_whole_sampler(monkeypatch):
    policy, jumps = make(), []
    jump = policy.process.clean_estimate

    def noted(prediction, x, t):
        jumps.append(jump(prediction, x, t))
        jumps[-1].retain_grad()
        return jumps[-1]

    monkeypatch.setattr(policy.process, "clean_estimate", noted)
    policy.propose(Context(torch.randn(64, 2, 2)), generators(64)).sum().backward()
    assert len(jumps) == 2 and all(j.grad.abs().sum() > 0 for j in jumps)
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in policy.denoiser.parameters())


def prefer_large(policy):
    """Critics that count the executed actions' first entries, ten times."""
    policy.critic.forward = lambda context, chunk: (10 * chunk[..., 0].sum(dim=1)).expand(2, -1)  # type: ignore[method-assign]
    return policy


def test_critics_choose_among_candidates():
    alone = make().act(observe(40), generators(40))[..., 0].sum(axis=1)
    best = prefer_large(make(candidates=16, temperature=0.0)).act(observe(40), generators(40))[..., 0].sum(axis=1)
    some = prefer_large(make(candidates=16, temperature=50.0)).act(observe(40), generators(40))[..., 0].sum(axis=1)
    assert alone.mean() < some.mean() < best.mean()


def test_a_choice_does_not_depend_on_the_batch():
    policy = make(candidates=8)
    observations = observe(5)
    together = policy.act(observations, generators(5))
    alone = policy.act({k: v[3:4] for k, v in observations.items()}, generators(1, first=3))
    np.testing.assert_allclose(together[3:4], alone, atol=1e-5)
    assert np.abs(together - policy.act(observations, generators(5, first=9))).max() > 1e-2


def test_the_critic_is_exported_where_it_chooses():
    policy = make(candidates=4)
    batch = {STATE.key: batch_of(3)[STATE.key]}
    assert not {"critic", "critic_encoder"} & set(make().export_graphs(batch))
    graphs = policy.export_graphs(batch)
    encoder, critic = (
        torch.export.export(graphs[g].module, graphs[g].inputs).module() for g in ("critic_encoder", "critic")
    )
    chunks = torch.rand(graphs["critic"].inputs[1].shape)
    normalized = policy.normalizer["action"].normalize(chunks)
    values = policy.values(policy.encoder(policy.normalized(batch)), normalized)
    torch.testing.assert_close(critic(encoder(batch[STATE.key]), chunks), values.amin(dim=0))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"images": True}, "states of one task only.*observation.image.top"),
        ({"sampling_levels": [2.0, 80.0]}, "must fall"),
        ({"sampling_levels": [90.0]}, "up to sigma_max=80"),
        ({"candidates": 0}, "candidates=0 at least 1"),
        ({"process": {"name": "ddpm"}}, "process.name='ddpm' must be"),
    ],
)
def test_impossible_configurations_are_refused(config, message):
    with pytest.raises(UserError, match=message):
        make(**config)


def test_more_steps_than_levels_are_refused():
    with pytest.raises(UserError, match=r"sampler.steps=3 must lie in 1..2"):
        make().check_sampler(SamplerConfig("consistency", steps=3))


def test_guides_at_the_bounds_move_chunks_inside_but_not_out():
    policy = make().requires_grad_(False)
    with torch.no_grad():
        for parameter in policy.denoiser.parameters():
            parameter.mul_(20)  # every entry is clipped
        steps = policy.steps(policy.encoder(policy.normalized(batch_of(3))), None)
        x = 80 * torch.randn(3, 4, policy.spec.action.dim, generator=torch.Generator().manual_seed(0))
        clipped = steps.estimate(x, 0)
        for side, moves in ((-1, True), (1, False)):
            guide = EnergyGuide(lambda z, a, s, side=side: side * (clipped.sign() * z).sum((1, 2)), 0.01, "denoiser")
            found = guided_estimate(steps, x, 0, steps.solver.levels, [guide])
            assert torch.equal(found, clipped) != moves
