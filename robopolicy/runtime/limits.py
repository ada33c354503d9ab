"""The safety limits of a robot, ``hardware/<arm>/safety.yaml``: what no command may exceed."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from robopolicy.configuration import dataclass_from
from robopolicy.errors import UserError
from robopolicy.runtime.contract import Contract, read_yaml

SAFETY = "safety.yaml"


@dataclass(frozen=True)
class AxisLimits:
    """Limits of one entry of the action, in its unit and seconds.

    Attributes:
        lower, upper: of the position.
        velocity, acceleration, jerk: largest absolute values.
        margin: distance from ``lower`` and ``upper`` that commands keep.
    """

    lower: float
    upper: float
    velocity: float
    acceleration: float
    jerk: float
    margin: float = 0.0

    def __post_init__(self) -> None:
        if not self.lower + self.margin < self.upper - self.margin or self.margin < 0:
            raise UserError(f"lower={self.lower}, upper={self.upper}, margin={self.margin} leave no room.")
        for name in ("velocity", "acceleration", "jerk"):
            if not 0 < getattr(self, name) < math.inf:
                raise UserError(f"{name}={getattr(self, name)} must be positive.")


@dataclass(frozen=True)
class RotationLimits:
    """Largest angular velocity [rad/s] and acceleration [rad/s^2] of the tool, for Cartesian commands."""

    velocity: float
    acceleration: float


@dataclass(frozen=True)
class JointFrame:
    """One joint of the kinematic chain, as a URDF has it.

    Attributes:
        xyz, rpy: its frame in the frame of the joint before, in metres and radians (fixed-axis roll, pitch, yaw).
        axis: of the rotation, in its frame.
    """

    xyz: tuple[float, float, float]
    rpy: tuple[float, float, float]
    axis: tuple[float, float, float] = (0.0, 0.0, 1.0)


@dataclass(frozen=True)
class Kinematics:
    """The chain from the base to the tool centre point.

    Attributes:
        joints: in the contract's order.
        tool_xyz, tool_rpy: the tool centre point in the last joint's frame.
        source: where the numbers come from.
    """

    joints: tuple[JointFrame, ...]
    tool_xyz: tuple[float, float, float] = (0.0, 0.0, 0.0)
    tool_rpy: tuple[float, float, float] = (0.0, 0.0, 0.0)
    source: str = ""


@dataclass(frozen=True)
class Workspace:
    """A box in the base frame [m] that the tool centre point must not leave."""

    x: tuple[float, float]
    y: tuple[float, float]
    z: tuple[float, float]


@dataclass(frozen=True)
class Limits:
    """What no command may exceed, and how long the runtime waits before it stops.

    Attributes:
        source: where the numbers come from.
        axes: by entry of the action (the contract's ``action.names``), but for the six rotation numbers of a pose.
        rotation: of Cartesian commands; None for joint commands.
        workspace: of the tool; needs ``kinematics`` for joint commands. None: no box.
        kinematics: of the arm; None where the workspace is not checked for joint commands.
        max_start_jump: largest distance of a plan's start from the measured position, in each axis's unit.
        max_tracking_error: largest distance of the commanded from the measured position while running.
        max_chunk_age: seconds from an observation after which a chunk made from it is thrown away.
        max_open_loop: seconds that the robot may follow its plan without a new chunk; then it stops and holds.
        invalid_chunks: unusable chunks in a row that are a fault.
        policy_timeout: seconds that one inference may take; then it is a fault.
        heartbeat_timeout: seconds without a heartbeat of the inference worker; then it is a fault.
        stream_grace: a stream that is silent is not used for inference at once; after ``stream_grace`` times its
            ``stale_after`` it is a fault.
        max_stamp_ahead: seconds that a stamp may lie in the future.
        max_spread: seconds between the newest samples of the streams of one observation.
        ramp: seconds over which the policy takes over after a start or an intervention.
        format_version: of the file.
    """

    source: str
    axes: dict[str, AxisLimits]
    rotation: RotationLimits | None = None
    workspace: Workspace | None = None
    kinematics: Kinematics | None = None
    max_start_jump: float = 0.2
    max_tracking_error: float = 0.2
    max_chunk_age: float = 0.5
    max_open_loop: float = 0.5
    invalid_chunks: int = 3
    policy_timeout: float = 2.0
    heartbeat_timeout: float = 1.0
    stream_grace: float = 2.0
    max_stamp_ahead: float = 0.1
    max_spread: float = 0.2
    ramp: float = 0.5
    format_version: Literal[1] = 1
    notes: tuple[str, ...] = field(default=())


def read_limits(path: Path, contract: Contract) -> Limits:
    """Read the limits of a contract's robot.

    Args:
        path: the file, or the folder of the arm.
        contract: of the robot.

    Raises:
        UserError: it is not there, not valid, or does not fit the contract; the message names the entry.
    """
    file = path / SAFETY if path.is_dir() else path
    try:
        limits = dataclass_from(Limits, read_yaml(file), "")
        _check(limits, contract)
    except UserError as error:
        raise UserError(f"{file}: {error}") from error
    return limits


def _check(limits: Limits, contract: Contract) -> None:
    rotated = set(contract.action.names[3:9]) if contract.action.kind == "tool_pose" else set()
    wanted = [name for name in contract.action.names if name not in rotated]
    if missing := [name for name in wanted if name not in limits.axes]:
        raise UserError(f"axes: {', '.join(missing)} of the contract's action.names have no limits.")
    if extra := [name for name in limits.axes if name not in wanted]:
        raise UserError(f"axes: {', '.join(extra)} are not in the contract's action.names ({', '.join(wanted)}).")
    if rotated and limits.rotation is None:
        raise UserError("rotation: poses need limits of the rotation.")
    if limits.kinematics is not None and len(limits.kinematics.joints) != len(contract.joints):
        raise UserError(
            f"kinematics.joints: found {len(limits.kinematics.joints)}, the contract has {len(contract.joints)}."
        )
    if limits.workspace and contract.action.kind == "joint_position" and limits.kinematics is None:
        raise UserError("workspace: the tool's position is computed from joints; give kinematics, or no workspace.")
