"""The recorder: rows against the truth, whatever the order in which messages and time come."""

from __future__ import annotations

import resource
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from scipy.interpolate import BPoly, CubicHermiteSpline

from robopolicy.data.store import EpisodeStore
from robopolicy.errors import UserError
from robopolicy.runtime.clock import NS
from robopolicy.runtime.commanded import CommandedMotion, Points
from robopolicy.runtime.contract import Action, CommandTopic, Contract, ObservationKey, Part, Stream
from robopolicy.runtime.recorder import EpisodeRecorder, Phase, open_recording
from robopolicy.runtime.samples import Joints

JOINTS = ("shoulder", "elbow")
MS = NS // 1000


def contract() -> Contract:
    stream = Stream("joint_states", "sensor_msgs/msg/JointState", rate=100, stale_after=0.1, latency=0.01)
    return Contract(
        robot="arm",
        policy_rate=20,
        command_rate=100,
        joints=JOINTS,
        measured="joints",
        streams={"joints": stream, "tracker": replace(stream, topic="tracker", rate=30, latency=0.0)},
        observations={
            "observation.state": ObservationKey((Part("joints", "interpolate", "position", JOINTS),), "rad"),
            "observation.object": ObservationKey((Part("tracker", "hold", "position", ("x",)),), "m"),
        },
        action=Action(JOINTS, unit="rad"),
        commands={"arm": CommandTopic("commands", "trajectory_msgs/msg/JointTrajectory", (0, 1), JOINTS, latency=0.02)},
    )


def signal_at(time: int | np.ndarray) -> np.ndarray:
    """What the joints do: (..., 2) rad."""
    seconds = np.asarray(time, dtype=np.float64) / NS
    return np.stack([np.sin(2 * seconds), 0.3 * np.cos(3 * seconds)], axis=-1)


def events(seconds: float, seed: int = 0) -> list[tuple[int, str, object]]:
    """Messages by the time at which they came, with jitter of stamps and of the way."""
    rng = np.random.default_rng(seed)
    told: list[tuple[int, str, object]] = []
    for name, rate, latency in (("joints", 100, 10 * MS), ("tracker", 30, 0)):
        for k in range(round(seconds * rate)):
            moment = NS + round((k + rng.uniform(-0.3, 0.3)) * NS / rate)
            value = signal_at(moment) if name == "joints" else np.array([float(moment) / NS])
            told.append(
                (
                    moment + latency + int(rng.uniform(0, 4 * MS)),
                    name,
                    (moment + latency, Joints(JOINTS if name == "joints" else ("x",), position=value)),
                )
            )
    for k in range(round(seconds * 20)):
        received = NS + k * 50 * MS + int(rng.uniform(0, 3 * MS))
        times = received + np.arange(1, 8) * 40 * MS
        # The motion that lies `latency` later, as one commands who knows the robot's delay.
        positions = signal_at(times + 20 * MS)
        velocities = (signal_at(times + 21 * MS) - signal_at(times + 19 * MS)) / 0.002
        told.append((received, "arm", Points(times, positions, velocities)))
    return sorted(told, key=lambda event: event[0])


def play(recorder: EpisodeRecorder, told: list[tuple[int, str, object]], *, start: int, every: int = 1) -> int:
    """Feed a recorder, letting it look at the time after every so many messages; returns the time at the end."""
    started = False
    for i, (received, name, message) in enumerate(told):
        if not started and received >= start:
            recorder.start(start)
            started = True
        if name == "arm":
            assert isinstance(message, Points)
            recorder.command(name, received, message)
        else:
            stamp, value = message  # type: ignore[misc]
            assert recorder.observe(name, stamp, received, value) == ""
        if i % every == 0:
            recorder.advance(received)
    return told[-1][0]


@pytest.fixture
def store(tmp_path: Path) -> Iterator[EpisodeStore]:
    with open_recording(tmp_path / "data.zarr", contract()) as opened:
        yield opened


def test_rows_are_the_signal_at_the_grid(store: EpisodeStore) -> None:
    recorder = EpisodeRecorder(contract(), store, task="wave")
    told = events(4.0)
    start = NS + 300 * MS
    stored = recorder.finish(play(recorder, told, start=start), True)
    assert stored.rows > 60 and recorder.phase is Phase.IDLE
    episode = store.episode(0)
    begin = next(received for received, name, _ in told if name == "arm" and received >= start)
    grid = begin + np.round(np.arange(stored.rows) * NS / 20).astype(np.int64)
    np.testing.assert_allclose(episode["timestamp"], (grid - begin) / NS, atol=1e-12)
    # Linear between samples at most 16 ms apart: h^2 / 8 of the second derivative (4 rad/s^2).
    np.testing.assert_allclose(episode["observation.state"], signal_at(grid), atol=0.016**2 / 8 * 4 + 1e-6)
    # The robot reaches at t + dt what was commanded `latency` before; the splines are that exact.
    np.testing.assert_allclose(episode["action"], signal_at(grid + 50 * MS), atol=2e-4)
    held = episode["observation.object"][:, 0]
    assert (held <= grid / NS + 1e-6).all() and (held > grid / NS - 0.06).all()
    assert store.tasks == ["wave"] and store.episode_success == [True] and store.behaviours == ["teleoperated"]


def test_rows_do_not_depend_on_when_they_are_made(tmp_path: Path) -> None:
    told = events(3.0, seed=4)
    episodes = []
    for every in (1, 17):
        with open_recording(tmp_path / f"{every}.zarr", contract()) as store:
            recorder = EpisodeRecorder(contract(), store)
            end = play(recorder, told, start=NS + 200 * MS, every=every)
            recorder.finish(end, True)
            episodes.append(store.episode(0))
    for key, values in episodes[0].items():
        np.testing.assert_array_equal(values, episodes[1][key], err_msg=key)


def test_a_silent_stream_ends_the_episode_and_it_is_no_success(store: EpisodeStore) -> None:
    recorder = EpisodeRecorder(contract(), store)
    told = events(3.0)
    cut = [event for event in told if event[1] != "joints" or event[0] < 2 * NS]
    end = play(recorder, cut, start=NS + 200 * MS)
    assert recorder.phase is Phase.STOPPED and "streams.joints (joint_states) was silent" in recorder.reason
    with pytest.raises(UserError, match="cannot be a success.*silent"):
        recorder.finish(end, True)
    rows = recorder.rows
    assert 14 <= rows <= 19  # 0.8 s and what `stale_after` bridges
    assert recorder.finish(end, False).rows == rows
    assert store.episode_success == [False]


def test_an_episode_wants_streams_and_commands(store: EpisodeStore) -> None:
    recorder = EpisodeRecorder(contract(), store)
    with pytest.raises(UserError, match="streams.joints.*no message has come"):
        recorder.start(NS)
    told = [event for event in events(2.0) if event[1] != "arm"]
    end = play(recorder, told, start=NS + 500 * MS)
    assert recorder.phase is Phase.WAITING and recorder.reason == "no command has come on commands"
    with pytest.raises(UserError, match="no rows yet"):
        recorder.finish(end, True)
    recorder.discard()
    assert recorder.phase is Phase.IDLE and store.n_episodes == 0


def test_an_episode_ends_at_its_longest(store: EpisodeStore) -> None:
    recorder = EpisodeRecorder(contract(), store, max_seconds=1.0)
    end = play(recorder, events(3.0), start=NS + 200 * MS)
    assert recorder.phase is Phase.STOPPED and "reached 1 s" in recorder.reason
    assert recorder.finish(end, True).rows == 20


def test_who_drove_is_stored(tmp_path: Path) -> None:
    with open_recording(tmp_path / "data.zarr", contract(), intervention=True) as store:
        recorder = EpisodeRecorder(contract(), store, behaviour="policy")
        recorder.intervene(NS, False)
        recorder.intervene(2 * NS, True)
        recorder.intervene(2 * NS + 500 * MS, False)
        recorder.finish(play(recorder, events(3.0), start=NS + 200 * MS), True)
        episode = store.episode(0)
        drove = episode["timestamp"][episode["intervention"] == 1]
    assert len(drove) == 10 and np.ptp(drove) == pytest.approx(0.45)


@contextmanager
def no_room() -> Iterator[None]:
    """Files cannot grow, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (64, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, handler)


def test_without_room_nothing_is_lost(store: EpisodeStore) -> None:
    recorder = EpisodeRecorder(contract(), store)
    told = events(2.0)
    recorder.finish(play(recorder, told, start=NS + 200 * MS), True)
    first = store.episode(0)
    shifted = [(r + 10 * NS, n, _later(m, 10 * NS)) for r, n, m in told]
    end = play(recorder, shifted, start=11 * NS + 200 * MS)
    with no_room(), pytest.raises(UserError, match="could not be written.*Earlier episodes are intact"):
        recorder.finish(end, True)
    assert recorder.phase is Phase.NOT_STORED
    with EpisodeStore.open(store.path) as seen:
        assert seen.n_episodes == 1
        for key, values in seen.episode(0).items():
            np.testing.assert_array_equal(values, first[key])
    assert recorder.finish(end, True).index == 1
    with EpisodeStore.open(store.path) as seen:
        assert seen.n_episodes == 2 and seen.episode_success == [True, True]
        np.testing.assert_array_equal(seen.episode(1)["timestamp"], first["timestamp"])


def _later(message: object, by: int) -> object:
    if isinstance(message, Points):
        return replace(message, times=message.times + by)
    stamp, value = message  # type: ignore[misc]
    return stamp + by, value


def test_another_contract_is_not_appended(tmp_path: Path) -> None:
    path = tmp_path / "data.zarr"
    open_recording(path, contract()).close()
    with pytest.raises(UserError, match="exists already"):
        open_recording(path, contract())
    open_recording(path, contract(), append=True).close()
    other = replace(contract(), action=Action(JOINTS, unit="deg"))
    with pytest.raises(UserError, match="contract's action.*deg"):
        open_recording(path, other, append=True)
    with pytest.raises(UserError, match="intervention: found nothing"):
        open_recording(path, contract(), append=True, intervention=True)


@pytest.mark.parametrize("accelerations", [False, True])
def test_splines_are_those_of_the_controller(accelerations: bool) -> None:
    rng = np.random.default_rng(0)
    times = np.array([0.1, 0.25, 0.3, 0.6])
    p, v, a = rng.normal(size=(3, 4, 2))
    points = Points((times * NS).astype(np.int64), p, v, a if accelerations else None)
    motion = CommandedMotion()
    motion.follow(0, points)
    at = np.linspace(0.1, 0.6, 53)[:-1]
    if accelerations:
        truth = BPoly.from_derivatives(times, np.stack([p, v, a], axis=1))
    else:
        truth = CubicHermiteSpline(times, p, v)
    found = [motion.at(round(t * NS)) for t in at]
    for derivative, name in enumerate(("position", "velocity", "acceleration")):
        values = np.stack([getattr(state, name) for state in found])
        np.testing.assert_allclose(values, truth(at, derivative), atol=1e-5, err_msg=name)


def test_a_new_trajectory_goes_on_from_the_commanded_state() -> None:
    motion = CommandedMotion()
    assert motion.at(0) is None
    ramp = Points(np.array([0, NS]), np.array([[0.0], [1.0]]), np.array([[1.0], [1.0]]))
    motion.follow(0, ramp)
    half = NS // 2
    motion.follow(half, Points(np.array([half + NS]), np.array([[0.5]]), np.zeros((1, 1))))
    before, after = motion.at(half - 1), motion.at(half + 1)
    assert before is not None and after is not None
    np.testing.assert_allclose(after.position, before.position, atol=1e-8)
    np.testing.assert_allclose(after.velocity, before.velocity, atol=1e-6)
    end = motion.at(3 * NS)
    assert end is not None and end.position == [0.5] and end.velocity == [0.0]
    motion.forget(NS)
    assert motion.at(half - 1) is None and motion.at(NS) is not None
