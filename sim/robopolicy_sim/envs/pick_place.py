"""PickPlace: put a block into a bin."""

from __future__ import annotations

import mujoco
import numpy as np

from robopolicy_sim.envs.objects import add_bin, add_block, random_turn
from robopolicy_sim.envs.placing import HALF_SIZE, RED, PlacingEnv
from robopolicy_sim.experts.pick_place import PickPlaceExpert

BIN_HALF = 0.055  # m, inside
WALL = 0.03  # m, height


class PickPlaceEnv(PlacingEnv):
    """Put the red block into the bin. Success: it lies in the bin, at rest, and the gripper has let go of it."""

    instruction = "put the red block into the bin"
    objects = ("cube",)
    goal_names = ("bin_x", "bin_y")
    goal_unit = "m"
    expert_class = PickPlaceExpert

    def _furnish(self, spec: mujoco.MjSpec) -> None:
        add_block(spec, "cube", [HALF_SIZE] * 3, RED)
        add_bin(spec, "bin", BIN_HALF, WALL, [0.16, 0.36, 0.62, 1])

    def _place_objects(self, rng: np.random.Generator) -> None:
        # The block on one side of the workspace, the bin on the other.
        side = rng.choice([-1.0, 1.0])
        block = [rng.uniform(-0.09, 0.09), side * rng.uniform(0.06, 0.17)]
        goal = [rng.uniform(-0.06, 0.06), -side * rng.uniform(0.12, 0.17)]
        # A small arm still needs room for its hand between the block and the bin.
        scale = np.array([self.scale, max(self.scale, 0.75)])
        self.place("cube", [*block * scale, HALF_SIZE], random_turn(rng))
        self.place("bin", [*goal * scale, 0.0])

    def _goal(self) -> np.ndarray:
        return (self.position("bin") - self.base_position)[:2]

    def _place_from_state(self, state: np.ndarray) -> None:
        super()._place_from_state(state)
        self.data.mocap_pos[self._mocap("bin")][:2] = state[-2:] + self.base_position[:2]

    def _offset(self) -> np.ndarray:
        """From the middle of the bin's floor to the block, (3,)."""
        return self.position("cube") - self.position("bin")

    def _distance(self) -> float:
        return float(np.linalg.norm(self._offset()[:2]))

    def _within_walls(self) -> bool:
        return bool((np.abs(self._offset()[:2]) < BIN_HALF).all())

    def _above(self) -> bool:
        return self._within_walls() and bool(self._offset()[2] > WALL)

    def _placed(self) -> bool:
        return self._within_walls() and bool(self._offset()[2] < WALL)

    def _succeeded(self) -> bool:
        return self._placed() and not self.touched_by_hand("cube") and self.speed("cube") < 0.03

    def _stages(self) -> dict[str, bool]:
        return {"grasped": self._was_grasped, "above_bin": self._was_above, "inside": self._placed()}
