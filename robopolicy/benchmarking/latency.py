"""Timing calls that take turns, and the quantiles of what was measured."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from tqdm import tqdm

T = TypeVar("T")


@dataclass(frozen=True)
class Distribution:
    """Quantiles of durations in seconds, linearly interpolated between the measured ones.

    Attributes:
        runs: measured durations; the 99th percentile of fewer than 100 is hardly more than the longest.
    """

    runs: int
    min: float
    p50: float
    p90: float
    p99: float
    max: float

    @classmethod
    def of(cls, seconds: Sequence[float]) -> Distribution:
        p50, p90, p99 = np.quantile(seconds, [0.5, 0.9, 0.99]).tolist()
        return cls(len(seconds), min(seconds), p50, p90, p99, max(seconds))


def take_turns(
    calls: Mapping[str, Callable[[], T]], runs: int, warmup: int, progress: bool = True
) -> dict[str, list[T]]:
    """Call each in turn, again and again, so that a busy machine slows all of them.

    Args:
        calls: by name.
        runs: rounds whose results are kept.
        warmup: rounds before them that are not.

    Returns:
        Results by name, in the order of the rounds.
    """
    results: dict[str, list[T]] = {name: [] for name in calls}
    for done in tqdm(range(warmup + runs), desc="rounds", unit="round", disable=not progress):
        for name, call in calls.items():
            result = call()
            if done >= warmup:
                results[name].append(result)
    return results
