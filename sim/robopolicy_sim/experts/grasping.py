"""Picking blocks up and setting them down, closed over what the gripper holds."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from robopolicy_sim.control import ToolTarget
from robopolicy_sim.experts.scripted import ScriptedExpert, nearest_turn, top_down

HOVER = 0.09  # m above a block before and after it is grasped
SLIPS = 4  # steps without contact after which a block counts as lost
# Of the hand, without and with the quarter turn; all arms reach 45 degrees to either side of them.
HEADINGS = (np.radians(20.0), np.radians(110.0))
AT_REST = 0.05  # m/s
GRASP_TOLERANCE = 0.02  # m that a grasp of a block may be off


class GraspingExpert(ScriptedExpert):
    """A scripted expert that handles blocks from above."""

    def pick(self, body: str, *, quarter_turn: bool = False) -> Iterator[ToolTarget]:
        """Grasp a block by one pair of its faces, or by the other one; try again until the gripper holds it."""
        env = self.env
        while True:
            if env.opening() < 0.9 and not env.grasped(body):
                yield from self.wait(SLIPS)  # contacts flicker
            if env.grasped(body):
                return
            yield from self.grip(1.0, steps=3 if env.opening() < 0.9 else 0)
            while env.speed(body) > AT_REST:
                yield from self.wait(1)
            aimed = self.aim(env.position(body), tolerance=GRASP_TOLERANCE)
            rotation = top_down(self.grasp_yaw(body, quarter_turn))
            yield from self.move(aimed + [0, 0, HOVER], rotation, tolerance=0.015)
            yield from self.move(aimed, rotation, speed=0.6, max_steps=60)  # a finger may have landed on the block
            yield from self.grip(0.0)
            yield from self.wait(0 if env.grasped(body) else SLIPS)
            if not env.grasped(body):
                yield from self.grip(1.0, steps=4)
                yield from self.rise(HOVER)

    def rise(self, height: float) -> Iterator[ToolTarget]:
        """Move the tool straight up by ``height`` metres."""
        state = self.env.tool_state()
        yield from self.move(state.position + [0, 0, height], state.rotation, tolerance=0.02, max_steps=40)

    def carry(
        self, body: str, goal: np.ndarray, *, clearance: float = HOVER, yaw: float | None = None
    ) -> Iterator[ToolTarget]:
        """Bring a held block to ``goal`` (3,) from above; ends early when the block is lost.

        Args:
            clearance: height in metres at which it travels and arrives above the goal.
            yaw: heading that the block shall have in the end, up to quarter turns; None leaves the hand's.
        """
        env = self.env
        state = env.tool_state()
        offset = state.position - env.position(body)
        rotation = state.rotation
        if yaw is not None:
            hand = float(np.arctan2(rotation[1, 0], rotation[0, 0]))
            reference = float(np.clip(hand, *HEADINGS))
            rotation = top_down(nearest_turn(hand + yaw - env.yaw(body), np.pi / 2, reference))
        above = goal + offset + [0, 0, clearance]
        lifted = np.array([state.position[0], state.position[1], above[2]])
        for waypoint, turned, tolerance in (
            (lifted, state.rotation, 0.02),
            (above, rotation, 0.006),
            (goal + offset, rotation, 0.004),
        ):
            slips = 0
            for target in self.move(waypoint, turned, tolerance=tolerance, speed=1.0 if waypoint is above else 0.6):
                slips = 0 if env.grasped(body) else slips + 1
                if slips == SLIPS:
                    return
                yield target

    def release(self) -> Iterator[ToolTarget]:
        """Open the gripper and move up."""
        yield from self.grip(1.0, steps=6)
        yield from self.rise(HOVER)

    def grasp_yaw(self, body: str, quarter_turn: bool) -> float:
        """Hand heading that closes on a pair of the block's faces, by mode near one or the other middle heading."""
        return float(nearest_turn(self.env.yaw(body), np.pi / 2, reference=HEADINGS[quarter_turn]))
