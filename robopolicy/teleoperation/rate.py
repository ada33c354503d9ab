"""Keeping the control rate, and noticing when it cannot be kept."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable

_TOLERANCE = 0.1  # share of a period


class RateKeeper:
    """Waits for the end of each control period.

    Deadlines lie one period apart, so that the rate does not drift. A late period moves the deadlines: lost time is
    not made up for, which would move the arm faster than the operator wants.

    Attributes:
        rate: wanted periods per second.
        periods: periods so far.
        late: those of them that ended late, by more than a tenth of a period.
    """

    def __init__(
        self, rate: float, now: Callable[[], float] = time.perf_counter, sleep: Callable[[float], None] = time.sleep
    ) -> None:
        self.rate = rate
        self.periods = 0
        self.late = 0
        self._now, self._sleep = now, sleep
        self._ends: deque[float] = deque([now()], maxlen=max(2, round(rate)) + 1)
        self._deadline = self._ends[0] + 1 / rate

    @property
    def measured(self) -> float:
        """Periods per second over the last second; 0 before the first one ends."""
        passed = self._ends[-1] - self._ends[0]
        return (len(self._ends) - 1) / passed if passed > 0 else 0.0

    @property
    def too_slow(self) -> bool:
        """Whether the rate of the last second is more than a tenth below the wanted one."""
        return 0 < self.measured < (1 - _TOLERANCE) * self.rate

    def wait(self) -> None:
        """Sleep until the period is over."""
        ahead = self._deadline - self._now()
        if ahead > 0:
            self._sleep(ahead)
        end = self._now()
        self.periods += 1
        late = end - self._deadline > _TOLERANCE / self.rate
        self.late += late
        self._ends.append(end)
        self._deadline = (end if late else self._deadline) + 1 / self.rate
