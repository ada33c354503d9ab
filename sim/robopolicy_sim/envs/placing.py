"""What PickPlace and Stack share: the red block is grasped, carried to a place and let go there."""

from __future__ import annotations

from abc import abstractmethod

import numpy as np

from robopolicy_sim.envs.arm_task import ArmTaskEnv

HALF_SIZE = 0.02  # m of the block that is carried
RED = (0.80, 0.16, 0.14, 1)


class PlacingEnv(ArmTaskEnv):
    """A task in which the block ``cube`` is put somewhere."""

    def _begin(self) -> None:
        self._start_distance = max(self._distance(), 1e-6)
        self._was_grasped = self._was_above = False

    @abstractmethod
    def _distance(self) -> float:
        """How far the block is from its place, in metres."""

    @abstractmethod
    def _above(self) -> bool:
        """Whether the block is above its place."""

    @abstractmethod
    def _placed(self) -> bool:
        """Whether the block is where it belongs, held or not."""

    def _track(self) -> None:
        self._was_grasped |= self.grasped("cube")
        self._was_above |= self._above()

    def _progress(self) -> float:
        """A quarter for reaching the block, a quarter for the grasp, a half for the way to its place."""
        if self._placed():
            return 0.95
        grasped = float(self.grasped("cube"))
        way = np.clip(1 - self._distance() / self._start_distance, 0, 0.9)
        return float(0.25 * self.nearness("cube") + 0.25 * grasped + 0.5 * way * grasped)
