"""The scripted expert of Lift: grasp the cube by either pair of faces and lift it; try again when it slips."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np

from robopolicy_sim.control import ToolTarget
from robopolicy_sim.experts.scripted import ScriptedExpert, nearest_turn, top_down

if TYPE_CHECKING:
    from robopolicy_sim.envs.arm_task import ArmTaskEnv

HOVER = 0.10  # m above the cube


class LiftExpert(ScriptedExpert):
    """Modes: ``faces_a`` and ``faces_b``, the pair of faces that is grasped, a quarter turn apart."""

    @classmethod
    def modes(cls, env: ArmTaskEnv) -> tuple[str, ...]:
        return ("faces_a", "faces_b")

    def script(self) -> Iterator[ToolTarget]:
        yield from self.grasp_cube()
        yield from self.move(self.env.position("cube") + [0, 0, 0.25], self.env.tool_state().rotation, max_steps=40)

    def grasp_cube(self) -> Iterator[ToolTarget]:
        env = self.env
        while not env.grasped("cube"):
            yield from self.grip(1.0, steps=3 if env.opening() < 0.9 else 0)
            aimed = self.aim(env.position("cube"), tolerance=0.02)
            rotation = top_down(self._grasp_yaw())
            yield from self.move(aimed + [0, 0, HOVER], rotation, tolerance=0.015)
            yield from self.move(aimed, rotation, speed=0.6)
            yield from self.grip(0.0)
            if not env.grasped("cube"):
                state = env.tool_state()
                yield from self.grip(1.0, steps=4)
                yield from self.move(state.position + [0, 0, HOVER], state.rotation, tolerance=0.02)

    def _grasp_yaw(self) -> float:
        """The cube's heading or a quarter turn from it, the nearest to the hand's of the two half turns."""
        turned = self.env.yaw("cube") + (np.pi / 2 if self.mode == "faces_b" else 0.0)
        return nearest_turn(turned, np.pi, reference=np.pi / 4 if self.mode == "faces_b" else -np.pi / 4)
