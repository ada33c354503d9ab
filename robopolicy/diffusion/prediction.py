"""What a network may regress, and the one conversion between all of it and the clean sample.

A noised sample is ``x = a x0 + s noise`` with a signal level a and a noise level s. Every prediction in use is affine
in x and x0, so that ``x0 = skip * x + out * prediction`` with two coefficients of (a, s): those are `coefficients`.
Targets are written out, since ``(x0 - skip * x) / out`` loses all digits where a or s is close to zero.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

PredictionKind = Literal["epsilon", "sample", "v_prediction", "velocity", "edm"]
"""``epsilon``: the noise (Ho et al. 2020). ``sample``: x0. ``v_prediction``: a noise - s x0 (Salimans & Ho 2022).
``velocity``: noise - x0 (rectified flow, Liu et al. 2023). ``edm``: the preconditioned F of Karras et al. 2022."""


def coefficients(kind: PredictionKind, a: Tensor, s: Tensor, sigma_data: float = 0.5) -> tuple[Tensor, Tensor]:
    """``skip`` and ``out`` of ``x0 = skip * x + out * prediction``.

    Args:
        kind: what the network predicts.
        a: signal level.
        s: noise level, of the same shape.
        sigma_data: standard deviation of the normalised data, for ``edm`` (Karras et al. 2022, table 1).
    """
    if kind == "sample":
        return torch.zeros_like(a), torch.ones_like(a)
    if kind == "epsilon":
        return 1 / a, -s / a
    if kind == "v_prediction":
        power = a**2 + s**2
        return a / power, -s / power
    if kind == "velocity":
        return 1 / (a + s), -s / (a + s)
    sigma = s / a
    total = sigma**2 + sigma_data**2
    return sigma_data**2 / (total * a), sigma * sigma_data / total.sqrt()


def clean_estimate(kind: PredictionKind, prediction: Tensor, x: Tensor, a: Tensor, s: Tensor, sd: float) -> Tensor:
    """The x0 that a prediction at x implies."""
    skip, out = coefficients(kind, a, s, sd)
    return skip * x + out * prediction


def from_clean(kind: PredictionKind, clean: Tensor, x: Tensor, a: Tensor, s: Tensor, sd: float) -> Tensor:
    """The prediction at x that implies a clean estimate; what a solver that wants another kind is given."""
    skip, out = coefficients(kind, a, s, sd)
    return (clean - skip * x) / out


def target(kind: PredictionKind, x0: Tensor, noise: Tensor, a: Tensor, s: Tensor, sd: float) -> Tensor:
    """What the network should predict at ``a x0 + s noise``."""
    if kind == "sample":
        return x0
    if kind == "epsilon":
        return noise
    if kind == "v_prediction":
        return a * noise - s * x0
    if kind == "velocity":
        return noise - x0
    sigma = s / a
    return (sigma * x0 - sd**2 * noise) / (sd * (sigma**2 + sd**2).sqrt())
