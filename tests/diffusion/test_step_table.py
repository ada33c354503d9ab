"""The table of a solver walks as diffusers' scheduler does."""

from __future__ import annotations

import pytest
import torch

from robopolicy.diffusion.ddpm import DdpmConfig
from robopolicy.diffusion.edm import EdmConfig
from robopolicy.diffusion.flow import FlowConfig
from robopolicy.diffusion.process import SamplerConfig, Solver
from robopolicy.diffusion.processes import build_process
from robopolicy.diffusion.step_table import COLUMNS, step_table
from robopolicy.errors import UserError

PROCESSES = [
    build_process(config) for config in (DdpmConfig(), EdmConfig(sigma_max=10.0, sigma_min=0.01), FlowConfig())
]
SAMPLERS = [(process, name) for process in PROCESSES for name in process.samplers]


@pytest.mark.parametrize("steps", [2, 5, 16])
@pytest.mark.parametrize(("process", "name"), SAMPLERS, ids=lambda value: getattr(value, "prediction", value))
def test_every_sampler_walks_as_its_scheduler(process, name, steps):
    """Random clean estimates, not those of a network, so that no coefficient can hide."""
    sampler = SamplerConfig(name, steps)
    table, solver = step_table(process, process.solver(sampler)), process.solver(sampler)
    assert len(table) == len(solver) and torch.equal(table.levels, solver.levels)
    ours, theirs, estimates = (torch.Generator().manual_seed(seed) for seed in (0, 0, 1))
    shape = (1, 4, 3)
    x = torch.randn(shape, generator=ours) * table.start
    expected = torch.randn(shape, generator=theirs) * process.largest_noise
    before = torch.zeros(shape), torch.zeros(shape)
    for i, drawn in enumerate(table.draws):
        clean = torch.randn(shape, generator=estimates)
        row = dict(zip(COLUMNS, table.rows[i], strict=True))
        after = row["x"] * x + row["clean"] * clean
        after = after + row["previous_x"] * before[0] + row["previous_clean"] * before[1]
        if drawn:
            after = after + row["noise"] * torch.randn(shape, generator=ours)
        expected = solver.step(i, clean, expected, theirs)
        x, before = after, (x, clean)
        scale = max(1.0, expected.abs().max().item())
        torch.testing.assert_close(x / scale, expected / scale, rtol=0, atol=2e-3 if name == "heun" else 1e-5)
    assert table.rows[-1, COLUMNS.index("x")] == 0 or name in ("ddpm", "euler_ancestral", "heun")


@pytest.mark.parametrize("process", PROCESSES, ids=lambda process: process.prediction)
def test_preconditioning_is_the_process_s(process):
    table = step_table(process, process.solver(SamplerConfig("dpmsolver++", 6)))
    x, prediction = torch.randn(1, 4, 3), torch.randn(1, 4, 3)
    for i in range(len(table)):
        scale, skip, out = table.rows[i, :3]
        t = table.levels[i : i + 1]
        torch.testing.assert_close(scale * x, process.network_input(x, t))
        torch.testing.assert_close(
            skip * x + out * prediction, process.clean_estimate(prediction, x, t), rtol=1e-4, atol=1e-4
        )


def test_a_solver_that_remembers_more_is_refused():
    class Remembering:
        def __init__(self):
            self.timesteps, self.seen = range(4), []

        def step(self, output, i, x, return_dict):
            self.seen.append(output)
            return (x + sum(self.seen),)

    solver = Solver(Remembering(), torch.arange(4, 0, -1).float(), lambda clean, x, t: clean)
    with pytest.raises(UserError, match="more than the last two network calls"):
        step_table(PROCESSES[1], solver)
