"""How long a chunk takes, from the observation to its arrival, as the next one should expect it."""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass

import numpy as np

from robopolicy.errors import UserError


@dataclass(frozen=True)
class DelaySettings:
    """How the delay is estimated.

    Attributes:
        window: newest measurements that count.
        percentile: of these; 100 is their largest, the cautious choice of Black et al. (2025).
    """

    window: int = 10
    percentile: float = 100.0

    def __post_init__(self) -> None:
        if self.window < 1 or not 0 <= self.percentile <= 100:
            raise UserError(f"delay: window={self.window} must be at least 1, percentile={self.percentile} in 0..100.")


class DelayEstimate:
    """The delay of the next chunk, from those of the last.

    Args:
        settings: window and percentile.
        prior: seconds, what is expected before the first measurement, e.g. from warming up.
    """

    def __init__(self, settings: DelaySettings, prior: float = 0.0) -> None:
        self.settings = settings
        self._prior = prior
        self._measured: deque[float] = deque(maxlen=settings.window)

    def add(self, seconds: float) -> None:
        self._measured.append(max(0.0, seconds))

    @property
    def seconds(self) -> float:
        if not self._measured:
            return self._prior
        return float(np.percentile(np.array(self._measured), self.settings.percentile, method="higher"))

    def steps(self, step: float, more: float = 0.0) -> int:
        """Control steps, rounded up.

        Args:
            step: seconds of one.
            more: seconds that are known to come on top.
        """
        return steps_of(self.seconds + more, step)


def steps_of(seconds: float, step: float) -> int:
    """Control steps that have begun after some seconds."""
    return math.ceil(round(seconds / step, 6))
