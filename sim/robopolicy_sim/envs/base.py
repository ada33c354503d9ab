"""The part that every MuJoCo task shares: loading a scene, starting an episode, stepping at the control rate."""

from __future__ import annotations

import math
from abc import abstractmethod
from pathlib import Path
from typing import Any, Protocol

import mujoco
import numpy as np
from gymnasium import spaces

from robopolicy_sim.observed_env import Observation, ObservedEnv

SCENES = Path(__file__).resolve().parent.parent / "scenes"


class Expert(Protocol):
    """A scripted policy for one episode."""

    def act(self, observation: Observation) -> np.ndarray:
        """Return the action for an observation."""


class MujocoTaskEnv(ObservedEnv):
    """A task in a MuJoCo scene, controlled at a fixed rate; ``observation.state`` is always observed.

    Args:
        rendering: ``cameras``, ``image_size``, ``render_quality``, ``render_mode`` and ``render_size``, see
            `observed_env.ObservedEnv`.
    """

    scene: str
    control_hz: float

    def __init__(self, **rendering: Any) -> None:
        self.metadata = self.metadata | {"render_fps": self.control_hz}
        model = self._load_model()
        self._substeps = fit_time_step(model, self.control_hz)
        cameras = {name: name for name in (model.camera(i).name for i in range(model.ncam))}
        super().__init__(model, mujoco.MjData(model), cameras, **rendering)
        self.action_space = self._build_action_space()

    def _load_model(self) -> mujoco.MjModel:
        return mujoco.MjModel.from_xml_path(str(SCENES / self.scene))

    @abstractmethod
    def make_expert(self, seed: int) -> Expert:
        """Return the scripted expert for one episode; ``seed`` settles its free choices."""

    @abstractmethod
    def _build_action_space(self) -> spaces.Box: ...

    @abstractmethod
    def _place(self, rng: np.random.Generator) -> None:
        """Write a random start into ``self.data``."""

    @abstractmethod
    def _setpoints(self, action: np.ndarray) -> np.ndarray:
        """Turn an action into actuator set points for one control period, (substeps, n_actuators)."""

    @abstractmethod
    def _track(self) -> None:
        """Update what success depends on beyond the present state; runs once after each control step."""

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Observation, dict[str, Any]]:
        super().reset(seed=seed)
        mujoco.mj_resetData(self.model, self.data)
        self._place(self.np_random)
        mujoco.mj_forward(self.model, self.data)
        return self._observation(), self._info()

    def _play(self, action: np.ndarray) -> None:
        for setpoint in self._setpoints(action):
            self.data.ctrl[:] = setpoint
            mujoco.mj_step(self.model, self.data)
        # Positions after mj_step are newer than the frames derived from them.
        mujoco.mj_kinematics(self.model, self.data)
        self._track()

    def _missing_camera(self, camera: str) -> str:
        return f"Camera '{camera}' is not in the scene {self.scene}; it has {', '.join(self._camera_names)}."


def fit_time_step(model: mujoco.MjModel, control_hz: float) -> int:
    """Shorten the model's time step, where needed, until whole steps fill a control period; returns how many do."""
    period = 1 / control_hz
    steps = math.ceil(period / model.opt.timestep - 1e-9)
    if not math.isclose(steps * model.opt.timestep, period):
        model.opt.timestep = period / steps
    return steps
