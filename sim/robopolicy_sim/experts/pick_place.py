"""The scripted expert of PickPlace."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np

from robopolicy_sim.control import ToolTarget
from robopolicy_sim.experts.grasping import GraspingExpert

if TYPE_CHECKING:
    from robopolicy_sim.envs.arm_task import ArmTaskEnv


class PickPlaceExpert(GraspingExpert):
    """Modes: the pair of faces that is grasped, and whether the block is set down or dropped into the bin."""

    @classmethod
    def modes(cls, env: ArmTaskEnv) -> tuple[str, ...]:
        return ("faces_a_set", "faces_b_set", "faces_a_drop", "faces_b_drop")

    def script(self) -> Iterator[ToolTarget]:
        env = self.env
        drop = self.mode.endswith("drop")
        while True:
            yield from self.pick("cube", quarter_turn="faces_b" in self.mode)
            height = 0.07 if drop else 0.03
            goal = self.aim(env.position("bin") + np.array([0, 0, height]), tolerance=0.045)
            yield from self.carry("cube", goal, clearance=0.06)
            yield from self.release()
            yield from self.wait(6)
