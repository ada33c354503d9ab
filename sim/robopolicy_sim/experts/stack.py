"""The scripted expert of Stack."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np

from robopolicy_sim.control import ToolTarget
from robopolicy_sim.experts.grasping import GraspingExpert

if TYPE_CHECKING:
    from robopolicy_sim.envs.arm_task import ArmTaskEnv


class StackExpert(GraspingExpert):
    """Modes: the pair of faces of the red block that is grasped. The blocks end face to face."""

    @classmethod
    def modes(cls, env: ArmTaskEnv) -> tuple[str, ...]:
        return ("faces_a", "faces_b")

    def script(self) -> Iterator[ToolTarget]:
        env = self.env
        while True:
            yield from self.pick("cube", quarter_turn=self.mode == "faces_b")
            top = env.position("base_cube") + np.array([0, 0, 0.047])
            goal = self.aim(top, tolerance=0.018)
            yield from self.carry("cube", goal, yaw=env.yaw("base_cube"))
            yield from self.release()
            yield from self.wait(6)
