"""From an operator's twist to actions of a contract: joint targets through inverse kinematics, or the twist itself."""

from __future__ import annotations

from typing import Any

import numpy as np
from scipy.spatial.transform import Rotation

from robopolicy.errors import UserError, require_extra
from robopolicy.runtime.contract import Contract
from robopolicy.teleoperation.command import Command

LEASH = 0.05  # m that the target may run ahead of the tool, so that it comes back at once from a wall
ANGULAR_LEASH = 0.3  # rad


class Operator:
    """Moves a target with the operator's twist, from where the arm is.

    Args:
        contract: of the robot. The action is ``joint_position`` of an arm that is known, or ``tool_twist``; entries
            after the arm's are the gripper's opening.
        arm: name of the arm in ``robopolicy_sim``; not needed for twists.
        period: seconds between actions.

    Raises:
        UserError: the action is of another kind, or the arm does not fit the contract.
    """

    def __init__(self, contract: Contract, arm: str, period: float) -> None:
        self._period, self._kind = period, contract.action.kind
        self._arm_entries = 6 if self._kind == "tool_twist" else len(contract.joints)
        self._gripper = len(contract.action.names) - self._arm_entries
        if self._kind == "tool_pose" or self._gripper not in (0, 1):
            raise UserError(
                f"Teleoperation gives joint_position or tool_twist with at most one gripper; the contract's action is "
                f"{self._kind} with {len(contract.action.names)} entries."
            )
        self._target: np.ndarray | None = None
        if self._kind == "joint_position":
            self._kinematics, speed = _kinematics(arm, len(contract.joints))
            self._travel = np.array(speed) * period

    def reset(self) -> None:
        """Begin anew from where the arm is measured."""
        self._target = None

    def action(self, command: Command, joints: np.ndarray | None) -> np.ndarray:
        """The action (A,) for the next period.

        Args:
            command: of the device.
            joints: (n,) measured angles [rad]; None for twists.
        """
        if self._kind == "tool_twist":
            return self._with_gripper(command.twist, command)
        assert joints is not None
        if self._target is None:
            self._target = joints.copy()
        position, rotation = self._kinematics.forward(self._target)
        at, turned = self._kinematics.forward(joints)
        step = self._period * command.twist
        ahead = position + step[:3] - at
        wanted = at + ahead * min(1.0, LEASH / max(float(np.linalg.norm(ahead)), 1e-9))
        turn = (Rotation.from_rotvec(step[3:]) * Rotation.from_matrix(rotation @ turned.T)).as_rotvec()
        turn = turn * min(1.0, ANGULAR_LEASH / max(float(np.linalg.norm(turn)), 1e-9))
        target = self._target
        if np.any(command.twist):
            solved = self._kinematics.inverse(wanted, Rotation.from_rotvec(turn).as_matrix() @ turned, target)
            target = target + np.clip(solved - target, -self._travel, self._travel)
        self._target = target
        return self._with_gripper(target, command)

    def rest(self, command: Command, joints: np.ndarray) -> np.ndarray:
        """The action (A,) that keeps the arm where it is; the gripper counts as being where the device wants it.

        Args:
            command: of the device.
            joints: (n,) measured angles [rad].
        """
        return self._with_gripper(np.zeros(6) if self._kind == "tool_twist" else joints, command)

    def _with_gripper(self, arm: np.ndarray, command: Command) -> np.ndarray:
        return np.append(arm, command.opening) if self._gripper else arm


def _kinematics(arm: str, joints: int) -> tuple[Any, tuple[float, ...]]:
    require_extra("robopolicy_sim", "sim")
    from robopolicy_sim.arms.arm import find_arm
    from robopolicy_sim.kinematics import ArmKinematics

    try:
        found = find_arm(arm)
    except ValueError as error:
        raise UserError(f"Inverse kinematics: {error}") from error
    if len(found.joints) != joints:
        raise UserError(f"arm={arm} has {len(found.joints)} joints, the contract {joints}.")
    return ArmKinematics(found), found.max_velocity
