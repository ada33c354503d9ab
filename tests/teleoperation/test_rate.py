from __future__ import annotations

import pytest

from robopolicy.teleoperation.rate import RateKeeper


class Clock:
    """Time that passes when somebody works or sleeps; sleeping takes a little longer than asked for."""

    def __init__(self) -> None:
        self.time = 100.0
        self.slept = 0.0

    def now(self) -> float:
        return self.time

    def sleep(self, seconds: float) -> None:
        self.slept += seconds
        self.time += seconds + 0.0005

    def work(self, seconds: float) -> None:
        self.time += seconds


def test_the_rate_does_not_drift() -> None:
    clock = Clock()
    keeper = RateKeeper(20, clock.now, clock.sleep)
    for period in range(200):
        clock.work(0.01 + 0.02 * (period % 2))
        keeper.wait()
    assert clock.time == pytest.approx(100 + 200 / 20, abs=0.002)
    assert keeper.measured == pytest.approx(20, rel=0.01)
    assert (keeper.periods, keeper.late, keeper.too_slow) == (200, 0, False)


def test_work_that_takes_too_long_is_noticed_and_not_made_up_for() -> None:
    clock = Clock()
    keeper = RateKeeper(20, clock.now, clock.sleep)
    for _ in range(40):
        clock.work(0.08)
        keeper.wait()
    assert keeper.measured == pytest.approx(12.5)
    assert keeper.too_slow
    assert keeper.late == 40
    before = clock.time
    keeper.wait()  # no work: still a whole period, not a burst
    assert clock.time - before == pytest.approx(0.05, abs=0.002)
