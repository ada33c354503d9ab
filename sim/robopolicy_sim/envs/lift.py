"""Lift: grasp a cube and hold it above the table."""

from __future__ import annotations

import mujoco
import numpy as np

from robopolicy_sim.envs.arm_task import ArmTaskEnv
from robopolicy_sim.envs.objects import add_block, random_turn
from robopolicy_sim.experts.lift import LiftExpert

HALF_SIZE = 0.02  # m
START_EXTENT = (0.10, 0.16)  # m, half sides of the region where the cube starts
LIFTED = 0.10  # m that the cube must rise
HOLD_STEPS = 5  # control steps that it must stay there


class LiftEnv(ArmTaskEnv):
    """Lift the red cube. Success: it has been 10 cm above its start, in the gripper, for five steps."""

    instruction = "lift the red cube"
    objects = ("cube",)
    expert_class = LiftExpert

    def _furnish(self, spec: mujoco.MjSpec) -> None:
        add_block(spec, "cube", [HALF_SIZE] * 3, [0.80, 0.16, 0.14, 1])

    def _place_objects(self, rng: np.random.Generator) -> None:
        x, y = rng.uniform(-1, 1, 2) * START_EXTENT * np.array(self.scale)
        self.place("cube", [x, y, HALF_SIZE], random_turn(rng))

    def _begin(self) -> None:
        self._start_height = float(self.position("cube")[2])
        self._steps_lifted = 0
        self._was_grasped = False

    def _rise(self) -> float:
        return float(self.position("cube")[2]) - self._start_height

    def _track(self) -> None:
        grasped = self.grasped("cube")
        self._was_grasped |= grasped
        self._steps_lifted = self._steps_lifted + 1 if grasped and self._rise() > LIFTED else 0

    def _succeeded(self) -> bool:
        return self._steps_lifted >= HOLD_STEPS

    def _stages(self) -> dict[str, bool]:
        return {"grasped": self._was_grasped, "lifted": self._steps_lifted > 0}

    def _progress(self) -> float:
        """A third for reaching the cube, a third for the grasp, a third for the rise."""
        rise = np.clip(self._rise() / LIFTED, 0, 1)
        return float((self.nearness("cube") + self.grasped("cube") + rise) / 3)
