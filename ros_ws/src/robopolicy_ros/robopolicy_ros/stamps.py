"""Between header stamps, which are wall clock time, and the runtime's monotonic clock."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any, Self

from builtin_interfaces.msg import Time

from robopolicy.runtime.clock import NS

_TRIES = 9


def stamp_ns(stamp: Any) -> int:
    """Nanoseconds of a ``builtin_interfaces/Time``."""
    return int(stamp.sec) * NS + int(stamp.nanosec)


@dataclass(frozen=True)
class Stamps:
    """A fixed offset between the two clocks.

    It is measured once: a wall clock that is set later shows as stamps that are old or lie ahead, which the runtime
    refuses, and not as a jump of its own clock.

    Attributes:
        offset: wall clock minus monotonic clock [ns].
    """

    offset: int = 0

    @classmethod
    def measure(cls) -> Self:
        """Read both clocks; of several tries the one that took the shortest counts."""
        tries = []
        for _ in range(_TRIES):
            before, wall, after = time.monotonic_ns(), time.time_ns(), time.monotonic_ns()
            tries.append((after - before, wall - (before + after) // 2))
        return cls(min(tries)[1])

    def to_monotonic(self, stamp: Any) -> int:
        """The runtime's time [ns] of a message's stamp."""
        return stamp_ns(stamp) - self.offset

    def wall_to_monotonic(self, wall: int) -> int:
        return wall - self.offset

    def to_stamp(self, monotonic: int) -> Time:
        """The stamp of a moment of the runtime's clock [ns]."""
        seconds, nanoseconds = divmod(monotonic + self.offset, NS)
        return Time(sec=seconds, nanosec=nanoseconds)
