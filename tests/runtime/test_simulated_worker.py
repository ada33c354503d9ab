"""Inference under a simulated clock: what comes out when."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from robopolicy.export.open import open_policy
from robopolicy.inference.policy import ExportedPolicy
from robopolicy.runtime.clock import SimulatedClock
from robopolicy.runtime.exchange import Chunk, Request
from robopolicy.runtime.inference_process import infer
from robopolicy.runtime.simulated_worker import SimulatedWorker
from tests.runtime.test_worker import SPEC, save

MS = 1_000_000


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ExportedPolicy]:
    spec = replace(SPEC, observations=SPEC.observations[:1])
    with closing(open_policy(save(spec, tmp_path_factory.mktemp("simulated") / "policy"), "torch")) as opened:
        yield opened


def request(number: int, **changes: object) -> Request:
    values = {"observation.state": np.full((2, 2), 0.1 * number)}
    return Request(**{"id": number, "epoch": 0, "observed_at": 0, "values": values, "seed": number} | changes)  # type: ignore[arg-type]


def test_a_chunk_comes_when_the_clock_has_passed_its_delay(policy):
    clock = SimulatedClock(5)
    worker = SimulatedWorker(policy, clock, lambda number: 0.1 * number)
    asked = request(2, epoch=3, observed_at=4)
    worker.submit(asked)
    assert worker.health().busy_since == 5 and worker.spec == policy.spec
    clock.advance(200 * MS - 1)
    assert worker.poll() is None
    clock.advance(1)
    chunk = worker.poll()
    assert (chunk.id, chunk.epoch, chunk.observed_at) == (2, 3, 4)
    assert (chunk.started, chunk.finished) == (5, 200 * MS + 5)
    np.testing.assert_array_equal(chunk.actions, infer(policy, asked))
    assert worker.poll() is None and worker.health().busy_since is None


def test_the_newest_request_waits_and_begins_when_the_one_before_ends(policy):
    clock = SimulatedClock()
    worker = SimulatedWorker(policy, clock, lambda number: 0.1)
    for number in (1, 2, 3):
        worker.submit(request(number))
        clock.advance(10 * MS)
    assert worker.health().superseded == 1
    clock.advance(120 * MS)
    assert worker.health().busy_since == 100 * MS
    assert worker.poll().id == 1
    clock.advance(50 * MS)
    third = worker.poll()
    assert third.id == 3 and (third.started, third.finished) == (100 * MS, 200 * MS)


def chunks(policy: ExportedPolicy, asked: dict[int, int], every: int) -> dict[int, Chunk]:
    """Chunks by id, of requests at some milliseconds, in a loop that asks for them every few milliseconds."""
    clock = SimulatedClock()
    worker = SimulatedWorker(policy, clock, lambda number: 0.007 * (number % 5))
    found = {}
    for tick in range(300):
        if tick in asked:
            worker.submit(request(asked[tick]))
        if tick % every == 0 and (chunk := worker.poll()):
            found[chunk.id] = chunk
        clock.advance(MS)
    return found


@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(0, 250), unique=True, max_size=12), st.integers(2, 40))
def test_asking_more_often_changes_nothing(policy, ticks, every):
    asked = {tick: number for number, tick in enumerate(sorted(ticks), 1)}
    often, seldom = chunks(policy, asked, 1), chunks(policy, asked, every)
    assert seldom.keys() <= often.keys() and (not asked or max(often) == max(seldom) == len(asked))
    for number, chunk in seldom.items():
        assert (chunk.started, chunk.finished) == (often[number].started, often[number].finished)
        np.testing.assert_array_equal(chunk.actions, often[number].actions)


def test_a_failed_inference_is_counted_when_it_ends(policy):
    clock = SimulatedClock()
    worker = SimulatedWorker(policy, clock, lambda number: 0.1)
    worker.submit(request(1, values={"observation.state": np.full((2, 2), np.nan)}))
    assert worker.health().failures == 0
    clock.advance(100 * MS)
    assert worker.poll() is None
    assert worker.health().failures == 1 and "not finite" in worker.health().error
    worker.submit(request(2))
    clock.advance(100 * MS)
    assert worker.poll().id == 2 and worker.health().error == ""


def test_a_closed_worker_is_not_alive(policy):
    clock = SimulatedClock()
    worker = SimulatedWorker(policy, clock, lambda number: 0.0)
    worker.submit(request(1))
    worker.close()
    worker.submit(request(2))
    assert not worker.health().alive and worker.health().busy_since is None
