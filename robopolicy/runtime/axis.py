"""One axis whose velocity, acceleration and jerk are limited at every moment, and which can always stop in time."""

from __future__ import annotations

from robopolicy.errors import require_extra
from robopolicy.runtime.braking import Motion, Piece, duration, end_of, range_of, stop

ROUNDING = 1e-9
"""How far rounding may carry a position across its limit, in the axis's unit."""
CATCHING_UP = 0.99
"""Largest share of its velocity at which a target is caught up with; at its full velocity nothing could be."""
SMOOTH_PERIODS = 4
"""Periods that a smooth way takes at least: with fewer, correcting its start at every period would not settle."""


class Axis:
    """Moves an axis on by one period at a time, such that it can stop between its limits after every one.

    Two ways lead to a moving target that is to be met after some time. The smooth one has the least squared jerk, with
    a free acceleration at its end. Where it would exceed a limit, Ruckig's (Berscheid and Kroeger 2021) takes over: in
    time if the limits allow it, else it meets the target, which is taken to keep its velocity, as soon as they do.
    Where the axis could not stop before ``lower`` or ``upper`` any more it brakes, which by induction it always can.

    Args:
        lower, upper: of the position; may be infinite. Outside of them the axis moves towards the inside only.
        velocity, acceleration, jerk: largest absolute values.
        period: seconds of one step.
    """

    def __init__(
        self, lower: float, upper: float, velocity: float, acceleration: float, jerk: float, period: float
    ) -> None:
        ruckig = require_extra("ruckig", "runtime")
        self.lower, self.upper, self.period = lower, upper, period
        self.velocity, self.acceleration, self.jerk = velocity, acceleration, jerk
        self._planner, self._path, self._wanted = ruckig.Ruckig(1), ruckig.Trajectory(1), ruckig.InputParameter(1)
        self._wanted.max_acceleration, self._wanted.max_jerk = [acceleration], [jerk]
        self._no_way: type[Exception] = ruckig.RuckigError
        # From farther away than this it can always stop, even from full speed and a period later.
        self._stopping_distance = velocity * (velocity / acceleration + 2 * acceleration / jerk + 2 * period)

    def step(self, motion: Motion, position: float, velocity: float, ahead: float) -> tuple[Motion, bool]:
        """One period towards a target.

        Args:
            motion: now.
            position, velocity: of the target, within the limits.
            ahead: seconds after which it is to be met.

        Returns:
            The motion after the period, and whether the axis brakes because of its limits.
        """
        smooth = self._smooth(motion, position, velocity, ahead)
        if smooth is None:
            pieces = _cut(self._catch_up(motion, position, velocity, ahead), self.period)
            after = end_of(motion, pieces)
        else:
            after, pieces = smooth
        if self._stays(motion, pieces, after):
            return after, False
        return self.brake(motion), True

    def brake(self, motion: Motion) -> Motion:
        """One period of the fastest way to rest; exactly at rest at its end."""
        pieces = self.stop(motion)
        if duration(pieces) <= self.period:
            return Motion(end_of(motion, pieces).position, 0.0, 0.0)
        return end_of(motion, _cut(pieces, self.period))

    def go_to_zero(self, motion: Motion) -> Motion:
        """One period of the way to zero, for an axis whose zero is a robot at rest; exactly there at its end."""
        pieces = self.way_to_zero(motion)
        if duration(pieces) <= self.period:
            return Motion(0.0, 0.0, 0.0)
        after = end_of(motion, _cut(pieces, self.period))
        return after if self._stays(motion, _cut(pieces, self.period), after) else self.brake(motion)

    def stop(self, motion: Motion) -> list[Piece]:
        """The fastest way to rest."""
        return stop(motion, self.acceleration, self.jerk)

    def way_to_zero(self, motion: Motion) -> list[Piece]:
        """The fastest way to rest at zero."""
        return self._catch_up(motion, 0.0, 0.0, 0.0)

    def _stays(self, motion: Motion, pieces: list[Piece], after: Motion) -> bool:
        """Whether a period, and a stop after it, stay between the limits."""
        far = self._stopping_distance
        if self.lower + far < after.position < self.upper - far:
            return True
        low, high = range_of(motion, [*pieces, *self.stop(after)])
        return min(self.lower - ROUNDING, motion.position) <= low and high <= max(
            self.upper + ROUNDING, motion.position
        )

    def _smooth(
        self, motion: Motion, position: float, velocity: float, ahead: float
    ) -> tuple[Motion, list[Piece]] | None:
        """The next period of the way with the least squared jerk, at its mean jerk; None where it exceeds a limit.

        With r = 1 to 0 the share of the time that is left, the jerk is ``x r + y r^2``: zero at the end, where the
        acceleration is free. x and y follow from what is missing at the end when the acceleration stays.
        """
        p, v, a = motion
        h, t = self.period, ahead
        if t < SMOOTH_PERIODS * h:
            return None
        dp, dv = (position - p - t * (v + t * a / 2)) / t**3, (velocity - v - t * a) / t**2
        x, y = 48 * dv - 120 * dp, 160 * dp - 60 * dv
        peaks = x * y < 0 and abs(x) < 2 * abs(y)
        if abs(x + y) > self.jerk or (peaks and x * x > 4 * abs(y) * self.jerk):
            return None
        turns = (0.0, -x / y) if peaks and abs(x) < abs(y) else (0.0,)
        for r in turns:
            if abs(a + t * (x * (1 - r * r) / 2 + y * (1 - r**3) / 3)) > self.acceleration:
                return None
        r = 1 - h / t
        jerk = (x * (1 - r * r) / 2 + y * (1 - r**3) / 3) * t / h
        after = motion.after(h, jerk)
        _, v_after, a_after = after
        if abs(a_after) > self.acceleration:
            return None
        if abs(v_after + a_after * abs(a_after) / (2 * self.jerk)) > self.velocity:
            return None
        if a * a_after < 0 and abs(v - a * a / (2 * jerk)) > self.velocity:
            return None
        return after, [Piece(h, jerk)]

    def _catch_up(self, motion: Motion, position: float, velocity: float, ahead: float) -> list[Piece]:
        """Ruckig's way as seen from the target, which moves at its velocity, over the next period."""
        fastest = CATCHING_UP * self.velocity
        speed = min(max(velocity, -fastest), fastest)
        wanted = self._wanted
        wanted.max_velocity, wanted.min_velocity = [self.velocity - speed], [-self.velocity - speed]
        wanted.current_position = [motion.position - (position - speed * ahead)]
        wanted.current_velocity, wanted.current_acceleration = [motion.velocity - speed], [motion.acceleration]
        wanted.minimum_duration = ahead
        try:
            self._planner.calculate(wanted, self._path)
        except self._no_way:
            return self.stop(motion)
        profile = self._path.profiles[0][0]
        pieces = [*zip(profile.brake.t, profile.brake.j, strict=True), *zip(profile.t, profile.j, strict=True)]
        return [Piece(*piece) for piece in pieces]


def _cut(pieces: list[Piece], seconds: float) -> list[Piece]:
    """The first seconds of the pieces, without jerk after their end."""
    kept: list[Piece] = []
    for piece in pieces:
        if piece.seconds >= seconds:
            return [*kept, Piece(seconds, piece.jerk)]
        kept.append(piece)
        seconds -= piece.seconds
    return [*kept, Piece(seconds, 0.0)]
