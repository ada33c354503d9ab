"""The scripted expert of Lift: grasp the cube by either pair of faces and lift it; try again when it slips."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from robopolicy_sim.control import ToolTarget
from robopolicy_sim.experts.grasping import GraspingExpert

if TYPE_CHECKING:
    from robopolicy_sim.envs.arm_task import ArmTaskEnv


class LiftExpert(GraspingExpert):
    """Modes: the pair of faces that is grasped, with the hand a quarter turn apart."""

    @classmethod
    def modes(cls, env: ArmTaskEnv) -> tuple[str, ...]:
        return ("faces_a", "faces_b")

    def script(self) -> Iterator[ToolTarget]:
        while True:
            yield from self.pick("cube", quarter_turn=self.mode == "faces_b")
            yield from self.rise(0.16)
