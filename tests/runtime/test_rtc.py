"""Real-time chunking under a simulated clock: masks, what is agreed on, and delays that are longer than they may be."""

from __future__ import annotations

import math
from contextlib import closing

import numpy as np
import pytest
import torch

from robopolicy.errors import UserError
from robopolicy.export.open import open_policy
from robopolicy.export.rtc_config import GUIDED_ENGINE, RtcConfig
from robopolicy.policies.bundle import save_bundle
from robopolicy.runtime.chunk_scheduler import (
    AsynchronousSettings,
    DelaySettings,
    RealTimeChunkingSettings,
    make_scheduler,
)
from robopolicy.runtime.clock import NS, nanoseconds
from robopolicy.runtime.exchange import Chunk
from robopolicy.runtime.rtc import largest_delay, prefix_mask, soft_mask
from tests.export.test_families import exported, onnx_sessions, opinionated, short
from tests.policies.test_contract import make
from tests.runtime.chunks import STEP, Sampler, drive, path, spec_of

T0 = 1000 * NS
SOFT, PREFIX = RealTimeChunkingSettings(), RealTimeChunkingSettings(mode="prefix")
both_modes = pytest.mark.parametrize("settings", [SOFT, PREFIX], ids=["soft", "prefix"])


@pytest.mark.parametrize(("horizon", "delay", "executed"), [(50, 5, 25), (15, 4, 8), (15, 7, 8), (16, 0, 8), (8, 3, 3)])
def test_the_soft_mask_is_the_papers_equation(horizon, delay, executed):
    mask = soft_mask(horizon, delay, executed)
    for i in range(horizon):
        c = (horizon - executed - i) / (horizon - executed - delay + 1)
        wanted = 1.0 if i < delay else c * (math.exp(c) - 1) / (math.e - 1) if i < horizon - executed else 0.0
        assert mask[i] == pytest.approx(wanted, abs=1e-7)
    assert (np.diff(mask) <= 0).all() and mask.dtype == np.float32


def test_the_prefix_mask_is_all_or_nothing():
    assert prefix_mask(6, 2).tolist() == [1, 1, 0, 0, 0, 0]


def test_the_largest_delay_is_the_last_for_which_the_papers_condition_holds():
    for horizon in range(2, 20):
        for execute in range(1, horizon + 1):
            possible = [d for d in range(horizon) if any(d <= s <= horizon - d for s in range(execute, horizon + 1))]
            assert largest_delay(horizon, execute) == max(possible, default=0)


def test_an_expected_delay_that_cannot_be_is_refused_with_what_could():
    assert make_scheduler(SOFT, spec_of(), prior_delay=0.35)  # 7 steps, 15 - 8
    with pytest.raises(UserError, match=r"allows a delay of 7 steps; 8 are expected \(0.36 s of inference, 0 s"):
        make_scheduler(SOFT, spec_of(), prior_delay=0.36)
    with pytest.raises(UserError, match=r"7 steps; 8 are expected \(0.3 s of inference, 0.08 s until"):
        make_scheduler(SOFT, spec_of(), prior_delay=0.3, lookahead=0.02, latency=np.array([0.0, 0.06]))
    with pytest.raises(UserError, match="Set a smaller execute"):
        make_scheduler(RealTimeChunkingSettings(execute=15), spec_of())


def test_prefixes_reach_as_far_as_the_policy_was_trained_for():
    with pytest.raises(UserError, match="trained without a prefix"):
        make_scheduler(PREFIX, spec_of(), prefix_steps=0)
    with pytest.raises(UserError, match=r"delay of 5 steps is expected, .* up to 4\."):
        make_scheduler(PREFIX, spec_of(), prior_delay=0.25, prefix_steps=4)
    assert make_scheduler(SOFT, spec_of(), prior_delay=0.25, prefix_steps=0)
    scheduler, actions = followed(PREFIX, prefix_steps=3, delay=0.22)
    agreement = scheduler.request(T0 + 8 * STEP, T0 + 8 * STEP)
    assert agreement.mask.tolist() == [0, 1, 1, 1, *[0] * 12]  # the past is none of it; 5 steps are expected
    assert scheduler.counters["delay_clipped"] == 1
    assert not scheduler.accept(Chunk(1, 0, T0 + 8 * STEP, actions, 0, 0), T0 + 12 * STEP)
    assert scheduler.counters["late"] == 1 and scheduler.wants(T0 + 12 * STEP)
    scheduler.request(T0 + 12 * STEP, T0 + 12 * STEP)
    assert scheduler.accept(Chunk(2, 0, T0 + 12 * STEP, actions, 0, 0), T0 + 15 * STEP)


def test_the_mode_and_the_engine_belong_together():
    guided = RealTimeChunkingSettings(mode="vjp")
    guided.check_engine(GUIDED_ENGINE)
    SOFT.check_engine("openvino-fp32")
    with pytest.raises(UserError, match="mode=vjp does not fit engine=torch"):
        guided.check_engine("torch")
    with pytest.raises(UserError, match="mode=soft does not fit engine=torch-rtc"):
        SOFT.check_engine(GUIDED_ENGINE)


def test_strength_and_start_are_of_the_guided_engine():
    assert SOFT.guidance is PREFIX.guidance is None
    assert RealTimeChunkingSettings(mode="vjp").guidance == RtcConfig()
    assert RealTimeChunkingSettings(mode="vjp", beta=0.0, warm_start=3).guidance == RtcConfig(0.0, 3)
    for given in ({"beta": 0.0}, {"warm_start": 2}, {"mode": "prefix", "warm_start": 2}):
        with pytest.raises(UserError, match=r"are settings of scheduler.mode=vjp, found scheduler.mode=(soft|prefix)"):
            RealTimeChunkingSettings(**given)
    for given in ({"beta": -0.5}, {"warm_start": -1}):
        with pytest.raises(UserError, match="must not be negative"):
            RealTimeChunkingSettings(mode="vjp", **given)


def test_strength_and_start_reach_the_engine_of_a_bundle(tmp_path, threads_as_before):
    """Network calls are counted: a chunk that has one before saves as many as the start leaves out."""
    policy = opinionated(make("dit flow", low=10.0, high=30.0))
    bundle = save_bundle(policy.eval(), tmp_path / "policy")
    guided = RealTimeChunkingSettings(mode="vjp", beta=2.0, warm_start=5)
    calls = []
    with closing(open_policy(bundle, GUIDED_ENGINE, rtc=guided.guidance)) as engine:
        sampler = engine.sessions["sampler"]._module
        assert sampler.config == RtcConfig(2.0, 5)
        sampler.step.network.register_forward_pre_hook(lambda *_: calls.append(1))
        observations = {"observation.state": np.full((1, 2, 2), 20.0)}
        noise, previous = engine.draw_noise(1, np.random.default_rng(0)), np.full((1, 8, 2), 15.0)
        engine.sample(observations, noise)
        assert len(calls) == 8
        engine.sample(observations, noise, previous, soft_mask(8, 2, 4)[None])
        assert len(calls) == 8 + 3
        assert engine.usual_seconds(runs=4) > 0
        assert len(calls) == 2 * (8 + 3) + 4 * 3
    with closing(open_policy(bundle, GUIDED_ENGINE)) as engine:
        assert engine.sessions["sampler"]._module.config == RtcConfig()
    with pytest.raises(UserError, match="warm_start=8 must lie in 0..7: this sampler makes 8"):
        open_policy(bundle, GUIDED_ENGINE, rtc=RtcConfig(warm_start=8))
    with pytest.raises(UserError, match="engine=torch does not compute the published guidance"):
        open_policy(bundle, "torch", rtc=RtcConfig())


def followed(settings=SOFT, *, delay=0.1, **options):
    """A scheduler that follows its first chunk, begun at T0; and the chunk."""
    scheduler = make_scheduler(settings, spec_of(), **options)
    scheduler.reset(T0, path([T0])[0])
    scheduler.request(T0, T0)
    actions = path([T0 + i * STEP for i in range(16)])
    scheduler.accept(Chunk(0, 0, T0, actions, T0, T0), T0)
    scheduler.delay.add(delay)
    return scheduler, actions


def test_the_chunk_before_is_shifted_to_the_times_of_the_next():
    scheduler, actions = followed()
    assert not scheduler.wants(T0 + 8 * STEP - 1) and scheduler.wants(T0 + 8 * STEP)
    agreement = scheduler.request(T0 + 8 * STEP, T0 + 8 * STEP)
    assert agreement.previous.shape == (16, 2) and agreement.previous.dtype == np.float32
    np.testing.assert_allclose(agreement.previous[:8], actions[8:], atol=1e-6)
    np.testing.assert_allclose(agreement.previous[8:], actions[-1:].repeat(8, axis=0), atol=1e-6)  # right padded
    # the entry before the newest observation was carried out; 7 of 15 actions are left, 2 of them within 0.1 s
    np.testing.assert_allclose(agreement.mask, [1.0, *soft_mask(15, 2, 8)])


def test_observations_need_not_lie_on_a_grid():
    scheduler, actions = followed()
    observed_at = T0 + 8 * STEP + STEP // 3
    agreement = scheduler.request(observed_at + 1, observed_at)
    truth = path([observed_at + i * STEP for i in range(7)])
    np.testing.assert_allclose(agreement.previous[:6], truth[:6], atol=2e-3)
    np.testing.assert_allclose(agreement.previous[6], truth[6], atol=2e-2)  # where the plan comes to rest
    np.testing.assert_allclose(agreement.mask, [1.0, *soft_mask(15, 2, 9)])


def test_a_past_that_the_plan_does_not_know_is_not_frozen():
    scheduler, _ = followed()
    agreement = scheduler.request(T0 + 1, T0 - STEP // 2)  # its first entry lies half a step before the reset
    assert agreement.mask[0] == 0 and agreement.mask[1] == 1


def test_nothing_is_agreed_on_before_the_first_chunk_and_after_the_last():
    scheduler, _ = followed()
    scheduler.lost()
    late = T0 + 30 * STEP
    assert scheduler.wants(late) and scheduler.request(late, late).mask is None
    scheduler.reset(late, np.zeros(2))
    assert scheduler.request(late, late).previous is None


def test_what_is_committed_includes_latency_and_lookahead():
    plain, _ = followed()
    slow, _ = followed(lookahead=0.02, latency=np.array([0.0, 0.06]))
    masks = [s.request(T0 + 8 * STEP, T0 + 8 * STEP).mask for s in (plain, slow)]
    assert [(mask[1:] == 1).sum() for mask in masks] == [2, 4]  # 0.1 s and 0.18 s of steps of 0.05 s


@both_modes
@pytest.mark.parametrize("delay", [0.05, 0.2, 0.22])
@pytest.mark.parametrize(
    ("tick", "tolerance"), [(0.05, (1e-6, 1e-4)), (0.01, (2e-4, 1e-2))], ids=["in step", "any phase"]
)
def test_what_is_committed_stays_when_the_sampler_keeps_to_the_mask(settings, delay, tick, tolerance):
    """The curve that the robot follows while it waits, and until the last frozen action, stays as it was.

    Exactly where chunks begin at multiples of the control step; otherwise actions are read between those before.
    """

    def took(k):
        return delay * (1 if k % 4 != 1 else 0.7)

    latency = np.array([0.0, 0.03])
    run = drive(settings, took, tick=tick, observation_age=0.05, latency=latency, prior=delay + 0.05)
    assert run.scheduler.counters["late"] == 0 and len(run.swaps) > 8 and run.paused == 0
    for swap in run.swaps[1:]:
        frozen = int((swap.agreement.mask[1:] == 1).sum())
        assert frozen >= delay / 0.05
        np.testing.assert_allclose(swap.actions[1 : frozen + 1], swap.agreement.previous[1 : frozen + 1], atol=1e-6)
        last = swap.observed_at + (frozen - 1) * STEP  # neighbours of the last frozen action are frozen, too
        for sent in range(swap.accepted_at, last - nanoseconds(0.03), nanoseconds(0.01)):
            for old, new, atol in zip(swap.before.at(sent), swap.after.at(sent), tolerance, strict=True):
                np.testing.assert_allclose(new, old, atol=atol)


def test_chunks_that_disagree_meet_more_smoothly_than_without_agreement():
    agreed, naive = (drive(s, 0.2, seconds=20) for s in (SOFT, AsynchronousSettings()))
    strongest = []
    for run in (agreed, naive):
        assert run.paused == 0
        moving = run.velocities[run.times > T0 + 2 * NS]  # later than the first chunk, which began in standing
        strongest.append(np.sort(abs(np.diff(moving, axis=0)).max(axis=1))[-50:].mean())
    assert strongest[0] < 0.5 * strongest[1]


def test_delays_that_vary_are_covered_by_the_largest_of_the_window():
    delays = [0.1, 0.22, 0.12, 0.1, 0.18]
    run = drive(RealTimeChunkingSettings(delay=DelaySettings(window=5)), lambda k: delays[k % 5], seconds=15, prior=0.2)
    assert run.scheduler.counters["late"] == 1  # the first 0.22 s
    assert run.scheduler.delay.seconds == pytest.approx(0.25)  # with the age of the observation
    median = drive(
        RealTimeChunkingSettings(delay=DelaySettings(window=5, percentile=50)), lambda k: delays[k % 5], seconds=15
    )
    assert median.scheduler.counters["late"] > 5


def test_a_prefix_that_was_too_short_is_not_used():
    """A policy trained on prefixes knows nothing of what came after; the robot goes on with the chunk before."""
    slow = 5
    run = drive(PREFIX, lambda k: 0.2 if k == slow else 0.07, seconds=8, prior=0.1)
    counters = run.scheduler.counters
    assert counters["late"] == 1 and run.paused == 0
    soft = drive(SOFT, lambda k: 0.2 if k == slow else 0.07, seconds=8, prior=0.1)
    assert soft.scheduler.counters["late"] == 1
    gaps = [np.diff([swap.accepted_at for swap in r.swaps]).max() / NS for r in (run, soft)]
    assert gaps[0] > gaps[1]  # a chunk is missing
    longest = max(int((swap.agreement.mask[1:] == 1).sum()) for swap in run.swaps[1:])
    assert longest == math.ceil(0.25 / 0.05)  # the next requests expect 0.2 s, 0.03 s and 0.02 s


@both_modes
def test_delays_longer_than_a_chunk_end_in_standing_still_and_are_counted(settings):
    spec = spec_of()
    run = drive(settings, lambda k: 0.9 if 3 <= k < 7 else 0.1, seconds=14, sampler=Sampler(spec, spread=0.02))
    counters = run.scheduler.counters
    assert counters["delay_clipped"] > 0 and counters["late"] > 0
    assert 0 < run.paused < 0.4
    for swap in run.swaps[1:]:
        seam = swap.accepted_at + nanoseconds(0.02)
        for old, new in zip(swap.before.at(seam), swap.after.at(seam), strict=True):
            np.testing.assert_allclose(new, old, atol=1e-6)
    after = run.times > run.times[-1] - 2 * NS  # and then it recovers
    assert (abs(run.velocities[after]).max(axis=1) > 0).all()


@pytest.fixture
def threads_as_before():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def engine(tmp_path_factory):
    """A real engine: a small network with random weights, exported to ONNX."""
    policy = short(opinionated(make("unet flow", low=10.0, high=30.0)), 4)
    threads = torch.get_num_threads()
    sessions = {k: v for k, v in onnx_sessions(policy, tmp_path_factory.mktemp("engine")).items() if k != "denoiser"}
    yield exported(policy, sessions)
    torch.set_num_threads(threads)


@both_modes
def test_with_a_real_engine(engine, settings):
    """Eight actions at 10 Hz, 0.2 s of inference: what is committed comes back, and the plan goes on smoothly."""
    spec, rng = engine.spec, np.random.default_rng(0)
    step = nanoseconds(1 / spec.fps)
    scheduler = make_scheduler(settings, spec, prior_delay=0.2)
    scheduler.reset(T0, np.full(2, 20.0))
    now, free_error, error = T0, [], []
    for k in range(8):
        assert scheduler.wants(now)
        observed_at = now
        agreement = scheduler.request(now, observed_at)
        state = np.full((1, 2, 2), 15.0 + k, np.float32)
        row = {} if agreement.mask is None else {"previous": agreement.previous[None], "mask": agreement.mask[None]}
        noise = engine.draw_noise(1, rng)
        chunk = engine.sample({"observation.state": state}, noise, **row)[0]
        if agreement.mask is not None:
            kept = agreement.mask == 1
            assert kept[1:3].all()  # 0.2 s are two actions
            error.append(abs(chunk - agreement.previous)[kept].max())
            free_error.append(
                abs(engine.sample({"observation.state": state}, noise)[0] - agreement.previous)[kept].max()
            )
        now += nanoseconds(0.2)
        before = scheduler.plan()
        scheduler.accept(Chunk(k, 0, observed_at, chunk, observed_at, now), now)
        if before is not None:
            for old, new in zip(before.at(now), scheduler.plan().at(now), strict=True):
                np.testing.assert_allclose(new, old, atol=1e-4)
        now = observed_at + 4 * step if k else now + 4 * step
    assert len(error) == 7 and scheduler.counters["accepted"] == 8 and scheduler.counters["late"] == 0
    assert max(error) < 1e-3 < 0.5 < max(free_error)
