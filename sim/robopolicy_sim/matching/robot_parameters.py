"""How an arm follows commands: the parameters that system identification finds and that arm tasks accept."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import mujoco
import numpy as np

from robopolicy_sim.arms.arm import Arm

PER_JOINT = ("stiffness", "damping", "friction")


@dataclass(frozen=True)
class RobotParameters:
    """Servo and joint parameters of an arm; None leaves the model's own value.

    Joint j is driven by stiffness_j (target_j - q_j) - damping_j dq_j/dt, within its torque limit, against Coulomb
    friction friction_j. Viscous friction of a joint acts like damping and is part of it.

    Attributes:
        stiffness: of the arm's servos [N m/rad], one for each joint.
        damping: of the arm's servos [N m s/rad].
        friction: Coulomb friction of the arm's joints [N m].
        action_latency: seconds between a command and the moment it reaches the servos.
        gripper_damping: viscous friction of each of the gripper's joints [N s/m or N m s/rad]; it sets its speed.
    """

    stiffness: tuple[float, ...] | None = None
    damping: tuple[float, ...] | None = None
    friction: tuple[float, ...] | None = None
    action_latency: float | None = None
    gripper_damping: float | None = None

    @classmethod
    def from_json(cls, option: Mapping[str, Any], arm: Arm) -> RobotParameters:
        """Read the option ``robot_parameters`` of an arm task.

        Args:
            option: values by name of the attribute, or ``{"file": path}`` of what ``robopolicy identify`` wrote.
            arm: that they are for.

        Raises:
            ValueError: a key is unknown, a list does not fit the arm, a value is impossible, or the file is none.
        """
        if "file" in option:
            option = _read_file(option, arm)
        known = [field.name for field in fields(cls)]
        unknown = [key for key in option if key not in known]
        if unknown:
            raise ValueError(f"robot_parameters: '{unknown[0]}' is unknown; it has {', '.join(known)}.")
        values: dict[str, Any] = {}
        for key, value in option.items():
            if value is None:
                continue
            count = len(arm.joints) if key in PER_JOINT else 1
            numbers = _numbers(key, value, count, arm)
            if numbers.min() < 0 or (numbers.min() == 0 and key in ("stiffness", "damping")):
                raise ValueError(f"robot_parameters: {key} is {value}; it cannot be negative, gains cannot be zero.")
            values[key] = tuple(numbers.tolist()) if key in PER_JOINT else float(numbers[0])
        return cls(**values)

    def to_json(self) -> dict[str, Any]:
        """The option ``robot_parameters``, without what is None."""
        values = {key: value for key, value in asdict(self).items() if value is not None}
        return {key: list(value) if key in PER_JOINT else value for key, value in values.items()}

    @classmethod
    def of_model(cls, model: mujoco.MjModel, arm: Arm, action_latency: float = 0.0) -> RobotParameters:
        """What a model has."""
        servos, dofs, gripper = _addresses(model, arm)
        return cls(
            stiffness=tuple(model.actuator_gainprm[servos, 0].tolist()),
            damping=tuple((-model.actuator_biasprm[servos, 2]).tolist()),
            friction=tuple(model.dof_frictionloss[dofs].tolist()),
            action_latency=action_latency,
            gripper_damping=float(model.dof_damping[gripper].mean()),
        )

    def apply(self, model: mujoco.MjModel, arm: Arm) -> None:
        """Write all but the latency, which is the environment's, into a model."""
        servos, dofs, gripper = _addresses(model, arm)
        if self.stiffness is not None:
            model.actuator_gainprm[servos, 0] = self.stiffness
            model.actuator_biasprm[servos, 1] = -np.array(self.stiffness)
        if self.damping is not None:
            model.actuator_biasprm[servos, 2] = -np.array(self.damping)
        if self.friction is not None:
            model.dof_frictionloss[dofs] = self.friction
        if self.gripper_damping is not None:
            model.dof_damping[gripper] = self.gripper_damping


def _read_file(option: Mapping[str, Any], arm: Arm) -> Mapping[str, Any]:
    path = option["file"]
    if len(option) > 1:
        raise ValueError("robot_parameters: give either 'file' or values, not both.")
    try:
        content = json.loads(Path(path).read_text())
        found, parameters = content["arm"], content["robot_parameters"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"robot_parameters: {path} is no result of 'robopolicy identify' ({type(error).__name__}: {error})."
        ) from error
    if found != arm.name:
        raise ValueError(f"robot_parameters: {path} is about the arm '{found}', but this is '{arm.name}'.")
    return parameters


def _addresses(model: mujoco.MjModel, arm: Arm) -> tuple[list[int], list[int], list[int]]:
    """Actuators of the arm, its degrees of freedom, those of the gripper."""
    servos = [model.actuator(name).id for name in arm.actuators]
    dofs = [model.joint(name).dofadr[0] for name in arm.joints]
    return servos, dofs, [model.joint(name).dofadr[0] for name in arm.gripper.joints]


def _numbers(key: str, value: Any, count: int, arm: Arm) -> np.ndarray:
    try:
        numbers = np.atleast_1d(np.asarray(value, dtype=np.float64))
    except (TypeError, ValueError):
        numbers = np.empty(0)
    if numbers.shape != (count,) or not np.isfinite(numbers).all():
        wanted = f"{count} finite numbers, one for each joint of '{arm.name}'" if key in PER_JOINT else "a number"
        raise ValueError(f"robot_parameters: {key} is {value!r}, wanted {wanted}.")
    return numbers
