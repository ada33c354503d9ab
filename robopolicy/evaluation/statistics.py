"""Intervals and paired tests for evaluation numbers; every number that is reported goes through here."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike
from scipy import stats

RESAMPLES = 10_000


@dataclass(frozen=True)
class Interval:
    """A point estimate with the ends of its two-sided confidence interval; NaN where it is not defined."""

    value: float
    low: float
    high: float


def wilson(successes: int, n: int, confidence: float = 0.95) -> Interval:
    """Rate with its score interval (Wilson 1927), which stays inside [0, 1] and is honest near both ends.

    Returns:
        NaN for all three numbers when ``n`` is 0.
    """
    if n == 0:
        return Interval(math.nan, math.nan, math.nan)
    interval = stats.binomtest(successes, n).proportion_ci(confidence, method="wilson")
    return Interval(successes / n, float(interval.low), float(interval.high))


def bootstrap_mean(values: ArrayLike, confidence: float = 0.95, *, seed: int = 0) -> Interval:
    """Mean with its percentile bootstrap interval (Efron 1979), 10,000 seeded resamples.

    Args:
        values: (n,) one number per episode.

    Returns:
        An interval of NaN below two values: one episode says nothing about the spread.
    """
    values = np.asarray(values, dtype=np.float64)
    n = len(values)
    if n < 2:
        return Interval(float(values[0]) if n else math.nan, math.nan, math.nan)
    # The mean of a resample depends only on how often each value was drawn.
    counts = np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), size=RESAMPLES)
    low, high = np.quantile(counts @ values / n, [(1 - confidence) / 2, (1 + confidence) / 2])
    return Interval(float(values.mean()), float(low), float(high))


@dataclass(frozen=True)
class PairedDifference:
    """Two policies on the same seeds, ``a`` minus ``b``.

    Attributes:
        score: mean difference of the episode scores with its paired bootstrap interval.
        success: difference of the success rates with its paired bootstrap interval.
        both, only_a, only_b, neither: episodes by who succeeded.
        p_value: two-sided exact McNemar test of equal success rates (a binomial test on the discordant episodes).
    """

    score: Interval
    success: Interval
    both: int
    only_a: int
    only_b: int
    neither: int
    p_value: float

    @property
    def n(self) -> int:
        return self.both + self.only_a + self.only_b + self.neither


def mcnemar(only_a: int, only_b: int) -> float:
    """Two-sided exact p-value (McNemar 1947); 1 when no episode is discordant."""
    discordant = only_a + only_b
    return float(stats.binomtest(only_a, discordant, 0.5).pvalue) if discordant else 1.0


def paired_difference(
    scores_a: ArrayLike, scores_b: ArrayLike, successes_a: ArrayLike, successes_b: ArrayLike, *, seed: int = 0
) -> PairedDifference:
    """Compare two policies episode by episode; entry ``i`` of all four ``(n,)`` arrays has the same seed."""
    a, b = np.asarray(successes_a, dtype=bool), np.asarray(successes_b, dtype=bool)
    only_a, only_b = int((a & ~b).sum()), int((b & ~a).sum())
    return PairedDifference(
        score=bootstrap_mean(np.subtract(scores_a, scores_b), seed=seed),
        success=bootstrap_mean(a.astype(float) - b.astype(float), seed=seed),
        both=int((a & b).sum()),
        only_a=only_a,
        only_b=only_b,
        neither=int((~a & ~b).sum()),
        p_value=mcnemar(only_a, only_b),
    )
