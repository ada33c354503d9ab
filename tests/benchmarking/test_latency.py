import pytest

from robopolicy.benchmarking.latency import Distribution, take_turns


def test_quantiles_of_known_durations():
    found = Distribution.of([i / 100 for i in range(101)])
    assert (found.runs, found.min, found.max) == (101, 0.0, 1.0)
    assert (found.p50, found.p90, found.p99) == pytest.approx((0.5, 0.9, 0.99))


def test_order_of_durations_does_not_matter():
    assert Distribution.of([3.0, 1.0, 2.0]) == Distribution.of([1.0, 2.0, 3.0])


def test_calls_take_turns_and_warm_up_does_not_count():
    order = []

    def call(name):
        order.append(name)
        return len(order)

    results = take_turns({"a": lambda: call("a"), "b": lambda: call("b")}, runs=2, warmup=1, progress=False)
    assert order == ["a", "b"] * 3
    assert results == {"a": [3, 5], "b": [4, 6]}
