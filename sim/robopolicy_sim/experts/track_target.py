"""The scripted expert of TrackTarget: meet the ring where it is going to be, then keep up with it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

SERVO_LAG = 0.05  # s by which the gantry follows a moving set point: its kv / kp
APPROACH_SPEED = 0.42  # m/s
MEETING_TIMES = np.arange(0.0, 4.0, 0.01)  # s, among which the first possible meeting is looked for


@dataclass(frozen=True)
class CircularCourse:
    """Uniform motion on a circle.

    Attributes:
        centre, start: the circle's centre and the position at time 0, (2,) each, in metres.
        rate: angular speed in rad/s, counter-clockwise.
    """

    centre: np.ndarray
    start: np.ndarray
    rate: float

    @classmethod
    def through(cls, position: np.ndarray, velocity: np.ndarray, centre: np.ndarray) -> CircularCourse:
        """Return the course about ``centre`` with this position [m] and velocity [m/s] at time 0, (2,) each."""
        x, y = position - centre
        return cls(centre, position, float((x * velocity[1] - y * velocity[0]) / (x * x + y * y)))

    def position(self, time: float | np.ndarray) -> np.ndarray:
        """Return where it is (..., 2) [m] at a time (...) [s]."""
        cos, sin = np.cos(self.rate * np.asarray(time)), np.sin(self.rate * np.asarray(time))
        x, y = self.start - self.centre
        return self.centre + np.stack([cos * x - sin * y, sin * x + cos * y], axis=-1)

    def velocity(self, time: float | np.ndarray) -> np.ndarray:
        """Return how it moves (..., 2) [m/s] at a time (...) [s]."""
        return self.rate * (self.position(time) - self.centre)[..., ::-1] * [-1, 1]


class TrackTargetExpert:
    """Closed loop on the newest observation alone, so it recovers from any state that the pusher can reach.

    Args:
        period: duration of a control step in seconds.
        reach: the pusher's largest commanded |x| and |y| in metres.
    """

    def __init__(self, *, period: float, reach: float) -> None:
        # A command is reached at the end of its step, later by the servo's lag.
        self._lookahead = period + SERVO_LAG
        self._reach = reach

    def act(self, observation: Mapping[str, np.ndarray]) -> np.ndarray:
        """Return the pusher's target (2,) float32 in metres.

        Args:
            observation: ``observation.state`` (8,): pusher, target, the target's velocity and its course's centre.
        """
        pusher, target, velocity, centre = np.asarray(observation["observation.state"], dtype=np.float64).reshape(4, 2)
        course = CircularCourse.through(target, velocity, centre)
        travel = course.position(self._lookahead) - pusher
        farthest = APPROACH_SPEED * self._lookahead
        if np.linalg.norm(travel) > farthest:
            travel = self._to_meeting(course, pusher)
            travel *= farthest / np.linalg.norm(travel)
        return np.clip(pusher + travel, -self._reach, self._reach).astype(np.float32)

    def _to_meeting(self, course: CircularCourse, pusher: np.ndarray) -> np.ndarray:
        """Return the way (2,) to the first place of the course that can be reached in time."""
        ways = course.position(MEETING_TIMES) - pusher
        in_time = np.linalg.norm(ways, axis=1) <= APPROACH_SPEED * MEETING_TIMES
        return ways[np.argmax(in_time)]
