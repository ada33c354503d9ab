"""From a task and a dataset to a policy spec, fitted normalisers and loaders."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from robopolicy.data.loader import WindowLoader, dataset_key
from robopolicy.data.normalize import Normalizer, fit_normalizer
from robopolicy.data.store import EpisodeStore
from robopolicy.data.windows import split_episodes
from robopolicy.errors import UserError, did_you_mean
from robopolicy.spec import KeySpec, PolicySpec, Role
from robopolicy.training.config import DataConfig, TrainConfig
from robopolicy.training.distributed import Processes

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class TaskKey:
    """One key of a task; what is left out is taken from the dataset. See `robopolicy.spec.KeySpec`."""

    key: str
    source: str = ""
    role: Role | None = None
    unit: str = ""
    columns: tuple[int, ...] | None = None
    angles: tuple[int, ...] = ()


@dataclass(frozen=True)
class TaskConfig:
    """What is learned, and where it is judged.

    Attributes:
        name: name of the task.
        observations: observation keys.
        action: the action key.
        n_obs_steps, horizon, n_action_steps: see `robopolicy.spec.PolicySpec`.
        fps: control steps per second; None takes the dataset's.
        environment: simulated environment for evaluation; ``dataset`` takes the one that the dataset was recorded in,
            empty when there is none.
        environment_options: its constructor's arguments, JSON values.
        schema: overrides of what the dataset says or lets infer: array name to fields (role, unit, …).
    """

    name: str
    observations: tuple[TaskKey, ...]
    action: TaskKey
    n_obs_steps: int = 2
    horizon: int = 16
    n_action_steps: int = 8
    fps: float | None = None
    environment: str = ""
    environment_options: dict[str, Any] = field(default_factory=dict)
    schema: dict[str, dict[str, str]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.observations:
            raise UserError("task.observations is empty; a policy needs at least one observation key.")


def open_dataset(task: TaskConfig, data: DataConfig) -> EpisodeStore:
    """Open the dataset with the task's overrides of its schema."""
    store = EpisodeStore.open(data.path, overrides=task.schema, fps=task.fps)
    if store.n_episodes == 0:
        raise UserError(f"{data.path} holds no episode. Record some: robopolicy record --help")
    return store


def task_environment(task: TaskConfig, store: EpisodeStore) -> tuple[str, dict[str, Any]]:
    """The environment to judge the policy in and its options; the task's options add to the recording's.

    Raises:
        UserError: the task wants the dataset's environment, and the dataset names none or several.
    """
    if task.environment != "dataset":
        return task.environment, task.environment_options
    (name, options), *others = _recorded_in(store.schema.attributes)
    if not name or any(other != (name, options) for other in others):
        what = "was recorded in several environments" if name else "does not say in which environment it was recorded"
        raise UserError(
            f"{store.path} {what}. Name the one to judge in: task.environment=lift, with task.environment_options if "
            "it has any, or task.environment='' if there is none."
        )
    return name, {**options, **task.environment_options}


def _recorded_in(attributes: Mapping[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """Environment and options of a recording, or of each that was merged; an empty name where it is not known."""
    sources = attributes.get("sources")
    if sources:
        return [world for source in sources for world in _recorded_in(source)]
    return [(str(attributes.get("env_id", "")), dict(attributes.get("environment_options", {})))]


def task_spec(task: TaskConfig, store: EpisodeStore) -> PolicySpec:
    """Complete the task's keys with the shapes and units of the dataset.

    Raises:
        UserError: the dataset lacks an array, or its rate is unknown.
    """
    if store.fps is None:
        raise UserError(f"{store.path} does not say its rate. Set it in the task: task.fps=10")
    return PolicySpec(
        observations=tuple(_complete(key, store, "state") for key in task.observations),
        action=_complete(task.action, store, "action"),
        fps=store.fps,
        n_obs_steps=task.n_obs_steps,
        horizon=task.horizon,
        n_action_steps=task.n_action_steps,
    )


def _complete(key: TaskKey, store: EpisodeStore, vector_role: Role) -> KeySpec:
    source = key.source or key.key
    if source not in store.keys:
        raise UserError(
            f"{store.path} has no array '{source}' for the task's key '{key.key}'.{did_you_mean(source, store.keys)}"
        )
    array = store.schema.arrays[source]
    role: Role = key.role or ("image" if array.role == "image" else vector_role)
    probe = KeySpec(key.key, (1,), vector_role, source=source, columns=key.columns)
    found = dataset_key(store, probe)
    return replace(found, role=role, unit=key.unit or found.unit, source=source, columns=key.columns, angles=key.angles)


@dataclass(frozen=True)
class TrainingData:
    """Loaders and normalisers of one run, and the environment to judge its policy in."""

    spec: PolicySpec
    training: WindowLoader
    validation: WindowLoader | None
    normalizer: Normalizer
    fingerprint: str
    environment: str
    environment_options: dict[str, Any]


def prepare_data(task: TaskConfig, data: DataConfig, train: TrainConfig, processes: Processes) -> TrainingData:
    """Open the dataset, choose episodes, fit the normalisers on the training episodes."""
    store = open_dataset(task, data)
    spec = task_spec(task, store)
    training, validation = split_episodes(store.n_episodes, data.val_ratio, data.seed, data.max_train_episodes)
    budget = None if data.memory_budget_mb is None else data.memory_budget_mb * 2**20
    loader = WindowLoader(
        store,
        spec,
        batch_size=train.batch_size,
        episodes=training,
        seed=train.seed,
        memory_budget=budget,
        rank=processes.rank,
        world=processes.world,
    )
    held_out = None
    if validation.any() and processes.main:
        held_out = _held_out(loader, validation, train)
    log.info("%d training episodes, %d windows; %d held out", training.sum(), len(loader.windows), validation.sum())
    steps = _steps_of(training, store.episode_ends)
    normalizer = _fit(loader, spec, data, steps)
    return TrainingData(spec, loader, held_out, normalizer, store.fingerprint(), *task_environment(task, store))


def _held_out(loader: WindowLoader, validation: np.ndarray, train: TrainConfig) -> WindowLoader | None:
    limit = train.validation_windows
    try:
        return loader.subset(validation, min(train.batch_size, limit), limit)
    except UserError as error:
        log.warning("no validation: the held-out episodes are too short. %s", error)
        return None


def _fit(loader: WindowLoader, spec: PolicySpec, data: DataConfig, steps: np.ndarray) -> Normalizer:
    for role in data.normalization:
        if role not in ("state", "action"):
            raise UserError(f"data.normalization: unknown role '{role}'.{did_you_mean(role, ('state', 'action'))}")
    keys = (*spec.states, spec.action)
    return Normalizer.from_parts(
        {
            k.key: fit_normalizer(loader.vectors(k)[steps], data.normalization.get(k.role, "minmax"), k.angles)  # type: ignore[arg-type]
            for k in keys
        }
    )


def _steps_of(episodes: np.ndarray, ends: np.ndarray) -> np.ndarray:
    """Mask (N,) of the steps of the chosen episodes."""
    return np.repeat(episodes, np.diff(ends, prepend=0))
