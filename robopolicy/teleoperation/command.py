"""What an operator asks for in one control period, and how the axes of a device become the velocity of the tool."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any, Protocol

import numpy as np

from robopolicy.errors import UserError


class SessionKey(Enum):
    """What an operator can tell the session; where several come at once they are obeyed in this order."""

    TOGGLE = "start or stop the episode"
    SUCCESS = "store it as a success"
    FAILURE = "store it as a failure"
    UNDO = "take back: the episode that runs, else the last stored one"
    QUIT = "quit"


@dataclass(frozen=True)
class Command:
    """What the operator asks for in one control period.

    Attributes:
        twist: (6,) velocity of the tool in the arm's base frame: translation in m/s, rotation vector in rad/s.
        opening: wanted opening of the gripper, 0 closed to 1 open.
        keys: what the operator tells the session.
    """

    twist: np.ndarray
    opening: float = 1.0
    keys: frozenset[SessionKey] = frozenset()


class Device(Protocol):
    """Something that an operator holds.

    Attributes:
        name: what the user types.
        hints: what to press, and what it does; shown in the window.
    """

    name: str
    hints: tuple[tuple[str, str], ...]

    def read(self, events: Sequence[Any]) -> Command:
        """The command for this control period; ``events`` are the window's (pygame) since the last call."""

    def reset(self) -> None:
        """Open the gripper again; called while no episode runs."""

    def close(self) -> None:
        """Give the device back."""


@dataclass(frozen=True)
class AxisMap:
    """How deflections in -1..1 become a twist.

    The operator's frame has x away from the operator, y to the left, z up.

    Attributes:
        axes: for translation x, y, z and rotation about x, y, z: number and sign of the device's axis.
        dead_zone: a deflection up to here counts as none; beyond it the response starts at zero, without a jump.
        expo: 0 responds linearly, 1 with the third power: fine near the centre, as fast at the end.
        linear_speed: m/s at full deflection, in any direction.
        angular_speed: rad/s at full deflection, about any axis.
        heading: rotation about the vertical from the arm's base frame to the operator's, in radians.
    """

    axes: tuple[tuple[int, int], ...] = tuple((axis, 1) for axis in range(6))
    dead_zone: float = 0.0
    expo: float = 0.0
    linear_speed: float = 0.15
    angular_speed: float = 0.8
    heading: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.dead_zone < 1 or not 0 <= self.expo <= 1:
            raise UserError(f"dead_zone={self.dead_zone} must lie in 0 to 1 (excluded), expo={self.expo} in 0 to 1.")
        if self.linear_speed <= 0 or self.angular_speed <= 0:
            raise UserError(f"Speeds must be positive, found {self.linear_speed} m/s and {self.angular_speed} rad/s.")

    def twist(self, deflections: np.ndarray) -> np.ndarray:
        """The twist (6,) in the arm's base frame for the device's raw deflections (n,)."""
        number, sign = np.transpose(self.axes)
        shaped = sign * self._respond(np.asarray(deflections, dtype=np.float64))[number]
        linear, angular = _within_unit_ball(shaped[:3]), _within_unit_ball(shaped[3:])
        cos, sin = np.cos(self.heading), np.sin(self.heading)
        to_base = np.array([[cos, -sin, 0.0], [sin, cos, 0.0], [0.0, 0.0, 1.0]])
        return np.concatenate([self.linear_speed * to_base @ linear, self.angular_speed * to_base @ angular])

    def _respond(self, deflections: np.ndarray) -> np.ndarray:
        beyond = np.clip((np.abs(deflections) - self.dead_zone) / (1 - self.dead_zone), 0, 1)
        return np.sign(deflections) * ((1 - self.expo) * beyond + self.expo * beyond**3)


def _within_unit_ball(vector: np.ndarray) -> np.ndarray:
    return vector / max(1.0, float(np.linalg.norm(vector)))
