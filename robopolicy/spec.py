"""Observation and action specifications: the one description that dataset, environment, policy and robot share.

Shapes are those of one time step. Images are ``(height, width, 3)`` uint8 RGB; everything else is a vector ``(dim,)``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal

from robopolicy.errors import UserError, did_you_mean

Role = Literal["image", "state", "action"]


@dataclass(frozen=True)
class KeySpec:
    """One stream of observations, or the action.

    Attributes:
        key: name inside policies and environments, e.g. ``observation.state``, ``observation.image.top``, ``action``.
        shape: shape of one time step, ``(dim,)`` or ``(height, width, 3)``.
        role: ``image`` (uint8 RGB), ``state`` or ``action`` (float32).
        unit: physical unit, e.g. ``m``, ``rad``, ``px``; empty when unknown.
        rotation: how orientations in this vector are represented, e.g. ``axis_angle``, ``quaternion_xyzw``, ``6d``.
        source: array of the dataset that holds this stream; empty means that it has the same name as ``key``.
        columns: columns of the source array to use, in order; None means all.
        angles: entries of the vector (after ``columns``) that are angles in radians; policies see sine and cosine.
    """

    key: str
    shape: tuple[int, ...]
    role: Role = "state"
    unit: str = ""
    rotation: str = ""
    source: str = ""
    columns: tuple[int, ...] | None = None
    angles: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if self.role == "image" and len(self.shape) != 3:
            raise UserError(f"{self.key}: an image is (height, width, 3), found shape {self.shape}.")
        if self.role != "image" and len(self.shape) != 1:
            raise UserError(f"{self.key}: role '{self.role}' is a vector (dim,), found shape {self.shape}.")
        if any(not 0 <= i < self.shape[0] for i in self.angles):
            raise UserError(f"{self.key}: angles {self.angles} are outside the vector of {self.shape[0]} entries.")

    @property
    def array(self) -> str:
        """Name of the dataset array behind this key."""
        return self.source or self.key

    @property
    def dim(self) -> int:
        """Length of the vector (state and action keys)."""
        return self.shape[0]

    @property
    def feature_dim(self) -> int:
        """Length of the vector that a network sees: each angle counts twice (sine, cosine)."""
        return self.shape[0] + len(self.angles)


GOAL = "goal."
"""Prefix of goal keys in batches and observations: ``goal.observation.state`` is a later value of that key."""
TASK = "task"
"""Key of the index (B,) into `PolicySpec.tasks` in batches."""
INSTRUCTION = "instruction"
"""Key of the instruction, as text, in the observations of a policy with tasks."""


@dataclass(frozen=True)
class TaskSpec:
    """One task of a multi-task policy.

    Attributes:
        instruction: what the robot is asked to do, in words.
        domain: which normaliser its data uses; datasets that were normalised together share one.
    """

    instruction: str
    domain: int = 0


@dataclass(frozen=True)
class PolicySpec:
    """What a policy reads and writes.

    Attributes:
        observations: the observation keys, in the order in which encoders concatenate them.
        action: the action key.
        fps: control steps per second.
        n_obs_steps: observations of history that condition a chunk, the newest included.
        horizon: length of the predicted chunk; it starts at the oldest conditioning observation.
        n_action_steps: actions of the chunk that are executed before the next prediction.
        goals: observation keys of which a goal is given, a value to be reached later; found under ``goal.<key>``.
        goal_horizon: in training, goals lie at most this many steps after the newest observation; None: anywhere in
            the rest of the episode.
        tasks: the tasks that the policy was trained on, told apart by instruction; empty for one task.
    """

    observations: tuple[KeySpec, ...]
    action: KeySpec
    fps: float
    n_obs_steps: int = 2
    horizon: int = 16
    n_action_steps: int = 8
    goals: tuple[KeySpec, ...] = ()
    goal_horizon: int | None = None
    tasks: tuple[TaskSpec, ...] = ()

    def __post_init__(self) -> None:
        if not 1 <= self.n_obs_steps <= self.horizon:
            raise UserError(f"n_obs_steps={self.n_obs_steps} must lie in 1..horizon={self.horizon}.")
        longest = self.horizon - self.n_obs_steps + 1
        if not 1 <= self.n_action_steps <= longest:
            raise UserError(
                f"n_action_steps={self.n_action_steps} must lie in 1..{longest} "
                f"(horizon {self.horizon} - n_obs_steps {self.n_obs_steps} + 1)."
            )
        names = [k.key for k in (*self.observations, self.action)]
        if len(set(names)) != len(names):
            raise UserError(f"Keys of a policy must differ, found {names}.")
        if self.goal_horizon is not None and self.goal_horizon < 1:
            raise UserError(f"goal_horizon={self.goal_horizon} must be at least 1.")
        instructions = [task.instruction for task in self.tasks]
        if len(set(instructions)) != len(instructions):
            raise UserError(f"The instructions of a policy's tasks must differ, found {instructions}.")
        if self.tasks and {task.domain for task in self.tasks} != set(range(self.domains)):
            raise UserError(f"The domains of the tasks must be 0..{self.domains - 1} without gaps, found {self.tasks}.")

    @property
    def pad_before(self) -> int:
        return self.n_obs_steps - 1

    @property
    def pad_after(self) -> int:
        return self.n_action_steps - 1

    @property
    def images(self) -> tuple[KeySpec, ...]:
        return tuple(k for k in self.observations if k.role == "image")

    @property
    def states(self) -> tuple[KeySpec, ...]:
        return tuple(k for k in self.observations if k.role == "state")

    @property
    def domains(self) -> int:
        """Number of normalisers for each key."""
        return 1 + max((task.domain for task in self.tasks), default=0)

    @property
    def executed(self) -> slice:
        """The part of a predicted chunk that is executed: it starts at the newest observation."""
        return slice(self.n_obs_steps - 1, self.n_obs_steps - 1 + self.n_action_steps)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], where: str = "spec") -> PolicySpec:
        """Rebuild a spec from plain values (YAML, JSON).

        Raises:
            UserError: a field is missing, unknown or impossible; the message starts with ``where``.
        """
        values = checked_fields(cls, values, where)
        if not isinstance(values["observations"], (list, tuple)):
            raise UserError(f"{where}.observations: expected a list, found {values['observations']!r}.")
        observations = tuple(
            _key_from_dict(k, f"{where}.observations[{i}]") for i, k in enumerate(values.pop("observations"))
        )
        action = _key_from_dict(values.pop("action"), f"{where}.action")
        goals = tuple(_key_from_dict(k, f"{where}.goals[{i}]") for i, k in enumerate(values.pop("goals", ())))
        tasks = tuple(
            TaskSpec(**checked_fields(TaskSpec, t, f"{where}.tasks[{i}]"))
            for i, t in enumerate(values.pop("tasks", ()))
        )
        return cls(observations=observations, action=action, goals=goals, tasks=tasks, **values)


def checked_fields(kind: type, values: Any, where: str) -> dict[str, Any]:
    """Check that ``values`` is a mapping with exactly the fields that the dataclass ``kind`` knows and needs.

    Raises:
        UserError: with a did-you-mean for unknown names.
    """
    from dataclasses import MISSING

    if not isinstance(values, Mapping):
        raise UserError(f"{where}: expected a mapping, found {type(values).__name__}.")
    known = {f.name: f for f in fields(kind)}
    for name in values:
        if name not in known:
            raise UserError(f"{where}: unknown entry '{name}'.{did_you_mean(str(name), known)}")
    for name, f in known.items():
        if name not in values and f.default is MISSING and f.default_factory is MISSING:
            raise UserError(f"{where}: the entry '{name}' is missing.")
    return dict(values)


def _key_from_dict(values: Any, where: str) -> KeySpec:
    values = checked_fields(KeySpec, values, where)
    for name in ("shape", "columns", "angles"):
        if values.get(name) is not None:
            if not isinstance(values[name], (list, tuple)) or not all(isinstance(v, int) for v in values[name]):
                raise UserError(f"{where}.{name}: expected a list of integers, found {values[name]!r}.")
            values[name] = tuple(values[name])
    return KeySpec(**values)


def check_keys(found: Mapping[str, KeySpec], wanted: tuple[KeySpec, ...], who: str) -> None:
    """Compare, key by key, what a dataset, environment or robot offers with what a policy wants.

    Args:
        found: the offered keys by name.
        wanted: the keys that must be there with equal shape, role, unit and rotation; an empty unit or rotation
            on either side is not compared.
        who: names the two sides in the error, e.g. ``"policy runs/x against environment pusht"``.

    Raises:
        UserError: one line for each mismatch: found, wanted, hint.
    """
    problems = []
    for want in wanted:
        have = found.get(want.key)
        if have is None:
            problems.append(f"{want.key}: not there.{did_you_mean(want.key, found)}")
            continue
        if have.shape != want.shape:
            problems.append(f"{want.key}: found shape {have.shape}, wanted {want.shape}.")
        if have.role != want.role:
            problems.append(f"{want.key}: found role '{have.role}', wanted '{want.role}'.")
        for name in ("unit", "rotation"):
            ours, theirs = getattr(have, name), getattr(want, name)
            if ours and theirs and ours != theirs:
                problems.append(f"{want.key}: found {name} '{ours}', wanted '{theirs}'; convert before use.")
    if problems:
        raise UserError(f"{who} do not fit:\n  " + "\n  ".join(problems))
