"""How well a dataset can be imitated: action divergence, transition diversity, coverage of the state space.

Belkhale, Cui, Sadigh, "Data Quality in Imitation Learning" (NeurIPS 2023) trace the quality of demonstrations to two
properties. *Action divergence* is the mismatch of the learned and the expert policy in the states that are visited: a
policy can only learn actions that are consistent from demonstration to demonstration. *Transition diversity* is the
randomness of the next state for a given state and action: a little of it covers the states around the expert's path,
a lot of it needs more data. Both are expectations over distributions that a dataset only samples, so they are
estimated (`measure`):

- action divergence: error of a local linear policy, fitted to the nearest states of all *other* episodes, on this
  episode's actions. Its mean square converges to the variance of the expert's actions in a state.
- transition diversity: error of a local linear model of the change of state, fitted to the nearest states and actions
  of all other episodes. Its mean square converges to the variance of the next state.
- state entropy: Kozachenko-Leonenko estimate for the distribution of the states.

The estimates include what the observation hides (a velocity, an occluded object), a choice among several good ways,
and, in sparse data, the curvature between neighbours: they compare datasets of one task and size, and find episodes
that differ; they are no absolute marks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from robopolicy.data.neighbours import entropy, local_linear_residuals, other_episode_neighbours
from robopolicy.data.schema import ArraySpec
from robopolicy.data.store import EpisodeStore
from robopolicy.errors import UserError, did_you_mean

PHASES = 20  # equal parts of an episode's duration
RESAMPLES = 2000
_ENTROPY_NEIGHBOUR = 4
_MOST_STEPS = 20_000  # asked about; all steps serve as neighbours
_OUTLIER = 3.5  # modified z-score (Iglewicz and Hoaglin 1993)
_MOST_FLAGS = 12
_MEANING = {
    "action divergence": "acts differently from other episodes in similar states",
    "transition diversity": "the state changes differently after similar states and actions",
    "state entropy": "visits states that other episodes do not",
}


@dataclass(frozen=True)
class Trajectories:
    """States and actions of a dataset, in its units.

    Attributes:
        name: of the dataset, for tables.
        states, actions: (N, d) and (N, a), float64, finite.
        episodes: (N,) episode of each step, counted from 0, in order.
        action_columns, state_columns: their names.
    """

    name: str
    states: np.ndarray
    actions: np.ndarray
    episodes: np.ndarray
    state_columns: tuple[str, ...]
    action_columns: tuple[str, ...]

    @property
    def n_episodes(self) -> int:
        return int(self.episodes[-1]) + 1


@dataclass(frozen=True)
class Scale:
    """Spread of each column over all datasets that are compared; a constant column has the spread 0 and is left out.

    Attributes:
        states: (d,) from quantiles, for distances.
        actions, changes: (a,) and (d,) standard deviations of actions and of the states' changes in one step.
    """

    states: np.ndarray
    actions: np.ndarray
    changes: np.ndarray

    @classmethod
    def of(cls, datasets: Sequence[Trajectories]) -> Scale:
        changes = [d.states[1:][_goes_on(d)] - d.states[:-1][_goes_on(d)] for d in datasets]
        states, actions = (np.concatenate([getattr(d, what) for d in datasets]) for what in ("states", "actions"))
        names = datasets[0].state_columns
        return cls(
            _of_its_kind(spread(states, robust=True), names),
            _of_its_kind(spread(actions), datasets[0].action_columns),
            _of_its_kind(spread(np.concatenate(changes)), names),
        )


@dataclass(frozen=True)
class Measure:
    """One measure of a dataset.

    Attributes:
        value, low, high: over all steps, with a 95 % percentile bootstrap interval over the episodes. The neighbours
            are not drawn again, so the interval speaks of the episodes that are judged, not of those that judge.
        episodes: (E,) of each episode; NaN where it has no step to judge.
        phases: (PHASES,) over the course of an episode; NaN where no step falls.
    """

    value: float
    low: float
    high: float
    episodes: np.ndarray
    phases: np.ndarray

    def outliers(self) -> np.ndarray:
        """Episodes whose value is far above the others', the worst first (median and median absolute deviation)."""
        excess = self.episodes - np.nanmedian(self.episodes)
        deviation = np.nanmedian(np.abs(excess))
        if deviation == 0:
            return np.empty(0, dtype=np.int64)
        score = np.nan_to_num(0.6745 * excess / deviation)
        worst = np.argsort(-score, kind="stable")
        return worst[score[worst] > _OUTLIER]


@dataclass(frozen=True)
class Quality:
    """Quality of one dataset.

    Attributes:
        name, n_episodes, n_steps: of the dataset.
        measures: ``action divergence`` and ``transition diversity``, root mean squares as shares of the column's
            spread (of the action; of the state's change in one step), averaged over the columns; ``state entropy`` in
            nats, of states in units of their spread.
        neighbour_distance: median distance to the farthest neighbour used, as a share of the distance of two states
            drawn at random. From about a half on, "similar states" are not similar, and more data are needed.
        action_noise: root mean square error by action column, in the dataset's units.
        transition_noise: the same by state column; columns that never change are left out.
    """

    name: str
    n_episodes: int
    n_steps: int
    measures: Mapping[str, Measure]
    neighbour_distance: float
    action_noise: Mapping[str, float]
    transition_noise: Mapping[str, float]

    def flags(self) -> list[tuple[int, str, float, float]]:
        """Episodes that stand out: (episode, measure, its value, the median)."""
        return [
            (int(episode), name, float(measure.episodes[episode]), float(np.nanmedian(measure.episodes)))
            for name, measure in self.measures.items()
            for episode in measure.outliers()
        ]

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {
            "dataset": self.name,
            "episodes": self.n_episodes,
            "steps": self.n_steps,
            "neighbour_distance": self.neighbour_distance,
            "action_noise": dict(self.action_noise),
            "transition_noise": dict(self.transition_noise),
            "measures": {
                name: {
                    "value": m.value,
                    "interval_95": [m.low, m.high],
                    "episodes": _plain(m.episodes),
                    "phases": _plain(m.phases),
                    "outliers": m.outliers().tolist(),
                }
                for name, m in self.measures.items()
            },
        }


def assess(paths: Sequence[Path], keys: Sequence[str] = ()) -> list[Quality]:
    """Measure several datasets on one scale.

    Args:
        paths: datasets with the same columns.
        keys: state arrays that describe a situation; default: all with the role ``state``.

    Raises:
        UserError: a dataset lacks states, actions or episodes, or their columns differ.
    """
    datasets = []
    for path in paths:
        with EpisodeStore.open(path) as store:
            datasets.append(read_trajectories(store, keys))
    first = datasets[0]
    for other in datasets[1:]:
        for what in ("state_columns", "action_columns"):
            ours, theirs = getattr(first, what), getattr(other, what)
            if ours != theirs:
                raise UserError(
                    f"{other.name}: found the {what.replace('_', ' ')} {', '.join(theirs)}, but {first.name} has "
                    f"{', '.join(ours)}. Only datasets with the same columns can be compared; choose with --keys."
                )
    scale = Scale.of(datasets)
    return [measure(dataset, scale) for dataset in datasets]


def read_trajectories(store: EpisodeStore, keys: Sequence[str] = ()) -> Trajectories:
    """Read the states and actions of a dataset; ``keys`` as in `assess`.

    Raises:
        UserError: there are none, or fewer than two episodes, or values that are not finite.
    """
    arrays = store.schema.arrays
    for key in keys:
        if key not in arrays:
            raise UserError(f"{store.path}: --keys: there is no array '{key}'.{did_you_mean(key, arrays)}")
        if arrays[key].role == "image":
            raise UserError(f"{store.path}: --keys: '{key}' holds images; distances of images say little. Name states.")
    states = tuple(arrays[key] for key in keys) or store.schema.of_role("state")
    actions = store.schema.of_role("action")
    if not states or not actions:
        raise UserError(
            f"{store.path}: found {len(states)} state and {len(actions)} action arrays, wanted at least one of each. "
            "'robopolicy data show' lists the arrays; --keys chooses those that describe the state."
        )
    if store.n_episodes < 2:
        raise UserError(f"{store.path}: found {store.n_episodes} episodes; an episode is judged by the others.")
    state_values, action_values = _table(store, states), _table(store, actions)
    if not (np.isfinite(state_values).all() and np.isfinite(action_values).all()):
        raise UserError(
            f"{store.path}: states or actions hold values that are not finite. "
            f"'robopolicy data doctor {store.path}' says where."
        )
    episodes = np.repeat(np.arange(store.n_episodes), store.episode_lengths)
    return Trajectories(store.path.name, state_values, action_values, episodes, _columns(states), _columns(actions))


def measure(data: Trajectories, scale: Scale) -> Quality:
    """Estimate the quality of one dataset, see the head of this file.

    Raises:
        UserError: all states or actions are constant, or there are too few steps for the number of columns.
    """
    varies, acts, changes = scale.states > 0, scale.actions > 0, scale.changes > 0
    if not varies.any() or not acts.any():
        raise UserError(f"{data.name}: all {'actions' if varies.any() else 'states'} are the same; nothing to measure.")
    states, actions = data.states[:, varies] / scale.states[varies], data.actions[:, acts] / scale.actions[acts]
    moves = (data.states[1:, changes] - data.states[:-1, changes]) / scale.changes[changes]
    asked = _asked_steps(data.episodes)

    near, distance = other_episode_neighbours(states, data.episodes, asked, _neighbours(data, states))
    divergence = local_linear_residuals(states, actions, asked, near)
    others = len(states) - np.bincount(data.episodes)[data.episodes[asked]]
    surprise = entropy(distance[:, _ENTROPY_NEIGHBOUR - 1], others, _ENTROPY_NEIGHBOUR, states.shape[1])
    summaries = {
        "action divergence": _root_mean_square(data.episodes, asked, divergence),
        "state entropy": _summarise(data.episodes, asked, surprise, root=False),
    }
    transition_noise = {}
    if changes.any():
        going = np.flatnonzero(_goes_on(data))
        both = np.concatenate([states, actions], axis=1)[going]
        owner, wanted = data.episodes[going], np.flatnonzero(np.isin(going, asked))
        near, _ = other_episode_neighbours(both, owner, wanted, _neighbours(data, both))
        diversity = local_linear_residuals(both, moves[going], wanted, near)
        summaries["transition diversity"] = _root_mean_square(data.episodes, going[wanted], diversity)
        transition_noise = _native(diversity, scale.changes, data.state_columns)
    return Quality(
        name=data.name,
        n_episodes=data.n_episodes,
        n_steps=len(states),
        measures={name: summaries[name] for name in _MEANING if name in summaries},
        neighbour_distance=float(np.median(distance[:, -1]) / _random_distance(states)),
        action_noise=_native(divergence, scale.actions, data.action_columns),
        transition_noise=transition_noise,
    )


def spread(values: np.ndarray, *, robust: bool = False) -> np.ndarray:
    """Standard deviation of each column of (N, columns); 0 for constant columns.

    Args:
        robust: from the middle 90 %, which span 3.29 standard deviations of a normal distribution. Columns that rest
            most of the time (a gripper) take the plain deviation.
    """
    plain = values.std(axis=0)
    plain[plain <= 1e-6 * np.abs(values).max(axis=0)] = 0
    if not robust:
        return plain
    low, high = np.quantile(values, [0.05, 0.95], axis=0)
    middle = (high - low) / 3.29
    return np.where(middle > 0.1 * plain, np.minimum(middle, plain), plain)


def _of_its_kind(spreads: np.ndarray, names: Sequence[str]) -> np.ndarray:
    """Raise small spreads of a position's or rotation's entries to a tenth of the largest in the same vector.

    A block that turns about z also tilts by a thousandth of a radian, which is no property of the situation.
    """
    raised = spreads.copy()
    for endings in (("x", "y", "z"), ("r11", "r21", "r31", "r12", "r22", "r32")):
        owners = [name[: -len(end)] if (end := name.rpartition("_")[2]) in endings else None for name in names]
        for owner in {owner for owner in owners if owner is not None}:
            members = np.array([name == owner for name in owners]) & (spreads > 0)
            if members.any():
                raised[members] = np.maximum(spreads[members], 0.1 * spreads[members].max())
    return raised


def quality_table(qualities: Sequence[Quality]) -> str:
    """The measures of all datasets side by side, then the episodes that stand out."""
    from robopolicy.data.summary import table

    rows: list[Sequence[str]] = [("", *(q.name for q in qualities))]
    rows.append(("episodes", *(str(q.n_episodes) for q in qualities)))
    rows.append(("steps", *(str(q.n_steps) for q in qualities)))
    for name in _MEANING:
        if any(name in q.measures for q in qualities):
            rows.append((name, *(_interval(name, q.measures.get(name)) for q in qualities)))
    rows.append(("distance of similar states", *(f"{q.neighbour_distance:.0%}" for q in qualities)))
    lines = [table(rows), "", "shares of the columns' spread, root mean square; entropy in nats; 95 % intervals"]
    if len({q.n_steps for q in qualities}) > 1:
        lines.append("the datasets differ in size: in the larger one neighbours are closer, which lowers all shares")
    for q in qualities:
        if q.neighbour_distance > 0.5:
            lines.append(f"{q.name}: similar states are far apart; the shares mostly tell that the data are sparse")
        flags = q.flags()
        lines += ["", f"{q.name}: episodes that stand out" if flags else f"{q.name}: no episode stands out"]
        lines += [
            f"  episode {episode:4d}  {name} {_value(name, value)} (median {_value(name, median)}): {_MEANING[name]}"
            for episode, name, value, median in flags[:_MOST_FLAGS]
        ]
        if len(flags) > _MOST_FLAGS:
            lines.append(f"  ... and {len(flags) - _MOST_FLAGS} more; --json lists them all")
    return "\n".join(lines)


def _value(name: str, value: float) -> str:
    return f"{value:.2f}" if name == "state entropy" else f"{value:.1%}"


def _interval(name: str, found: Measure | None) -> str:
    if found is None:
        return "-"
    return f"{_value(name, found.value)} ({_value(name, found.low)} .. {_value(name, found.high)})"


def _table(store: EpisodeStore, specs: Sequence[ArraySpec]) -> np.ndarray:
    return np.concatenate([store.read(s.name).reshape(store.n_steps, -1).astype(np.float64) for s in specs], axis=1)


def _plain(values: np.ndarray) -> list[float | None]:
    """For JSON, which has no NaN."""
    return [None if np.isnan(value) else value for value in values.tolist()]


def _columns(specs: Sequence[ArraySpec]) -> tuple[str, ...]:
    names: list[str] = []
    for spec in specs:
        size = int(np.prod(spec.shape, dtype=np.int64))
        names += spec.columns if len(spec.columns) == size else [f"{spec.name}[{i}]" for i in range(size)]
    return tuple(names)


def _goes_on(data: Trajectories) -> np.ndarray:
    """(N - 1,) whether the step is followed by one of the same episode."""
    return np.diff(data.episodes) == 0


def _asked_steps(episodes: np.ndarray) -> np.ndarray:
    """Every step, or in a large dataset every so many steps of each episode."""
    position = np.arange(len(episodes)) - np.searchsorted(episodes, episodes)
    return np.flatnonzero(position % -(-len(episodes) // _MOST_STEPS) == 0)


def _neighbours(data: Trajectories, points: np.ndarray) -> int:
    """Enough neighbours for a regression on all columns, few enough to stay local."""
    wanted = max(20, 3 * (points.shape[1] + 1))
    available = len(points) - int(np.bincount(data.episodes).max())
    if available < max(points.shape[1] + 2, _ENTROPY_NEIGHBOUR):
        raise UserError(
            f"{data.name}: found {len(points)} steps for {points.shape[1]} columns that vary; that is too few to "
            "compare states. Record more episodes, or choose fewer arrays with --keys."
        )
    return min(wanted, available)


def _random_distance(states: np.ndarray) -> float:
    """Root mean square distance of two states drawn at random."""
    return float(np.sqrt(2 * states.var(axis=0).sum()))


def _native(residuals: np.ndarray, scale: np.ndarray, columns: Sequence[str]) -> dict[str, float]:
    noise = np.sqrt((residuals**2).mean(axis=0)) * scale[scale > 0]
    names = [name for name, s in zip(columns, scale, strict=True) if s > 0]
    return dict(zip(names, noise.tolist(), strict=True))


def _root_mean_square(episodes: np.ndarray, steps: np.ndarray, residuals: np.ndarray) -> Measure:
    return _summarise(episodes, steps, (residuals**2).mean(axis=1), root=True)


def _summarise(episodes: np.ndarray, steps: np.ndarray, values: np.ndarray, *, root: bool) -> Measure:
    """Average values of single steps over everything, over each episode and over each phase."""
    finish = np.sqrt if root else np.asarray
    owner, n = episodes[steps], int(episodes[-1]) + 1
    counts, sums = np.bincount(owner, minlength=n), np.bincount(owner, values, minlength=n)
    judged = counts > 0  # an episode of one step has no transition
    m = int(judged.sum())
    draws = np.random.default_rng(0).multinomial(m, np.full(m, 1 / m), size=RESAMPLES)
    low, high = np.quantile(finish(draws @ sums[judged] / (draws @ counts[judged])), [0.025, 0.975])
    lengths = np.bincount(episodes)
    phase = (steps - np.searchsorted(episodes, owner)) * PHASES // lengths[owner]
    in_phase, phase_sums = np.bincount(phase, minlength=PHASES), np.bincount(phase, values, minlength=PHASES)
    phases = np.divide(phase_sums, in_phase, out=np.full(PHASES, np.nan), where=in_phase > 0)
    return Measure(
        float(finish(values.mean())),
        float(low),
        float(high),
        finish(np.divide(sums, counts, out=np.full(n, np.nan), where=counts > 0)),
        finish(phases),
    )
