"""Stack: put one block on another."""

from __future__ import annotations

import mujoco
import numpy as np

from robopolicy_sim.envs.objects import add_block, random_turn, separated_points
from robopolicy_sim.envs.placing import HALF_SIZE, RED, PlacingEnv
from robopolicy_sim.experts.stack import StackExpert

BASE_HALF = 0.025  # m of the lower block
EXTENT = (0.10, 0.16)  # m, half sides of the region where they start
GAP = 0.10  # m between their centres at the start
OFFSET = 0.02  # m that the centres of the stacked blocks may be apart


class StackEnv(PlacingEnv):
    """Put the red block on the blue one. Success: it rests on top of it and the gripper has let go."""

    instruction = "put the red block on the blue block"
    objects = ("cube", "base_cube")
    expert_class = StackExpert

    def _furnish(self, spec: mujoco.MjSpec) -> None:
        add_block(spec, "cube", [HALF_SIZE] * 3, RED)
        add_block(spec, "base_cube", [BASE_HALF] * 3, [0.13, 0.35, 0.70, 1], mass=0.2)

    def _place_objects(self, rng: np.random.Generator) -> None:
        extent = np.array(EXTENT) * max(self.scale, 0.6)
        (x, y), (base_x, base_y) = separated_points(rng, 2, extent, GAP)
        self.place("cube", [x, y, HALF_SIZE], random_turn(rng))
        self.place("base_cube", [base_x, base_y, BASE_HALF], random_turn(rng))

    def _offset(self) -> np.ndarray:
        """From where the upper block would rest to where it is, (3,)."""
        return self.position("cube") - self.position("base_cube") - [0, 0, BASE_HALF + HALF_SIZE]

    def _distance(self) -> float:
        return float(np.linalg.norm(self._offset()))

    def _above(self) -> bool:
        offset = self._offset()
        return bool(np.linalg.norm(offset[:2]) < OFFSET and offset[2] > 0)

    def _placed(self) -> bool:
        offset = self._offset()
        return bool(np.linalg.norm(offset[:2]) < OFFSET and abs(offset[2]) < 0.006)

    def _succeeded(self) -> bool:
        return self._placed() and not self.touched_by_hand("cube") and self.speed("cube") < 0.02

    def _stages(self) -> dict[str, bool]:
        return {"grasped": self._was_grasped, "above": self._was_above, "on_top": self._placed()}
