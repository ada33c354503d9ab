"""Choosing a policy before the robot moves: success in simulation, discounted by how strange real observations are.

The idea is VSDR, "Validate on Sim, Detect on Real" (Leibovich, Jacob, Endrawis, Novik, Tamar, ICRA 2022,
arXiv:2111.00765): rank policies by a score that combines their evaluation in simulation with an out-of-distribution
(OOD) score of their features on a fixed set of real observations, which all policies share and for which none of them
has to be run. Either part alone can be wrong: a policy that exploits something only the simulation has scores high
there, and a policy that ignores its observations finds nothing strange.

The published formula was not at hand when this was written. Ours is

    score = success rate in simulation * familiarity,    familiarity = min(1, D(held out) / D(real)),

where D is the mean OOD distance of features to those of one half of the policy's training episodes; the other half
calibrates it ("held out"). The ratio has no unit, so encoders of different size and scale can be compared; the score
lies in [0, 1] and does not depend on which other policies are candidates.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.spatial.distance import cdist
from scipy.stats import rankdata

from robopolicy.errors import UserError, did_you_mean
from robopolicy.evaluation.features import EncodedObservations
from robopolicy.evaluation.statistics import Interval

RESAMPLES = 2_000
NEIGHBOUR = 5
# Variances below this share of the mean variance count as that share: a feature that never moves in the training data
# would otherwise outweigh all others as soon as it moves by the camera's noise.
VARIANCE_FLOOR = 1e-3

Distance = Callable[[np.ndarray, np.ndarray], np.ndarray]


def mahalanobis_distances(features: np.ndarray, reference: np.ndarray) -> np.ndarray:
    """Mahalanobis distance of each row to the Gaussian fitted to the reference (Lee et al. 2018, one class).

    For features from that Gaussian the squared distance has a chi-square distribution with d degrees of freedom.

    Args:
        features: (n, d).
        reference: (m, d), m >= 2.

    Returns:
        (n,) distances.
    """
    centre = reference.mean(axis=0)
    variances, axes = np.linalg.eigh(np.cov(reference, rowvar=False).reshape(len(centre), -1))
    scale = np.sqrt(_floored(variances))
    return np.linalg.norm((features - centre) @ axes / scale, axis=1)


def neighbour_distances(features: np.ndarray, reference: np.ndarray) -> np.ndarray:
    """Distance of each row to its fifth nearest reference row (Sun et al. 2022), columns scaled to unit variance.

    Fits features of any distribution, also several clusters, but needs more of them than `mahalanobis_distances`.

    Args:
        features: (n, d).
        reference: (m, d), m >= 5.

    Returns:
        (n,) distances.
    """
    scale = np.sqrt(_floored(reference.var(axis=0)))
    return np.partition(cdist(features / scale, reference / scale), NEIGHBOUR - 1, axis=1)[:, NEIGHBOUR - 1]


DISTANCES: dict[str, Distance] = {"mahalanobis": mahalanobis_distances, "neighbours": neighbour_distances}


@dataclass(frozen=True)
class Candidate:
    """What is known of a policy without running it on the robot.

    Attributes:
        name: its name.
        successes, trials: episodes in simulation.
        training: features of its training data, at least two episodes.
        real: features of the real observations, the same ones for every candidate.
    """

    name: str
    successes: int
    trials: int
    training: EncodedObservations
    real: EncodedObservations


@dataclass(frozen=True)
class Choice:
    """One candidate with its score; intervals are 95 %.

    Attributes:
        score: simulated success rate times familiarity.
        simulated: success rate in simulation.
        familiarity: in [0, 1]; 1 when real observations are no stranger than held-out training data.
        outside: share of the real observations that are stranger than 95 % of the held-out ones; 0.05 is expected
            of observations like those in training.
        rank, simulated_rank, familiarity_rank: 1 is best; ties share the best rank.
        chance: share of the resamples in which this candidate has the highest score; a tie counts in equal parts.
    """

    name: str
    score: Interval
    simulated: Interval
    familiarity: Interval
    outside: float
    rank: int
    simulated_rank: int
    familiarity_rank: int
    chance: float


def familiarity(held_out: np.ndarray, real: np.ndarray) -> float:
    """How familiar real observations are, in [0, 1]: mean distance of held-out ones over that of real ones, at most 1.

    Args:
        held_out: (n,) OOD distances of training data that the reference does not hold.
        real: (m,) OOD distances of real observations.
    """
    near, far = float(held_out.mean()), float(real.mean())
    return 1.0 if far <= near else near / far


def select(candidates: Sequence[Candidate], *, distance: str = "mahalanobis", seed: int = 0) -> tuple[Choice, ...]:
    """Rank candidates, the best first.

    Intervals and chances come from 2,000 seeded resamples: simulated successes from binomial distributions with the
    rate ``(k + 1/2) / (n + 1)``, episodes of training data and of real observations with replacement; the real
    episodes are drawn once for all candidates.

    Args:
        candidates: at least one, with different names.
        distance: a key of `DISTANCES`.

    Raises:
        UserError: no candidate, equal names, an unknown distance, or too little training data.
    """
    names = [c.name for c in candidates]
    if not names or len(set(names)) != len(names):
        raise UserError(f"Wanted policies with different names, found {names}.")
    if distance not in DISTANCES:
        raise UserError(f"There is no distance '{distance}'.{did_you_mean(distance, DISTANCES)}")
    drawn = [_scored(c, DISTANCES[distance], seed) for c in candidates]
    resampled = np.stack([d.score for d in drawn])
    best = resampled == resampled.max(axis=0)
    chances = (best / best.sum(axis=0)).mean(axis=1)
    simulated = np.array([c.successes / c.trials for c in candidates])
    familiar = np.array([d.value for d in drawn])
    scores = simulated * familiar
    ranks, simulated_ranks, familiarity_ranks = (rankdata(-x, method="min") for x in (scores, simulated, familiar))
    choices = [
        Choice(
            name=name,
            score=_interval(scores[i], drawn[i].score),
            simulated=_interval(simulated[i], drawn[i].simulated),
            familiarity=_interval(familiar[i], drawn[i].familiarity),
            outside=drawn[i].outside,
            rank=int(ranks[i]),
            simulated_rank=int(simulated_ranks[i]),
            familiarity_rank=int(familiarity_ranks[i]),
            chance=float(chances[i]),
        )
        for i, name in enumerate(names)
    ]
    return tuple(sorted(choices, key=lambda choice: choice.rank))


@dataclass(frozen=True)
class _Draws:
    """Familiarity of one candidate, and (RESAMPLES,) draws of its parts."""

    value: float
    outside: float
    simulated: np.ndarray
    familiarity: np.ndarray

    @property
    def score(self) -> np.ndarray:
        return self.simulated * self.familiarity


def _scored(candidate: Candidate, distance: Distance, seed: int) -> _Draws:
    training = candidate.training
    episodes = np.random.default_rng(seed).permutation(np.unique(training.episode))
    is_reference = np.isin(training.episode, episodes[: -(-len(episodes) // 2)])
    reference, held_out = training.features[is_reference], training.features[~is_reference]
    if len(episodes) < 2 or len(reference) < NEIGHBOUR:
        raise UserError(
            f"'{candidate.name}': {len(training.features)} observations of {len(episodes)} training episodes are too "
            f"few; wanted at least two episodes and {2 * NEIGHBOUR} observations."
        )
    calibration, real = distance(held_out, reference), distance(candidate.real.features, reference)
    # One generator for each source: candidates share the draws of the real episodes, not those of their own data.
    own = np.random.default_rng((seed, *candidate.name.encode()))
    n = candidate.trials
    ratio = _episode_means(calibration, training.episode[~is_reference], own) / _episode_means(
        real, candidate.real.episode, np.random.default_rng((seed, 1))
    )
    return _Draws(
        value=familiarity(calibration, real),
        outside=float(np.mean(real > np.quantile(calibration, 0.95))),
        simulated=own.binomial(n, (candidate.successes + 0.5) / (n + 1), size=RESAMPLES) / n,
        familiarity=np.minimum(1, ratio),
    )


def _episode_means(values: np.ndarray, episode: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Means ``(RESAMPLES,)`` of values over episodes drawn with replacement (cluster bootstrap)."""
    _, number, counts = np.unique(episode, return_inverse=True, return_counts=True)
    sums = np.bincount(number, weights=values)
    draws = rng.multinomial(len(sums), np.full(len(sums), 1 / len(sums)), size=RESAMPLES)
    return np.maximum(draws @ sums, np.finfo(float).tiny) / (draws @ counts)


def _interval(value: float, draws: np.ndarray) -> Interval:
    low, high = np.quantile(draws, [0.025, 0.975])
    return Interval(float(value), float(low), float(high))


def _floored(variances: np.ndarray) -> np.ndarray:
    """Variances, none below `VARIANCE_FLOOR` times their mean, and none zero."""
    return np.maximum(variances, max(VARIANCE_FLOOR * variances.mean(), np.finfo(float).tiny))
