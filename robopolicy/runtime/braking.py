"""Motion of one axis at piecewise constant jerk, and the fastest way to rest.

On that way the acceleration goes at full jerk to a peak, or to its limit and stays there, then at full jerk to zero.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np


class Motion(NamedTuple):
    """Where an axis is: position, velocity, acceleration."""

    position: float
    velocity: float
    acceleration: float

    def after(self, seconds: float, jerk: float) -> Motion:
        """Where it is when the jerk was constant for some seconds."""
        p, v, a = self
        return Motion(
            p + seconds * (v + seconds * (a / 2 + seconds * jerk / 6)),
            v + seconds * (a + seconds * jerk / 2),
            a + seconds * jerk,
        )


class Piece(NamedTuple):
    """Seconds of constant jerk."""

    seconds: float
    jerk: float


def duration(pieces: Iterable[Piece]) -> float:
    """Seconds of all pieces."""
    return sum(piece.seconds for piece in pieces)


def end_of(motion: Motion, pieces: Iterable[Piece]) -> Motion:
    """Where a motion is after its pieces."""
    for seconds, jerk in pieces:
        motion = motion.after(seconds, jerk)
    return motion


def range_of(motion: Motion, pieces: Iterable[Piece]) -> tuple[float, float]:
    """Smallest and largest position from here to the end of the pieces."""
    low = high = motion.position
    for seconds, jerk in pieces:
        after = motion.after(seconds, jerk)
        positions = [after.position, *(motion.after(t, jerk).position for t in _turns(motion, jerk, seconds))]
        low, high = min(low, *positions), max(high, *positions)
        motion = after
    return low, high


def stop(motion: Motion, largest_acceleration: float, jerk: float) -> list[Piece]:
    """The fastest way to rest.

    Args:
        motion: now; its acceleration lies within the limit.
        largest_acceleration, jerk: largest absolute values.
    """
    _, v, a = motion
    sign = 1.0 if v + a * abs(a) / (2 * jerk) >= 0 else -1.0
    v, a = sign * v, sign * a
    peak, flat = math.sqrt(max(jerk * v + a * a / 2, 0.0)), 0.0
    if peak > largest_acceleration:
        peak = largest_acceleration
        flat = (v + a * a / (2 * jerk)) / peak - peak / jerk
    return [Piece(max(a + peak, 0.0) / jerk, -sign * jerk), Piece(flat, 0.0), Piece(peak / jerk, sign * jerk)]


def stopping_path(
    motions: np.ndarray, largest_acceleration: np.ndarray, jerk: np.ndarray, spacing: float
) -> tuple[np.ndarray, np.ndarray]:
    """Samples of the fastest ways to rest of many axes, each by itself.

    Args:
        motions: (n, 3) position, velocity, acceleration.
        largest_acceleration, jerk: (n,) largest absolute values.
        spacing: seconds between samples.

    Returns:
        Positions and velocities (T, n), now first, until all are at rest.
    """
    p, v, a = motions.T
    ways = [stop(Motion(*m), *limits) for m, *limits in zip(motions.tolist(), largest_acceleration, jerk, strict=True)]
    seconds, jerks = np.array(ways).T
    ends = np.cumsum(seconds, axis=0)
    times = spacing * np.arange(math.ceil(float(np.max(ends[-1])) / spacing) + 1)[:, None]
    begin = np.zeros_like(p)
    for end, change in zip(ends, jerks, strict=True):
        t = np.clip(times - begin, 0.0, end - begin)
        p, v, a = p + t * (v + t * (a / 2 + t * change / 6)), v + t * (a + t * change / 2), a + t * change
        begin = end
    return p, v


def _turns(motion: Motion, jerk: float, seconds: float) -> list[float]:
    """When the velocity is zero, while the jerk is constant for some seconds."""
    _, v, a = motion
    square = a * a - 2 * jerk * v
    if square < 0:
        return []
    # Both roots of v + a t + jerk t^2 / 2 without cancellation.
    half = -(a + math.copysign(math.sqrt(square), a))
    roots = ([2 * v / half] if half else []) + ([half / jerk] if jerk else [])
    return [root for root in roots if 0 < root < seconds]
