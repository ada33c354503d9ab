"""From the operator's twist to the action that an environment takes, chosen by the names of the action's entries."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np
from scipy.spatial.transform import Rotation

from robopolicy.errors import UserError
from robopolicy.teleoperation.command import Command

DELTA_NAMES = ("dx", "dy", "dz", "rx", "ry", "rz", "opening")
POSE_NAMES = ("x", "y", "z", "r11", "r21", "r31", "r12", "r22", "r32", "opening")
LEASH = 0.05  # m that an integrated target may run ahead of the tool, so that it comes back at once from a wall
ANGULAR_LEASH = 0.3  # rad


class ActionAdapter(Protocol):
    """Turns commands into actions of one kind of environment."""

    def reset(self, observation: Mapping[str, np.ndarray]) -> None:
        """Begin an episode at its first observation."""

    def action(self, command: Command, observation: Mapping[str, np.ndarray]) -> np.ndarray:
        """The action for a command, within the bounds of the action space."""


class ToolDisplacement:
    """Displacement in one control period: translation (3) m, rotation vector (3) rad, opening. Keeps no state."""

    def __init__(self, space: Any, period: float) -> None:
        self._space = space
        self._period = period

    def reset(self, observation: Mapping[str, np.ndarray]) -> None:
        """Nothing to remember: the environment adds displacements up."""

    def action(self, command: Command, observation: Mapping[str, np.ndarray]) -> np.ndarray:
        return _bounded(np.append(self._period * command.twist, command.opening), self._space)


class ToolPose:
    """Absolute pose: position (3) m, 6-D rotation (6), opening; the twist moves it from where the tool stands."""

    def __init__(self, space: Any, period: float, columns: np.ndarray) -> None:
        """``columns``: the nine entries of ``observation.state`` that hold the measured pose."""
        self._space = space
        self._period = period
        self._columns = columns

    def reset(self, observation: Mapping[str, np.ndarray]) -> None:
        self._position, self._rotation = self._measured(observation)

    def action(self, command: Command, observation: Mapping[str, np.ndarray]) -> np.ndarray:
        position, rotation = self._measured(observation)
        step = self._period * command.twist
        target = _leashed(self._position + step[:3], position)
        self._position = np.clip(target, self._space.low[:3], self._space.high[:3])
        ahead = (Rotation.from_rotvec(step[3:]) * self._rotation * rotation.inv()).as_rotvec()
        ahead *= min(1.0, ANGULAR_LEASH / max(float(np.linalg.norm(ahead)), 1e-9))
        self._rotation = Rotation.from_rotvec(ahead) * rotation
        columns = self._rotation.as_matrix()[:, :2].T.ravel()
        return _bounded(np.concatenate([self._position, columns, [command.opening]]), self._space)

    def _measured(self, observation: Mapping[str, np.ndarray]) -> tuple[np.ndarray, Rotation]:
        pose = np.asarray(observation["observation.state"], dtype=np.float64)[self._columns]
        first = pose[3:6] / np.linalg.norm(pose[3:6])
        second = pose[6:9] - (pose[6:9] @ first) * first
        second /= np.linalg.norm(second)
        return pose[:3], Rotation.from_matrix(np.stack([first, second, np.cross(first, second)], axis=1))


class PlanarPosition:
    """Absolute position (x, y) in metres; the translation of the twist moves it from where the tool stands."""

    def __init__(self, space: Any, period: float, columns: np.ndarray) -> None:
        """``columns``: the two entries of ``observation.state`` that hold the measured position."""
        self._space = space
        self._period = period
        self._columns = columns

    def reset(self, observation: Mapping[str, np.ndarray]) -> None:
        self._position = self._measured(observation)

    def action(self, command: Command, observation: Mapping[str, np.ndarray]) -> np.ndarray:
        target = _leashed(self._position + self._period * command.twist[:2], self._measured(observation))
        self._position = np.clip(target, self._space.low, self._space.high)
        return _bounded(self._position, self._space)

    def _measured(self, observation: Mapping[str, np.ndarray]) -> np.ndarray:
        return np.asarray(observation["observation.state"], dtype=np.float64)[self._columns]


def action_adapter(env: Any) -> ActionAdapter:
    """The adapter for an environment, by ``env.metadata["names"]`` of its action and state.

    Known are tool displacements (`DELTA_NAMES`), absolute tool poses (`POSE_NAMES`, measured in the state under the
    same names with the prefix ``tcp_``) and two-dimensional absolute positions (in the state under the same names).

    Raises:
        UserError: the action is of another kind.
    """
    names = env.metadata.get("names", {})
    action, state = tuple(names.get("action", ())), tuple(names.get("observation.state", ()))
    space, period = env.action_space, 1.0 / float(env.metadata["render_fps"])
    if action == DELTA_NAMES:
        return ToolDisplacement(space, period)
    if action == POSE_NAMES and (columns := _columns([f"tcp_{name}" for name in POSE_NAMES[:9]], state)) is not None:
        return ToolPose(space, period, columns)
    if len(action) == 2 and (columns := _columns(action, state)) is not None:
        return PlanarPosition(space, period, columns)
    raise UserError(
        f"{env.spec.id}: a person cannot steer actions with the entries {', '.join(action) or 'without names'}. Wanted "
        f"in env.metadata['names']['action']: {', '.join(DELTA_NAMES)} (control=ee_delta_target); or "
        f"{', '.join(POSE_NAMES)} (control=ee_pose); or two names that observation.state has too."
    )


def _columns(wanted: Sequence[str], names: Sequence[str]) -> np.ndarray | None:
    return np.array([names.index(name) for name in wanted]) if set(wanted) <= set(names) else None


def _leashed(target: np.ndarray, measured: np.ndarray) -> np.ndarray:
    ahead = target - measured
    return measured + ahead * min(1.0, LEASH / max(float(np.linalg.norm(ahead)), 1e-9))


def _bounded(action: np.ndarray, space: Any) -> np.ndarray:
    bounded: np.ndarray = np.clip(action, space.low, space.high).astype(space.dtype)
    return bounded
