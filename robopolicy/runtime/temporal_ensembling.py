"""Temporal ensembling of action chunks (ACT; Zhao et al. 2023, arXiv 2304.13705, algorithm 2)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from robopolicy.errors import UserError
from robopolicy.runtime.delays import DelaySettings
from robopolicy.runtime.scheduling import Scheduler, Timing


@dataclass(frozen=True)
class TemporalEnsemblingSettings:
    """Infer as often as possible; average what all chunks say of a moment.

    Attributes:
        coefficient: m of the weights ``exp(-m i)``, i counted from the oldest chunk. Above 0 older chunks weigh more,
            0 is the mean, below 0 newer ones weigh more.
        every: steps between two observations that are inferred from, at least.
        delay: how the delay is estimated, which is only reported.
    """

    name: Literal["temporal_ensembling"] = "temporal_ensembling"
    coefficient: float = 0.01
    every: int = 1
    delay: DelaySettings = field(default_factory=DelaySettings)

    def __post_init__(self) -> None:
        if self.every < 1:
            raise UserError(f"scheduler.every={self.every} must be at least 1.")


class TemporalEnsembling(Scheduler):
    """Each moment's action is the weighted mean of the actions that all chunks hold for it.

    Chunks begin at any time, not only at multiples of the control step: an older chunk is read between its actions on
    a straight line.
    """

    def __init__(self, settings: TemporalEnsemblingSettings, timing: Timing, prior: float = 0.0) -> None:
        super().__init__(timing, settings.delay, prior)
        self._coefficient = settings.coefficient
        self._every = settings.every * timing.step
        self._chunks: list[tuple[list[int], np.ndarray]] = []

    def reset(self, now: int, position: np.ndarray) -> None:
        super().reset(now, position)
        self._chunks.clear()

    def _due(self, now: int) -> bool:
        return now >= self._origin + self._every

    def _merged(self, times: list[int], actions: np.ndarray, now: int) -> tuple[list[int], np.ndarray]:
        self._chunks = [chunk for chunk in self._chunks if chunk[0][-1] >= now]
        self._chunks.append(super()._merged(times, actions, now))
        times = self._chunks[-1][0]
        return times, ensemble(self._chunks, times, self._coefficient)


def ensemble(chunks: Sequence[tuple[list[int], np.ndarray]], times: list[int], coefficient: float) -> np.ndarray:
    """``sum_i w_i a_i / sum_i w_i`` with ``w_i = exp(-m i)`` over the chunks that cover a time, i = 0 the oldest.

    Args:
        chunks: times (n,) [ns] and actions (n, A) of each, oldest first; the last one covers all ``times``.
        times: (T,) ns.
        coefficient: m.

    Returns:
        (T, A).
    """
    base = times[0]
    at = np.array([time - base for time in times], np.float64)
    total, weights = np.zeros((len(times), chunks[-1][1].shape[1])), np.zeros((len(times), 1))
    count = np.zeros((len(times), 1))
    for own, actions in chunks:
        grid = np.array([time - base for time in own], np.float64)
        covered = ((grid[0] <= at) & (at <= grid[-1]))[:, None]
        read = np.stack([np.interp(at, grid, column) for column in np.asarray(actions, np.float64).T], axis=1)
        weight = covered * np.exp(-coefficient * count)
        total, weights, count = total + weight * read, weights + weight, count + covered
    return total / weights
