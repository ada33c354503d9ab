"""What an action means: tool poses, tool displacements or joint angles, turned into joint targets of the servos."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import numpy as np
from gymnasium import spaces

from robopolicy_sim.arms.arm import Arm
from robopolicy_sim.kinematics import (
    ArmKinematics,
    from_rotation_6d,
    rotation_error,
    rotation_from_vector,
    to_rotation_6d,
)

MAX_TRANSLATION = 0.6  # m/s that one displacement may ask for
MAX_ROTATION = 3.0  # rad/s
LEASH = 0.15  # m that an accumulated target may run ahead of the tool


@dataclass(frozen=True)
class ToolTarget:
    """Where the tool should be, in the arm's base frame, and how far the gripper should be open.

    Attributes:
        position: (3,) TCP in metres.
        rotation: (3, 3).
        opening: share of the gripper's stroke, 0 closed to 1 open.
    """

    position: np.ndarray
    rotation: np.ndarray
    opening: float


@dataclass(frozen=True)
class ArmState:
    """What is measured: joint angles (n,) in radians, TCP position (3,) and rotation (3, 3) in one frame."""

    joints: np.ndarray
    position: np.ndarray
    rotation: np.ndarray


@dataclass(frozen=True)
class JointTarget:
    """Set points of the servos: joint angles (n,) in radians and the gripper's opening share."""

    joints: np.ndarray
    opening: float


class Controller(ABC):
    """One action space of an arm.

    Attributes:
        action_space: bounds of the action.
        names, unit: of its entries.
    """

    action_space: spaces.Box
    names: tuple[str, ...]
    unit: str

    def __init__(self, arm: Arm, kinematics: ArmKinematics, period: float) -> None:
        self.kinematics = kinematics
        self._max_travel = np.array(arm.max_velocity) * period
        self._period = period
        self._target = JointTarget(np.array(arm.home), 1.0)

    def reset(self, target: JointTarget) -> None:
        """Begin an episode with the servos holding ``target``."""
        self._target = target

    def step(self, action: np.ndarray, state: ArmState) -> JointTarget:
        """Turn an action into the servos' set points for the end of the control period, within the speed limits."""
        wanted = self._decode(action, state)
        travel = wanted.joints - self._target.joints
        travel = np.minimum(np.maximum(travel, -self._max_travel), self._max_travel)
        self._target = JointTarget(self._target.joints + travel, min(max(float(wanted.opening), 0.0), 1.0))
        return self._target

    @abstractmethod
    def _decode(self, action: np.ndarray, state: ArmState) -> JointTarget: ...

    @abstractmethod
    def encode(self, target: ToolTarget, state: ArmState) -> np.ndarray:
        """The action, float32, that asks for ``target``; displacements are cut to their limits."""

    def _solve(self, position: np.ndarray, rotation: np.ndarray) -> np.ndarray:
        return self.kinematics.inverse(position, rotation, self._target.joints)


class ToolPose(Controller):
    """Absolute TCP pose: position (3) in metres, 6-D rotation (6), opening (1).

    Where the six numbers are no rotation (zero or parallel columns, as a policy may put out), the tool keeps its own.
    """

    names = ("x", "y", "z", "r11", "r21", "r31", "r12", "r22", "r32", "opening")
    unit = "m; 6-D rotation; share"

    def __init__(self, arm: Arm, kinematics: ArmKinematics, period: float) -> None:
        super().__init__(arm, kinematics, period)
        low = np.array([*[-arm.reach] * 2, -0.2, *[-1.0] * 6, 0.0], np.float32)
        high = np.array([*[arm.reach] * 2, 1.4 * arm.reach, *[1.0] * 6, 1.0], np.float32)
        self.action_space = spaces.Box(low, high)

    def _decode(self, action: np.ndarray, state: ArmState) -> JointTarget:
        try:
            rotation = from_rotation_6d(action[3:9])
        except ValueError:
            rotation = state.rotation
        return JointTarget(self._solve(action[:3], rotation), action[9])

    def encode(self, target: ToolTarget, state: ArmState) -> np.ndarray:
        pose = np.concatenate([target.position, to_rotation_6d(target.rotation), [target.opening]])
        return pose.astype(np.float32)


class ToolDelta(Controller):
    """TCP displacement in the base frame: translation (3) in metres, rotation vector (3) in radians, opening (1).

    Relative to the measured pose (``from_target=False``; SIMPLER's Google robot) or to the last target
    (``from_target=True``; SIMPLER's WidowX), which does not drift while the arm lags behind.
    """

    names = ("dx", "dy", "dz", "rx", "ry", "rz", "opening")
    unit = "m; rad; share"

    def __init__(self, arm: Arm, kinematics: ArmKinematics, period: float, *, from_target: bool) -> None:
        super().__init__(arm, kinematics, period)
        high = np.repeat(np.array([MAX_TRANSLATION, MAX_ROTATION], np.float32) * np.float32(period), 3)
        self.action_space = spaces.Box(np.append(-high, np.float32(0)), np.append(high, np.float32(1)))
        self._from_target = from_target
        self._pose: tuple[np.ndarray, np.ndarray] | None = None

    def reset(self, target: JointTarget) -> None:
        super().reset(target)
        self._pose = self.kinematics.forward(target.joints)

    def _origin(self, state: ArmState) -> tuple[np.ndarray, np.ndarray]:
        return self._pose if self._from_target and self._pose else (state.position, state.rotation)

    def _decode(self, action: np.ndarray, state: ArmState) -> JointTarget:
        action = np.clip(action, self.action_space.low, self.action_space.high).astype(np.float64)
        position, rotation = self._origin(state)
        position = position + action[:3]
        ahead = position - state.position
        position = state.position + ahead * min(1.0, LEASH / max(float(np.linalg.norm(ahead)), 1e-9))
        self._pose = position, rotation_from_vector(action[3:6]) @ rotation
        return JointTarget(self._solve(*self._pose), action[6])

    def encode(self, target: ToolTarget, state: ArmState) -> np.ndarray:
        position, rotation = self._origin(state)
        delta = np.concatenate(
            [target.position - position, rotation_error(target.rotation, rotation), [target.opening]]
        )
        # Scaled as a whole, so that the direction stays.
        for part in (slice(0, 3), slice(3, 6)):
            delta[part] /= max(1.0, float(np.abs(delta[part] / self.action_space.high[part]).max()))
        return delta.astype(np.float32)


class JointPosition(Controller):
    """Absolute joint angles (n) in radians, opening (1)."""

    unit = "rad; share"

    def __init__(self, arm: Arm, kinematics: ArmKinematics, period: float) -> None:
        super().__init__(arm, kinematics, period)
        low, high = kinematics.limits
        self.action_space = spaces.Box(np.array([*low, 0], np.float32), np.array([*high, 1], np.float32))
        self.names = (*arm.joints, "opening")

    def _decode(self, action: np.ndarray, state: ArmState) -> JointTarget:
        action = np.clip(action, self.action_space.low, self.action_space.high)
        return JointTarget(action[:-1].astype(np.float64), float(action[-1]))

    def encode(self, target: ToolTarget, state: ArmState) -> np.ndarray:
        return np.append(self._solve(target.position, target.rotation), target.opening).astype(np.float32)


CONTROLS = ("ee_pose", "ee_delta_current", "ee_delta_target", "joint_position")


def make_controller(control: str, arm: Arm, kinematics: ArmKinematics, period: float) -> Controller:
    """The controller called ``control`` for a control period in seconds.

    Raises:
        ValueError: the name is unknown.
    """
    if control == "ee_pose":
        return ToolPose(arm, kinematics, period)
    if control in ("ee_delta_current", "ee_delta_target"):
        return ToolDelta(arm, kinematics, period, from_target=control == "ee_delta_target")
    if control == "joint_position":
        return JointPosition(arm, kinematics, period)
    raise ValueError(f"control='{control}' is unknown; choose one of {', '.join(CONTROLS)}.")
