"""What was commanded on one topic, as a function of time: set points, or trajectories as ros2_control follows them."""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass

import numpy as np

from robopolicy.runtime.clock import NS


@dataclass(frozen=True, eq=False)
class Points:
    """What one message asks for.

    Attributes:
        times: (T,) ns, rising: when each row is to be reached.
        positions: (T, n) entries of the action.
        velocities, accelerations: (T, n) per second, or None; accelerations come with velocities.
        hold: a set point: it is valid at once, and nothing lies in between.
    """

    times: np.ndarray
    positions: np.ndarray
    velocities: np.ndarray | None = None
    accelerations: np.ndarray | None = None
    hold: bool = False


@dataclass(frozen=True, eq=False)
class Setpoint:
    """Where a motion is at one time: (n,) position, velocity, acceleration."""

    position: np.ndarray
    velocity: np.ndarray
    acceleration: np.ndarray


class CommandedMotion:
    """The motion that a sequence of messages asks for.

    A new message replaces what was left of the one before, from the time at which it came. A trajectory goes on from
    the commanded state of that time (``interpolate_from_desired_state`` of the joint_trajectory_controller) along
    splines: linear with positions only, cubic with velocities, quintic with accelerations. After its end, and before a
    first trajectory's first point, the motion rests at that point.
    """

    def __init__(self) -> None:
        self._received: list[int] = []
        self._points: list[Points] = []

    @property
    def newest(self) -> int | None:
        """When the newest message came [ns]; None before the first."""
        return self._received[-1] if self._received else None

    def follow(self, received: int, points: Points) -> None:
        """Take a message that came at ``received`` [ns], not before the last one."""
        received = max(received, self._received[-1]) if self._received else received
        before = self.at(received)
        if not points.hold and before is not None and points.times[0] > received:
            points = _with_start(points, received, before)
        self._received.append(received)
        self._points.append(points)

    def at(self, time: int) -> Setpoint | None:
        """The commanded state at a time [ns]; None before the first message."""
        index = bisect_right(self._received, time) - 1
        return None if index < 0 else _evaluate(self._points[index], time)

    def forget(self, before: int) -> None:
        """Drop messages that are not needed for times from ``before`` on."""
        keep = max(0, bisect_right(self._received, before) - 1)
        del self._received[:keep], self._points[:keep]

    def clear(self) -> None:
        self._received.clear()
        self._points.clear()


def _with_start(points: Points, time: int, state: Setpoint) -> Points:
    def joined(first: np.ndarray, rows: np.ndarray | None) -> np.ndarray | None:
        return None if rows is None else np.concatenate([first[None], rows])

    return Points(
        np.concatenate([[time], points.times]),
        np.concatenate([state.position[None], points.positions]),
        joined(state.velocity, points.velocities),
        joined(state.acceleration, points.accelerations),
    )


def _evaluate(points: Points, time: int) -> Setpoint:
    zero = np.zeros(points.positions.shape[1])
    if time >= points.times[-1] or time < points.times[0]:
        position = points.positions[-1 if time >= points.times[-1] else 0]
        return Setpoint(position, zero, zero)
    i = int(np.searchsorted(points.times, time, side="right")) - 1
    span = float(points.times[i + 1] - points.times[i]) / NS
    s = float(time - points.times[i]) / (points.times[i + 1] - points.times[i])
    p0, p1 = points.positions[i : i + 2]
    if points.velocities is None:
        return Setpoint(p0 + s * (p1 - p0), (p1 - p0) / span, zero)
    v0, v1 = points.velocities[i : i + 2] * span
    a0 = a1 = None
    if points.accelerations is not None:
        a0, a1 = points.accelerations[i : i + 2] * span**2
    return _hermite(s, span, p0, v0, a0, p1, v1, a1)


def _hermite(
    s: float,
    span: float,
    p0: np.ndarray,
    v0: np.ndarray,
    a0: np.ndarray | None,
    p1: np.ndarray,
    v1: np.ndarray,
    a1: np.ndarray | None,
) -> Setpoint:
    """Cubic or quintic polynomial in s from 0 to 1; derivatives of the ends are by s."""
    d = p1 - p0
    if a0 is None or a1 is None:
        c = [p0, v0, 3 * d - 2 * v0 - v1, -2 * d + v0 + v1]
    else:
        c = [
            p0,
            v0,
            a0 / 2,
            10 * d - 6 * v0 - 4 * v1 - (3 * a0 - a1) / 2,
            -15 * d + 8 * v0 + 7 * v1 + (3 * a0 - 2 * a1) / 2,
            6 * d - 3 * (v0 + v1) - (a0 - a1) / 2,
        ]
    position = sum((c[k] * s**k for k in range(1, len(c))), c[0])
    velocity = sum((k * c[k] * s ** (k - 1) for k in range(2, len(c))), c[1])
    acceleration = sum((k * (k - 1) * c[k] * s ** (k - 2) for k in range(3, len(c))), 2 * c[2])
    return Setpoint(position, velocity / span, acceleration / span**2)
