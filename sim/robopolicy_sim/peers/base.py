"""What the environments of other projects share here: how they are described, how an episode starts."""

from __future__ import annotations

import importlib
from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import gymnasium as gym
import mujoco
import numpy as np
from gymnasium import spaces

from robopolicy_sim.observed_env import Observation, ObservedEnv


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


class PeerEnv(ObservedEnv):
    """An environment of another project.

    Its physics, control, action, start distribution and success are that project's own.

    Args:
        model, data: the project's compiled model and its state; must stay the same objects from episode to episode.
        interface: how the environment is described here.
        action_space: as the project defines it; actions are clipped to it.
        rendering: ``cameras``, ``image_size``, ``render_quality``, ``render_mode`` and ``render_size``, see
            `observed_env.ObservedEnv`.
    """

    def __init__(
        self,
        model: mujoco.MjModel,
        data: mujoco.MjData,
        interface: PeerInterface,
        action_space: spaces.Box,
        **rendering: Any,
    ) -> None:
        cameras = _camera_names(model, interface.cameras)
        self.metadata = self.metadata | {
            "render_fps": interface.control_hz,
            "names": dict(interface.names),
            "units": dict(interface.units),
            "cameras": tuple(cameras),
            "packages": interface.packages,
        }
        self.action_space = action_space
        super().__init__(model, data, cameras, **rendering)

    @abstractmethod
    def _begin(self, seed: int) -> None:
        """Start an episode; ``seed`` alone decides how."""

    @abstractmethod
    def _advance(self, action: np.ndarray) -> None:
        """Play one control step; the action is within the action space."""

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Observation, dict[str, Any]]:
        """Start the episode of a seed; without one, a seed is drawn from the environment's generator."""
        super().reset(seed=seed)
        self._begin(int(self.np_random.integers(2**31)) if seed is None else seed)
        return self._observation(), self._info() | {"variation": {}}

    def _play(self, action: np.ndarray) -> None:
        self._advance(np.clip(action, self.action_space.low, self.action_space.high))


def _camera_names(model: mujoco.MjModel, parts: Mapping[str, str]) -> dict[str, str]:
    """The model's name of every camera, by the name it has here."""
    others = {model.camera(i).name for i in range(model.ncam)} - set(parts.values())
    return {**parts, **{name: name for name in sorted(others)}}
