"""The gantry that tasks on the open bench share: a rod, commanded by its position."""

from __future__ import annotations

from typing import Any

import numpy as np
from gymnasium import spaces

from robopolicy_sim.envs.base import MujocoTaskEnv


class GantryEnv(MujocoTaskEnv):
    """A rod that a bridge (along y) and a carriage (along x) move over the bench.

    Action: target position of the rod's pusher (x, y) in metres, absolute; the controller moves towards it at no more
    than ``max_speed``.

    Args:
        max_speed: speed limit of the commanded position in metres per second.
        rendering: see `MujocoTaskEnv`.
    """

    def __init__(self, *, max_speed: float, **rendering: Any) -> None:
        super().__init__(**rendering)
        self._max_speed = max_speed
        self._setpoint: np.ndarray = np.zeros(2)

    @property
    def _pusher(self) -> np.ndarray:
        return self.data.qpos[[1, 0]]  # the bridge (y) carries the carriage (x)

    def _place_pusher(self, position: np.ndarray) -> None:
        """Put the pusher at rest at a position (2,), where it is also commanded to be."""
        self.data.qpos[[1, 0]] = position
        self.data.ctrl[:] = self._setpoint = position

    def _build_action_space(self) -> spaces.Box:
        low, high = self.model.actuator_ctrlrange.T
        return spaces.Box(low.astype(np.float32), high.astype(np.float32))

    def _setpoints(self, action: np.ndarray) -> np.ndarray:
        low, high = self.model.actuator_ctrlrange.T
        travel = np.clip(action, low, high) - self._setpoint
        travel *= min(1.0, self._max_speed / self.control_hz / max(float(np.linalg.norm(travel)), 1e-9))
        ramp = np.arange(1, self._substeps + 1)[:, None] / self._substeps
        setpoints = self._setpoint + ramp * travel
        self._setpoint = setpoints[-1]
        return setpoints
