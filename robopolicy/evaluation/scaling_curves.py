"""Which data to collect next: success as a function of the number of demonstrations, factor by factor.

After Zha et al., "Guiding Data Collection via Factored Scaling Curves" (2025): for each environmental factor (camera
pose, table height, ...) or pair of factors, policies are trained with different amounts of the demonstrations that vary
it, everything else unchanged, and evaluated on the conditions that count. The curve through these success rates is
extended beyond the data at hand, and the next demonstrations go where they promise most.

What the idea leaves open is settled here as follows. The failure rate follows a shifted power law,
``failure(n) = start * (1 + n / knee) ** -exponent``; success is binomial, widened where repeated trainings scatter more
than that; weak priors keep curves with few points reasonable; the allocation maximises the expected success, summed
over the curves. A failure rate that no amount of data removes is not modelled: extrapolate by a factor of two or three,
then measure again.
"""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from scipy import optimize, special, stats

from robopolicy.errors import UserError, did_you_mean

COLUMNS = ("factor", "n_demos", "successes", "n")
_DRAWS = 4000
_PROPOSAL_FREEDOM = 4  # of the t distribution that posterior draws are chosen from: heavier tails than the posterior
# Priors of logit(start), log(knee / largest n_demos) and log(exponent): mean and standard deviation.
_PRIOR_MEAN = np.array([0.0, np.log(0.5), np.log(0.7)])
_PRIOR_DEVIATION = np.array([2.0, 2.5, 0.7])
_STARTS = [_PRIOR_MEAN + np.array([0.0, knee, exponent]) for knee in (-2.0, 0.0, 2.0) for exponent in (-1.0, 0.5)]


@dataclass(frozen=True)
class Trials:
    """Evaluations of policies that differ in one factor's amount of data.

    Attributes:
        factor: name of the factor; a pair has a name of its own, e.g. ``camera+light``.
        demos: (m,) demonstrations that vary the factor, float64.
        successes, n: (m,) successful and all evaluation episodes; several trainings with one amount are several rows.
    """

    factor: str
    demos: np.ndarray
    successes: np.ndarray
    n: np.ndarray

    @property
    def collected(self) -> int:
        """Demonstrations at hand: the largest amount that a policy was trained with."""
        return int(self.demos.max())


@dataclass(frozen=True)
class ScalingCurve:
    """A fitted curve.

    Attributes:
        trials: what it was fitted to.
        start, knee, exponent: the most probable parameters: failure rate without data of the factor, demonstrations at
            which it begins to fall, and how fast it falls.
        draws: (S, 3) draws of the same parameters from their posterior.
    """

    trials: Trials
    start: float
    knee: float
    exponent: float
    draws: np.ndarray

    def success(self, demos: np.ndarray) -> np.ndarray:
        """Success rate of the most probable curve at (m,) amounts of data, (m,)."""
        return 1 - failure_rate(np.array([[self.start, self.knee, self.exponent]]), demos)[0]

    def draws_at(self, demos: np.ndarray) -> np.ndarray:
        """Success rate of each posterior draw at (m,) amounts of data, (S, m)."""
        return 1 - failure_rate(self.draws, demos)


@dataclass(frozen=True)
class PlannedFactor:
    """What a plan says of one factor.

    Attributes:
        curve: its scaling curve.
        collect: demonstrations to collect.
        now: (3,) success rate at the present amount: mean and 95 % interval.
        gain: (3,) added by ``collect``: mean and 95 % interval.
        gain_alone: mean added if the whole budget went here.
        best: probability that the whole budget helps most here.
    """

    curve: ScalingCurve
    collect: int
    now: np.ndarray
    gain: np.ndarray
    gain_alone: float
    best: float


@dataclass(frozen=True)
class CollectionPlan:
    """How to spend a budget of demonstrations.

    Attributes:
        budget: demonstrations to collect.
        factors: by factor, the most to collect first.
        gain, gain_equal_split: expected success, summed over the curves, that the plan and an equal split add.
        dispersion: variance of the success rates over the binomial one, see `dispersion`.
    """

    budget: int
    factors: tuple[PlannedFactor, ...]
    gain: float
    gain_equal_split: float
    dispersion: float

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {
            "budget": self.budget,
            "gain": self.gain,
            "gain_equal_split": self.gain_equal_split,
            "dispersion": self.dispersion,
            "factors": [
                {
                    "factor": f.curve.trials.factor,
                    "collected": f.curve.trials.collected,
                    "collect": f.collect,
                    "success_now": f.now.tolist(),
                    "gain": f.gain.tolist(),
                    "gain_if_alone": f.gain_alone,
                    "probability_best": f.best,
                    "curve": {"start": f.curve.start, "knee": f.curve.knee, "exponent": f.curve.exponent},
                }
                for f in self.factors
            ],
        }


def read_trials(path: Path) -> list[Trials]:
    """Read a table with the columns ``factor, n_demos, successes, n``, one row for each trained policy.

    Raises:
        UserError: names the line and what is wrong with it.
    """
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:  # spreadsheets write a byte order mark
            reader = csv.DictReader(file, skipinitialspace=True)
            reader.fieldnames = header = [name.strip() for name in reader.fieldnames or ()]
            rows = list(reader)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path}: cannot be read as a CSV table: {error}") from error
    for column in COLUMNS:
        if column not in header:
            raise UserError(
                f"{path}: the column '{column}' is missing; wanted {','.join(COLUMNS)}.{did_you_mean(column, header)}"
            )
    found: dict[str, list[tuple[int, int, int]]] = {}
    for line, row in enumerate(rows, start=2):
        found.setdefault((row["factor"] or "").strip(), []).append(_numbers(row, f"{path}, line {line}"))
    if not found:
        raise UserError(f"{path}: the table has no rows.")
    trials = [Trials(name, *np.array(sorted(values), dtype=np.float64).T) for name, values in found.items()]
    for trial in trials:
        if len(np.unique(trial.demos)) < 2:
            raise UserError(
                f"{path}: the factor '{trial.factor}' has one amount of data, {trial.collected}; a curve needs two at "
                "least, four are better. Train a policy on a part of its demonstrations."
            )
    return trials


def fit_curves(trials: Sequence[Trials], *, seed: int = 0) -> tuple[list[ScalingCurve], float]:
    """Fit the curve of each factor; returns them and the common dispersion of the trials around their curves."""
    modes = [_mode(trial, 1.0, _STARTS) for trial in trials]
    widening = dispersion(trials, [_parameters(mode, trial) for mode, trial in zip(modes, trials, strict=True)])
    rng = np.random.default_rng(seed)
    curves = []
    for trial, calm in zip(trials, modes, strict=True):
        mode = _mode(trial, widening, [calm])
        start, knee, exponent = _parameters(mode, trial).tolist()
        curves.append(ScalingCurve(trial, start, knee, exponent, _posterior(trial, mode, widening, rng)))
    return curves, widening


def plan_collection(trials: Sequence[Trials], budget: int, *, seed: int = 0) -> CollectionPlan:
    """Fit all curves and divide the budget.

    Raises:
        UserError: the budget is not positive.
    """
    if budget < 1:
        raise UserError(f"--budget: found {budget}, wanted a positive number of demonstrations.")
    curves, widening = fit_curves(trials, seed=seed)
    added = np.arange(budget + 1)
    paths = [curve.draws_at(curve.trials.collected + added) for curve in curves]
    rises = [path - path[:, :1] for path in paths]
    expected = np.array([rise.mean(axis=0) for rise in rises])
    collect = allocate(expected)
    alone = np.stack([rise[:, -1] for rise in rises])
    best = np.bincount(alone.argmax(axis=0), minlength=len(curves)) / alone.shape[1]
    planned = [
        PlannedFactor(
            curve, int(n), _mean_and_interval(path[:, 0]), _mean_and_interval(rise[:, n]), float(gain[-1]), float(share)
        )
        for curve, n, path, rise, gain, share in zip(curves, collect, paths, rises, expected, best, strict=True)
    ]
    shares = np.diff(np.linspace(0, budget, len(curves) + 1).round().astype(int))
    rows = np.arange(len(curves))
    return CollectionPlan(
        budget,
        tuple(sorted(planned, key=lambda f: (-f.collect, -f.gain_alone))),
        float(expected[rows, collect].sum()),
        float(expected[rows, shares].sum()),
        widening,
    )


def allocate(gains: np.ndarray) -> np.ndarray:
    """Divide a budget so that the summed gain is as large as possible.

    Each next demonstration goes where it adds most, which is optimal as long as no curve gets steeper (Fox 1966).
    Shifted power laws and their means do not.

    Args:
        gains: (F, budget + 1) gain of 0, 1, ... more demonstrations for each factor.

    Returns:
        (F,) demonstrations for each factor, int64; their sum is the budget.
    """
    steps = np.diff(gains, axis=1)
    budget = steps.shape[1]
    chosen = np.argsort(-steps, axis=None, kind="stable")[:budget]
    return np.bincount(chosen // budget, minlength=len(gains))


def failure_rate(parameters: np.ndarray, demos: np.ndarray) -> np.ndarray:
    """``start * (1 + demos / knee) ** -exponent`` for (S, 3) parameters and (m,) amounts, (S, m)."""
    start, knee, exponent = (column[:, None] for column in parameters.T)
    return start * (1 + demos / knee) ** -exponent


def dispersion(trials: Sequence[Trials], parameters: Sequence[np.ndarray]) -> float:
    """How much more the success rates scatter around all curves than evaluation alone explains, at least 1.

    Pearson's chi-square over its degrees of freedom (McCullagh and Nelder 1989, section 4.5): above 1, training has a
    part in the scatter. It is 1 when all curves together leave fewer than three degrees of freedom.
    """
    square, freedom = 0.0, 0
    for trial, best in zip(trials, parameters, strict=True):
        rate = 1 - failure_rate(best[None], trial.demos)[0]
        variance = np.maximum(trial.n * rate * (1 - rate), 0.25)
        square += float(((trial.successes - trial.n * rate) ** 2 / variance).sum())
        freedom += max(0, len(trial.demos) - len(best))  # a curve through one or two points fits whatever they are
    return max(1.0, square / freedom) if freedom >= 3 else 1.0


def plan_table(plan: CollectionPlan) -> str:
    """The plan as text."""
    from robopolicy.data.summary import table

    rows: list[Sequence[str]] = [("factor", "collected", "success now", "if all spent here", "best", "collect", "gain")]
    for f in plan.factors:
        rows.append(
            (
                f.curve.trials.factor,
                str(f.curve.trials.collected),
                _percent(f.now),
                f"+{f.gain_alone:.1%}",
                f"{f.best:.0%}",
                str(f.collect),
                f"+{_percent(f.gain)}" if f.collect else "-",
            )
        )
    first = plan.factors[0]
    lines = [
        table(rows),
        "",
        "mean (95 % interval), gains in points; best: probability that the whole budget helps most here",
        f"Collect first: {first.curve.trials.factor}. The plan adds {plan.gain:+.1%} success in all, an equal split "
        f"{plan.gain_equal_split:+.1%}.",
    ]
    if plan.dispersion > 1.05:
        lines.append(
            f"The rates vary {plan.dispersion:.1f} times as much (variance) as evaluation alone explains, for example "
            "because trainings differ; the intervals allow for it."
        )
    if first.best < 0.5:
        lines.append("The data do not yet tell the factors apart: more evaluation episodes or amounts would.")
    return "\n".join(lines)


def _percent(numbers: np.ndarray) -> str:
    mean, low, high = numbers
    return f"{mean:.1%} ({low:.1%} .. {high:.1%})"


def _mean_and_interval(draws: np.ndarray) -> np.ndarray:
    return np.array([draws.mean(), *np.quantile(draws, [0.025, 0.975])])


def _numbers(row: Mapping[str, str | None], where: str) -> tuple[int, int, int]:
    try:
        demos, successes, n = (int(row[column] or "") for column in COLUMNS[1:])
    except ValueError:
        values = ", ".join(f"{column}={row[column]!r}" for column in COLUMNS[1:])
        raise UserError(f"{where}: found {values}, wanted whole numbers (successes counts episodes).") from None
    if demos < 0 or n < 1 or not 0 <= successes <= n:
        raise UserError(
            f"{where}: found n_demos={demos}, successes={successes}, n={n}; wanted n_demos >= 0 and "
            "0 <= successes <= n with n >= 1."
        )
    return demos, successes, n


def _parameters(z: np.ndarray, trial: Trials) -> np.ndarray:
    """(..., 3) unconstrained coordinates to start, knee, exponent."""
    scale = trial.demos.max()
    return np.stack([special.expit(z[..., 0]), scale * np.exp(z[..., 1]), np.exp(z[..., 2])], axis=-1)


def _log_posterior(z: np.ndarray, trial: Trials, widening: float) -> np.ndarray:
    """(S,) unnormalised log posterior of (S, 3) coordinates; the likelihood is tempered by the dispersion."""
    failed = np.clip(failure_rate(_parameters(z, trial), trial.demos), 1e-12, 1 - 1e-12)
    likelihood = trial.successes * np.log1p(-failed) + (trial.n - trial.successes) * np.log(failed)
    prior = -0.5 * (((z - _PRIOR_MEAN) / _PRIOR_DEVIATION) ** 2).sum(axis=-1)
    return likelihood.sum(axis=-1) / widening + prior


def _mode(trial: Trials, widening: float, starts: Sequence[np.ndarray]) -> np.ndarray:
    """(3,) coordinates of the highest posterior density that a search from ``starts`` finds."""

    def loss(z: np.ndarray) -> float:
        return -float(_log_posterior(z[None], trial, widening)[0])

    options = {"maxiter": 4000, "maxfev": 4000, "xatol": 1e-6, "fatol": 1e-9}
    rough = min((optimize.minimize(loss, z, method="L-BFGS-B") for z in starts), key=lambda result: result.fun)
    return optimize.minimize(loss, rough.x, method="Nelder-Mead", options=options).x


def _posterior(trial: Trials, mode: np.ndarray, widening: float, rng: np.random.Generator) -> np.ndarray:
    """(S, 3) parameters by sampling importance resampling (Rubin 1988) from a t distribution around the mode."""
    curvature = _hessian(lambda z: _log_posterior(z, trial, widening), mode)
    values, vectors = np.linalg.eigh(-curvature)
    # No direction is known worse than the prior says.
    covariance = vectors @ np.diag(1 / np.maximum(values, 1 / _PRIOR_DEVIATION.max() ** 2)) @ vectors.T
    proposal = stats.multivariate_t(mode, covariance, df=_PROPOSAL_FREEDOM, seed=rng)
    candidates = proposal.rvs(10 * _DRAWS)
    log_weight = _log_posterior(candidates, trial, widening) - proposal.logpdf(candidates)
    weight = np.exp(log_weight - log_weight.max())
    chosen = rng.choice(len(candidates), size=_DRAWS, p=weight / weight.sum())
    return _parameters(candidates[chosen], trial)


def _hessian(function: Any, z: np.ndarray, step: float = 1e-3) -> np.ndarray:
    """Second derivatives of a batched function at (3,), by central differences."""
    offsets = step * np.eye(len(z))
    corners = np.array([[a + b, a - b, b - a, -a - b] for a in offsets for b in offsets])
    values = function((z + corners).reshape(-1, len(z))).reshape(-1, 4)
    return ((values @ [1, -1, -1, 1]) / (4 * step**2)).reshape(len(z), len(z))
