"""A solver as numbers: every step is a linear combination of a few tensors.

Solvers see clean estimates only, so a step is linear in x, the estimate and what the solver remembers of the call
before. `step_table` reads the coefficients off a diffusers scheduler by feeding it unit vectors: what a graph, an
engine or a robot without torch then computes is the scheduler's own arithmetic, for every scheduler of this form.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from robopolicy.diffusion.process import Process, Solver
from robopolicy.errors import UserError

COLUMNS = ("scale", "skip", "out", "x", "clean", "previous_x", "previous_clean", "noise")
_NOISE_SLOTS = 64
_ROUNDING = 2e-7
"""Coefficients below are what float32 leaves of a zero; at sigma 80 even these would be seen in the chunk."""
_SMALL = 1e-5
"""Share of the largest coefficient below which one counts as rounding."""


@dataclass(frozen=True)
class StepTable:
    """How to walk from noise to a chunk without a scheduler, N network calls.

    Call i: ``prediction = network(scale_i x, level_i)``, ``clean = clip(skip_i x + out_i prediction)``, and then
    ``x = x_i x + clean_i clean + previous_x_i x' + previous_clean_i clean' + noise_i z`` with x' and clean' of the call
    before and z a standard normal tensor.

    Attributes:
        levels: (N,) the process's level of each call.
        rows: (N, 8) float32 coefficients in the order of `COLUMNS`.
        draws: for each call, which of the noise tensors it adds; 0, the one that sampling starts from, means none.
        start: standard deviation of x at the first call.
    """

    levels: Tensor
    rows: Tensor
    draws: tuple[int, ...]
    start: float

    def __len__(self) -> int:
        return len(self.levels)

    @property
    def noises(self) -> int:
        """Standard normal tensors of a chunk, the first one included."""
        return 1 + max(self.draws)


@torch.no_grad()
def step_table(process: Process, solver: Solver) -> StepTable:
    """Tabulate a fresh solver of a process.

    Raises:
        UserError: the solver remembers more than one call, or is not linear.
    """
    steps, draws = _solver_rows(solver)
    one, zero = torch.ones(1, 1, 1), torch.zeros(1, 1, 1)
    rows = []
    for i, step in enumerate(steps):
        t = solver.levels[i : i + 1]
        scale = process.network_input(one, t)
        skip, out = process.clean_estimate(zero, one, t), process.clean_estimate(one, zero, t)
        rows.append([scale.item(), skip.item(), out.item(), *step])
    return StepTable(solver.levels.clone(), torch.tensor(rows), draws, float(process.largest_noise))


def _solver_rows(solver: Solver) -> tuple[list[list[float]], tuple[int, ...]]:
    """The last five columns, and which noise tensor each call adds."""
    calls = len(solver)
    x_at, clean_at = 2 * torch.arange(calls), 2 * torch.arange(calls) + 1  # a unit vector of its own for each input
    size = 2 * calls + _NOISE_SLOTS
    generator = torch.Generator().manual_seed(0)
    rows, draws, drawn = [], [], 0
    for i in range(calls):
        x, clean = torch.zeros(1, 1, size), torch.zeros(1, 1, size)
        x[..., x_at[i]], clean[..., clean_at[i]] = 1, 1
        before = generator.get_state()
        result = solver.step(i, clean, x, generator)
        noise = 0.0
        if not torch.equal(before, generator.get_state()):
            replay = torch.Generator()
            replay.set_state(before)
            z = torch.randn(result.shape, generator=replay)
            slot = 2 * calls + int(z[0, 0, 2 * calls :].abs().argmax())  # neither x nor an estimate reach it
            noise = float(result[0, 0, slot] / z[0, 0, slot])
            result = result - noise * z
            drawn += 1
        inputs = [int(at[j]) for j in (i, i - 1) if j >= 0 for at in (x_at, clean_at)]
        found = [*result[0, 0, inputs].tolist(), 0.0, 0.0][:4]
        result[0, 0, inputs] = 0
        if result.abs().max() > _SMALL * max(1.0, *map(abs, found)):
            raise UserError(
                f"The sampler's step {i} depends on more than the last two network calls and cannot be exported. Use "
                "another sampler.name."
            )
        rows.append([0.0 if abs(c) < _ROUNDING else c for c in (*found, noise)])
        draws.append(drawn if noise else 0)
    return rows, tuple(draws)
