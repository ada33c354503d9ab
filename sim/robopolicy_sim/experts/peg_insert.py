"""The scripted expert of PegInsert: grasp the peg, turn it to fit, lower it while its measured pose corrects the hand."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np

from robopolicy_sim.control import ToolTarget
from robopolicy_sim.experts.grasping import HOVER, SLIPS, GraspingExpert
from robopolicy_sim.experts.scripted import nearest_turn, top_down
from robopolicy_sim.kinematics import rotation_error, rotation_from_vector

if TYPE_CHECKING:
    from robopolicy_sim.envs.peg_insert import PegInsertEnv

GRIP = 0.022  # m above the peg's middle at which it is held
ABOVE = 0.015  # m above the hole's mouth at which the peg is turned and aligned
AIM_TOLERANCE = 0.004  # m
ALIGNED = 0.001  # m and
ALIGNED_ANGLE = 0.02  # rad that the peg may be off before it is lowered
MOST_STEPS = 60  # for aligning it
LOST = 0.015  # m that the peg may slip in the gripper
STUCK = 8  # steps without going down after which the peg is raised again


class PegInsertExpert(GraspingExpert):
    """Modes: the pair of faces that is grasped (``a``, ``b``), and whether the peg is turned ``left`` or ``right`` to fit the hole."""

    env: PegInsertEnv

    @classmethod
    def modes(cls, env: PegInsertEnv) -> tuple[str, ...]:  # type: ignore[override]
        return ("a_left", "a_right", "b_left", "b_right")

    def script(self) -> Iterator[ToolTarget]:
        env = self.env
        while True:
            yield from self.grasp_peg()
            yield from self.rise(float(env.peg_above(2 * ABOVE)[2] - env.position("peg")[2]))
            turn = (env.yaw("socket") - env.yaw("peg")) % (np.pi / 2)
            yaw = env.yaw("peg") + (turn if self.mode.endswith("left") else turn - np.pi / 2)
            while self._holds_peg():
                yield from self.insert(rotation_from_vector(np.array([0.0, 0.0, yaw])))

    def grasp_peg(self) -> Iterator[ToolTarget]:
        """Close the gripper on the upper half of the peg; try again until it holds it."""
        env = self.env
        while not env.grasped("peg"):
            yield from self.grip(1.0, steps=3 if env.opening() < 0.9 else 0)
            place = env.position("peg") + [0, 0, GRIP]
            # The hand's headings stay within a quarter turn of its home heading, also after the turn to fit.
            middle = -np.pi / 4 if self.mode.startswith("a") else np.pi / 4
            rotation = top_down(nearest_turn(env.yaw("peg"), np.pi / 2, reference=middle))
            yield from self.move(place + [0, 0, HOVER], rotation, tolerance=0.01)
            yield from self.move(place, rotation, speed=0.6)
            yield from self.grip(0.0)
            yield from self.wait(0 if env.grasped("peg") else SLIPS)

    def insert(self, rotation: np.ndarray) -> Iterator[ToolTarget]:
        """Align the held peg above the hole and lower it; when it goes no deeper, raise it again."""
        env = self.env
        missed = self.aim(np.zeros(3), tolerance=AIM_TOLERANCE)
        for _ in range(MOST_STEPS):
            above = env.peg_above(ABOVE) + missed
            off = above - env.position("peg"), rotation_error(rotation, env.rotation("peg"))
            if not self._holds_peg() or (np.linalg.norm(off[0]) < ALIGNED and np.linalg.norm(off[1]) < ALIGNED_ANGLE):
                break
            yield self.toward(*self._tool_for_peg(above, rotation), speed=0.7)
        lowest, stuck = np.inf, 0
        while stuck < STUCK and self._holds_peg():
            height = float(env.tip()[2])
            stuck = 0 if height < lowest - 5e-4 else stuck + 1
            lowest = min(lowest, height)
            # Near the rim it goes gently, so that the peg does not slip in the gripper when it lands on it.
            ahead = 0.003 if abs(height) < 0.004 else 0.012
            yield self.toward(*self._tool_for_peg(env.peg_above(height - ahead) + missed, rotation), speed=0.5)
        yield from self.rise(ABOVE)

    def _holds_peg(self) -> bool:
        """Whether the peg is where a closed gripper holds it; contact alone flickers while it is moved."""
        env = self.env
        held = env.position("peg") + GRIP * env.rotation("peg")[:, 2]
        return self.opening == 0 and float(np.linalg.norm(env.tool_state().position - held)) < LOST

    def _tool_for_peg(self, position: np.ndarray, rotation: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Tool pose that brings the peg, as it is held now, to a pose."""
        state = self.env.tool_state()
        turn = rotation @ self.env.rotation("peg").T
        return position + turn @ (state.position - self.env.position("peg")), turn @ state.rotation
