"""The scripted expert of PegInsert: grasp the peg, turn it to fit, lower it while its pose corrects the hand."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np

from robopolicy_sim.control import ToolTarget
from robopolicy_sim.experts.grasping import HOVER, GraspingExpert
from robopolicy_sim.experts.scripted import nearest_turn, top_down
from robopolicy_sim.kinematics import rotation_error, rotation_from_vector

if TYPE_CHECKING:
    from robopolicy_sim.envs.peg_insert import PegInsertEnv

GRIP = 0.5  # of the peg's half length above its middle, where it is held
OPENED = 0.03  # m that the gripper is open beyond the peg's width
ABOVE = 0.015  # m above the hole's mouth at which the peg is turned and aligned
AIM_TOLERANCE = 0.004  # m
ALIGNED = 0.001  # m and
ALIGNED_ANGLE = 0.02  # rad that the peg may be off before it is lowered
MOST_STEPS = 60  # for aligning it
LOST = 0.015  # m that the peg may slip in the gripper
STUCK = 8  # steps without going down after which the peg is raised again


class PegInsertExpert(GraspingExpert):
    """Modes: the pair of faces that is grasped (``a``, ``b``), and the hand's heading over the hole (``0``, ``90``).

    The heading is in degrees from the hole's own. Together they settle which of its four ways round the peg goes in.
    """

    env: PegInsertEnv

    @classmethod
    def modes(cls, env: PegInsertEnv) -> tuple[str, ...]:  # type: ignore[override]
        return ("a_0", "a_90", "b_0", "b_90")

    def script(self) -> Iterator[ToolTarget]:
        env = self.env
        while True:
            yield from self.grasp_peg()
            if self._holds_peg():
                yield from self.rise(float(env.peg_above(2 * ABOVE)[2] - env.position("peg")[2]))
                rotation = rotation_from_vector(np.array([0.0, 0.0, self._fitting_yaw()]))
            while self._holds_peg():
                yield from self.insert(rotation)

    def grasp_peg(self) -> Iterator[ToolTarget]:
        """Close the gripper on the upper half of the peg."""
        env = self.env
        share = min(1.0, (2 * env.half_width + OPENED) / env.arm.gripper.stroke)
        yield from self.grip(share, steps=4)
        place = env.position("peg") + [0, 0, GRIP * env.half_length]
        rotation = top_down(self.grasp_yaw("peg", self.mode.startswith("b")))
        yield from self.move(place + [0, 0, HOVER * env.size], rotation, pads=True, tolerance=0.008)
        yield from self.move(place, rotation, pads=True, speed=0.6)
        yield from self.grip(0.0)

    def _fitting_yaw(self) -> float:
        """The peg's yaw, one of four that fit, for which the hand has the mode's heading."""
        env = self.env
        frame = env.tool_state().rotation
        heading = np.arctan2(frame[1, 0], frame[0, 0])
        hole = env.yaw("socket")
        wanted = hole + np.radians(float(self.mode.split("_")[1]))
        return nearest_turn(hole, np.pi / 2, reference=env.yaw("peg") + nearest_turn(wanted - heading, 2 * np.pi))

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
        held = env.position("peg") + GRIP * env.half_length * env.rotation("peg")[:, 2]
        return self.opening == 0 and float(np.linalg.norm(env.pads_middle() - held)) < LOST

    def _tool_for_peg(self, position: np.ndarray, rotation: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Tool pose that brings the peg, as it is held now, to a pose."""
        state = self.env.tool_state()
        turn = rotation @ self.env.rotation("peg").T
        return position + turn @ (state.position - self.env.position("peg")), turn @ state.rotation
