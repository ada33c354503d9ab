"""Real-time chunking's guidance on Gaussian chunks, whose posterior mean and its Jacobian are known."""

import math

import numpy as np
import pytest
import torch

from robopolicy.diffusion.ddpm import DdpmConfig, DdpmProcess
from robopolicy.diffusion.edm import EdmConfig, EdmProcess
from robopolicy.diffusion.flow import FlowConfig, FlowProcess
from robopolicy.diffusion.guidance import Denoising
from robopolicy.diffusion.process import SamplerConfig
from robopolicy.diffusion.rtc_guidance import RtcGuide
from robopolicy.diffusion.sampling import Steps, guided_estimate, sample_chunks

H, A = 6, 2
SIZE = H * A
NO_BOUNDS = (torch.tensor(-math.inf), torch.tensor(math.inf))
PROCESSES = {
    "ddpm": (DdpmProcess(DdpmConfig()), SamplerConfig("ddim", 20)),
    "edm": (EdmProcess(EdmConfig(sigma_max=10.0)), SamplerConfig("euler", 20)),
    "flow": (FlowProcess(FlowConfig()), SamplerConfig("euler", 20)),
}
each_process = pytest.mark.parametrize("name", PROCESSES)


def chunk_distribution():
    """Mean (12,) and covariance (12, 12): neighbouring actions are strongly correlated, and so are both entries."""
    i = np.arange(H)
    over_time = np.exp(-((i[:, None] - i) ** 2) / 8)
    across = np.array([[1.0, 0.5], [0.5, 1.0]])
    covariance = 0.25 * np.kron(over_time, across) + 1e-4 * np.eye(SIZE)
    return np.linspace(-0.3, 0.3, SIZE), covariance


MEAN, COVARIANCE = chunk_distribution()


def closed_form(a, s):
    """Gain K and the Jacobian of ``E[x0 | x] = mean + K (x - a mean)``."""
    gain = a * COVARIANCE @ np.linalg.inv(a**2 * COVARIANCE + s**2 * np.eye(SIZE))
    return gain, gain


def steps_of(name, sampler=None):
    process, usual = PROCESSES[name]
    solver = process.solver(sampler or usual)
    a, s = (v.flatten().double().numpy() for v in process.signal_and_noise(solver.levels))

    def estimate(x, i):
        gain = torch.tensor(closed_form(a[i], s[i])[0], dtype=x.dtype)
        mean = torch.tensor(MEAN, dtype=x.dtype)
        return (mean + (x.flatten(1) - a[i] * mean) @ gain.T).view_as(x)

    return Steps(process, solver, estimate, NO_BOUNDS), a, s


def given(rows=3, seed=0):
    """x, the chunk before and a mask, float64."""
    generator = torch.Generator().manual_seed(seed)
    x, previous = (torch.randn(rows, H, A, generator=generator, dtype=torch.float64) for _ in range(2))
    mask = torch.tensor([1.0, 1.0, 0.6, 0.2, 0.0, 0.0], dtype=torch.float64).view(1, H, 1).repeat(rows, 1, 1)
    return x, previous, mask


def guided_by_hand(x, previous, mask, a, s, beta, jacobian=None):
    """The module's last equation with explicit matrices; another Jacobian may be put in."""
    gain, true_jacobian = closed_form(a, s)
    jacobian = true_jacobian if jacobian is None else jacobian
    flat = x.flatten(1).numpy()
    clean = MEAN + (flat - a * MEAN) @ gain.T
    error = mask.expand(-1, -1, A).flatten(1).numpy() * (previous.flatten(1).numpy() - clean)
    return clean + s * min(beta, (a**2 + s**2) / (a * s)) * error @ jacobian


@each_process
@pytest.mark.parametrize("beta", [5.0, 1e9])
def test_it_is_the_true_vector_jacobian_product(name, beta):
    steps, a, s = steps_of(name)
    x, previous, mask = given()
    for i in (3, 10, 18):
        guide = RtcGuide(previous, mask, beta)
        found = guided_estimate(steps, x, i, steps.solver.levels, [guide]).flatten(1).numpy()
        np.testing.assert_allclose(found, guided_by_hand(x, previous, mask, a[i], s[i], beta), atol=2e-5)
        identity = guided_by_hand(x, previous, mask, a[i], s[i], beta, jacobian=np.eye(SIZE))
        assert abs(found - identity).max() > 0.01  # what a detached network computes


def test_it_is_the_papers_equation_on_a_flow():
    steps, _, _ = steps_of("flow")
    x, previous, mask = given()
    for i in range(1, 20):
        tau = 1 - float(steps.solver.levels[i])
        gain, jacobian = closed_form(tau, 1 - tau)
        flat = x.flatten(1).numpy()
        clean = MEAN + (flat - tau * MEAN) @ gain.T
        velocity = (clean - flat) / (1 - tau)
        r2 = (1 - tau) ** 2 / (tau**2 + (1 - tau) ** 2)
        error = mask.expand(-1, -1, A).flatten(1).numpy() * (previous.flatten(1).numpy() - clean)
        velocity = velocity + min(5.0, (1 - tau) / (tau * r2)) * error @ jacobian
        found = guided_estimate(steps, x, i, steps.solver.levels, [RtcGuide(previous, mask, 5.0)])
        np.testing.assert_allclose(found.flatten(1).numpy(), flat + (1 - tau) * velocity, atol=2e-5)


@pytest.mark.parametrize("tau", [0.1, 0.4, 0.8])
def test_a_path_is_a_flow_in_other_units(tau):
    """x / (a + s) of any path is the flow's x: the same chunk must be pulled to the same place."""
    _, previous, mask = given()
    flow_x = given(seed=1)[0]
    found = []
    for factor in (1.0, 1 / math.hypot(tau, 1 - tau), 1 / tau):  # flow, variance preserving, variance exploding
        a, s = factor * tau, factor * (1 - tau)
        x = (factor * flow_x).requires_grad_()
        gain = torch.tensor(closed_form(a, s)[0])
        mean = torch.tensor(MEAN)
        network_clean = (mean + (x.flatten(1) - a * mean) @ gain.T).view_as(x)
        level = [torch.full((1, 1, 1), v, dtype=torch.float64) for v in (a, s)]
        at = Denoising(x, network_clean.detach(), *level, 0, 5, 0.5, network_clean)
        found.append(RtcGuide(previous, mask, 3.0)(at))
    torch.testing.assert_close(found[1], found[0])
    torch.testing.assert_close(found[2], found[0])


def test_beta_bounds_the_pull_and_is_the_number_of_calls_if_not_given():
    steps, a, s = steps_of("flow", SamplerConfig("euler", 5))
    x, previous, mask = given()
    levels = steps.solver.levels
    for i in (0, 4):  # tau is 0 and 0.8; the weight has no bound of its own at tau = 0
        plain = guided_estimate(steps, x, i, levels, [])
        pulls = [guided_estimate(steps, x, i, levels, [RtcGuide(previous, mask, b)]) - plain for b in (1.0, 2.0, 5.0)]
        torch.testing.assert_close(pulls[1], 2 * pulls[0])
        default = guided_estimate(steps, x, i, levels, [RtcGuide(previous, mask)]) - plain
        torch.testing.assert_close(default, pulls[2])
        by_hand = guided_by_hand(x, previous, mask, max(a[i], 1e-4), s[i], 5.0)
        if i:
            np.testing.assert_allclose((plain + default).flatten(1).numpy(), by_hand, atol=2e-5)


@each_process
def test_a_mask_of_zeros_changes_no_bit(name):
    _, previous, mask = given()
    start = given(seed=2)[0].float() * float(PROCESSES[name][0].largest_noise)
    generator = torch.Generator().manual_seed(0)
    plain = sample_chunks(steps_of(name)[0], start, generator)
    guide = RtcGuide(previous.float(), torch.zeros_like(mask).float())
    guided = sample_chunks(steps_of(name)[0], start, torch.Generator().manual_seed(0), [guide])
    assert torch.equal(plain, guided)


class Projection:
    """What an identity Jacobian amounts to: estimates are moved where the mask is, and nowhere else."""

    through_denoiser = False

    def __init__(self, previous, mask):
        self.previous, self.mask = previous, mask

    def __call__(self, at):
        return at.clean + self.mask * (self.previous - at.clean)


@each_process
def test_sampled_chunks_begin_as_the_one_before_and_go_on_smoothly(name):
    """Unlike a projection, the Jacobian moves the actions that are not asked to agree, too."""
    rows = 256
    generator = torch.Generator().manual_seed(3)
    start = torch.randn(rows, H, A, generator=generator) * float(PROCESSES[name][0].largest_noise)
    factor = torch.tensor(np.linalg.cholesky(COVARIANCE)).float()
    previous = (torch.tensor(MEAN).float() + torch.randn(rows, SIZE, generator=generator) @ factor.T).view(rows, H, A)
    mask = torch.zeros(rows, H, 1)
    mask[:, :3] = 1
    free, guided, projected = (
        sample_chunks(steps_of(name)[0], start, None, guides)
        for guides in ([], [RtcGuide(previous, mask)], [Projection(previous, mask)])
    )

    def error(chunk, entries):
        return abs(chunk - previous)[:, entries].mean()

    def jump(chunk):
        return (chunk[:, 3] - chunk[:, 2]).norm(dim=1).mean()

    assert error(guided, slice(0, 3)) < 0.15 * error(free, slice(0, 3))
    assert error(guided, 3) < 0.9 * error(projected, 3) and error(guided, 3) < 0.6 * error(free, 3)
    assert jump(guided) < 1.15 * jump(previous) and jump(projected) > 1.4 * jump(previous)
