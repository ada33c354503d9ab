"""What every denoising network offers: conditioning once per chunk, noise levels once per schedule, cheap calls."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from robopolicy.nets.context import Context

Conditioning = tuple[Tensor, ...]
"""What a network keeps of a context, rows first; tensors only, so that it can be exported."""


class Denoiser(nn.Module, ABC):
    """Predicts the process's target for noised action chunks.

    A call has three parts, so that nothing is computed twice while a chunk is sampled: `condition` runs once per
    chunk, `at_levels` once for all noise levels of the sampler, and only `forward` once per step.

    Attributes:
        head: the output layers, which fine-tuning can train alone.
    """

    head: nn.Module

    @abstractmethod
    def condition(self, context: Context) -> Conditioning:
        """Everything that depends on the context and not on the noised chunk."""

    @abstractmethod
    def embed(self, level: Tensor) -> Tensor:
        """Embed noise levels (N,), of the order of 0 to 1000, to (N, ...)."""

    def at_levels(self, level: Tensor) -> Sequence[Any]:
        """For sampling: what `forward` takes as ``noise`` at each of the levels (N,), valid for all rows of a batch."""
        return self.embed(level).split(1)

    def active_parameters(self) -> int:
        """Parameters that one call reads; fewer than there are where experts are chosen."""
        return sum(p.numel() for p in self.parameters())

    @abstractmethod
    def forward(self, x: Tensor, noise: Any, cond: Conditioning) -> Tensor:
        """Predict the target.

        Args:
            x: (B, H, A) noised, normalised, scaled action chunks; or, of networks with a prefix, (B, H, 2 A + 1) as
                `robopolicy.nets.prefix.Prefix` shows them.
            noise: `embed` of (B,) levels, one for each row, or of (1,) level for all; or an entry of `at_levels`.
            cond: from `condition`, B rows.

        Returns:
            (B, H, A).
        """
