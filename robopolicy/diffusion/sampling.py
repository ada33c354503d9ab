"""Sampling action chunks: from noise to a clean chunk with a solver."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from robopolicy.diffusion.process import Solver

Generators = torch.Generator | Sequence[torch.Generator] | None
"""One generator for the batch, or one for each row: then a row does not depend on the batch that it is in."""


def draw_noise(shape: tuple[int, ...], generators: Generators, device: torch.device) -> Tensor:
    """Standard normal noise, drawn on the CPU so that a seed means the same on every device."""
    if isinstance(generators, Sequence):
        return torch.stack([torch.randn(shape[1:], generator=g) for g in generators]).to(device)
    return torch.randn(shape, generator=generators).to(device)


def sample_chunks(
    solver: Solver,
    estimate: Callable[[Tensor, int], Tensor],
    start: Tensor,
    bounds: tuple[Tensor, Tensor],
    generators: Generators,
) -> Tensor:
    """Walk from noise to normalised action chunks.

    Args:
        solver: fresh.
        estimate: maps x (B, H, A) and the index of the network call to the clean-sample estimate (B, H, A).
        start: x (B, H, A) at the first level, pure noise.
        bounds: smallest and largest normalised action, (A,) or (B, 1, A); each estimate is clipped to them.
        generators: source of the randomness on the way.

    Returns:
        (B, H, A).
    """
    generator = list(generators) if isinstance(generators, Sequence) else generators
    x = start
    for i in range(len(solver)):
        x = solver.step(i, estimate(x, i).clamp(*bounds), x, generator)
    return x
