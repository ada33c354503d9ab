"""From a task and one or several datasets to a policy spec, fitted normalisers and loaders."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np

from robopolicy.data.loader import HeldOut, WindowLoader, dataset_key
from robopolicy.data.mixture import InTurn, MixtureDataset, MixturePart, mixture_fingerprint, rows_before, shares
from robopolicy.data.normalize import AffineNormalizer, Normalizer, fit_normalizer
from robopolicy.data.store import EpisodeStore
from robopolicy.data.windows import split_episodes
from robopolicy.errors import UserError, did_you_mean
from robopolicy.spec import KeySpec, PolicySpec, Role, TaskSpec, check_keys
from robopolicy.training.config import DataConfig, MixtureEntry, TrainConfig
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
        multitask: the policy is told the instruction of each episode; None: where there are several datasets.
        goals: observation keys of which the policy is given a value to reach; in training, that of a later step.
        goal_horizon: see `robopolicy.spec.PolicySpec`.
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
    multitask: bool | None = None
    goals: tuple[str, ...] = ()
    goal_horizon: int | None = None
    schema: dict[str, dict[str, str]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.observations:
            raise UserError("task.observations is empty; a policy needs at least one observation key.")
        if self.goal_horizon is not None and not self.goals:
            raise UserError("task.goal_horizon needs goals, e.g. task.goals=[observation.state].")
        names = [key.key for key in self.observations]
        for name in self.goals:
            if name not in names:
                raise UserError(f"task.goals: '{name}' is no observation of the task.{did_you_mean(name, names)}")


def open_datasets(task: TaskConfig, data: DataConfig) -> tuple[EpisodeStore, ...]:
    """Open the datasets with the task's overrides of their schemas."""
    stores = tuple(EpisodeStore.open(entry.path, overrides=task.schema, fps=task.fps) for entry in data.datasets)
    for store in stores:
        if store.n_episodes == 0:
            raise UserError(f"{store.path} holds no episode. Record some: robopolicy record --help")
    return stores


@dataclass(frozen=True)
class TaskEnvironment:
    """An environment to judge a policy in.

    Attributes:
        environment: its name.
        environment_options: its constructor's arguments, JSON values.
        instruction: what the policy is asked to do there; empty: what the environment says, or nothing.
    """

    environment: str
    environment_options: dict[str, Any]
    instruction: str = ""


def task_environments(
    task: TaskConfig, data: DataConfig, stores: Sequence[EpisodeStore]
) -> tuple[TaskEnvironment, ...]:
    """The environments to judge the policy in: each dataset's, with its instruction if it has only one.

    Raises:
        UserError: see `task_environment`.
    """
    found = []
    for store, entry in zip(stores, data.datasets, strict=True):
        name, options = task_environment(task, store)
        texts = set(episode_instructions(store, entry)) if is_multitask(task, data) else set()
        world = TaskEnvironment(name, options, texts.pop() if len(texts) == 1 else "")
        if name and world not in found:
            found.append(world)
    return tuple(found)


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


def is_multitask(task: TaskConfig, data: DataConfig) -> bool:
    """Whether the policy is told the instruction of each episode."""
    return len(data.datasets) > 1 if task.multitask is None else task.multitask


def episode_instructions(store: EpisodeStore, entry: MixtureEntry) -> list[str]:
    """Instruction of each episode; where it has none, the dataset's name."""
    if entry.instruction:
        return [entry.instruction] * store.n_episodes
    name = store.path.name.removesuffix(".zip").removesuffix(".zarr")
    return [text or name for text in store.tasks]


def task_spec(task: TaskConfig, stores: Sequence[EpisodeStore]) -> PolicySpec:
    """Complete the task's keys with the shapes and units of the datasets; the spec's tasks are left out.

    Raises:
        UserError: a dataset lacks an array, its rate is unknown, or it differs from the others.
    """
    first, *others = stores
    spec = _spec_of(task, first)
    for other in others:
        found = _spec_of(task, other)
        keys = {key.key: key for key in (*found.observations, found.action)}
        check_keys(keys, (*spec.observations, spec.action), f"The datasets {other.path} and {first.path}")
        if found.fps != spec.fps:
            raise UserError(
                f"{other.path}: found {found.fps:g} steps/s, wanted {spec.fps:g} as {first.path} has. Convert it, or "
                "set task.fps where what it says is wrong."
            )
    return spec


def _spec_of(task: TaskConfig, store: EpisodeStore) -> PolicySpec:
    if store.fps is None:
        raise UserError(f"{store.path} does not say its rate. Set it in the task: task.fps=10")
    observations = tuple(_complete(key, store, "state") for key in task.observations)
    return PolicySpec(
        observations=observations,
        action=_complete(task.action, store, "action"),
        fps=store.fps,
        n_obs_steps=task.n_obs_steps,
        horizon=task.horizon,
        n_action_steps=task.n_action_steps,
        goals=tuple(key for key in observations if key.key in task.goals),
        goal_horizon=task.goal_horizon,
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
    """Loaders and normalisers of one run, and the environments to judge its policy in."""

    spec: PolicySpec
    training: WindowLoader | MixtureDataset
    validation: HeldOut | None
    normalizer: Normalizer
    fingerprint: str
    environments: tuple[TaskEnvironment, ...]

    @property
    def environment(self) -> str:
        """The environment, where it is the same for all tasks; else empty."""
        return self._common[0]

    @property
    def environment_options(self) -> dict[str, Any]:
        return self._common[1]

    @property
    def _common(self) -> tuple[str, dict[str, Any]]:
        worlds = [(world.environment, world.environment_options) for world in self.environments]
        return worlds[0] if worlds and all(world == worlds[0] for world in worlds) else ("", {})

    def task_entry(self, before: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """What a bundle says about where its policy is judged; ``environments`` where it depends on the task.

        Args:
            before: the entry of the bundle that the training began with; its environments stay where their
                instructions are not among the new data's.
        """
        entry: dict[str, Any] = {"environment": self.environment, "environment_options": self.environment_options}
        found = [asdict(world) for world in self.environments]
        here = {world["instruction"] for world in found}
        kept = [world for world in (before or {}).get("environments", []) if world["instruction"] not in here]
        if len(found) + len(kept) > 1 or any(here):
            entry["environments"] = [*kept, *found]
        return entry


def prepare_data(task: TaskConfig, data: DataConfig, train: TrainConfig, processes: Processes) -> TrainingData:
    """Open the datasets, choose episodes, fit the normalisers on the training episodes."""
    stores = open_datasets(task, data)
    spec = task_spec(task, stores)
    parts, validation = [], []
    for store, entry in zip(stores, data.datasets, strict=True):
        chosen, held_out = split_episodes(store.n_episodes, data.val_ratio, data.seed, data.max_train_episodes)
        parts.append(MixturePart(store, entry.weight, chosen, episode_instructions(store, entry)))
        validation.append(held_out)
    if is_multitask(task, data):
        spec = replace(spec, tasks=_tasks(parts, data))
    elif len(parts) > 1 and data.normalize == "per_dataset":
        raise UserError(
            "task.multitask=false: a policy that is not told the instruction cannot know by which dataset's ranges to "
            "convert. Set data.normalize=together."
        )
    training = _open_training(parts, spec, data, train, processes)
    loaders = training.loaders if isinstance(training, MixtureDataset) else [training]
    return TrainingData(
        spec,
        training,
        _open_validation(parts, loaders, validation, train) if processes.main else None,
        _fit(parts, loaders, data),
        stores[0].fingerprint() if len(parts) == 1 else mixture_fingerprint(parts, bool(spec.tasks)),
        task_environments(task, data, stores),
    )


def _open_training(
    parts: Sequence[MixturePart], spec: PolicySpec, data: DataConfig, train: TrainConfig, processes: Processes
) -> WindowLoader | MixtureDataset:
    options: dict[str, Any] = {
        "batch_size": train.batch_size,
        "seed": train.seed,
        "memory_budget": None if data.memory_budget_mb is None else data.memory_budget_mb * 2**20,
        "rank": processes.rank,
        "world": processes.world,
    }
    if len(parts) > 1:
        return MixtureDataset(parts, spec, **options)
    (part,) = parts
    return WindowLoader(part.store, spec, episodes=part.episodes, instructions=part.instructions, **options)


def _open_validation(
    parts: Sequence[MixturePart], loaders: Sequence[WindowLoader], validation: Sequence[np.ndarray], train: TrainConfig
) -> HeldOut | None:
    """The held-out windows of each dataset, in the shares of training; tasks that are not trained are left out."""
    limits = rows_before(shares([part.weight for part in parts]), train.validation_windows).tolist()
    sources = []
    for part, loader, episodes, limit in zip(parts, loaders, validation, limits, strict=True):
        known = [task.instruction for task in loader.spec.tasks]
        held_out = episodes & np.isin(part.instructions, known) if known else episodes
        name, chosen = part.store.path.name, part.episodes.sum()
        log.info("%s: %d training episodes, %d windows; %d held out", name, chosen, len(loader.windows), held_out.sum())
        if not held_out.any() or not limit:
            continue
        try:
            sources.append(loader.subset(held_out, min(train.batch_size, limit), limit))
        except UserError as error:
            log.warning("no validation: the held-out episodes are too short. %s", error)
    return InTurn(sources) if sources else None


def _tasks(parts: Sequence[MixturePart], data: DataConfig) -> tuple[TaskSpec, ...]:
    """The instructions of the training episodes, in order of appearance, each with its dataset's normaliser."""
    first = parts[0].store
    if len(parts) == 1 and not any(first.tasks) and not data.datasets[0].instruction:
        raise UserError(
            f"task.multitask=true, but no episode of {first.path} has an instruction. Leave task.multitask out, or "
            "record with instructions."
        )
    apart = len(parts) > 1 and data.normalize == "per_dataset"
    domains: dict[str, int] = {}
    for i, part in enumerate(parts):
        for text in dict.fromkeys(part.instructions[e] for e in np.flatnonzero(part.episodes)):
            other = domains.setdefault(text, i if apart else 0)
            if apart and other != i:
                raise UserError(
                    f"'{text}' is an instruction in {parts[other].store.path} and in {part.store.path}, which are "
                    "normalised apart. Give one of them an instruction of its own "
                    "(data.mixture=[{path: …, instruction: …}, …]), or set data.normalize=together."
                )
    return tuple(TaskSpec(text, domain) for text, domain in domains.items())


def _fit(parts: Sequence[MixturePart], loaders: Sequence[WindowLoader], data: DataConfig) -> Normalizer:
    """Fit on the training episodes: one domain for each dataset, or one for all."""
    for role in data.normalization:
        if role not in ("state", "action"):
            raise UserError(f"data.normalization: unknown role '{role}'.{did_you_mean(role, ('state', 'action'))}")
    spec = loaders[0].spec
    steps = [_steps_of(part.episodes, part.store.episode_ends) for part in parts]
    fitted = {}
    for k in (*spec.states, spec.action):
        values = [loader.vectors(k)[chosen] for loader, chosen in zip(loaders, steps, strict=True)]
        groups = values if spec.domains > 1 else [np.concatenate(values)]
        mode: Any = data.normalization.get(k.role, "minmax")
        fitted[k.key] = AffineNormalizer.stack([fit_normalizer(group, mode, k.angles) for group in groups])
    return Normalizer.from_parts(fitted)


def _steps_of(episodes: np.ndarray, ends: np.ndarray) -> np.ndarray:
    """Mask (N,) of the steps of the chosen episodes."""
    return np.repeat(episodes, np.diff(ends, prepend=0))
