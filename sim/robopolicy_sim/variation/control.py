"""How the arm follows commands: stiffness and damping of its servos, latency."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from robopolicy_sim.variation.factor import Factor

if TYPE_CHECKING:
    from robopolicy_sim.envs.arm_task import ArmTaskEnv


def _servos(env: ArmTaskEnv) -> np.ndarray:
    """Actuators of the arm's joints, without the gripper's."""
    return np.array([env.model.actuator(name).id for name in env.arm.actuators])


def _scale_stiffness(env: ArmTaskEnv, scale: float) -> None:
    # A position servo's force: gain[0] * command + bias[1] * position + bias[2] * velocity.
    servos = _servos(env)
    env.model.actuator_gainprm[servos, 0] *= scale
    env.model.actuator_biasprm[servos, 1] *= scale


def _scale_damping(env: ArmTaskEnv, scale: float) -> None:
    env.model.actuator_biasprm[_servos(env), 2] *= scale


def _delay(env: ArmTaskEnv, seconds: float) -> None:
    env.action_latency = seconds


FACTORS = (
    Factor(
        "gain",
        "stiffness of the arm's servos, as a factor",
        _scale_stiffness,
        levels={"soft": 0.3, "stiff": 2.0},
        bounds=(0.05, 4.0),
        nominal=1.0,
        fields=("actuator_gainprm", "actuator_biasprm"),
    ),
    Factor(
        "damping",
        "damping of the arm's servos, as a factor",
        _scale_damping,
        levels={"lively": 0.4, "sluggish": 2.5},
        bounds=(0.1, 5.0),
        nominal=1.0,
        fields=("actuator_biasprm",),
    ),
    Factor(
        "action_latency",
        "time between a command and the moment it reaches the servos, in place of the environment's own [s]",
        _delay,
        levels={"late": 0.1},
        bounds=(0.0, 0.5),
        nominal=0.0,
        attributes=("action_latency",),
    ),
)
