"""How well a simulation predicts the real robot: agreement of real and simulated success rates of the same policies.

The measures are those of SIMPLER (Li et al. 2024, "Evaluating Real-World Robot Manipulation Policies in Simulation"):
Pearson's r, mean maximum rank violation (MMRV) and a Kruskal-Wallis test per policy; and two plain rank correlations.
MMRV is not symmetric, so real and simulated rates are keyword arguments everywhere.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import combinations

import numpy as np
from numpy.typing import ArrayLike
from scipy import stats

from robopolicy.errors import UserError
from robopolicy.evaluation.rates import SuccessRates, paired
from robopolicy.evaluation.statistics import RESAMPLES, Interval

FEWEST_POLICIES = 3  # two points always lie on a line
FEWEST_TO_RESAMPLE = 5  # with fewer, every third resample of the policies holds at most two different ones
_BLOCK = 2_000_000  # entries of the largest temporary array


def mmrv(*, real: ArrayLike, simulated: ArrayLike) -> np.ndarray:
    """Mean maximum rank violation, in [0, 1]; 0 is best.

    Policies ``i`` and ``j`` violate the rank by ``|real_i - real_j|`` when the simulation orders them differently:
    ``(simulated_i > simulated_j) != (real_i > real_j)``. MMRV is the mean over ``i`` of the largest violation over
    ``j`` (Li et al. 2024, section "Metrics"). The strict comparison makes a tie in the simulation count for the better
    of two policies only.

    Args:
        real, simulated: (..., policies) success rates.

    Returns:
        (...) one number for each row.
    """
    real, simulated = np.asarray(real, dtype=np.float64), np.asarray(simulated, dtype=np.float64)
    violated = (simulated[..., :, None] > simulated[..., None, :]) != (real[..., :, None] > real[..., None, :])
    gaps = np.abs(real[..., :, None] - real[..., None, :])
    return np.where(violated, gaps, 0).max(axis=-1).mean(axis=-1)


def pearson(*, real: ArrayLike, simulated: ArrayLike) -> np.ndarray:
    """Pearson's linear correlation of ``(..., policies)`` rates; NaN where one side is constant."""
    a, b = (x - x.mean(axis=-1, keepdims=True) for x in map(np.asarray, (real, simulated)))
    scale = np.sqrt((a**2).sum(axis=-1) * (b**2).sum(axis=-1))
    # Equal rates leave a rest of rounding after centring, which must not pass for spread.
    scale = np.where(_constant(real) | _constant(simulated), 0, scale)
    return _ratio((a * b).sum(axis=-1), scale)


def spearman(*, real: ArrayLike, simulated: ArrayLike) -> np.ndarray:
    """Spearman's rho of ``(..., policies)`` rates: Pearson's r of the ranks, ties share their mean rank."""
    return pearson(real=stats.rankdata(real, axis=-1), simulated=stats.rankdata(simulated, axis=-1))


def kendall_tau_b(*, real: ArrayLike, simulated: ArrayLike) -> np.ndarray:
    """Kendall's tau-b (Kendall 1945) of ``(..., policies)`` rates; NaN where one side is constant.

    Concordant minus discordant pairs, over the geometric mean of the pairs that are not tied on either side.
    """
    a, b = (np.sign(x[..., :, None] - x[..., None, :]) for x in map(np.asarray, (real, simulated)))
    pairs = (-2, -1)
    return _ratio((a * b).sum(axis=pairs), np.sqrt((a**2).sum(axis=pairs) * (b**2).sum(axis=pairs)))


def kruskal_wallis(*, real_successes: int, real_trials: int, simulated_successes: int, simulated_trials: int) -> float:
    """P-value of the Kruskal-Wallis test that real and simulated trials of one policy have equal outcomes.

    As in SIMPLER, each side is a vector of zeros and ones. A high value says that no difference was found, which few
    trials always do; it does not say that there is none. 1 where all trials ended alike.
    """
    sides = ((real_successes, real_trials), (simulated_successes, simulated_trials))
    real, simulated = (np.repeat([1, 0], [successes, trials - successes]) for successes, trials in sides)
    if np.ptp(np.concatenate([real, simulated])) == 0:
        return 1.0
    return float(stats.kruskal(real, simulated).pvalue)


@dataclass(frozen=True)
class Agreement:
    """One measure of agreement with its 95 % percentile intervals.

    Attributes:
        trials: other trials of the same policies; NaN ends where the number of trials is not known.
        policies: other policies, and other trials where their number is known; NaN ends below five policies.
    """

    name: str
    label: str
    definition: str
    value: float
    trials: Interval
    policies: Interval


@dataclass(frozen=True)
class WrongPair:
    """Two policies that the simulation does not order as the robot does.

    Attributes:
        better, worse: by the real rates.
        real: real rate of ``better`` minus that of ``worse``, above 0.
        simulated: the same in simulation, at most 0.
        p_value: Fisher's exact test of equal real rates; NaN where the number of real trials is not known. A high
            value: the real trials do not show which of the two is better either.
    """

    better: str
    worse: str
    real: float
    simulated: float
    p_value: float


@dataclass(frozen=True)
class Fidelity:
    """Agreement of a simulation with reality.

    Attributes:
        real, simulated: the two tables, rows in the same order.
        agreements: the measures, the headline first.
        kruskal: (policies,) p-values, see `kruskal_wallis`; NaN where the number of trials is not known.
        wrong_pairs: largest real difference first.
    """

    real: SuccessRates
    simulated: SuccessRates
    agreements: tuple[Agreement, ...]
    kruskal: np.ndarray
    wrong_pairs: tuple[WrongPair, ...]

    def agreement(self, name: str) -> Agreement:
        """The measure called ``name``, e.g. ``mmrv``.

        Raises:
            KeyError: there is none.
        """
        return {a.name: a for a in self.agreements}[name]


Measure = Callable[..., np.ndarray]
MEASURES: tuple[tuple[str, str, str, Measure], ...] = (
    ("pearson", "Pearson r", "Linear correlation of simulated with real success rates; 1 is best.", pearson),
    (
        "mmrv",
        "MMRV",
        "Mean over policies of the largest real difference to a policy that simulation orders the other way; "
        "0 is best.",
        mmrv,
    ),
    (
        "kendall",
        "Kendall tau-b",
        "Pairs of policies in the same order minus those in the other order, as a share, corrected for ties; "
        "1 is best.",
        kendall_tau_b,
    ),
    ("spearman", "Spearman rho", "Linear correlation of the ranks; 1 is best.", spearman),
)


def fidelity(*, real: SuccessRates, simulated: SuccessRates, seed: int = 0) -> Fidelity:
    """Compare the success rates of the same policies on the robot and in simulation.

    Intervals are percentile bootstraps of 10,000 seeded resamples. Trials are resampled parametrically: counts of both
    sides are drawn from binomial distributions with the rate ``(k + 1/2) / (n + 1)`` (Jeffreys' prior), so that a
    policy that never failed in n trials is not taken for one that cannot fail. Noise in the rates lowers a correlation
    and raises MMRV, so an interval may lie on the pessimistic side of the value itself; more trials narrow it.

    Raises:
        UserError: the tables do not hold the same policies, or fewer than three.
    """
    real, simulated = paired(real=real, simulated=simulated)
    if len(real.policies) < FEWEST_POLICIES:
        raise UserError(
            f"{real.source} holds {len(real.policies)} policies; agreement needs at least {FEWEST_POLICIES}. "
            "Add policies, e.g. checkpoints of one training."
        )
    rng = np.random.default_rng(seed)
    tables = (real, simulated)
    trials = tuple(_draw_trials(table, RESAMPLES, rng) for table in tables)
    chosen = rng.integers(len(real.policies), size=(RESAMPLES, len(real.policies)))
    policies = tuple(np.take_along_axis(draws, chosen, axis=1) for draws in trials)
    new_trials, new_policies = real.counted and simulated.counted, len(real.policies) >= FEWEST_TO_RESAMPLE
    agreements = []
    for name, label, definition, measure in MEASURES:
        value = float(measure(real=real.rates, simulated=simulated.rates))
        over_trials = _interval(measure, value, trials if new_trials else None)
        over_policies = _interval(measure, value, policies if new_policies else None)
        agreements.append(Agreement(name, label, definition, value, over_trials, over_policies))
    return Fidelity(real, simulated, tuple(agreements), _kruskal(real, simulated), wrong_pairs(real, simulated))


def wrong_pairs(real: SuccessRates, simulated: SuccessRates) -> tuple[WrongPair, ...]:
    """Pairs of policies with different real rates that the simulation ties or orders the other way.

    Args:
        real, simulated: tables with the same rows, see `paired`.
    """
    pairs = []
    for i, j in combinations(range(len(real.policies)), 2):
        i, j = (i, j) if real.rates[i] > real.rates[j] else (j, i)
        gap, simulated_gap = (float(table.rates[i] - table.rates[j]) for table in (real, simulated))
        if gap > 0 >= simulated_gap:
            pairs.append(WrongPair(real.policies[i], real.policies[j], gap, simulated_gap, _fisher(real, i, j)))
    return tuple(sorted(pairs, key=lambda pair: -pair.real))


def _draw_trials(table: SuccessRates, resamples: int, rng: np.random.Generator) -> np.ndarray:
    """Success rates ``(resamples, policies)`` of new trials; the old rates where the number of trials is not known."""
    known, n = table.trials > 0, np.maximum(table.trials, 1)
    drawn = rng.binomial(n, (table.successes + 0.5) / (n + 1), size=(resamples, len(n))) / n
    return np.where(known, drawn, table.rates)


def _interval(measure: Measure, value: float, draws: tuple[np.ndarray, ...] | None) -> Interval:
    """95 % percentile interval over the resamples in which the measure is defined."""
    if draws is None:
        return Interval(value, math.nan, math.nan)
    real, simulated = draws
    blocks = math.ceil(real.size * real.shape[1] / _BLOCK)
    parts = zip(np.array_split(real, blocks), np.array_split(simulated, blocks), strict=True)
    values = np.concatenate([measure(real=r, simulated=s) for r, s in parts])
    if np.isnan(values).mean() > 0.05:
        return Interval(value, math.nan, math.nan)
    low, high = np.nanquantile(values, [0.025, 0.975])
    return Interval(value, float(low), float(high))


def _kruskal(real: SuccessRates, simulated: SuccessRates) -> np.ndarray:
    rows = zip(real.successes, real.trials, simulated.successes, simulated.trials, strict=True)
    return np.array(
        [
            kruskal_wallis(real_successes=k, real_trials=n, simulated_successes=m, simulated_trials=o)
            if n and o
            else math.nan
            for k, n, m, o in rows
        ]
    )


def _fisher(table: SuccessRates, i: int, j: int) -> float:
    k, n = table.successes, table.trials
    if not (n[i] and n[j]):
        return math.nan
    return float(stats.fisher_exact([[k[i], n[i] - k[i]], [k[j], n[j] - k[j]]]).pvalue)


def _constant(values: ArrayLike) -> np.ndarray:
    return np.ptp(np.asarray(values), axis=-1) == 0


def _ratio(numerator: np.ndarray, denominator: np.ndarray) -> np.ndarray:
    defined = denominator > 0
    return np.where(defined, np.clip(numerator / np.where(defined, denominator, 1), -1, 1), math.nan)
