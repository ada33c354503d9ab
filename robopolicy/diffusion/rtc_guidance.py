"""Real-time chunking as guidance (Black, Galliker & Levine 2025, arXiv 2506.07339), for every Gaussian path.

The paper guides a flow, ``x = tau x0 + (1 - tau) n``, towards the chunk Y before with the mask W (its equations 2 to 4,
pseudo-inverse guidance of Song et al. 2023):

    v' = v + min(beta, (1 - tau) / (tau r^2)) J^T W (Y - E[x0 | x]),   r^2 = (1 - tau)^2 / (tau^2 + (1 - tau)^2)

with ``J = d E[x0 | x] / dx``. Any other path ``x = a x0 + s n`` is this one at ``tau = a / (a + s)`` once x is divided
by ``a + s``. Written for the clean estimate, from which velocity and noise follow, all of them are

    E[x0 | x]' = E[x0 | x] + s min(beta, (a^2 + s^2) / (a s)) J^T W (Y - E[x0 | x])
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from robopolicy.diffusion.guidance import SMALLEST_SIGNAL, Denoising


@dataclass(frozen=True)
class RtcGuide:
    """Pulls clean estimates towards the chunk before, through the denoiser's own Jacobian.

    Attributes:
        previous: Y (R, H, A), normalised.
        mask: W (R, H, 1) in [0, 1].
        beta: largest weight; None: the number of network calls. A flow's step of 1 / N with weight N overwrites x.
    """

    previous: Tensor
    mask: Tensor
    beta: float | None = None

    @property
    def through_denoiser(self) -> bool:
        return True

    def __call__(self, at: Denoising) -> Tensor:
        assert at.network_clean is not None
        error = self.mask * (self.previous - at.clean)
        (pulled,) = torch.autograd.grad(at.network_clean, at.x, error, retain_graph=True)
        a, s = at.signal.clamp(min=SMALLEST_SIGNAL), at.noise
        weight = ((a**2 + s**2) / (a * s)).clamp(max=self.beta if self.beta is not None else at.calls)
        return at.clean + s * weight * pulled
