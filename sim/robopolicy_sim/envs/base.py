"""The part that every MuJoCo task shares: loading, stepping at the control rate, observations, rendering."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import gymnasium as gym
import mujoco
import numpy as np
from gymnasium import spaces

from robopolicy_sim.rendering import CameraRenderer, RenderQuality, find_quality

Observation = dict[str, np.ndarray]

SCENES = Path(__file__).resolve().parent.parent / "scenes"


class Expert(Protocol):
    """A scripted policy for one episode."""

    def act(self, observation: Observation) -> np.ndarray:
        """Return the action for an observation."""


class MujocoTaskEnv(gym.Env[Observation, np.ndarray], ABC):
    """A task in a MuJoCo scene, controlled at a fixed rate.

    Observations: float32 vectors by key (``observation.state`` always) and, for each camera asked for,
    ``observation.image.<camera>`` (image_size, image_size, 3) uint8 RGB. The reward is the progress in [0, 1], 1 on
    success; success ends the episode. ``info`` holds ``success`` (bool), ``progress`` (float) and ``stages`` (bool by
    name).

    Args:
        cameras: cameras of the scene to observe.
        image_size: side of the observed images in pixels.
        render_quality: ``fast`` (no shadows), ``shadows``, ``full``, or a ``RenderQuality``; of all images.
        render_mode: None or ``rgb_array``.
        render_size: (height, width) of ``render()`` in pixels.

    Without cameras and render mode no OpenGL is touched.
    """

    metadata: dict[str, Any] = {"render_modes": ["rgb_array"]}
    scene: str
    control_hz: float
    instruction: str

    def __init__(
        self,
        *,
        cameras: Sequence[str] = (),
        image_size: int = 96,
        render_quality: str | RenderQuality = "fast",
        render_mode: str | None = None,
        render_size: tuple[int, int] = (480, 640),
    ) -> None:
        if render_mode not in (None, "rgb_array"):
            raise ValueError(f"render_mode={render_mode!r} is not supported; use None or 'rgb_array'.")
        self.model = self._load_model()
        self._substeps = fit_time_step(self.model, self.control_hz)
        self.data = mujoco.MjData(self.model)
        self.render_mode = render_mode
        self._cameras = self._checked_cameras(cameras)
        self._image_size = (image_size, image_size)
        self._render_size = (render_size[0], render_size[1])  # JSON has lists, which are no keys
        self._quality = find_quality(render_quality)
        self._renderer: CameraRenderer | None = None
        self.metadata = self.metadata | {"render_fps": self.control_hz}
        self.action_space: spaces.Box = self._build_action_space()
        self.observation_space: spaces.Dict = self._build_observation_space()  # type: ignore[assignment]

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
    def _vectors(self) -> Observation:
        """Return the observed vectors by key, as ``metadata["names"]`` lists their entries."""

    @abstractmethod
    def _track(self) -> None:
        """Update what success depends on beyond the present state; runs once after each control step."""

    @abstractmethod
    def _succeeded(self) -> bool: ...

    def _stages(self) -> dict[str, bool]:
        """Return which stages of the task have been reached in this episode."""
        return {}

    @abstractmethod
    def _progress(self) -> float:
        """Return how far the task has come, in [0, 1]."""

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Observation, dict[str, Any]]:
        super().reset(seed=seed)
        mujoco.mj_resetData(self.model, self.data)
        self._place(self.np_random)
        mujoco.mj_forward(self.model, self.data)
        return self._observation(), self._info()

    def step(self, action: np.ndarray) -> tuple[Observation, float, bool, bool, dict[str, Any]]:
        action = np.asarray(action, dtype=np.float64)
        if action.shape != self.action_space.shape or not np.isfinite(action).all():
            raise ValueError(f"An action is {self.action_space.shape} finite numbers, found {action}.")
        for setpoint in self._setpoints(action):
            self.data.ctrl[:] = setpoint
            mujoco.mj_step(self.model, self.data)
        # Positions after mj_step are newer than the frames derived from them.
        mujoco.mj_kinematics(self.model, self.data)
        self._track()
        info = self._info()
        return self._observation(), info["progress"], info["success"], False, info

    def render(self) -> np.ndarray | None:
        return self._image("scene", self._render_size) if self.render_mode == "rgb_array" else None

    def close(self) -> None:
        if self._renderer is not None:
            self._renderer.close()
            self._renderer = None

    def _observation(self) -> Observation:
        observation = {key: vector.astype(np.float32) for key, vector in self._vectors().items()}
        for camera in self._cameras:
            observation[f"observation.image.{camera}"] = self._image(camera, self._image_size)
        return observation

    def _info(self) -> dict[str, Any]:
        success = self._succeeded()
        return {"success": success, "progress": 1.0 if success else self._progress(), "stages": self._stages()}

    def _image(self, camera: str, size: tuple[int, int]) -> np.ndarray:
        if self._renderer is None:
            self._renderer = self._make_renderer(self._quality)
        return self._renderer.render(self.data, camera, size)

    def _make_renderer(self, quality: RenderQuality) -> CameraRenderer:
        return CameraRenderer(self.model, quality)

    def _build_observation_space(self) -> spaces.Dict:
        images = {
            f"observation.image.{camera}": spaces.Box(0, 255, (*self._image_size, 3), np.uint8)
            for camera in self._cameras
        }
        vectors = {
            key: spaces.Box(-np.inf, np.inf, (len(names),), np.float32)
            for key, names in self.metadata["names"].items()
            if key != "action"
        }
        return spaces.Dict({**vectors, **images})

    def _checked_cameras(self, cameras: Sequence[str]) -> tuple[str, ...]:
        if isinstance(cameras, str):
            raise ValueError(f"cameras='{cameras}' is a string; give a list of names.")
        known = [self.model.camera(i).name for i in range(self.model.ncam)]
        for camera in cameras:
            if camera not in known:
                raise ValueError(f"Camera '{camera}' is not in the scene {self.scene}; it has {', '.join(known)}.")
        return tuple(cameras)


def fit_time_step(model: mujoco.MjModel, control_hz: float) -> int:
    """Shorten the model's time step, where needed, until whole steps fill a control period; returns how many do."""
    period = 1 / control_hz
    steps = math.ceil(period / model.opt.timestep - 1e-9)
    if not math.isclose(steps * model.opt.timestep, period):
        model.opt.timestep = period / steps
    return steps
