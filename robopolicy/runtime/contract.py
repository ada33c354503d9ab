"""The robot contract: how topics become observations and how actions become commands.

One file, ``hardware/<arm>/contract.yaml``, is read by recording, deployment, the simulated robot and
``robopolicy hardware check``, so that they cannot disagree. Joints are addressed by name, never by index.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml

from robopolicy.configuration import dataclass_from
from robopolicy.errors import UserError, did_you_mean
from robopolicy.spec import KeySpec

FORMAT_VERSION = 1
CONTRACT = "contract.yaml"

StreamType = Literal[
    "sensor_msgs/msg/JointState",
    "sensor_msgs/msg/Image",
    "sensor_msgs/msg/CompressedImage",
    "geometry_msgs/msg/PoseStamped",
    "geometry_msgs/msg/WrenchStamped",
]
CommandType = Literal[
    "trajectory_msgs/msg/JointTrajectory",
    "std_msgs/msg/Float64MultiArray",
    "sensor_msgs/msg/JointState",
    "geometry_msgs/msg/PoseStamped",
    "geometry_msgs/msg/TwistStamped",
]
IMAGES = ("sensor_msgs/msg/Image", "sensor_msgs/msg/CompressedImage")


@dataclass(frozen=True)
class Stream:
    """A topic that the robot or a sensor publishes.

    Attributes:
        topic: relative names are resolved in the node's namespace.
        type: of its messages. A ``JointState`` is any vector of named numbers with a stamp.
        rate: messages per second that are expected.
        stale_after: age of the newest message [s] after which the stream counts as silent.
        latency: seconds between the moment that is measured and the stamp.
        stamp: ``header``, or ``receive`` for drivers that do not stamp.
        reliability, depth: QoS of the subscription; best effort matches both kinds of publishers.
        size: (height, width) of images; None for vectors.
    """

    topic: str
    type: StreamType
    rate: float
    stale_after: float
    latency: float = 0.0
    stamp: Literal["header", "receive"] = "header"
    reliability: Literal["best_effort", "reliable"] = "best_effort"
    depth: int = 10
    size: tuple[int, int] | None = None

    @property
    def image(self) -> bool:
        return self.type in IMAGES


@dataclass(frozen=True)
class Part:
    """Entries of an observation key, from one stream.

    Attributes:
        stream: its name in the contract.
        align: how the stream is read at a time: ``hold`` takes the newest sample before it, ``nearest`` the nearest,
            ``interpolate`` lies between its neighbours (rotations: slerp).
        field: of a ``JointState``: ``position``, ``velocity`` or ``effort``; of a pose: ``pose`` (position, then
            6-D rotation: the first two columns of the matrix), ``position`` or ``quaternion`` (xyzw); of a wrench:
            ``wrench`` (force, torque). Empty for images.
        names: entries of a ``JointState``, in the order in which the key has them.
        scale, offset: the entry is ``scale * value + offset``: one number, or one for each entry.
        resize: (height, width) to which images are resized (mean of the covered pixels when smaller).
    """

    stream: str
    align: Literal["hold", "nearest", "interpolate"]
    field: Literal["", "position", "velocity", "effort", "pose", "quaternion", "wrench"] = ""
    names: tuple[str, ...] = ()
    scale: tuple[float, ...] = (1.0,)
    offset: tuple[float, ...] = (0.0,)
    resize: tuple[int, int] | None = None


@dataclass(frozen=True)
class ObservationKey:
    """An observation key of the policy: one image, or parts one after the other."""

    parts: tuple[Part, ...]
    unit: str = ""


@dataclass(frozen=True)
class CommandTopic:
    """Where entries of the action are sent.

    Attributes:
        topic: relative names are resolved in the node's namespace.
        type: of its messages. Trajectories are sent for every chunk, everything else at the command rate.
        entries: of the action, in the order of ``names``.
        names: joints; for poses and twists none.
        scale, offset: the action's entry is ``scale * value + offset`` of the command's value, as in `Part`.
        latency: seconds until the robot has carried a command out; commands are sent that much earlier.
        frame: ``header.frame_id`` of poses and twists.
        gripper: a gripper: rate limited, not part of the arm's trajectory.
    """

    topic: str
    type: CommandType
    entries: tuple[int, ...]
    names: tuple[str, ...] = ()
    scale: tuple[float, ...] = (1.0,)
    offset: tuple[float, ...] = (0.0,)
    latency: float = 0.0
    frame: str = ""
    gripper: bool = False


@dataclass(frozen=True)
class Action:
    """What the policy puts out.

    Attributes:
        names: of its entries: joints, or x y z r11 r21 r31 r12 r22 r32 of the tool, then e.g. the gripper's opening.
        kind: ``joint_position`` (absolute angles), ``tool_pose`` (absolute position and 6-D rotation in the base
            frame) or ``tool_twist`` (m/s, rad/s); a gripper's entries may follow.
        unit: as in the dataset.
    """

    names: tuple[str, ...]
    kind: Literal["joint_position", "tool_pose", "tool_twist"] = "joint_position"
    unit: str = ""


@dataclass(frozen=True)
class Signal:
    """A topic that may stop the robot, or let it go.

    Attributes:
        topic: relative names are resolved in the node's namespace.
        type: ``std_msgs/msg/Bool`` (true: pressed), or ``sensor_msgs/msg/Joy`` with a button.
        stale_after: seconds without a message after which it counts as lost.
        button: index of the button of a ``Joy``.
    """

    topic: str
    type: Literal["std_msgs/msg/Bool", "sensor_msgs/msg/Joy"]
    stale_after: float
    button: int = 0


@dataclass(frozen=True)
class Signals:
    """The stopping topics that the robot has; None where it has not.

    Attributes:
        estop: true stops and latches; so does silence.
        deadman: must be held while the policy runs.
    """

    estop: Signal | None = None
    deadman: Signal | None = None


@dataclass(frozen=True)
class Contract:
    """A robot as a policy sees it.

    Attributes:
        robot: name of the arm.
        policy_rate: control steps per second, the ``fps`` of datasets and policies.
        command_rate: commands per second that are computed (and sent, but for trajectories).
        joints: the arm's joints from base to hand, in radians.
        measured: the stream that tells the joints' positions (a ``JointState``).
        streams: by name.
        observations: by key.
        action: of the policy.
        commands: by name.
        signals: that stop the robot.
        reference: the stream whose newest stamp is the time of an observation; empty: the first camera, else
            ``measured``.
        intervention: topic (``JointState``, names of the action) on which a person may take over; empty: none.
        format_version: of the file.
    """

    robot: str
    policy_rate: float
    command_rate: float
    joints: tuple[str, ...]
    measured: str
    streams: dict[str, Stream]
    observations: dict[str, ObservationKey]
    action: Action
    commands: dict[str, CommandTopic]
    signals: Signals = field(default_factory=Signals)
    reference: str = ""
    intervention: str = ""
    format_version: int = FORMAT_VERSION

    def __post_init__(self) -> None:
        if self.format_version != FORMAT_VERSION:
            raise UserError(f"format_version={self.format_version}: this version of robopolicy reads {FORMAT_VERSION}.")
        if not 0 < self.policy_rate <= self.command_rate:
            raise UserError(f"policy_rate={self.policy_rate} must lie in 0 to command_rate={self.command_rate}.")
        _known(self.measured, self.streams, "measured")
        if self.streams[self.measured].type != "sensor_msgs/msg/JointState":
            raise UserError(f"measured: the stream '{self.measured}' must be a sensor_msgs/msg/JointState.")
        if self.reference:
            _known(self.reference, self.streams, "reference")
        for name, stream in self.streams.items():
            if stream.image != (stream.size is not None):
                raise UserError(f"streams.{name}.size: images have one, (height, width), and nothing else does.")
            if stream.rate <= 0 or stream.stale_after <= 0 or stream.latency < 0 or stream.depth < 1:
                raise UserError(f"streams.{name}: rate, stale_after and depth must be positive, latency not negative.")
        if shared := self.streams.keys() & self.commands.keys():
            raise UserError(f"streams and commands are both called {', '.join(sorted(shared))}; rename one.")
        for key, observation in self.observations.items():
            self._check_observation(key, observation)
        self._check_commands()

    @property
    def observation_specs(self) -> dict[str, KeySpec]:
        """What a policy is offered, by key."""
        return {key: self._key_spec(key, observation) for key, observation in self.observations.items()}

    @property
    def action_spec(self) -> KeySpec:
        return KeySpec("action", (len(self.action.names),), "action", unit=self.action.unit)

    def _check_observation(self, key: str, observation: ObservationKey) -> None:
        if not observation.parts:
            raise UserError(f"observations.{key}: wanted at least one part.")
        for i, part in enumerate(observation.parts):
            where = f"observations.{key}.parts[{i}]"
            _known(part.stream, self.streams, f"{where}.stream")
            stream = self.streams[part.stream]
            if stream.image and (len(observation.parts) > 1 or part.align == "interpolate" or part.field):
                raise UserError(f"{where}: an image is the only part of its key, has no field, is not interpolated.")
            fields = _FIELDS[stream.type]
            if part.field not in fields:
                raise UserError(f"{where}.field='{part.field}': a {stream.type} has {', '.join(fields)}.")
            if (stream.type == "sensor_msgs/msg/JointState") != bool(part.names):
                raise UserError(f"{where}.names: entries of a JointState are named, those of others are not.")
            for name in ("scale", "offset"):
                _one_or_each(getattr(part, name), part_dim(part), f"{where}.{name}")

    def _check_commands(self) -> None:
        sent: list[int] = []
        for name, command in self.commands.items():
            where = f"commands.{name}"
            for entry in command.entries:
                if not 0 <= entry < len(self.action.names):
                    raise UserError(f"{where}.entries: {entry} is none of the action's {len(self.action.names)}.")
            if command.type.startswith("geometry_msgs"):
                wanted = {"geometry_msgs/msg/PoseStamped": 9, "geometry_msgs/msg/TwistStamped": 6}[command.type]
                if len(command.entries) != wanted or command.names:
                    raise UserError(f"{where}: a {command.type} takes {wanted} entries without names.")
            elif len(command.names) != len(command.entries):
                raise UserError(f"{where}: {len(command.entries)} entries want as many names, found {command.names}.")
            for part in ("scale", "offset"):
                _one_or_each(getattr(command, part), len(command.entries), f"{where}.{part}")
            if 0 in command.scale:
                raise UserError(f"{where}.scale: 0 cannot be undone.")
            sent += command.entries
        if sorted(sent) != list(range(len(self.action.names))):
            raise UserError(
                f"commands: every entry of the action is sent once; there are {list(range(len(self.action.names)))}, "
                f"sent are {sorted(sent)}."
            )

    def _key_spec(self, key: str, observation: ObservationKey) -> KeySpec:
        first = observation.parts[0]
        stream = self.streams[first.stream]
        if stream.size is not None:
            return KeySpec(key, (*(first.resize or stream.size), 3), "image")
        return KeySpec(key, (sum(map(part_dim, observation.parts)),), "state", unit=observation.unit)


_FIELDS: dict[str, tuple[str, ...]] = {
    "sensor_msgs/msg/JointState": ("position", "velocity", "effort"),
    "sensor_msgs/msg/Image": ("",),
    "sensor_msgs/msg/CompressedImage": ("",),
    "geometry_msgs/msg/PoseStamped": ("pose", "position", "quaternion"),
    "geometry_msgs/msg/WrenchStamped": ("wrench",),
}
_DIMENSIONS = {"pose": 9, "quaternion": 4, "wrench": 6}


def part_dim(part: Part) -> int:
    """Entries of a part that is no image."""
    return len(part.names) or _DIMENSIONS.get(part.field, 3)


def read_contract(path: Path) -> Contract:
    """Read a contract.

    Args:
        path: the file, or the folder of the arm.

    Raises:
        UserError: it is not there or not a contract; the message names the entry.
    """
    file = path / CONTRACT if path.is_dir() else path
    values = read_yaml(file)
    try:
        return dataclass_from(Contract, values, "")
    except UserError as error:
        raise UserError(f"{file}: {error}") from error


def read_yaml(file: Path) -> Any:
    """The plain values of a YAML file.

    Raises:
        UserError: it is not there, or no YAML.
    """
    try:
        return yaml.safe_load(file.read_text())
    except OSError as error:
        raise UserError(f"{file} cannot be read: {error.strerror}.") from error
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise UserError(f"{file} is not valid YAML: {error}") from error


def _known(name: str, known: dict[str, Any], where: str) -> None:
    if name not in known:
        raise UserError(f"{where}: there is no stream '{name}'.{did_you_mean(name, known)}")


def _one_or_each(values: tuple[float, ...], count: int, where: str) -> None:
    if len(values) not in (1, count):
        raise UserError(f"{where}: wanted 1 or {count} numbers, found {list(values)}.")
