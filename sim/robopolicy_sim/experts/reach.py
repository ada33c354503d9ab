"""The scripted expert of Reach: around the post on the left or on the right."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np

from robopolicy_sim.control import ToolTarget
from robopolicy_sim.experts.scripted import ScriptedExpert

if TYPE_CHECKING:
    from robopolicy_sim.envs.arm_task import ArmTaskEnv

DETOUR = 0.17  # m to the side of the post, times the arm's scale
LENGTH = 0.12  # m along the post on that side, times the arm's scale


class ReachExpert(ScriptedExpert):
    """Modes: ``left`` and ``right`` of the post, as the arm sees it."""

    @classmethod
    def modes(cls, env: ArmTaskEnv) -> tuple[str, ...]:
        return ("left", "right")

    def script(self) -> Iterator[ToolTarget]:
        env = self.env
        rotation = env.tool_state().rotation
        side = 1.0 if self.mode == "left" else -1.0
        for along in (-LENGTH, LENGTH):
            waypoint = env.position("post") + np.array([along, side * DETOUR, 0.0]) * env.scale
            waypoint[2] = env.position("goal")[2]
            yield from self.move(waypoint, rotation, tolerance=0.03)
        while True:
            yield from self.move(self.aim(env.position("goal"), tolerance=0.03), rotation, tolerance=0.006)
            yield from self.wait(5)
