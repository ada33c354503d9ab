"""The widest domain randomization in which a policy still succeeds.

DORAEMON (Tiboni, Klink, Peters, Tommasi, D'Eramo, Chalvatzaki: "Domain Randomization via Entropy Maximization",
ICLR 2024): independent Beta distributions of the simulator's parameters; each iteration plays episodes under them and
then maximises their entropy, subject to an estimated success rate of at least alpha and to a Kullback-Leibler
divergence of at most epsilon from the distributions of the episodes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
from scipy.optimize import minimize
from scipy.special import betaln, digamma, polygamma

MAX_SHAPE = 1000.0
_SLACK = 1e-6  # of a constraint, in the optimiser's arithmetic
Value = Callable[[np.ndarray], tuple[float, np.ndarray]]  # of the logarithms of the shapes, with its gradient


@dataclass(frozen=True)
class Betas:
    """Independent Beta distributions, each stretched to its range.

    Attributes:
        names: of the parameters.
        ends: (k, 2) lowest and highest value.
        shapes: (k, 2) a and b, at least 1: distributions with one peak; (1, 1) is uniform.
    """

    names: tuple[str, ...]
    ends: np.ndarray
    shapes: np.ndarray

    @classmethod
    def around(cls, ranges: Mapping[str, tuple[float, float, float]], concentration: float = 100.0) -> Betas:
        """Narrow distributions to start from.

        Args:
            ranges: (low, centre, high) by name.
            concentration: a + b; the larger, the narrower.
        """
        low, centre, high = np.array(list(ranges.values()), dtype=np.float64).T
        share = (centre - low) / (high - low)
        shapes = np.maximum(concentration * np.stack([share, 1 - share], axis=1), 1.0)
        return cls(tuple(ranges), np.stack([low, high], axis=1), shapes)

    def entropy(self) -> float:
        """Differential entropy in nats, in the parameters' own units."""
        return _entropy(self.shapes)[0] + float(np.log(np.diff(self.ends)).sum())

    def highest_entropy(self) -> float:
        """The entropy of uniform distributions over the same ranges."""
        return float(np.log(np.diff(self.ends)).sum())

    def divergence(self, other: Betas) -> float:
        """Kullback-Leibler divergence from ``other``, over the same ranges, in nats."""
        return _divergence(self.shapes, other.shapes)[0]

    def mean(self) -> np.ndarray:
        """(k,)"""
        low, high = self.ends.T
        return low + (high - low) * self.shapes[:, 0] / self.shapes.sum(axis=1)

    def deviation(self) -> np.ndarray:
        """Standard deviations (k,)."""
        total = self.shapes.sum(axis=1)
        return np.diff(self.ends)[:, 0] * np.sqrt(self.shapes.prod(axis=1) / (total + 1)) / total

    def sample(self, n: int, rng: np.random.Generator) -> np.ndarray:
        """Draw (n, k) values."""
        low, high = self.ends.T
        return low + (high - low) * rng.beta(self.shapes[:, 0], self.shapes[:, 1], (n, len(self.names)))

    def randomization(self) -> dict[str, Any]:
        """As the option ``randomization`` of simulated environments takes it."""
        rows = np.hstack([self.shapes, self.ends])
        return {name: {"beta": [float(f"{x:.6g}") for x in row]} for name, row in zip(self.names, rows, strict=True)}


@dataclass(frozen=True)
class Update:
    """One step of the distributions.

    Attributes:
        betas: the new ones.
        goal: ``entropy``: it was maximised; ``success``: the success rate was, because no distribution in reach has
            the wanted one.
        expected_success: estimated success rate under the new ones.
        divergence: of the new from the old ones, in nats.
    """

    betas: Betas
    goal: Literal["entropy", "success"]
    expected_success: float
    divergence: float


def update(
    current: Betas, values: np.ndarray, success: np.ndarray, *, min_success: float, max_divergence: float
) -> Update:
    """Take one step from the distributions that the episodes were drawn from.

    Args:
        values: (n, k) parameters of the episodes.
        success: (n,) bool.
        min_success: alpha, the success rate to keep.
        max_divergence: epsilon, KL(new || current) of one step in nats.
    """
    low, high = current.ends.T
    shares = np.clip((values - low) / (high - low), 1e-9, 1 - 1e-9)
    succeeded = np.asarray(success, dtype=np.float64)

    def entropy(x: np.ndarray) -> tuple[float, np.ndarray]:
        return _in_logs(x, _entropy)

    def nearness(x: np.ndarray) -> tuple[float, np.ndarray]:
        value, gradient = _in_logs(x, lambda shapes: _divergence(shapes, current.shapes))
        return max_divergence - value, -gradient

    def success_rate(x: np.ndarray) -> tuple[float, np.ndarray]:
        return _in_logs(x, lambda shapes: _importance_mean(shapes, current.shapes, shares, succeeded))

    def margin(x: np.ndarray) -> tuple[float, np.ndarray]:
        value, gradient = success_rate(x)
        return value - min_success, gradient

    start = np.log(current.shapes).ravel()
    goal: Literal["entropy", "success"] = "entropy"
    if success_rate(start)[0] < min_success:
        # The paper's back-up problem: the highest success rate within the trust region.
        start = _maximise(success_rate, [nearness], start)
        if success_rate(start)[0] < min_success:
            goal = "success"
    new = start if goal == "success" else _maximise(entropy, [nearness, margin], start)
    betas = replace(current, shapes=np.exp(new).reshape(-1, 2))
    return Update(betas, goal, success_rate(new)[0], betas.divergence(current))


def _maximise(goal: Value, constraints: Sequence[Value], start: np.ndarray) -> np.ndarray:
    """Maximise from a feasible start, constraints being values that must not be negative; the result is feasible."""
    found = minimize(
        lambda x: tuple(-part for part in goal(x)),
        # At the trust region's centre its gradient vanishes, which SQP could not see past.
        np.clip(start + 1e-3, 0, np.log(MAX_SHAPE)),
        jac=True,
        method="SLSQP",
        bounds=[(0.0, np.log(MAX_SHAPE))] * len(start),
        constraints=[
            {"type": "ineq", "fun": lambda x, c=c: c(x)[0], "jac": lambda x, c=c: c(x)[1]} for c in constraints
        ],
        options={"maxiter": 200, "ftol": 1e-9},
    )
    end = _pulled_back(start, found.x, lambda x: all(constraint(x)[0] >= -_SLACK for constraint in constraints))
    return end if goal(end)[0] > goal(start)[0] else start


def _pulled_back(start: np.ndarray, end: np.ndarray, feasible: Callable[[np.ndarray], bool]) -> np.ndarray:
    """The point nearest to ``end`` on the way from ``start`` that is feasible, by bisection."""
    if feasible(end):
        return end
    inside, outside = 0.0, 1.0
    for _ in range(40):
        middle = (inside + outside) / 2
        inside, outside = (middle, outside) if feasible(start + middle * (end - start)) else (inside, middle)
    return start + inside * (end - start)


def _in_logs(x: np.ndarray, value: Callable[[np.ndarray], tuple[float, np.ndarray]]) -> tuple[float, np.ndarray]:
    """A function of the shapes (k, 2), with its gradient, as one of their logarithms (2 k,)."""
    shapes = np.exp(x).reshape(-1, 2)
    found, gradient = value(shapes)
    return found, (gradient * shapes).ravel()


def _entropy(shapes: np.ndarray) -> tuple[float, np.ndarray]:
    """Entropy on [0, 1]^k and its gradient (k, 2)."""
    a, b = shapes.T
    excess = shapes.sum(axis=1) - 2
    value = betaln(a, b) - (a - 1) * digamma(a) - (b - 1) * digamma(b) + excess * digamma(a + b)
    gradient = -(shapes - 1) * polygamma(1, shapes) + (excess * polygamma(1, a + b))[:, None]
    return float(value.sum()), gradient


def _divergence(new: np.ndarray, old: np.ndarray) -> tuple[float, np.ndarray]:
    """KL(new || old) of Beta distributions and its gradient (k, 2) by the new shapes."""
    change = new - old
    total = new.sum(axis=1)
    value = betaln(*old.T) - betaln(*new.T) + (change * digamma(new)).sum(axis=1) - change.sum(axis=1) * digamma(total)
    gradient = change * polygamma(1, new) - (change.sum(axis=1) * polygamma(1, total))[:, None]
    return float(value.sum()), gradient


def _importance_mean(
    new: np.ndarray, old: np.ndarray, shares: np.ndarray, succeeded: np.ndarray
) -> tuple[float, np.ndarray]:
    """Success rate under the new shapes from episodes under the old ones, and its gradient (k, 2).

    The mean of success times the ratio of densities, not normalised, as in the paper: probability that moves to where
    no episode was played counts as failure.

    Args:
        shares: (n, k) parameters as shares of their ranges.
        succeeded: (n,) 0 or 1.
    """
    logs = np.stack([np.log(shares), np.log1p(-shares)], axis=2)  # (n, k, 2)
    log_ratio = ((new - old) * logs).sum(axis=(1, 2)) - (betaln(*new.T) - betaln(*old.T)).sum()
    weights = np.exp(log_ratio) * succeeded
    score = logs - digamma(new) + digamma(new.sum(axis=1, keepdims=True))
    return float(weights.mean()), np.tensordot(weights, score, axes=1) / len(weights)
