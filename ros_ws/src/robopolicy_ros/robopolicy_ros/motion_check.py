"""Whether commands keep a robot's limits, judged from the messages alone.

Written apart from the filter that makes the commands, so that one does not share the other's mistakes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from scipy.spatial.transform import Rotation

from robopolicy.runtime.limits import Limits, RotationLimits

_MAKING_UP = 3
"""Set points after a late one with which a sender may still make up for the time."""


@dataclass(frozen=True)
class Bounds:
    """Limits of the entries of one command topic, in the unit of the action.

    Attributes:
        lower, upper, velocity, acceleration: (n,).
    """

    lower: np.ndarray
    upper: np.ndarray
    velocity: np.ndarray
    acceleration: np.ndarray

    @classmethod
    def of(cls, limits: Limits, names: Sequence[str]) -> Bounds:
        axes = [limits.axes[name] for name in names]
        columns = ("lower", "upper", "velocity", "acceleration")
        return cls(*(np.array([getattr(axis, column) for axis in axes]) for column in columns))


@dataclass(frozen=True)
class Slack:
    """What a measurement from outside cannot tell from a violation.

    Attributes:
        position: [unit].
        share: of velocities and accelerations.
        jitter: seconds by which the times of messages vary; of trajectories only, whose seams depend on it.
    """

    position: float = 1e-4
    share: float = 0.02
    jitter: float = 0.03


@dataclass
class Violations:
    """What was found, by kind, and the first examples of each in words."""

    counts: Counter[str] = field(default_factory=Counter)
    examples: dict[str, str] = field(default_factory=dict)

    def add(self, kind: str, example: str) -> None:
        self.counts[kind] += 1
        self.examples.setdefault(kind, example)


class Hermite:
    """A trajectory as a joint trajectory controller follows it: cubic between points with velocities.

    Args:
        times: (T,) seconds, rising.
        positions, velocities: (T, n).
    """

    def __init__(self, times: np.ndarray, positions: np.ndarray, velocities: np.ndarray) -> None:
        self.times, self.positions, self.velocities = times, positions, velocities

    def at(self, time: float) -> tuple[np.ndarray, np.ndarray]:
        """Position and velocity (n,), at rest after the end; before the first point, its state."""
        if time >= self.times[-1]:
            return self.positions[-1], np.zeros_like(self.positions[-1])
        i = int(np.searchsorted(self.times, time, "right")) - 1
        if i < 0:
            return self.positions[0], self.velocities[0]
        span = self.times[i + 1] - self.times[i]
        s = (time - self.times[i]) / span
        p0, p1, v0, v1 = (
            self.positions[i],
            self.positions[i + 1],
            self.velocities[i] * span,
            self.velocities[i + 1] * span,
        )
        position = (2 * s**3 - 3 * s**2 + 1) * p0 + (s**3 - 2 * s**2 + s) * v0
        position = position + (3 * s**2 - 2 * s**3) * p1 + (s**3 - s**2) * v1
        velocity = (6 * s**2 - 6 * s) * (p0 - p1) + (3 * s**2 - 4 * s + 1) * v0 + (3 * s**2 - 2 * s) * v1
        return position, velocity / span


class SetPointCheck:
    """Judges set points that come once a period.

    Args:
        bounds: of the entries.
        period: seconds between two set points.
        max_step: largest distance of a first set point from where the robot is.
        slack: see `Slack`.

    Attributes:
        violations: found so far.
    """

    def __init__(self, bounds: Bounds, period: float, max_step: float, slack: Slack | None = None) -> None:
        self.bounds, self.period, self.max_step, self.slack = bounds, period, max_step, slack or Slack()
        self.violations = Violations()
        self._last: np.ndarray | None = None
        self._velocity: np.ndarray | None = None
        self._sent = 0.0
        self._punctual = (np.zeros(0), 0.0)  # the last set point before any were late, and when it was sent
        self._disturbed = 0

    def restart(self) -> None:
        """The next set point is the first of a motion."""
        self._last = self._velocity = None

    def check(self, sent: float, position: np.ndarray, measured: np.ndarray | None = None) -> None:
        """Judge one set point.

        Where cycles of the sender were late, it moves on by as many periods as have passed since it was punctual, and
        two more or less: between its look at the clock and the sending it may be held up, too.

        Args:
            sent: seconds.
            position: (n,).
            measured: where the robot is, for the first set point of a motion.
        """
        found, bounds, slack = self.violations, self.bounds, self.slack
        if not np.isfinite(position).all():
            return found.add("not finite", str(position.tolist()))
        outside = np.maximum(bounds.lower - position, position - bounds.upper).max()
        if outside > slack.position:
            found.add("position", f"{outside:.4g} outside: {position.tolist()}")
        if self._last is None:
            if measured is not None and np.abs(position - measured).max() > self.max_step + slack.position:
                found.add("first set point", f"{np.abs(position - measured).max():.4g} from the robot")
            self._last, self._velocity, self._sent = position, None, sent
            self._punctual = (position, sent)
            return
        passed = (sent - self._sent) / self.period
        self._disturbed = _MAKING_UP if passed > 1.1 else max(0, self._disturbed - 1)
        late = self._disturbed > 0
        velocity = (position - self._last) / self.period
        if late:
            before, then = self._punctual
            velocity = (position - before) / self.period / (np.ceil((sent - then) / self.period) + 2)
        else:
            self._punctual = (position, sent)
        noise = slack.position / self.period
        excess = (np.abs(velocity) - bounds.velocity * (1 + slack.share) - noise).max()
        if excess > 0:
            found.add("velocity", f"{excess:.4g} over")
        if self._velocity is not None and not late:
            acceleration = (velocity - self._velocity) / self.period
            excess = (np.abs(acceleration) - bounds.acceleration * (1 + slack.share) - 1e-3).max()
            if excess > 0:
                found.add("acceleration", f"{excess:.4g} over")
        self._last, self._velocity, self._sent = position, None if late else velocity, sent


class TrajectoryCheck:
    """Judges trajectories that replace each other.

    Args:
        bounds, max_step, slack: as in `SetPointCheck`.

    Attributes:
        violations: found so far.
    """

    def __init__(self, bounds: Bounds, max_step: float, slack: Slack | None = None) -> None:
        self.bounds, self.max_step, self.slack = bounds, max_step, slack or Slack()
        self.violations = Violations()
        self._running: Hermite | None = None

    def restart(self) -> None:
        """What the robot follows now was not seen: the next trajectory is the first of a motion."""
        self._running = None

    def check(
        self,
        sent: float,
        times: np.ndarray,
        positions: np.ndarray,
        velocities: np.ndarray,
        measured: np.ndarray | None = None,
    ) -> None:
        """Judge a trajectory.

        Args:
            sent: seconds.
            times: (T,) seconds after ``sent``.
            positions, velocities: (T, n).
            measured: where the robot is, for a trajectory that begins a motion.
        """
        found, bounds = self.violations, self.bounds
        if not (np.isfinite(positions).all() and np.isfinite(velocities).all() and np.isfinite(times).all()):
            return found.add("not finite", str(positions.tolist()))
        if not len(times) or times[0] <= 0 or (np.diff(times) <= 0).any():
            return found.add("times", str(times[:5].tolist()))
        if np.abs(velocities[-1]).max() > 1e-9:
            found.add("last velocity", str(velocities[-1].tolist()))
        fine = np.unique(
            np.concatenate([np.linspace(a, b, 6) for a, b in zip(times[:-1], times[1:], strict=True)] + [times])
        )
        curve = Hermite(times, positions, velocities)
        path, speed = (np.array(rows) for rows in zip(*map(curve.at, fine), strict=True))
        outside = np.maximum(bounds.lower - path, path - bounds.upper).max()
        if outside > self.slack.position:
            found.add("position", f"{outside:.4g} outside")
        excess = (np.abs(speed) - bounds.velocity * (1 + self.slack.share)).max()
        if excess > 1e-3:
            found.add("velocity", f"{excess:.4g} over")
        if len(times) > 1:
            mean = np.diff(velocities, axis=0) / np.diff(times)[:, None]
            excess = (np.abs(mean) - bounds.acceleration * (1 + self.slack.share)).max()
            if excess > 1e-2:
                found.add("acceleration", f"{excess:.4g} over")
            self._check_consistent(times, positions, velocities)
        self._check_seam(sent, times[0], positions[0], velocities[0], measured)
        self._running = Hermite(sent + times, positions, velocities)

    def _check_consistent(self, times: np.ndarray, positions: np.ndarray, velocities: np.ndarray) -> None:
        """Velocities belong to the positions: their mean is the slope, but for what the acceleration allows."""
        span = np.diff(times)[:, None]
        error = np.abs(np.diff(positions, axis=0) / span - (velocities[1:] + velocities[:-1]) / 2)
        if (error > self.bounds.acceleration * span / 2 + self.slack.position / span).any():
            self.violations.add("velocities of other positions", f"{error.max():.4g}")

    def _check_seam(
        self, sent: float, first: float, position: np.ndarray, velocity: np.ndarray, measured: np.ndarray | None
    ) -> None:
        """The robot, wherever it is on the trajectory before, can be at the first point in time.

        Once that trajectory has ended, the robot may rest elsewhere: it was moved, or never got the trajectory.

        Both trajectories pass from one state within ``first`` seconds, so they differ at most by what accelerating one
        way and the other does; the time of sending is known to ``slack.jitter``.
        """
        if self._running is None:
            if measured is not None and np.abs(position - measured).max() > self.max_step + self.slack.position:
                self.violations.add("first point", f"{np.abs(position - measured).max():.4g} from the robot")
            return
        before, speed = self._running.at(sent + first)
        if sent > self._running.times[-1] and measured is not None:
            before = min(before, measured, key=lambda place: np.abs(position - place).max())
        bounds, jitter = self.bounds, self.slack.jitter
        reach = first + jitter
        jump, change = np.abs(position - before), np.abs(velocity - speed)
        about = f"{1e3 * first:.1f} ms after it was sent, at {np.abs(speed).max():.4g} before"
        if (change > 2 * bounds.acceleration * reach + 1e-3).any():
            self.violations.add("seam velocity", f"{change.max():.4g} {about}")
        allowed = bounds.acceleration * reach**2 + np.maximum(np.abs(speed), np.abs(velocity)) * jitter
        if (jump > allowed + self.slack.position).any():
            self.violations.add("seam position", f"{jump.max():.4g} {about}")


class RotationCheck:
    """Judges the orientations of poses that come once a period.

    Args:
        limits: of the angular velocity and acceleration.
        period: seconds between two poses.
        violations: where to add what is found.
        slack: see `Slack`; its position is in radians here.
    """

    def __init__(
        self, limits: RotationLimits, period: float, violations: Violations, slack: Slack | None = None
    ) -> None:
        self.limits, self.period, self.violations, self.slack = limits, period, violations, slack or Slack()
        self._last: Rotation | None = None
        self._velocity: np.ndarray | None = None
        self._sent = 0.0

    def restart(self) -> None:
        """The next pose is the first of a motion."""
        self._last = self._velocity = None

    def check(self, sent: float, quaternion: np.ndarray) -> None:
        """Judge the quaternion (4,) xyzw of a pose that was sent at a time [s]."""
        if not abs(float(np.linalg.norm(quaternion)) - 1) < 1e-6:
            return self.violations.add("no rotation", str(quaternion.tolist()))
        turned, limits, slack = Rotation.from_quat(quaternion), self.limits, self.slack
        before, last = self._last, self._velocity
        passed, self._sent = (sent - self._sent) / self.period, sent
        self._last, self._velocity = turned, None
        if before is None:
            return
        late = passed > 1.1
        velocity = (turned * before.inv()).as_rotvec() / self.period / (np.ceil(passed) + 1 if late else 1.0)
        speed = float(np.linalg.norm(velocity))
        if speed > limits.velocity * (1 + slack.share) + slack.position / self.period:
            self.violations.add("angular velocity", f"{speed:.4g}")
        if late:
            return
        self._velocity = velocity
        if last is not None:
            acceleration = float(np.linalg.norm(velocity - last)) / self.period
            # a limited rotation vector turns with up to this much more
            if acceleration > limits.acceleration * (1 + slack.share) + limits.velocity**2 + 1e-3:
                self.violations.add("angular acceleration", f"{acceleration:.4g}")
