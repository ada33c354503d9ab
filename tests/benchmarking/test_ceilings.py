import pytest
import torch

from robopolicy.benchmarking import ceilings
from robopolicy.benchmarking.ceilings import Ceilings, measure_ceilings, shortest


def test_bandwidth_is_the_best_from_the_next_smaller_size_on():
    found = Ceilings("cpu", 1, {100: 50.0, 1000: 80.0, 10_000: 20.0}, {"fp32": 1.0}, 1.0)
    # 100 bytes were measured slower than 1000, which only noise explains
    assert [found.bandwidth_at(size) for size in (10, 100, 500, 1000, 5000, 10_000, 10**6)] == [80] * 5 + [20] * 2


def test_the_better_of_two_measurements_number_by_number():
    one = Ceilings("cpu", 2, {10: 5.0, 20: 4.0}, {"fp32": 7.0, "bf16": 1.0}, 3.0)
    two = Ceilings("cpu", 2, {10: 6.0, 20: 2.0}, {"fp32": 6.0, "bf16": 2.0}, 2.0)
    assert one.best(two) == Ceilings("cpu", 2, {10: 6.0, 20: 4.0}, {"fp32": 7.0, "bf16": 2.0}, 3.0)


class Clock:
    """A clock that the timed call moves."""

    def __init__(self, durations):
        self.now, self.durations = 0.0, iter(durations)

    def perf_counter(self):
        return self.now

    def call(self):
        self.now += next(self.durations)


def test_shortest_of_several_after_one_that_does_not_count(monkeypatch):
    clock = Clock([1.0, 5.0, 3.0, 4.0, 9.0, 9.0])
    monkeypatch.setattr(ceilings, "time", clock)
    assert shortest(clock.call, at_least=0, runs=5) == 3.0


def test_short_calls_are_repeated_for_the_given_time(monkeypatch):
    clock = Clock([0.5] * 100)
    monkeypatch.setattr(ceilings, "time", clock)
    shortest(clock.call, at_least=10.0, runs=5)
    assert clock.now == pytest.approx(0.5 + 10.0)


def test_measures_this_machine_for_the_asked_sizes():
    before = torch.get_num_threads()
    found = measure_ceilings(1, working_sets=[123_456, 10], precisions=["fp32", "int8"])
    assert torch.get_num_threads() == before
    assert {123_456, 4096} <= set(found.bandwidth) and list(found.flops) == ["fp32"]
    # any machine reads more than 100 MB/s, and multiplies matrices faster than a matrix with a vector
    assert min(found.bandwidth.values()) > 1e8 and found.flops["fp32"] > found.gemv_flops > 1e7
