"""What a task needs to know about an arm beside its MuJoCo model, and the arms that come with the package."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import mujoco
import numpy as np

ARMS_FOLDER = Path(__file__).resolve().parent


@dataclass(frozen=True)
class Gripper:
    """The gripper of an arm: one actuator that opens and closes it.

    Attributes:
        actuator: name of the position actuator.
        closed: its control value when closed.
        open: its control value when open.
        joints: the joints it moves.
        joint_closed: position of these joints when closed [m or rad].
        joint_open: position of these joints when open [m or rad].
        stroke: distance between the finger pads when open [m].
        pads: the geoms that touch what is grasped.
    """

    actuator: str
    closed: float
    open: float
    joints: tuple[str, ...]
    joint_closed: float
    joint_open: float
    stroke: float
    pads: tuple[str, ...] = ("pad_left", "pad_right")

    def command(self, share: float) -> float:
        """Return the control value for an opening share, 0 (closed) to 1 (open); values outside are clipped."""
        return self.closed + min(max(share, 0.0), 1.0) * (self.open - self.closed)

    def share(self, joint_positions: np.ndarray) -> float:
        """Return the opening share, 0 (closed) to 1 (open), from the positions of ``joints``, shape (n_joints,)."""
        mean = float(joint_positions.sum()) / len(self.joints)
        opening = (mean - self.joint_closed) / (self.joint_open - self.joint_closed)
        return min(max(opening, 0.0), 1.0)


@dataclass(frozen=True)
class Arm:
    """An arm with a gripper, mounted upright on the table: base frame z up, x forward.

    Attributes:
        name: short name, as in environment ids.
        xml: its MJCF file, with one position actuator for each joint.
        joints: the arm's joints from base to hand.
        home: joint positions [rad] with the hand above the table, in front of the arm, pointing down.
        tcp_site: site between the finger pads; z is the approach direction, y the closing direction.
        gripper: the gripper.
        max_velocity: joint velocity limits [rad/s].
        max_acceleration: joint acceleration limits [rad/s^2].
        reach: published reach, without the gripper; of a user's arm the length from joint 2 to the TCP [m].
        base: name of the root body, whose frame is the base frame.
        camera: name of the camera on the hand; None where there is none.
        actuators: actuators of ``joints``; by default they share the joints' names.
    """

    name: str
    xml: Path
    joints: tuple[str, ...]
    home: tuple[float, ...]
    tcp_site: str
    gripper: Gripper
    max_velocity: tuple[float, ...]
    max_acceleration: tuple[float, ...]
    reach: float
    base: str = "base"
    camera: str | None = "wrist"
    actuators: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not self.actuators:
            object.__setattr__(self, "actuators", self.joints)
        for field in ("home", "max_velocity", "max_acceleration", "actuators"):
            found, wanted = len(getattr(self, field)), len(self.joints)
            if found != wanted:
                raise ValueError(f"Arm '{self.name}': {field} has {found} values, but the arm has {wanted} joints.")


PANDA = Arm(
    name="panda",
    xml=ARMS_FOLDER / "panda.xml",
    joints=tuple(f"joint{i}" for i in range(1, 8)),
    home=(0.0, -0.2324, 0.0, -2.4599, 0.0, 2.2275, math.pi / 4),
    tcp_site="tcp",
    gripper=Gripper(
        actuator="gripper",
        closed=0.0,
        open=0.04,
        joints=("finger_left", "finger_right"),
        joint_closed=0.0,
        joint_open=0.04,
        stroke=0.08,
    ),
    max_velocity=(2.175, 2.175, 2.175, 2.175, 2.61, 2.61, 2.61),
    max_acceleration=(15.0, 7.5, 10.0, 12.5, 15.0, 20.0, 20.0),
    reach=0.855,
)

UR5E = Arm(
    name="ur5e",
    xml=ARMS_FOLDER / "ur5e.xml",
    joints=tuple(f"joint{i}" for i in range(1, 7)),
    home=(-0.30073, -1.70791, 1.85095, -1.71384, -math.pi / 2, -1.87153),
    tcp_site="tcp",
    gripper=Gripper(
        actuator="gripper",
        closed=0.0,
        open=0.0425,
        joints=("finger_left", "finger_right"),
        joint_closed=0.0,
        joint_open=0.0425,
        stroke=0.085,
    ),
    max_velocity=(math.pi,) * 6,
    # The manufacturer publishes none; its ROS description plans with these.
    max_acceleration=(math.pi,) * 6,
    reach=0.85,
)

SO101 = Arm(
    name="so101",
    xml=ARMS_FOLDER / "so101.xml",
    joints=tuple(f"joint{i}" for i in range(1, 6)),
    home=(-0.00121, -0.28094, 0.77936, 1.07238, 0.04747),
    tcp_site="tcp",
    gripper=Gripper(
        actuator="gripper",
        closed=-0.174533,
        open=0.75,
        joints=("finger_jaw",),
        joint_closed=-0.174533,
        joint_open=0.75,
        stroke=0.066,
    ),
    # 45 rpm, the servo's speed without load.
    max_velocity=(4.71,) * 5,
    # Not published: about a third of what the stall torque gives the stretched arm.
    max_acceleration=(20.0,) * 5,
    reach=0.4,
)

ARMS = {arm.name: arm for arm in (PANDA, UR5E, SO101)}


def find_arm(name: str) -> Arm:
    """Return the arm of this name.

    Raises:
        ValueError: there is none.
    """
    if name not in ARMS:
        raise ValueError(f"arm='{name}' is unknown; choose one of {', '.join(ARMS)}.")
    return ARMS[name]


def arm_spec(arm: Arm) -> mujoco.MjSpec:
    """Load the arm's MJCF, to be compiled alone or attached to a scene.

    The names carry no prefix: ``scene.attach(arm_spec(arm), prefix="", frame=frame)``. Keyframes are dropped, because
    they would not fit a scene with objects; ``Arm.home`` takes their place.

    Raises:
        ValueError: MuJoCo cannot read the file.
    """
    try:
        spec = mujoco.MjSpec.from_file(str(arm.xml))
    except (ValueError, OSError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{arm.xml} is not a model that MuJoCo can read: {reason}") from error
    for key in list(spec.keys):
        spec.delete(key)
    return spec
