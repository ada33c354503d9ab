"""The one clock of the runtime: integer nanoseconds that never run backwards."""

from __future__ import annotations

import time
from typing import Protocol

NS = 1_000_000_000
"""Nanoseconds per second."""


def nanoseconds(seconds: float) -> int:
    return round(seconds * NS)


class Clock(Protocol):
    """What tells the time."""

    def now(self) -> int:
        """Nanoseconds since some fixed moment; monotonic."""


class MonotonicClock:
    """The machine's monotonic clock, the same in all of its processes."""

    def now(self) -> int:
        return time.monotonic_ns()


class SimulatedClock:
    """Time that stands still until it is told to go on."""

    def __init__(self, start: int = 0) -> None:
        self._now = start

    def now(self) -> int:
        return self._now

    def advance(self, nanoseconds: int) -> None:
        """Let time pass.

        Raises:
            ValueError: it would run backwards.
        """
        if nanoseconds < 0:
            raise ValueError(f"Time cannot go back by {-nanoseconds} ns.")
        self._now += nanoseconds
