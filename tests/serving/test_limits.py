"""Limits that follow from the policy's spec, and the rate."""

from __future__ import annotations

import pytest

from robopolicy.errors import UserError
from robopolicy.serving import limits
from robopolicy.serving.limits import Limits, TokenBucket
from robopolicy.serving.wire import pack
from tests.serving.conftest import IMAGE_SPEC, SPEC, TASK_SPEC, task_frame


def test_the_longest_frame_follows_from_the_spec() -> None:
    image, state, previous = 36 * 48 * 3, 2 * 4, 8 * (2 * 4 + 4)
    assert Limits().message_bytes(SPEC) == 2 * (2 * state + previous) + 65536
    assert Limits().message_bytes(IMAGE_SPEC) == 2 * (2 * (state + image) + previous) + 65536
    assert len(pack(task_frame())) < Limits().message_bytes(TASK_SPEC)
    assert Limits(max_message_bytes=77).message_bytes(SPEC) == 77


@pytest.mark.parametrize("name", ["rate", "max_connections", "max_message_bytes", "write_timeout"])
@pytest.mark.parametrize("value", [0, -1, float("inf"), float("nan")])
def test_limits_are_above_zero(name: str, value: float) -> None:
    with pytest.raises(UserError, match=f"{name}={value}"):
        Limits(**{name: value})


def test_a_bucket_fills_at_its_rate(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr(limits.time, "monotonic", lambda: now)
    bucket = TokenBucket(4)
    assert [bucket.take() for _ in range(5)] == [True] * 4 + [False]
    now += 0.5
    assert [bucket.take() for _ in range(3)] == [True, True, False]
    now += 60
    assert sum(bucket.take() for _ in range(20)) == 4


def test_a_slow_rate_lets_the_first_request_through(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr(limits.time, "monotonic", lambda: now)
    bucket = TokenBucket(0.1)
    assert bucket.take() and not bucket.take()
    now += 10
    assert bucket.take()
