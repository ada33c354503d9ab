"""Sampling action chunks: from noise to a clean chunk with a diffusers solver."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from robopolicy.diffusion.ddpm import DdpmProcess, SamplerConfig

Generators = torch.Generator | Sequence[torch.Generator] | None
"""One generator for the batch, or one for each row: then a row does not depend on the batch that it is in."""


def draw_noise(shape: tuple[int, ...], generators: Generators, device: torch.device) -> Tensor:
    """Standard normal noise, drawn on the CPU so that a seed means the same on every device."""
    if isinstance(generators, Sequence):
        return torch.stack([torch.randn(shape[1:], generator=g) for g in generators]).to(device)
    return torch.randn(shape, generator=generators).to(device)


def sample_chunks(
    process: DdpmProcess,
    sampler: SamplerConfig,
    denoise: Callable[[Tensor, Tensor], Tensor],
    shape: tuple[int, int, int],
    bounds: tuple[Tensor, Tensor],
    generators: Generators,
    device: torch.device,
) -> Tensor:
    """Sample normalised action chunks.

    Args:
        process: the noise process of the network.
        sampler: solver and number of steps.
        denoise: maps x (B, H, A) and t (B,) to the network's prediction (B, H, A).
        shape: (B, H, A).
        bounds: smallest and largest normalised action (A,); each clean-sample estimate is clipped to them.
        generators: source of all randomness.
        device: where to sample.

    Returns:
        (B, H, A).
    """
    solver = process.solver(sampler)
    x = draw_noise(shape, generators, device)
    options = {"generator": list(generators) if isinstance(generators, Sequence) else generators}
    for t in solver.timesteps.tolist():
        levels = torch.full((shape[0],), t, device=device, dtype=torch.long)
        clean = process.clean_estimate(denoise(x, levels), x, levels).clamp(*bounds)
        x = solver.step(clean, t, x, **options).prev_sample
    return x
