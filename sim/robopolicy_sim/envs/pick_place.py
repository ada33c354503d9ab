"""PickPlace: put a block into a bin."""

from __future__ import annotations

import mujoco
import numpy as np

from robopolicy_sim.envs.arm_task import ArmTaskEnv
from robopolicy_sim.envs.objects import add_bin, add_block
from robopolicy_sim.experts.pick_place import PickPlaceExpert

HALF_SIZE = 0.02  # m
BIN_HALF = 0.055  # m, inside
WALL = 0.03  # m, height


class PickPlaceEnv(ArmTaskEnv):
    """Put the red block into the bin. Success: it lies in the bin, at rest, and the gripper has let go of it."""

    instruction = "put the red block into the bin"
    objects = ("cube",)
    goal_names = ("bin_x", "bin_y")
    expert_class = PickPlaceExpert

    def _furnish(self, spec: mujoco.MjSpec) -> None:
        add_block(spec, "cube", [HALF_SIZE] * 3, [0.80, 0.16, 0.14, 1])
        add_bin(spec, "bin", BIN_HALF, WALL, [0.16, 0.36, 0.62, 1])

    def _place_objects(self, rng: np.random.Generator) -> None:
        # The block on one side of the workspace, the bin on the other.
        side = rng.choice([-1.0, 1.0])
        block = [rng.uniform(-0.09, 0.09), side * rng.uniform(0.06, 0.17)]
        goal = [rng.uniform(-0.06, 0.06), -side * rng.uniform(0.12, 0.17)]
        # A small arm still needs room for its hand between the block and the bin.
        scale = np.array([self.scale, max(self.scale, 0.75)])
        self.place("cube", [*block * scale, HALF_SIZE], rng.uniform(-np.pi, np.pi))
        self.data.mocap_pos[self._mocap("bin")] = [*goal * scale, self.table_height]

    def _begin(self) -> None:
        self._start_distance = self._distance()
        self._was_grasped = self._was_above = False

    def _goal(self) -> np.ndarray:
        return (self.position("bin") - self.base_position)[:2]

    def _place_from_state(self, state: np.ndarray) -> None:
        super()._place_from_state(state)
        self.data.mocap_pos[self._mocap("bin")][:2] = state[-2:] + self.base_position[:2]

    def _distance(self) -> float:
        return float(np.linalg.norm((self.position("cube") - self.position("bin"))[:2]))

    def _inside(self) -> bool:
        offset = self.position("cube") - self.position("bin")
        return bool((np.abs(offset[:2]) < BIN_HALF).all() and offset[2] < WALL)

    def _track(self) -> None:
        self._was_grasped |= self.grasped("cube")
        offset = self.position("cube") - self.position("bin")
        self._was_above |= bool((np.abs(offset[:2]) < BIN_HALF).all() and offset[2] > WALL)

    def _succeeded(self) -> bool:
        return self._inside() and not self.touched_by_hand("cube") and self.speed("cube") < 0.03

    def _stages(self) -> dict[str, bool]:
        return {"grasped": self._was_grasped, "above_bin": self._was_above, "inside": self._inside()}

    def _progress(self) -> float:
        """A quarter for reaching the block, a quarter for the grasp, a half for the way to the bin."""
        if self._inside():
            return 0.95
        reached = 1 - np.tanh(5 * np.linalg.norm(self.tool_state().position - self.position("cube")))
        grasped = float(self.grasped("cube"))
        way = np.clip(1 - self._distance() / self._start_distance, 0, 0.9)
        return float(0.25 * reached + 0.25 * grasped + 0.5 * way * grasped)
