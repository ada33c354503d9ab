"""Recording a robot: rows aligned on the policy's grid, episode by episode into our dataset, live or from a bag.

Row ``k`` belongs to the time ``t_k = t_0 + k / policy_rate``. It holds the observation at ``t_k``, read through the
policy's own `ObservationBuffer`, and the action that was commanded for ``t_k + 1 / policy_rate``. A row is made as soon
as every stream has a sample beyond ``t_k``, so its content does not depend on when it is made, and a bag with the same
messages gives the same rows.
"""

from __future__ import annotations

import json
from bisect import bisect_right
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from enum import Enum
from pathlib import Path
from typing import Any

import numpy as np

from robopolicy.data.schema import ArraySpec
from robopolicy.data.store import EpisodeStore
from robopolicy.errors import UserError
from robopolicy.runtime.clock import NS, nanoseconds
from robopolicy.runtime.commanded import CommandedMotion, Points
from robopolicy.runtime.contract import Contract, Part
from robopolicy.runtime.observation_buffer import ObservationBuffer
from robopolicy.runtime.samples import Value

SLACK = 0.05
"""Seconds that a command may wait in queues before it is seen."""

_REMEMBERED = 10 * NS  # how long commands are kept: rows wait for streams that are late
_STILL_COMMANDED = 0.5  # seconds: after a longer pause the robot may be elsewhere than where it was commanded to
_HISTORY = 0.5  # seconds of samples that are kept beyond what alignment needs: the process may stall
_POSE = ("x", "y", "z", "r11", "r21", "r31", "r12", "r22", "r32")
_NAMES = {
    "pose": _POSE,
    "position": _POSE[:3],
    "quaternion": ("qx", "qy", "qz", "qw"),
    "wrench": ("fx", "fy", "fz", "tx", "ty", "tz"),
}


class Phase(Enum):
    """What the recorder is doing."""

    IDLE = "idle"
    WAITING = "waiting for the first commands"
    RECORDING = "recording"
    STOPPED = "stopped, waiting for a word"
    NOT_STORED = "not stored, waiting for a word"


@dataclass(frozen=True)
class StoredEpisode:
    """An episode that is on the disk.

    Attributes:
        index: in the dataset.
        rows: of it.
        success: as it was labelled.
    """

    index: int
    rows: int
    success: bool


class EpisodeRecorder:
    """Turns streams and commands into episodes of a dataset.

    Times are ns of one clock; messages of a stream or topic come in the order in which they were received.

    Args:
        contract: of the robot.
        store: opened for appending by `open_recording`; the caller closes it.
        task: instruction of the episodes; may be set before each.
        behaviour: what drives, e.g. ``teleoperated`` or ``policy``.
        max_seconds: an episode stops growing after so long.

    Attributes:
        phase: what the recorder is doing.
        reason: why it stopped, or what it waits for, for a person.
        counts: refused messages and late commands, by topic and reason.
    """

    def __init__(
        self,
        contract: Contract,
        store: EpisodeStore,
        *,
        task: str = "",
        behaviour: str = "teleoperated",
        max_seconds: float = 120.0,
    ) -> None:
        self.contract, self.store = contract, store
        self.task, self.behaviour = task, behaviour
        self.buffer = ObservationBuffer(contract, n_obs_steps=max(1, round(_HISTORY * contract.policy_rate)))
        self.phase, self.reason = Phase.IDLE, ""
        self.counts: Counter[str] = Counter()
        self._max_rows = max(1, round(max_seconds * contract.policy_rate))
        self._streams = list(dict.fromkeys(p.stream for o in contract.observations.values() for p in o.parts))
        self._spoke: dict[str, int] = {}
        self._motions = {name: CommandedMotion() for name in contract.commands}
        self._driven: tuple[list[int], list[bool]] = [], []
        self._intervention = "intervention" in store.keys
        self._spoiled = False
        self._asked = self._begin = 0
        self._rows: list[dict[str, Any]] = []

    @property
    def rows(self) -> int:
        """Rows of the present episode."""
        return len(self._rows)

    def observe(self, stream: str, stamp: int, received: int, value: Value) -> str:
        """Take a message of a stream; see `ObservationBuffer.add`."""
        problem = self.buffer.add(stream, stamp, received, value)
        if problem:
            self.counts[f"{stream}: refused"] += 1
        return problem

    def command(self, name: str, received: int, points: Points) -> None:
        """Take a message on a command topic that came at ``received``."""
        if self.rows and received <= self._time(self.rows):
            self.counts[f"{name}: late"] += 1
        self._motions[name].follow(received, points)
        self._motions[name].forget(received - _REMEMBERED)
        if self.phase is Phase.WAITING and received >= self._asked:
            self._spoke.setdefault(name, received)

    def intervene(self, received: int, person: bool) -> None:
        """Take word of who drives from ``received`` on."""
        self._driven[0].append(received)
        self._driven[1].append(person)

    def start(self, now: int) -> None:
        """Begin an episode. Its first row lies where every command topic has spoken.

        Raises:
            UserError: an episode runs already, or a stream is silent.
        """
        if self.phase is not Phase.IDLE:
            raise UserError(f"An episode is {self.phase.value}. Say success, failure or discard first.")
        for name in self._streams:
            stream = self.contract.streams[name]
            age = self.buffer.age(name, now)
            if age > stream.stale_after + stream.latency:
                found = "no message has come" if np.isinf(age) else f"its newest sample is {age:.2f} s old"
                raise UserError(f"streams.{name} ({stream.topic}) is silent: {found}. Start its driver.")
        self.phase, self.reason, self._spoiled, self._asked = Phase.WAITING, "", False, now
        self._rows = []
        self._spoke = {}
        for motion in self._motions.values():
            newest = motion.newest
            if newest is not None and newest < now - nanoseconds(_STILL_COMMANDED):
                motion.clear()

    def advance(self, now: int) -> None:
        """Make the rows that are complete; call it as time passes."""
        if self.phase is Phase.WAITING:
            self._wait()
        while self.phase is Phase.RECORDING and self._complete(now):
            self._add_row()

    def finish(self, now: int, success: bool, *, rows: int | None = None) -> StoredEpisode:
        """End the episode and store it. When this returns it is on the disk.

        Args:
            now: rows that are not complete yet are left out.
            rows: store only so many of the first ones; None: all.

        Raises:
            UserError: there is none, it was spoiled and shall be a success, or it could not be stored. It is kept in
                the last two cases; try again, or `discard` it.
        """
        self.advance(now)
        if self.phase is Phase.IDLE:
            raise UserError("No episode runs. Start one first.")
        if not self._rows:
            raise UserError(f"The episode has no rows yet ({self.reason or self.phase.value}). Discard it, or wait.")
        if success and self._spoiled:
            raise UserError(f"The episode was stopped and cannot be a success: {self.reason}")
        used = self._rows[:rows]
        arrays = {name: np.stack([row[name] for row in used]) for name in used[0]}
        try:
            index = self.store.append(arrays, task=self.task, success=success, behaviour=self.behaviour)
        except OSError as error:
            self.phase = Phase.NOT_STORED
            self.reason = (
                f"{self.store.path}: the episode of {len(used)} rows could not be written: {error.strerror or error}. "
                "Earlier episodes are intact. Make room and say success or failure again, or discard it."
            )
            raise UserError(self.reason) from error
        self.discard()
        return StoredEpisode(index, len(used), success)

    def discard(self) -> None:
        """Throw the present episode away."""
        self.phase, self.reason, self._rows = Phase.IDLE, "", []

    def stop(self, reason: str, *, spoiled: bool) -> None:
        """End the episode; a spoiled one cannot become a success."""
        self.phase, self.reason, self._spoiled = Phase.STOPPED, reason, spoiled

    def _wait(self) -> None:
        silent = [command.topic for name, command in self.contract.commands.items() if name not in self._spoke]
        self.reason = f"no command has come on {', '.join(silent)}" if silent else ""
        if not silent:
            self.phase = Phase.RECORDING
            self._begin = max(self._asked, *self._spoke.values())

    def _time(self, row: int) -> int:
        return self._begin + round(row * NS / self.contract.policy_rate)

    def _complete(self, now: int) -> bool:
        time = self._time(self.rows)
        if now <= self._time(self.rows + 1) + nanoseconds(SLACK):
            return False
        for name in self._streams:
            newest_before_now = now - nanoseconds(max(self.buffer.age(name, now), 0.0))
            waited = (now - time) / NS > self.contract.streams[name].stale_after + self.contract.streams[name].latency
            if newest_before_now <= time and not waited:
                return False
        return True

    def _add_row(self) -> None:
        time, after = self._time(self.rows), self._time(self.rows + 1)
        try:
            observation = self.buffer.at(time)
        except UserError as error:
            self.stop(str(error), spoiled=True)
            return
        action = np.zeros(len(self.contract.action.names), np.float32)
        for name, motion in self._motions.items():
            topic = self.contract.commands[name]
            state = motion.at(after - nanoseconds(topic.latency)) or motion.at(after)
            assert state is not None  # every topic has spoken before t_0
            action[list(topic.entries)] = state.position
        row = {**observation, "action": action, "timestamp": np.float64((time - self._begin) / NS)}
        if self._intervention:
            row["intervention"] = np.uint8(self._person_drives(time))
        self._rows.append(row)
        if self.rows >= self._max_rows:
            self.stop(f"the episode has reached {self.rows / self.contract.policy_rate:g} s", spoiled=False)

    def _person_drives(self, time: int) -> bool:
        times, person = self._driven
        index = bisect_right(times, time) - 1
        return index >= 0 and person[index]


def open_recording(
    path: Path,
    contract: Contract,
    *,
    append: bool = False,
    intervention: bool = False,
    attributes: Mapping[str, Any] | None = None,
) -> EpisodeStore:
    """Create the dataset of a contract, or open it to go on.

    Args:
        path: a Zarr folder.
        append: add to an existing dataset.
        intervention: also store for each row whether a person drove.
        attributes: provenance of a new dataset, JSON values.

    Raises:
        UserError: it exists and ``append`` is False, or it was recorded with a contract that means something else.
    """
    specs = array_specs(contract, intervention=intervention)
    meaning = _meaning(contract)
    if not path.exists():
        provenance = {"source": "ros", "robot": contract.robot, "contract": meaning, **(attributes or {})}
        return EpisodeStore.create(path, specs, fps=contract.policy_rate, attributes=provenance)
    if not append:
        raise UserError(f"{path} exists already. Add to it with append, or choose another path.")
    store = EpisodeStore.open(path, "a")
    problems = _differences(store, specs, meaning)
    if problems:
        store.close()
        raise UserError(f"{path} does not fit the contract; choose another path.\n  " + "\n  ".join(problems))
    return store


def array_specs(contract: Contract, *, intervention: bool = False) -> tuple[ArraySpec, ...]:
    """The arrays of a contract's recording."""
    specs = []
    for key, spec in contract.observation_specs.items():
        if spec.role == "image":
            specs.append(ArraySpec(key, spec.shape, "uint8", "image"))
            continue
        names = tuple(name for part in contract.observations[key].parts for name in _part_names(part))
        specs.append(ArraySpec(key, spec.shape, "float32", "state", unit=spec.unit, names=names))
    action = contract.action
    specs.append(ArraySpec("action", (len(action.names),), "float32", "action", unit=action.unit, names=action.names))
    specs.append(ArraySpec("timestamp", (), "float64", "other", unit="s"))
    if intervention:
        specs.append(ArraySpec("intervention", (), "uint8", "other"))
    return tuple(specs)


def _part_names(part: Part) -> tuple[str, ...]:
    if part.names:
        return part.names if part.field == "position" else tuple(f"{name}_{part.field}" for name in part.names)
    return tuple(f"{part.stream}_{name}" for name in _NAMES[part.field])


def _meaning(contract: Contract) -> dict[str, Any]:
    """What rows mean, as JSON: equal shapes do not make equal meanings."""
    values = asdict(contract)
    kept: dict[str, Any] = json.loads(json.dumps({name: values[name] for name in ("observations", "action")}))
    return kept


def _differences(store: EpisodeStore, specs: tuple[ArraySpec, ...], meaning: Mapping[str, Any]) -> list[str]:
    wanted = {spec.name: (spec.shape, spec.dtype, spec.names) for spec in specs}
    found = {name: (spec.shape, spec.dtype, spec.names) for name, spec in store.schema.arrays.items()}
    problems = [
        f"{name}: found {found.get(name, 'nothing')}, wanted {wanted.get(name, 'nothing')}."
        for name in sorted(found.keys() | wanted.keys())
        if found.get(name) != wanted.get(name)
    ]
    recorded = store.schema.attributes.get("contract", meaning)
    problems += [
        f"the contract's {name}: found {recorded.get(name)}, wanted {meaning[name]}."
        for name in meaning
        if recorded.get(name) != meaning[name]
    ]
    return problems
