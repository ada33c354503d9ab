"""Plans and schedulers under a simulated clock."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from robopolicy.configuration import dataclass_from
from robopolicy.errors import UserError
from robopolicy.runtime.chunk_scheduler import (
    AsynchronousSettings,
    RealTimeChunkingSettings,
    SchedulerSettings,
    SynchronousSettings,
    TemporalEnsemblingSettings,
    action_latency,
    make_scheduler,
)
from robopolicy.runtime.clock import NS, nanoseconds
from robopolicy.runtime.contract import Action, CommandTopic, Contract, ObservationKey, Part, Stream
from robopolicy.runtime.delays import DelayEstimate, DelaySettings
from robopolicy.runtime.exchange import Chunk
from robopolicy.runtime.plan import ChunkPlan, Curve, knot_velocities
from robopolicy.runtime.temporal_ensembling import ensemble
from tests.runtime.chunks import FPS, STEP, Sampler, drive, path, spec_of

ALL = {
    "synchronous": SynchronousSettings(),
    "asynchronous": AsynchronousSettings(),
    "temporal_ensembling": TemporalEnsemblingSettings(),
    "rtc": RealTimeChunkingSettings(),
    "rtc prefix": RealTimeChunkingSettings(mode="prefix"),
}
each_scheduler = pytest.mark.parametrize("name", ALL)
T0 = 1000 * NS


def curve_through(positions, step=STEP):
    positions = np.asarray(positions, np.float64)
    times = [T0 + i * step for i in range(len(positions))]
    return Curve(times, positions, np.concatenate([np.zeros_like(positions[:1]), knot_velocities(times, positions)]))


knots = st.lists(st.lists(st.floats(-3, 3), min_size=2, max_size=2), min_size=2, max_size=8)


@given(knots)
@settings(max_examples=60, deadline=None)
def test_a_curve_meets_its_knots_smoothly_and_does_not_overshoot(positions):
    curve = curve_through(positions)
    values = np.array(positions)
    for time, value in zip(curve.times, values, strict=True):
        np.testing.assert_allclose(curve.at(time)[0], value, atol=1e-9)
        before, after = (curve.at(time + d) for d in (-1_000, 1_000))
        limit = 1e-6 * 12 * 6 / 0.05**2 + 1e-9  # a microsecond at the largest acceleration of such a cubic
        assert abs(after[0] - before[0]).max() < 1e-3
        if time != curve.times[-1]:
            assert abs(curve.at(time)[1] - after[1]).max() < limit
        if time != curve.times[0]:
            assert abs(curve.at(time - 1)[1] - before[1]).max() < limit
    for i in range(len(values) - 1):
        low, high = np.minimum(values[i], values[i + 1]) - 1e-9, np.maximum(values[i], values[i + 1]) + 1e-9
        for share in (0.1, 0.35, 0.5, 0.8):
            position = curve.at(curve.times[i] + round(share * STEP))[0]
            assert (low <= position).all() and (position <= high).all()


def test_velocities_are_derivatives_and_the_ends_are_at_rest():
    curve = curve_through(path([T0 + i * STEP for i in range(12)]))
    for time in range(T0 + STEP // 3, curve.times[-1], STEP // 4):
        ahead, behind = (curve.at(time + d)[0] for d in (10_000, -10_000))
        np.testing.assert_allclose((ahead - behind) / 2e-5, curve.at(time)[1], atol=1e-3)
    for time in (T0 - NS, curve.times[-1], curve.times[-1] + NS):
        position, velocity = curve.at(time)
        assert not velocity.any() and position.tolist() in (curve.positions[0].tolist(), curve.positions[-1].tolist())
    inner = [T0 + i * STEP for i in range(1, 11)]
    truth = 2 * np.cos(2 * np.array(inner)[:, None] / NS + np.arange(2))
    found = np.array([curve.at(time)[1] for time in inner])
    turning = abs(truth) < 0.2  # velocities are zero at a turn and small beside it
    np.testing.assert_allclose(found[~turning], truth[~turning], atol=0.15)


@given(
    st.integers(0, 40), st.integers(0, 2**32 - 1), st.floats(0, 0.2), st.sampled_from([0.0, 0.013, 0.1]), st.booleans()
)
@settings(max_examples=80, deadline=None)
def test_splicing_never_jumps(when, seed, shift, latency, other):
    """Whatever is spliced in, wherever: position and velocity go on, and the plan ends at rest at the last action."""
    rng = np.random.default_rng(seed)
    latencies = np.array([latency, latency, 0.07 if other else latency])
    plan = ChunkPlan.standing(T0, rng.standard_normal(3), latencies)
    times = [T0 + (i + 1) * STEP for i in range(8)]
    plan, _ = plan.spliced(T0 + NS // 100, times, rng.standard_normal((8, 3)), step=STEP, keep=T0)
    seam = T0 + NS // 100 + when * 13_000_000
    moved = [time + when * 13_000_000 - nanoseconds(shift) for time in times]
    actions = rng.standard_normal((8, 3))
    spliced, late = plan.spliced(seam, moved, actions, step=STEP, keep=T0)
    for time in (seam - 20_000_000, seam - 1, seam):
        if time >= T0:
            for old, new in zip(plan.at(time), spliced.at(time), strict=True):
                np.testing.assert_allclose(new, old, atol=1e-5)
    for at in (spliced.at(seam + 100), plan.at(seam)):
        np.testing.assert_allclose(at[0], plan.at(seam)[0], atol=1e-4)
    np.testing.assert_allclose(spliced.at(seam + 100)[1], plan.at(seam)[1], atol=1e-2)
    position, velocity = spliced.at(spliced.end)
    np.testing.assert_allclose(position, actions[-1])
    assert not velocity.any()
    assert late == any(moved[-1] - nanoseconds(v) < seam + STEP // 2 for v in latencies)


def test_each_entry_is_sent_its_own_latency_earlier():
    latency = np.array([0.0, 0.1])
    times = [T0 + (i + 1) * STEP for i in range(20)]
    plan = ChunkPlan.standing(T0, np.zeros(2), latency)
    plan, late = plan.spliced(T0, times, path(times), step=STEP, keep=T0)
    assert not late
    for i in range(4, 18):
        np.testing.assert_allclose(plan.at(times[i])[0][0], path([times[i]])[0, 0], atol=1e-12)
        np.testing.assert_allclose(plan.at(times[i] - nanoseconds(0.1))[0][1], path([times[i]])[0, 1], atol=1e-12)
    positions, known = plan.reached([T0 - STEP, *times, times[-1] + STEP])
    np.testing.assert_allclose(positions[3:-1], path(times)[2:], atol=1e-12)
    assert known.tolist() == [False, False, *[True] * 19, False]  # before T0 + 0.1 s the slow entry obeys nobody
    assert (plan.end, plan.rest) == (times[-1], times[-1])


def test_what_cannot_be_sent_in_time_is_dropped_and_nothing_left_is_counted():
    plan = ChunkPlan.standing(T0, np.zeros(1), np.zeros(1))
    times = [T0 + (i + 1) * STEP for i in range(4)]
    seam = times[1] - STEP // 2 + 1  # the second action is a nanosecond too near
    spliced, late = plan.spliced(seam, times, np.arange(1.0, 5.0)[:, None], step=STEP, keep=T0)
    assert not late and spliced.parts[0].curve.times == [T0, seam, *times[2:]]
    spliced, late = plan.spliced(times[-1], times, np.arange(1.0, 5.0)[:, None], step=STEP, keep=T0)
    assert late and spliced.end == times[-1] + STEP and spliced.at(spliced.end)[0] == [4.0]


@each_scheduler
@pytest.mark.parametrize("delay", [0.0, 0.1, 0.35])
def test_commands_never_jump(name, delay):
    """What a robot is told, every 10 ms: positions follow velocities, and velocities do not jump at a swap."""
    latency = np.array([0.0, 0.04])
    run = drive(ALL[name], lambda k: delay * (0.8 + 0.2 * (k % 3)), latency=latency)
    assert len(run.swaps) > 3
    mean = (run.velocities[1:] + run.velocities[:-1]) / 2 * 0.01
    # a cubic's acceleration changes at most by that of the largest step between two knots
    largest = abs(np.diff(run.velocities, axis=0)).max()
    assert abs(np.diff(run.positions, axis=0) - mean).max() < 0.01 * largest + 1e-9
    for swap in run.swaps[1:]:
        seam = swap.accepted_at + 20_000_000
        for old, new in zip(swap.before.at(seam), swap.after.at(seam), strict=True):
            np.testing.assert_allclose(new, old, atol=1e-6)


@each_scheduler
def test_the_same_run_twice(name):
    first, second = (drive(ALL[name], lambda k: 0.05 + 0.01 * (k % 7), seconds=3) for _ in range(2))
    assert np.array_equal(first.positions, second.positions)
    assert first.scheduler.counters == second.scheduler.counters


@each_scheduler
def test_plans_forget_their_past(name):
    run = drive(ALL[name], 0.1, seconds=12)
    knots_kept = max(len(part.curve.times) for part in run.swaps[-1].after.parts)
    assert knots_kept < 16 + 2.5 * FPS  # a chunk, and a second of knots and seams


def test_synchronous_stands_still_to_observe_and_starts_where_it_stands():
    spec = spec_of()
    run = drive(SynchronousSettings(settle=0.2), 0.3, sampler=Sampler(spec, spread=0.0))
    assert run.paused > 0.4  # 0.4 s of motion, 0.2 s to settle, 0.3 s of inference
    for before, swap in zip(run.swaps, run.swaps[1:], strict=False):
        end = before.after.end
        assert swap.observed_at + nanoseconds(0.03) >= end + nanoseconds(0.2)
        assert swap.agreement.previous is None
        seam = swap.accepted_at + nanoseconds(0.02)
        assert swap.after.end == seam + 8 * STEP
        for k in range(8):  # the chunk's own actions, from its arrival on
            np.testing.assert_allclose(swap.after.at(seam + (k + 1) * STEP)[0], swap.actions[1 + k], atol=1e-6)


def test_asynchronous_keeps_moving_and_drops_the_past():
    run = drive(AsynchronousSettings(), 0.25)
    assert run.paused < 0.01 and run.scheduler.counters["over_budget"] == 0
    for swap in run.swaps[1:]:
        assert swap.agreement.previous is None
        seam = swap.accepted_at + nanoseconds(0.02)
        reached = [swap.observed_at + i * STEP for i in range(16)]
        kept = [i for i, time in enumerate(reached) if time >= seam + STEP // 2]
        assert 0 < len(kept) < 12
        for i in kept:
            np.testing.assert_allclose(swap.after.at(reached[i])[0], swap.actions[i], atol=1e-6)


def test_a_plan_that_was_used_up_goes_on_with_the_next_action():
    """The robot stood while the chunk was late: time that it stood does not count."""
    run = drive(AsynchronousSettings(), 0.8, sampler=Sampler(spec_of(), spread=0.0))
    swap = run.swaps[2]
    seam, end = swap.accepted_at + nanoseconds(0.02), swap.before.end
    assert seam > end
    stood = seam - end
    first = next(i for i in range(16) if swap.observed_at + i * STEP + stood >= seam + STEP // 2)
    assert first > 1  # what it did before it stood counts
    for i in range(first, 16):
        np.testing.assert_allclose(swap.after.at(swap.observed_at + i * STEP + stood)[0], swap.actions[i], atol=1e-6)


def test_a_chunk_that_comes_after_all_of_its_actions_is_counted():
    scheduler = make_scheduler(AsynchronousSettings(), spec_of())
    scheduler.reset(T0, np.zeros(2))
    for observed_at, now in ((T0, T0), (T0 + 8 * STEP, T0 + 8 * STEP)):
        scheduler.request(now, observed_at)
        scheduler.accept(Chunk(0, 0, observed_at, path(range(16)), now, now), now)
    scheduler.request(T0 + 16 * STEP, T0)  # an old observation, as from a stream that hangs
    scheduler.accept(Chunk(0, 0, T0, np.ones((16, 2)), 0, 0), T0 + 16 * STEP)
    assert scheduler.counters["over_budget"] == 1
    assert scheduler.plan().at(T0 + 17 * STEP)[0].tolist() == [1.0, 1.0]


def closed_form(chunks, step, coefficient):
    """ACT's sum for one time step; chunk t begins at step t."""
    covering = [chunk[step - t] for t, chunk in enumerate(chunks) if 0 <= step - t < len(chunk)]
    weights = np.exp(-coefficient * np.arange(len(covering)))
    return (weights[:, None] * covering).sum(axis=0) / weights.sum()


@pytest.mark.parametrize("coefficient", [0.01, 0.0, -0.3, 0.5])
def test_ensembles_are_the_closed_form(coefficient):
    rng = np.random.default_rng(0)
    chunks = rng.standard_normal((9, 6, 3))
    timed = [([T0 + (t + i) * STEP for i in range(6)], chunk) for t, chunk in enumerate(chunks)]
    found = ensemble(timed, timed[-1][0], coefficient)
    for i in range(6):
        np.testing.assert_allclose(found[i], closed_form(chunks, 8 + i, coefficient), atol=1e-12)


@pytest.mark.parametrize("coefficient", [0.01, -0.2])
def test_temporal_ensembling_executes_what_lerobots_would(coefficient):
    pytest.importorskip("draccus", reason="of LeRobot only the motor bus is installed")
    act = pytest.importorskip("lerobot.policies.act.modeling_act", reason="LeRobot is not installed")
    torch = pytest.importorskip("torch")
    spec = spec_of(dim=3, n_obs_steps=1, horizon=6, n_action_steps=1)
    scheduler = make_scheduler(TemporalEnsemblingSettings(coefficient=coefficient), spec)
    theirs = act.ACTTemporalEnsembler(coefficient, 6)
    rng = np.random.default_rng(0)
    scheduler.reset(T0, np.zeros(3))
    for k in range(20):
        now = T0 + k * STEP
        actions = rng.standard_normal((6, 3)).astype(np.float32)
        assert scheduler.wants(now)
        assert scheduler.request(now, now).previous is None
        scheduler.accept(Chunk(k, 0, now, actions, now, now), now)
        wanted = theirs.update(torch.tensor(actions)[None])[0].numpy()
        np.testing.assert_allclose(scheduler.plan().at(now + STEP)[0], wanted, atol=1e-6)


def test_temporal_ensembling_averages_late_chunks_of_any_phase():
    """With 0.17 s per chunk, chunks start off each other's grid; on a common path their mean is the path."""
    run = drive(TemporalEnsemblingSettings(), 0.17, sampler=Sampler(spec_of(), spread=0.0))
    assert run.paused < 0.01 and len(run.swaps) > 25
    late = run.times > T0 + 2 * NS
    np.testing.assert_allclose(run.positions[late], path(run.times[late] + nanoseconds(0.02)), atol=0.01)
    noisy, naive = (drive(s, 0.17) for s in (TemporalEnsemblingSettings(), AsynchronousSettings(execute=1)))
    jumps = [abs(np.diff(r.velocities, axis=0)).max() for r in (noisy, naive)]
    assert jumps[0] < 0.6 * jumps[1]


@each_scheduler
def test_one_inference_at_a_time_until_it_comes_is_lost_or_forgotten(name):
    scheduler = make_scheduler(ALL[name], spec_of())
    assert not scheduler.wants(T0) and scheduler.plan() is None
    scheduler.reset(T0, np.zeros(2))
    assert scheduler.wants(T0) and scheduler.plan() is None
    scheduler.request(T0, T0 - STEP)
    assert not scheduler.wants(T0 + 10 * NS)
    scheduler.lost()
    assert scheduler.wants(T0) and scheduler.counters["lost"] == 1
    scheduler.request(T0, T0 - STEP)
    scheduler.reset(T0 + NS, np.ones(2))
    scheduler.accept(Chunk(0, 0, T0 - STEP, np.zeros((16, 2)), T0, T0), T0 + NS)
    assert scheduler.counters["stale"] == 1 and scheduler.plan() is None and scheduler.wants(T0 + NS)
    scheduler.request(T0 + NS, T0 + NS)
    scheduler.accept(Chunk(1, 0, T0 + NS, np.ones((16, 2)), T0 + NS, T0 + NS), T0 + 2 * NS)
    assert scheduler.plan().at(T0 + 2 * NS)[0].tolist() == [1.0, 1.0]
    assert scheduler.delay.seconds == 1.0


def test_delays_are_the_largest_or_a_percentile_of_the_newest():
    delay = DelayEstimate(DelaySettings(window=3), prior=0.21)
    assert (delay.seconds, delay.steps(0.05), delay.steps(0.05, more=0.04)) == (0.21, 5, 5)
    for seconds in (0.3, 0.1, 0.1):
        delay.add(seconds)
    assert delay.seconds == 0.3 and delay.steps(0.1) == 3  # 0.3 / 0.1 is a little more than 3
    delay.add(0.12)
    assert delay.seconds == 0.12
    half = DelayEstimate(DelaySettings(window=5, percentile=50))
    for seconds in (0.5, 0.1, 0.3, 0.2, 0.4):
        half.add(seconds)
    assert half.seconds == 0.3
    with pytest.raises(UserError, match="window=0"):
        DelaySettings(window=0)


@dataclass(frozen=True)
class Holder:
    """A configuration with a scheduler in it."""

    scheduler: SchedulerSettings = field(default_factory=SynchronousSettings)


def test_schedulers_are_chosen_by_name():
    found = dataclass_from(Holder, {"scheduler": {"name": "rtc", "mode": "prefix", "delay": {"window": 4}}}, "")
    assert found.scheduler == RealTimeChunkingSettings(mode="prefix", delay=DelaySettings(4))
    found = dataclass_from(Holder, {"scheduler": {"name": "temporal_ensembling", "coefficient": 0}}, "")
    assert found.scheduler == TemporalEnsemblingSettings(coefficient=0.0)
    with pytest.raises(UserError, match="'asynchronous'"):
        dataclass_from(Holder, {"scheduler": {"name": "async"}}, "")


def test_settings_that_do_not_fit_are_refused():
    with pytest.raises(UserError, match="has 15 actions"):
        make_scheduler(SynchronousSettings(execute=16), spec_of())
    with pytest.raises(UserError, match="settle"):
        SynchronousSettings(settle=-1.0)
    with pytest.raises(UserError, match="every=0"):
        TemporalEnsemblingSettings(every=0)


def test_latencies_come_from_the_contract():
    streams = {"joints": Stream("joint_states", "sensor_msgs/msg/JointState", 100, 0.1)}
    observations = {"observation.state": ObservationKey((Part("joints", "interpolate", "position", ("a", "b")),))}
    commands = {
        "gripper": CommandTopic("g", "std_msgs/msg/Float64MultiArray", (1,), ("b",), latency=0.12, gripper=True),
        "arm": CommandTopic("a", "std_msgs/msg/Float64MultiArray", (0, 2), ("a", "c"), latency=0.03),
    }
    contract = Contract("two", 20, 100, ("a", "c"), "joints", streams, observations, Action(("a", "b", "c")), commands)
    assert action_latency(contract).tolist() == [0.03, 0.12, 0.03]
