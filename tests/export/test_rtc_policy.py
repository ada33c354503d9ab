"""Real-time chunking as published, on real networks behind the interface of engines."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from robopolicy.diffusion.guidance import Denoising
from robopolicy.diffusion.rtc_guidance import RtcGuide
from robopolicy.errors import UserError
from robopolicy.export.borders import torch_session
from robopolicy.export.rtc_policy import RtcConfig, RtcSampler, rtc_policy
from tests.export.test_families import opinionated
from tests.policies.test_contract import batch_of, make, observations_of

LOW, HIGH = 10.0, 30.0
ROWS = 3


@pytest.fixture(autouse=True)
def threads_as_before():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def small(family, steps=6, **sampler):
    # a network that regresses the clean chunk depends on x only once it is trained, one of the noise always does
    changes = {"process": {"name": "ddpm", "prediction": "epsilon"}} if family == "unet ddpm" else {}
    policy = opinionated(make(family, low=LOW, high=HIGH, **changes)).requires_grad_(False)
    policy.sampler = replace(policy.sampler, steps=steps, **sampler)
    return policy


def given(policy, engine, rows=ROWS):
    """Observations, noise, a chunk before and a mask with ones, a decay and zeros."""
    rng = np.random.default_rng(0)
    previous = rng.uniform(LOW + 4, HIGH - 4, (rows, policy.spec.horizon, policy.spec.action.dim))
    mask = np.tile(np.array([1, 1, 1, 0.5, 0.2, 0, 0, 0]), (rows, 1))
    return observations_of(policy, batch_of(policy, rows)), engine.draw_noise(rows, rng), previous, mask


@pytest.mark.parametrize("family", ["unet ddpm", "unet edm", "unet flow", "dit flow", "mode"])
def test_without_a_chunk_before_it_is_the_plain_sampler(family):
    policy = small(family)
    engine = rtc_policy(policy)
    graphs = policy.export_graphs({"observation.state": batch_of(policy, 1)["observation.state"]})
    plain = torch_session(graphs["sampler"])
    observations, noise, previous, mask = given(policy, engine)
    free = engine.sample(observations, noise)
    found = engine.sessions["encoder"](dict(observations))
    zeros = np.zeros_like(mask, dtype=np.float32)
    inputs = {"noise": noise, "previous": previous.astype(np.float32), "mask": zeros} | found
    np.testing.assert_allclose(free, plain(inputs)["chunk"], atol=1e-4)
    assert np.array_equal(free, engine.sample(observations, noise, previous, zeros))
    assert not np.array_equal(free, engine.sample(observations, noise, previous, mask))


@pytest.mark.parametrize("family", ["unet ddpm", "unet flow", "dit flow", "unet edm"])
def test_a_call_uses_the_networks_whole_jacobian(family):
    """One network call of the sampler against the Jacobian, column by column, in float64."""
    policy = small(family).double()
    sampler = RtcSampler(policy, RtcConfig(beta=4.0)).double()
    history = batch_of(policy, 1)["observation.state"].double()
    context = policy.encoder({"observation.state": policy.normalizer["observation.state"].normalize(history)})
    cond = policy.denoiser.condition(context)
    process, i = policy.process, 3
    t = sampler.table.levels[i : i + 1]
    level = policy.denoiser.embed(process.network_level(t).double())

    def clean_of(x):
        prediction = policy.denoiser(process.network_input(x, t), level, cond)
        a, s = (v.double() for v in process.signal_and_noise(t))
        skip = process.clean_estimate(torch.zeros_like(x), torch.ones_like(x), t)
        out = process.clean_estimate(torch.ones_like(x), torch.zeros_like(x), t)
        return skip * x + out * prediction, a, s

    generator = torch.Generator().manual_seed(0)
    shape = (1, policy.spec.horizon, policy.spec.action.dim)
    x, previous = (0.5 * torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(2))
    mask = torch.tensor([1.0, 1, 1, 0.5, 0.2, 0, 0, 0], dtype=torch.float64).view(1, -1, 1)
    jacobian = torch.autograd.functional.jacobian(lambda v: clean_of(v)[0], x).reshape(x.numel(), x.numel())
    step, columns = 1e-5, []
    for j in range(x.numel()):
        aside = torch.zeros(x.numel(), dtype=torch.float64)
        aside[j] = step
        ahead, behind = (clean_of(x + sign * aside.view_as(x))[0] for sign in (1, -1))
        columns.append((ahead - behind).flatten() / (2 * step))
    torch.testing.assert_close(jacobian, torch.stack(columns, dim=1), atol=1e-6, rtol=1e-4)

    clean, a, s = clean_of(x)
    error = (mask * (previous - clean)).flatten()
    weight = min(4.0, float((a**2 + s**2) / (a * s)))
    by_hand = clean.flatten() + float(s) * weight * jacobian.T @ error
    at_x = x.clone().requires_grad_()
    network_clean = clean_of(at_x)[0]
    at = Denoising(at_x, network_clean.detach(), a, s, i, 6, process.sigma_data, network_clean)
    found = RtcGuide(previous, mask, 4.0)(at)
    torch.testing.assert_close(found.flatten(), by_hand)
    identity = clean.flatten() + float(s) * weight * error
    assert abs(found.flatten() - identity).max() > 1e-3


@pytest.mark.parametrize("family", ["unet ddpm", "unet edm", "unet flow", "dit flow"])
def test_chunks_are_pulled_towards_the_one_before_where_the_mask_is(family):
    policy = small(family, steps=10)
    engine = rtc_policy(policy)
    observations, noise, previous, mask = given(policy, engine)
    free = engine.sample(observations, noise)
    pulled = engine.sample(observations, noise, previous, mask)
    before, after = (abs(chunk - previous)[:, :3].mean() for chunk in (free, pulled))
    assert after < 0.7 * before
    again = engine.sample(observations, noise, previous, mask)
    assert np.array_equal(pulled, again)
    row = engine.sample({k: v[1:2] for k, v in observations.items()}, noise[1:2], previous[1:2], mask[1:2])
    np.testing.assert_allclose(row, pulled[1:2], atol=1e-3)


class Counted(torch.nn.Module):
    """A denoiser's network that counts its calls."""

    def __init__(self, network):
        super().__init__()
        self.network, self.calls = network, 0

    def forward(self, *args):
        self.calls += 1
        return self.network(*args)


@pytest.mark.parametrize("family", ["unet ddpm", "unet flow", "dit flow"])
def test_a_warm_start_saves_calls_and_stays_near(family):
    policy = small(family, steps=8, name={"unet ddpm": "ddim"}.get(family, "euler"))
    distances = []
    for first in (0, 4, 7):
        engine = rtc_policy(policy, RtcConfig(beta=0.0, warm_start=first))
        sampler = engine.sessions["sampler"]._module
        sampler.step.network = Counted(sampler.step.network)
        observations, noise, previous, mask = given(policy, engine)
        chunk = engine.sample(observations, noise, previous, mask)
        assert sampler.step.network.calls == 8 - first
        if first == 0:
            assert np.array_equal(chunk, engine.sample(observations, noise))
        distances.append(float(abs(chunk - previous).mean()))
        sampler.step.network.calls = 0
        engine.sample(observations, noise)  # nothing to start from
        assert sampler.step.network.calls == 8
    assert distances[2] < distances[1] < distances[0]


def test_what_cannot_be_is_refused():
    with pytest.raises(UserError, match="must lie in 0..7: this sampler makes 8"):
        rtc_policy(small("unet flow", steps=8), RtcConfig(warm_start=8))
    with pytest.raises(UserError, match="first-order sampler"):
        rtc_policy(small("unet flow", steps=8, name="dpmsolver++"), RtcConfig(warm_start=3))
    with pytest.raises(UserError, match="beta=-1"):
        RtcConfig(beta=-1)
