"""From streams with stamps to observations: newest samples, aligned, or the reason why there is none.

The recorder and the policy read through the same `ObservationBuffer`, so that a policy sees what it was trained on.
Nothing is filled with zeros, and a sample that cannot be trusted is refused and counted.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from robopolicy.errors import UserError, did_you_mean
from robopolicy.runtime.alignment import lerp, neighbours, resize, rotation_6d, slerp
from robopolicy.runtime.clock import NS, nanoseconds
from robopolicy.runtime.contract import Contract, Part, Stream
from robopolicy.runtime.exchange import Observation
from robopolicy.runtime.samples import Joints, Pose, Value, Wrench

_JOINT_STATE = "sensor_msgs/msg/JointState"
_POSE = "geometry_msgs/msg/PoseStamped"
_TWIST = "geometry_msgs/msg/TwistStamped"
_FASTER = 2.0
"""Streams may send this many times their ``rate`` before the history gets too short."""

Column = tuple[str, str]
"""Field and name of a number that is kept of a stream, e.g. ``("position", "elbow_joint")``."""
_POSE_COLUMNS: tuple[Column, ...] = tuple(("pose", name) for name in ("x", "y", "z", "qx", "qy", "qz", "qw"))
_WRENCH_COLUMNS: tuple[Column, ...] = tuple(("wrench", name) for name in ("fx", "fy", "fz", "tx", "ty", "tz"))


@dataclass
class StreamCounts:
    """What became of the messages of a stream.

    Attributes:
        accepted: messages.
        refused: messages, by reason: ``backwards``, ``ahead``, ``kind``, ``names``, ``size``, ``values``.
        missed: messages that never came, judged by the stamps and the expected rate.
    """

    accepted: int = 0
    refused: Counter[str] = field(default_factory=Counter)
    missed: int = 0


class ObservationBuffer:
    """The newest samples of every stream of a contract, read at any moment that they cover.

    A stream's moment of measurement is its stamp without its latency. After a start, history before the first moment
    at which every stream had a sample is that moment's observation again; later a gap is a reason, not padding.
    All calls come from one thread.

    Args:
        contract: of the robot.
        n_obs_steps: of the policy.
        keys: observation keys to read; None: all.
        max_stamp_ahead: seconds that a stamp may lie in the future of its arrival.
        max_spread: seconds between the newest samples of the streams of one observation.

    Attributes:
        counts: of the messages, by stream.
        reference: the stream whose newest moment is the time of an observation: the contract's, else the first camera
            that ``keys`` read, else ``measured``.

    Raises:
        UserError: a key is not in the contract.
    """

    def __init__(
        self,
        contract: Contract,
        *,
        n_obs_steps: int = 1,
        keys: Sequence[str] | None = None,
        max_stamp_ahead: float = 0.1,
        max_spread: float = 0.2,
    ) -> None:
        for key in keys or ():
            if key not in contract.observations:
                raise UserError(f"observations: there is no '{key}'.{did_you_mean(key, contract.observations)}")
        self.contract = contract
        wanted = contract.observations if keys is None else keys
        self._keys = {key: contract.observations[key].parts for key in wanted}
        self._step = nanoseconds(1 / contract.policy_rate)
        self._steps = n_obs_steps
        self._max_ahead, self._max_spread = nanoseconds(max_stamp_ahead), max_spread
        latencies = [stream.latency for stream in contract.streams.values()]
        history = n_obs_steps / contract.policy_rate + max(latencies) + 2 * max_spread
        parts = [part for parts in self._keys.values() for part in parts]
        self._rings = {
            name: _Ring(name, stream, history + stream.stale_after, *_columns(contract, name, parts))
            for name, stream in contract.streams.items()
        }
        read = list(dict.fromkeys(part.stream for part in parts))
        cameras = [name for name in read if contract.streams[name].image]
        # a camera that is not read must not tell the time, nor be waited for
        self.reference = contract.reference or (cameras[0] if cameras else contract.measured)
        self._used = list(dict.fromkeys([self.reference, *read]))
        self._readers = {
            key: [_reader(part, self._rings[part.stream]) for part in parts] for key, parts in self._keys.items()
        }
        self.counts = {name: ring.counts for name, ring in self._rings.items()}

    def add(self, stream: str, stamp: int, received: int, value: Value) -> str:
        """Take a message.

        Args:
            stream: its name in the contract.
            stamp: of the message [ns], on the same clock as ``received``.
            received: when it came [ns].
            value: what it carries. Images are kept as they are, not copied: their memory must not be used again.

        Returns:
            Empty, or why it was refused, for a person: the stamp does not rise or lies ahead, names are missing, the
            size is another one, numbers are not finite.
        """
        ring = self._rings[stream]
        if ring.count and stamp <= ring.last_stamp:
            back = (ring.last_stamp - stamp) / NS
            return ring.refuse("backwards", f"its stamp lies {back:.3f} s before that of the message before")
        if stamp > received + self._max_ahead:
            return ring.refuse("ahead", f"its stamp lies {(stamp - received) / NS:.3f} s in the future")
        return ring.add(stamp, value)

    def age(self, stream: str, now: int) -> float:
        """Seconds since the newest sample of a stream was measured (its stamp, less the latency); inf for none."""
        ring = self._rings[stream]
        return (now - ring.newest) / NS if ring.count else math.inf

    def at(self, time: int) -> dict[str, np.ndarray]:
        """One control step.

        Args:
            time: ns. Streams whose samples after it have not come yet are read at their newest one.

        Returns:
            By key, (*shape): vectors float32, images uint8, which may be the message's own memory: do not write.

        Raises:
            UserError: a stream has no sample at that time: it has not begun, was silent, or it is too long ago.
        """
        for name in self._used:
            if problem := self._rings[name].gap(time):
                raise UserError(problem)
        return {key: self._value(key, time) for key in self._keys}

    def observation(self, now: int) -> Observation | str:
        """What the policy is given: the newest step, and those of before at its rate.

        Returns:
            The observation; or, for a person, why there is none: a stream is silent, or the newest samples of the
            streams lie too far apart.
        """
        for name in self._used:
            if problem := self._silent(name, now):
                return problem
        moments = {name: self._rings[name].newest for name in self._used}
        spread = (max(moments.values()) - min(moments.values())) / NS
        if spread > self._max_spread:
            old, new = min(moments, key=moments.__getitem__), max(moments, key=moments.__getitem__)
            return (
                f"streams.{old} was measured {spread:.3f} s before streams.{new}; at most {self._max_spread:g} s may "
                "lie between them. Check the latencies in the contract and the clocks of the drivers."
            )
        time = moments[self._used[0]]
        begin = min(time, max(self._rings[name].first for name in self._used))
        times = [max(time - k * self._step, begin) for k in range(self._steps - 1, -1, -1)]
        for name in self._used:
            for moment in times:
                if problem := self._rings[name].gap(moment):
                    return problem
        values = {key: _stacked([self._value(key, moment) for moment in times]) for key in self._keys}
        return Observation(time, values, {name: self._rings[name].last_stamp for name in self._used})

    def measured(self) -> tuple[int, np.ndarray] | None:
        """Newest moment [ns] and positions (n,) of the contract's joints; None before the first message."""
        ring = self._rings[self.contract.measured]
        if not ring.count:
            return None
        return ring.newest, ring.row(ring.count - 1)[ring.places("position", self.contract.joints)]

    def measured_action(self) -> np.ndarray | None:
        """Where the robot is, as the action (A,) that would keep it there.

        Joints and grippers are found by the names of the contract's commands among the positions of the ``measured``
        stream, else of any other ``JointState`` stream; so their drivers must use one name and one unit for what they
        tell and what they are told. Poses come from the pose stream that observations use, else from the only one,
        and must be that of the commanded frame in the base frame.

        Returns:
            None where an entry is in no stream, or its stream has not begun. A twist that keeps the robot is zero.
        """
        action = np.full(len(self.contract.action.names), np.nan)
        for command in self.contract.commands.values():
            entries = list(command.entries)
            found: np.ndarray
            if command.type == _TWIST:
                found = np.zeros(6)
            elif command.type == _POSE:
                pose = self._measured_pose()
                found = np.full(9, np.nan) if pose is None else pose
            else:
                found = np.array([self._position(name) for name in command.names])
            action[entries] = np.array(command.scale) * found + np.array(command.offset)
        return None if np.isnan(action).any() else action

    @property
    def action_streams(self) -> set[str]:
        """The streams that `measured_action` reads, as far as they have begun."""
        names = {name for command in self.contract.commands.values() for name in command.names}
        found = {ring.name for name in names if (ring := self._telling(name)) is not None}
        if any(command.type == _POSE for command in self.contract.commands.values()):
            found |= set(self._pose_streams()[:1])
        return found

    def _telling(self, name: str) -> _Ring | None:
        """The stream that tells a joint's position: the measured one, or another whose messages name it."""
        for ring in (self._rings[self.contract.measured], *self._rings.values()):
            place = ring.place.get(("position", name))
            if place is not None and ring.count and math.isfinite(float(ring.row(ring.count - 1)[place])):
                return ring
        return None

    def _pose_streams(self) -> list[str]:
        poses = [name for name, stream in self.contract.streams.items() if stream.type == _POSE]
        return [name for name in poses if name in self._used] or (poses if len(poses) == 1 else [])

    def _silent(self, name: str, now: int) -> str:
        ring = self._rings[name]
        if not ring.count:
            refused = ring.counts.refused.total()
            why = f" {refused} were refused, the last one because {ring.refusal}." if refused else ""
            return f"streams.{name} ({ring.stream.topic}): no message has come.{why}"
        age = (now - ring.last_stamp) / NS
        if age <= ring.stream.stale_after:
            return ""
        why = f" Newer ones are refused: {ring.refusal}." if ring.refused_last else ""
        return (
            f"streams.{name} ({ring.stream.topic}) is silent: its newest message is {age:.3f} s old, at most "
            f"{ring.stream.stale_after:g} s are allowed.{why}"
        )

    def _value(self, key: str, time: int) -> np.ndarray:
        readers = self._readers[key]
        if len(readers) == 1:
            return readers[0].read(time)
        return np.concatenate([reader.read(time) for reader in readers])

    def _position(self, name: str) -> float:
        ring = self._telling(name)
        return math.nan if ring is None else float(ring.row(ring.count - 1)[ring.place["position", name]])

    def _measured_pose(self) -> np.ndarray | None:
        used = self._pose_streams()
        if not used or not self._rings[used[0]].count:
            return None
        ring = self._rings[used[0]]
        row = ring.row(ring.count - 1)
        return np.concatenate([row[:3], rotation_6d(row[3:])])


class _Ring:
    """The newest samples of a stream, by number since the start: numbers in a table, or images."""

    def __init__(
        self, name: str, stream: Stream, seconds: float, required: Sequence[Column], optional: Sequence[Column]
    ) -> None:
        self.name, self.stream = name, stream
        self.columns = [*required, *optional]
        self.place = {column: i for i, column in enumerate(self.columns)}
        self.required = len(required)
        self._fields = {field_name for field_name, _ in required}
        self.capacity = math.ceil(_FASTER * seconds * stream.rate) + 4
        self.counts = StreamCounts()
        self.refusal, self.refused_last = "", False
        self.count = 0
        self.first = self.newest = self.last_stamp = 0
        self._latency = nanoseconds(stream.latency)
        self._moments = np.zeros(2 * self.capacity, np.int64)  # twice, so that the newest ones always lie in one piece
        self._rows = np.full((self.capacity, len(self.columns)), np.nan)
        self._row = np.full(len(self.columns), np.nan)  # a refused message must not overwrite the oldest row
        self._images: list[_Sample | None] = [None] * (self.capacity if stream.image else 0)
        self._names: tuple[str, ...] | None = None
        self._index: list[tuple[str, slice | np.ndarray, np.ndarray]] = []

    def add(self, stamp: int, value: Value) -> str:
        at = self.count % self.capacity
        if problem := self._keep(at, value):
            return problem
        moment = stamp - self._latency
        if self.count:
            self.counts.missed += max(round((stamp - self.last_stamp) * self.stream.rate / NS) - 1, 0)
        else:
            self.first = moment
        self._moments[at] = self._moments[at + self.capacity] = moment
        self.newest, self.last_stamp, self.refused_last = moment, stamp, False
        self.count += 1
        self.counts.accepted += 1
        return ""

    def refuse(self, reason: str, text: str) -> str:
        self.counts.refused[reason] += 1
        self.refusal, self.refused_last = text, True
        return f"A message on streams.{self.name} is refused: {text}."

    def neighbours(self, time: int, part: Part) -> tuple[int, int, float]:
        """Numbers of the samples that are read at a time, see `robopolicy.runtime.alignment.neighbours`."""
        kept = min(self.count, self.capacity)
        end = (self.count - 1) % self.capacity + 1 + (self.capacity if self.count > self.capacity else 0)
        before, after, share = neighbours(self._moments[end - kept : end], time, part.align)
        return self.count - kept + before, self.count - kept + after, share

    def gap(self, time: int) -> str:
        """Why there is no sample at a time; empty where there is."""
        if not self.count or time < self.first:
            return f"streams.{self.name} ({self.stream.topic}) had no message yet at the time of the observation."
        number, _, _ = self.neighbours(time, _HOLD)
        moment = int(self._moments[number % self.capacity])
        if moment > time:
            return (
                f"streams.{self.name}: {(moment - time) / NS:.3f} s more of its history are needed. It sends more than "
                f"{_FASTER:g} times the {self.stream.rate:g} messages per second of the contract; correct its rate."
            )
        if time - moment > self.stream.stale_after * NS:
            return (
                f"streams.{self.name} ({self.stream.topic}) was silent for {(time - moment) / NS:.3f} s; at most "
                f"{self.stream.stale_after:g} s are allowed."
            )
        return ""

    def row(self, number: int) -> np.ndarray:
        return self._rows[number % self.capacity]

    def image(self, number: int) -> _Sample:
        sample = self._images[number % self.capacity]
        assert sample is not None
        return sample

    def places(self, field: str, names: Sequence[str]) -> np.ndarray:
        """Columns (len(names),) of entries."""
        return np.array([self.place[field, name] for name in names])

    def _keep(self, at: int, value: Value) -> str:
        if self.stream.image:
            return self._keep_image(at, value)
        row = self._row
        if isinstance(value, Joints):
            problem = self._read_joints(row, value)
        elif isinstance(value, Pose) and self.stream.type == _POSE:
            problem = self._read_vectors(row, (value.position, 3), (value.quaternion, 4))
            problem = problem or self._normalise(row[3:])
        elif isinstance(value, Wrench) and self.stream.type == "geometry_msgs/msg/WrenchStamped":
            problem = self._read_vectors(row, (value.force, 3), (value.torque, 3))
        else:
            problem = self.refuse("kind", f"it is a {type(value).__name__}, wanted a {self.stream.type}")
        if problem:
            return problem
        if not np.isfinite(row[: self.required]).all():
            bad = [name for (_, name), x in zip(self.columns, row[: self.required].tolist(), strict=False) if x - x]
            return self.refuse("values", f"{', '.join(bad)}: not a finite number")
        self._rows[at] = row
        return ""

    def _keep_image(self, at: int, value: Value) -> str:
        if not isinstance(value, np.ndarray):
            return self.refuse("kind", f"it is a {type(value).__name__}, wanted an image")
        assert self.stream.size is not None
        if value.shape != (*self.stream.size, 3) or value.dtype != np.uint8:
            wanted = (*self.stream.size, 3)
            return self.refuse("size", f"it is {value.shape} of {value.dtype}, wanted {wanted} of uint8")
        self._images[at] = _Sample(value)
        return ""

    def _read_joints(self, row: np.ndarray, value: Joints) -> str:
        if self.stream.type != _JOINT_STATE:
            return self.refuse("kind", f"it is a JointState, wanted a {self.stream.type}")
        names = value.names
        if names is not self._names and names != self._names:
            if missing := [name for _, name in self.columns[: self.required] if name not in names]:
                found = ", ".join(names) or "none"
                return self.refuse("names", f"{', '.join(dict.fromkeys(missing))} is missing; found {found}")
            self._index = self._positions(names)
            self._names = names
            row[:] = np.nan
        for field_name, places, indices in self._index:
            numbers = getattr(value, field_name)
            if numbers is None and field_name not in self._fields:
                row[places] = np.nan
                continue
            if numbers is None or len(numbers) != len(names):
                found = "none" if numbers is None else str(len(numbers))
                return self.refuse("size", f"{field_name}: found {found} for {len(names)} names")
            row[places] = numbers[indices]
        return ""

    def _positions(self, names: tuple[str, ...]) -> list[tuple[str, slice | np.ndarray, np.ndarray]]:
        """By field: where entries go in a row, and where they are in a message with those names."""
        fields: dict[str, list[tuple[int, int]]] = {}
        order = {name: i for i, name in reversed(list(enumerate(names)))}
        for place, (field_name, name) in enumerate(self.columns):
            if name in order:
                fields.setdefault(field_name, []).append((place, order[name]))
        return [(name, *_as_index(pairs)) for name, pairs in fields.items()]

    def _read_vectors(self, row: np.ndarray, first: tuple[np.ndarray, int], second: tuple[np.ndarray, int]) -> str:
        for numbers, wanted in (first, second):
            if np.shape(numbers) != (wanted,):
                return self.refuse("size", f"found a vector {np.shape(numbers)}, wanted ({wanted},)")
        row[: first[1]], row[first[1] :] = first[0], second[0]
        return ""

    def _normalise(self, quaternion: np.ndarray) -> str:
        length = math.sqrt(float(quaternion @ quaternion))
        if abs(length - 1) > 0.01:  # drivers send zeros before they know the pose
            return self.refuse("values", f"its quaternion {quaternion.tolist()} is not of length 1")
        quaternion /= length
        return ""


class _Sample:
    """An image, and what it was resized to."""

    def __init__(self, image: np.ndarray) -> None:
        self._sizes = {image.shape[:2]: image}
        self._original = image

    def resized(self, size: tuple[int, int] | None) -> np.ndarray:
        if size is None:
            return self._original
        if size not in self._sizes:
            self._sizes[size] = resize(self._original, size)
        return self._sizes[size]


class _ImageReader:
    """Reads an image key."""

    def __init__(self, part: Part, ring: _Ring) -> None:
        self._part, self._ring = part, ring

    def read(self, time: int) -> np.ndarray:
        number, _, _ = self._ring.neighbours(time, self._part)
        return self._ring.image(number).resized(self._part.resize)


class _VectorReader:
    """Reads a part of numbers."""

    def __init__(self, part: Part, ring: _Ring) -> None:
        self._part, self._ring = part, ring
        self._scale, self._offset = np.array(part.scale), np.array(part.offset)
        self._plain = part.scale == (1.0,) and part.offset == (0.0,)
        self._rotates = part.field in ("pose", "quaternion")
        self._places: slice | np.ndarray = slice(None)
        if part.names:
            self._places = ring.places(part.field, part.names)
        elif part.field == "position":
            self._places = slice(0, 3)

    def read(self, time: int) -> np.ndarray:
        """(dim,) float32."""
        before, after, share = self._ring.neighbours(time, self._part)
        row = self._ring.row(before)
        value = row[self._places]
        if share:
            other = self._ring.row(after)
            value = lerp(value, other[self._places], share)
            if self._rotates:
                value[3:] = slerp(row[3:], other[3:], share)
        if self._rotates:
            rotation = value[3:]
            value = rotation if self._part.field == "quaternion" else np.concatenate([value[:3], rotation_6d(rotation)])
        if not self._plain:
            value = self._scale * value + self._offset
        return value.astype(np.float32)


_HOLD = Part("", "hold")


def _stacked(steps: Sequence[np.ndarray]) -> np.ndarray:
    """(n_obs_steps, *shape); one image is not copied."""
    return np.stack(steps) if len(steps) > 1 else steps[0][None]


def _reader(part: Part, ring: _Ring) -> _ImageReader | _VectorReader:
    return _ImageReader(part, ring) if ring.stream.image else _VectorReader(part, ring)


def _columns(contract: Contract, name: str, parts: Sequence[Part]) -> tuple[list[Column], list[Column]]:
    """Numbers that every message of a stream must have, and those that it may have."""
    stream = contract.streams[name]
    if stream.type != _JOINT_STATE:
        return list({_POSE: _POSE_COLUMNS, "geometry_msgs/msg/WrenchStamped": _WRENCH_COLUMNS}.get(stream.type, ())), []
    required: list[Column] = [(part.field, entry) for part in parts if part.stream == name for entry in part.names]
    if name == contract.measured:
        required += [("position", joint) for joint in contract.joints]
    commanded = [("position", entry) for command in contract.commands.values() for entry in command.names]
    required = list(dict.fromkeys(required))
    return required, [column for column in dict.fromkeys(commanded) if column not in required]


def _as_index(pairs: Sequence[tuple[int, int]]) -> tuple[slice | np.ndarray, np.ndarray]:
    """Places and indices of (place, index) pairs; places in one piece are a slice, which is faster."""
    places, indices = (np.array(side) for side in zip(*pairs, strict=True))
    if np.array_equal(places, np.arange(places[0], places[0] + len(places))):
        return slice(int(places[0]), int(places[0]) + len(places)), indices
    return places, indices
