"""The curve that commands are read from: knots of action chunks, joined by cubics without a jump in velocity.

A plan is kept in the time at which commands are *sent*: an action that is to be reached at t by a device that takes
``latency`` seconds to carry it out lies at ``t - latency`` (UMI, Chi et al. 2024). Entries of the action with different
latencies (arm, gripper) are curves of their own.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from robopolicy.runtime.clock import NS, nanoseconds

_SAME = 1_000
"""Knots nearer than this [ns] are one: a cubic between them would amplify rounding."""


class Plan(Protocol):
    """A curve in action space."""

    @property
    def start(self) -> int:
        """When it begins [ns]."""

    @property
    def end(self) -> int:
        """When it is used up [ns]."""

    def at(self, time: int) -> tuple[np.ndarray, np.ndarray]:
        """Position and velocity (A,) at a time [ns]; before the start and after the end it stands still there."""


class Curve:
    """A cubic Hermite curve through knots, continuous in position and velocity.

    Args:
        times: (K,) rising ns.
        positions, velocities: (K, n) at the knots, units and units per second.
    """

    def __init__(self, times: Sequence[int], positions: np.ndarray, velocities: np.ndarray) -> None:
        self.times = list(times)
        self.positions, self.velocities = positions, velocities
        self._rest = np.zeros(positions.shape[1])
        h = np.diff(np.array(self.times, np.int64))[:, None] / NS
        slope = np.diff(positions, axis=0) / h
        v0, v1 = velocities[:-1], velocities[1:]
        square = (3 * slope - 2 * v0 - v1) / h
        cube = (v0 + v1 - 2 * slope) / h**2
        position = np.stack([positions[:-1], v0, square, cube], axis=1)
        velocity = np.stack([v0, 2 * square, 3 * cube, np.zeros_like(cube)], axis=1)
        self._coefficients = np.concatenate([position, velocity], axis=2)  # (K - 1, powers of time, 2 n)

    def at(self, time: int) -> tuple[np.ndarray, np.ndarray]:
        """Position and velocity (n,); it stands still outside of the knots."""
        i = bisect_right(self.times, time) - 1
        if i < 0:
            return self.positions[0], self._rest
        if i == len(self.times) - 1:
            return self.positions[-1], self._rest
        u = (time - self.times[i]) / NS
        both = np.array([1.0, u, u * u, u * u * u]) @ self._coefficients[i]
        return both[: len(self._rest)], both[len(self._rest) :]

    def continued(
        self, seam: int, times: Sequence[int], positions: np.ndarray, velocities: np.ndarray, keep: int
    ) -> Curve:
        """This curve until the seam, then other knots.

        Args:
            seam: when the new knots take over [ns].
            times: (K,) of the new knots, after the seam; at least one.
            positions, velocities: (K, n).
            keep: knots that only matter before this time [ns] are forgotten.
        """
        first = max(0, bisect_right(self.times, keep) - 1)
        last = bisect_right(self.times, seam - _SAME)
        position, velocity = self.at(seam)
        return Curve(
            [*self.times[first:last], seam, *times],
            np.concatenate([self.positions[first:last], position[None], positions]),
            np.concatenate([self.velocities[first:last], velocity[None], velocities]),
        )


def knot_velocities(times: Sequence[int], positions: np.ndarray) -> np.ndarray:
    """Velocities at all knots but the first, for a curve that does not overshoot and comes to rest at the last.

    The three-point derivative, zero where the curve turns round and at most three times the smaller slope beside it,
    which keeps the segments between these knots monotone (Fritsch & Carlson 1980; Hyman 1983).

    Args:
        times: (K,) rising ns.
        positions: (K, n).

    Returns:
        (K - 1, n) units per second.
    """
    h = np.diff(np.array(times, np.int64))[:, None] / NS
    slope = np.diff(positions, axis=0) / h
    before, after = slope[:-1], slope[1:]
    middle = (h[1:] * before + h[:-1] * after) / (h[:-1] + h[1:])
    largest = np.where(before * after > 0, 3 * np.minimum(abs(before), abs(after)), 0)
    return np.concatenate([np.clip(middle, -largest, largest), np.zeros((1, positions.shape[1]))])


@dataclass(frozen=True, eq=False)
class Part:
    """Entries of the action that are carried out with one latency.

    Attributes:
        entries: of the action, (n,).
        latency: ns between a command and its being reached.
        curve: of the commands, in the time at which they are sent.
    """

    entries: np.ndarray
    latency: int
    curve: Curve


class ChunkPlan:
    """A plan that chunks are spliced into.

    Args:
        parts: hold every entry of the action once.

    Attributes:
        start, end: see `Plan`.
        rest: when the robot has reached the end [ns].
    """

    def __init__(self, parts: Sequence[Part]) -> None:
        self.parts = tuple(parts)
        self.start = max(part.curve.times[0] for part in parts)
        self.end = max(part.curve.times[-1] for part in parts)
        self.rest = max(part.curve.times[-1] + part.latency for part in parts)
        self._size = sum(len(part.entries) for part in parts)

    @classmethod
    def standing(cls, now: int, position: np.ndarray, latency: np.ndarray) -> ChunkPlan:
        """Rest at a position.

        Args:
            now: ns.
            position: (A,).
            latency: (A,) seconds from a command until it is reached.
        """
        position = np.asarray(position, np.float64)
        parts = []
        for value in np.unique(latency):
            entries = np.flatnonzero(latency == value)
            curve = Curve([now], position[None, entries], np.zeros((1, len(entries))))
            parts.append(Part(entries, nanoseconds(value), curve))
        return cls(parts)

    def at(self, time: int) -> tuple[np.ndarray, np.ndarray]:
        if len(self.parts) == 1:
            return self.parts[0].curve.at(time)
        position, velocity = np.empty(self._size), np.empty(self._size)
        for part in self.parts:
            position[part.entries], velocity[part.entries] = part.curve.at(time)
        return position, velocity

    def reached(self, times: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
        """Where the robot is at some times if it follows the plan.

        Args:
            times: (n,) ns, of being reached.

        Returns:
            Positions (n, A), those beyond the ends repeated from there, and which of them (n,) the plan knows.
        """
        positions, known = np.empty((len(times), self._size)), np.ones(len(times), bool)
        for part in self.parts:
            curve = part.curve
            for i, time in enumerate(times):
                sent = time - part.latency
                positions[i, part.entries] = curve.at(sent)[0]
                known[i] &= curve.times[0] <= sent <= curve.times[-1]
        return positions, known

    def spliced(
        self, seam: int, times: Sequence[int], positions: np.ndarray, *, step: int, keep: int
    ) -> tuple[ChunkPlan, bool]:
        """This plan until the seam, then actions.

        Actions are dropped that would have to be sent less than half a step after the seam. If none is left, the last
        one is sent one step after the seam.

        Args:
            seam: ns.
            times: (n,) ns at which the actions are to be reached, rising.
            positions: (n, A).
            step: control step [ns].
            keep: what lies before this time [ns] is forgotten.

        Returns:
            The plan, and whether no action was left in time.
        """
        parts, late = [], False
        for part in self.parts:
            sent = [time - part.latency for time in times]
            first = bisect_right(sent, seam + step // 2 - 1)
            mine = positions[:, part.entries].astype(np.float64)
            if first == len(sent):
                late, first, sent, mine = True, 0, [seam + step], mine[-1:]
            # the chunk's own velocities: the same actions make the same curve, wherever the seam is
            before = (sent[first - 1], mine[first - 1]) if first else (seam, part.curve.at(seam)[0])
            kept, values = sent[first:], mine[first:]
            velocities = knot_velocities([before[0], *kept], np.concatenate([before[1][None], values]))
            curve = part.curve.continued(seam, kept, values, velocities, keep)
            parts.append(Part(part.entries, part.latency, curve))
        return ChunkPlan(parts), late
