"""What every environment here shares: vectors and camera images as observations, progress as reward, ``render``."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

import gymnasium as gym
import mujoco
import numpy as np
from gymnasium import spaces

from robopolicy_sim.rendering import CameraRenderer, RenderQuality, find_quality

Observation = dict[str, np.ndarray]


class ObservedEnv(gym.Env[Observation, np.ndarray], ABC):
    """An environment on a MuJoCo model, observed as vectors and camera images.

    Observations: float32 vectors by key and, for each camera asked for, ``observation.image.<camera>`` (image_size,
    image_size, 3) uint8 RGB, upright. The reward is the progress in [0, 1], 1 on success; success ends the episode.
    ``info`` holds ``success`` (bool), ``progress`` (float) and ``stages`` (bool by name).

    A subclass sets ``metadata["names"]`` before it calls this constructor, and ``action_space``.

    Args:
        model, data: compiled model and its state; must stay the same objects from episode to episode.
        camera_names: the model's name of every camera, by the name it has here.
        cameras: cameras to observe.
        image_size: side of the observed images in pixels.
        render_quality: ``fast`` (no shadows), ``shadows``, ``full``, or a ``RenderQuality``; of all images.
        render_mode: None or ``rgb_array``.
        render_size: (height, width) of ``render()`` in pixels.

    Without cameras and render mode no OpenGL is touched.
    """

    metadata: dict[str, Any] = {"render_modes": ["rgb_array"]}
    instruction: str
    action_space: spaces.Box

    def __init__(
        self,
        model: mujoco.MjModel,
        data: mujoco.MjData,
        camera_names: Mapping[str, str],
        *,
        cameras: Sequence[str] = (),
        image_size: int = 96,
        render_quality: str | RenderQuality = "fast",
        render_mode: str | None = None,
        render_size: tuple[int, int] = (480, 640),
    ) -> None:
        if render_mode not in (None, "rgb_array"):
            raise ValueError(f"render_mode={render_mode!r} is not supported; use None or 'rgb_array'.")
        self.model, self.data = model, data
        self.render_mode = render_mode
        self._camera_names = camera_names
        self._cameras = self._checked_cameras(cameras)
        self._image_size = (image_size, image_size)
        self._render_size = (render_size[0], render_size[1])  # JSON has lists, which are no keys
        self._quality = find_quality(render_quality)
        self._renderer: CameraRenderer | None = None
        self.observation_space: spaces.Dict = self._build_observation_space()  # type: ignore[assignment]

    @abstractmethod
    def _play(self, action: np.ndarray) -> None:
        """Play one control step; the action has the action space's shape and is finite."""

    @abstractmethod
    def _vectors(self) -> Observation:
        """Return the observed vectors by key, as ``metadata["names"]`` lists their entries."""

    @abstractmethod
    def _succeeded(self) -> bool: ...

    @abstractmethod
    def _progress(self) -> float:
        """Return how far the task has come; it is clipped to [0, 1]."""

    def _stages(self) -> dict[str, bool]:
        """Return which stages of the task have been reached in this episode; empty where it has none."""
        return {}

    def step(self, action: np.ndarray) -> tuple[Observation, float, bool, bool, dict[str, Any]]:
        action = np.asarray(action, dtype=np.float64)
        if action.shape != self.action_space.shape or not np.isfinite(action).all():
            raise ValueError(f"An action is {self.action_space.shape} finite numbers, found {action}.")
        self._play(action)
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
        progress = 1.0 if success else float(np.clip(self._progress(), 0, 1))
        return {"success": success, "progress": progress, "stages": self._stages()}

    def _image(self, camera: str, size: tuple[int, int]) -> np.ndarray:
        if self._renderer is None:
            self._renderer = self._make_renderer(self._quality)
        return self._renderer.render(self.data, self._camera_names[camera], size)

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
        for camera in cameras:
            if camera not in self._camera_names:
                raise ValueError(self._missing_camera(camera))
        return tuple(cameras)

    def _missing_camera(self, camera: str) -> str:
        return f"There is no camera '{camera}'; there are {', '.join(self._camera_names)}."
