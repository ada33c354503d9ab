"""What the environments of other projects share here: observations by key, images, progress, success."""

from __future__ import annotations

import importlib
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import gymnasium as gym
import mujoco
import numpy as np
from gymnasium import spaces

from robopolicy_sim.rendering import CameraRenderer, RenderQuality, find_quality

Observation = dict[str, np.ndarray]


def require_peer(module: str, command: str) -> ModuleType:
    """Import a module of another project.

    Raises:
        gymnasium.error.DependencyNotInstalled: it cannot be imported; the message holds the command that installs it.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise gym.error.DependencyNotInstalled(
            f"This environment needs the package '{module.partition('.')[0]}', which is not usable here ({error}). "
            f"Install it with: {command}"
        ) from error


@dataclass(frozen=True)
class PeerInterface:
    """How an environment of another project is described here.

    Attributes:
        names: names of the entries of each vector, by key; ``action`` is one of the keys.
        units: unit of each vector, by key.
        control_hz: control steps per second.
        cameras: the camera that plays the part of ``scene``, ``front`` and ``wrist``; the model's other cameras keep
            their names.
        packages: distributions whose versions decide the outcome of an episode.
    """

    names: Mapping[str, tuple[str, ...]]
    units: Mapping[str, str]
    control_hz: float
    cameras: Mapping[str, str]
    packages: tuple[str, ...]


class PeerEnv(gym.Env[Observation, np.ndarray], ABC):
    """An environment of another project.

    Its physics, control, action, start distribution and success are that project's own. Observations: float32 vectors
    by key and, for each camera asked for, ``observation.image.<camera>`` (image_size, image_size, 3) uint8 RGB,
    upright. The reward is the progress in [0, 1], 1 on success; success ends the episode. ``info`` holds ``success``
    (bool), ``progress`` (float) and ``stages`` (bool by name).

    Args:
        model, data: the project's compiled model and its state; must stay the same objects from episode to episode.
        interface: how the environment is described here.
        action_space: as the project defines it; actions are clipped to it.
        cameras: cameras to observe.
        image_size: side of the observed images in pixels.
        render_quality: see `robopolicy_sim.rendering`; ``fast`` draws no shadows and takes one sample per pixel.
        render_mode: None or ``rgb_array``.
        render_size: (height, width) of ``render()`` in pixels.
    """

    metadata: dict[str, Any] = {"render_modes": ["rgb_array"]}
    instruction: str

    def __init__(
        self,
        model: mujoco.MjModel,
        data: mujoco.MjData,
        interface: PeerInterface,
        action_space: spaces.Box,
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
        self._camera_names = _camera_names(model, interface.cameras)
        for camera in cameras:
            if camera not in self._camera_names:
                raise ValueError(f"There is no camera '{camera}'; there are {', '.join(self._camera_names)}.")
        self._cameras = tuple(cameras)
        self._image_size = (image_size, image_size)
        self._render_size = (render_size[0], render_size[1])  # JSON has lists, which are no keys
        self._quality = find_quality(render_quality)
        self._renderer: CameraRenderer | None = None
        self.metadata = self.metadata | {
            "render_fps": interface.control_hz,
            "names": dict(interface.names),
            "units": dict(interface.units),
            "cameras": tuple(self._camera_names),
            "packages": interface.packages,
        }
        self.action_space: spaces.Box = action_space
        vectors = {key: (-np.inf, np.inf, (len(names),), np.float32) for key, names in interface.names.items()}
        images = {f"observation.image.{camera}": (0, 255, (*self._image_size, 3), np.uint8) for camera in cameras}
        self.observation_space: spaces.Dict = spaces.Dict(  # type: ignore[assignment]
            {key: spaces.Box(*box) for key, box in {**vectors, **images}.items() if key != "action"}
        )

    @abstractmethod
    def _begin(self, seed: int) -> None:
        """Start an episode; ``seed`` alone decides how."""

    @abstractmethod
    def _advance(self, action: np.ndarray) -> None:
        """Play one control step."""

    @abstractmethod
    def _vectors(self) -> Observation:
        """Return the observed vectors by key."""

    @abstractmethod
    def _progress(self) -> float:
        """Return how far the task has come, in [0, 1]."""

    @abstractmethod
    def _succeeded(self) -> bool: ...

    def _stages(self) -> dict[str, bool]:
        """Return which stages of the task have been reached in this episode; empty where the project tells none."""
        return {}

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Observation, dict[str, Any]]:
        """Start the episode of a seed; without one, a seed is drawn from the environment's generator."""
        super().reset(seed=seed)
        self._begin(int(self.np_random.integers(2**31)) if seed is None else seed)
        return self._observation(), self._info() | {"variation": {}}

    def step(self, action: np.ndarray) -> tuple[Observation, float, bool, bool, dict[str, Any]]:
        action = np.asarray(action, dtype=np.float64)
        if action.shape != self.action_space.shape or not np.isfinite(action).all():
            raise ValueError(f"An action is {self.action_space.shape} finite numbers, found {action}.")
        self._advance(np.clip(action, self.action_space.low, self.action_space.high))
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
            self._renderer = CameraRenderer(self.model, self._quality)
        return self._renderer.render(self.data, self._camera_names[camera], size)


def _camera_names(model: mujoco.MjModel, parts: Mapping[str, str]) -> dict[str, str]:
    """The model's name of every camera, by the name it has here."""
    others = {model.camera(i).name for i in range(model.ncam)} - set(parts.values())
    return {**parts, **{name: name for name in sorted(others)}}
