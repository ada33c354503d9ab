"""What an operator does becomes a dataset: end to end on PushPuck, with an operator who plays a list of commands."""

from __future__ import annotations

import multiprocessing
import os
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from robopolicy.data.doctor import diagnose
from robopolicy.data.record import record_demonstrations
from robopolicy.data.store import EpisodeStore
from robopolicy.errors import UserError
from robopolicy.teleoperation.actions import action_adapter
from robopolicy.teleoperation.command import Command, SessionKey
from robopolicy.teleoperation.live import make_playable
from robopolicy.teleoperation.session import Phase, Session, open_dataset

from ..data.test_edit import digest
from .scripted import expert_commands, press

START = press(SessionKey.TOGGLE)
FORWARD = Command(np.array([0.1, 0, 0, 0, 0, 0]))


def start_session(env: Any, path: Path, **options: Any) -> Session:
    return Session(env, open_dataset(path, env, append=path.exists()), action_adapter(env), **options)


def play(session: Session, *commands: Command) -> None:
    for command in commands:
        session.advance(command)


def test_two_episodes_are_recorded_and_one_is_taken_back(push_puck: Any, tmp_path: Path) -> None:
    first, second = expert_commands(push_puck, 5), expert_commands(push_puck, 6)
    with start_session(push_puck, tmp_path / "one.zarr", seed=5) as session:
        play(session, _started(first[0]), *first[1:])
        assert (session.recorded, session.phase, session.seed) == (1, Phase.READY, 6)
    path = tmp_path / "two.zarr"
    with start_session(push_puck, path, seed=5) as session:
        play(session, FORWARD, _started(first[0]), *first[1:])  # before the start nothing moves
        play(session, _started(second[0]), *second[1:])
        assert (session.recorded, session.seed) == (2, 7)
        play(session, press(SessionKey.UNDO))
        assert (session.recorded, session.seed) == (1, 6)
        report = session.report
    assert (report.recorded, report.succeeded, report.steps) == (1, 1, len(first))
    assert digest(path) == digest(tmp_path / "one.zarr")
    with EpisodeStore.open(path) as store:
        assert (store.n_episodes, store.n_steps, store.fps) == (1, len(first), 10)
        assert store.tasks == ["push the puck into the ring"]
        assert (store.episode_success, store.episode_seeds) == ([True], [5])
        assert store.behaviours == ["teleoperated"]


def _started(command: Command) -> Command:
    return Command(command.twist, keys=frozenset({SessionKey.TOGGLE}))


def test_the_dataset_is_like_one_of_the_scripted_expert(push_puck: Any, tmp_path: Path) -> None:
    """Same arrays, and the same values where the operator does the same."""
    commands = expert_commands(push_puck, 5)
    with start_session(push_puck, tmp_path / "person.zarr", seed=5, episodes=1) as session:
        play(session, _started(commands[0]), *commands[1:])
        assert session.finished
    record_demonstrations("robopolicy_sim/PushPuck-v0", tmp_path / "expert.zarr", episodes=1, seed=5, progress=False)
    with EpisodeStore.open(tmp_path / "person.zarr") as person, EpisodeStore.open(tmp_path / "expert.zarr") as expert:
        assert person.schema.arrays == expert.schema.arrays
        ours, theirs = person.episode(0), expert.episode(0)
        np.testing.assert_allclose(ours["action"], theirs["action"], atol=1e-5)
        # Contacts amplify what the actions differ by.
        np.testing.assert_allclose(ours["observation.state"], theirs["observation.state"], atol=0.01)
        np.testing.assert_allclose(ours["reward"], theirs["reward"], atol=0.05)
    assert not [problem for problem in diagnose(tmp_path / "person.zarr") if problem.severity == "error"]


@pytest.mark.parametrize("key", [SessionKey.SUCCESS, SessionKey.FAILURE])
def test_the_operator_decides_where_the_environment_does_not(push_puck: Any, tmp_path: Path, key: SessionKey) -> None:
    with start_session(push_puck, tmp_path / "d.zarr") as session:
        play(session, START, FORWARD, FORWARD, press(key))  # while it runs
        play(session, START, FORWARD, START, FORWARD, press(key))  # or after it was stopped
    with EpisodeStore.open(tmp_path / "d.zarr") as store:
        assert store.episode_success == [key is SessionKey.SUCCESS] * 2
        assert store.episode_lengths.tolist() == [3, 2]  # a stopped episode does not go on
        assert store.episode_seeds == [0, 1]


def test_an_episode_that_is_not_confirmed_is_thrown_away(push_puck: Any, tmp_path: Path) -> None:
    with start_session(push_puck, tmp_path / "d.zarr") as session:
        play(session, START, FORWARD, press(SessionKey.UNDO))
        assert (session.phase, session.seed, session.steps) == (Phase.READY, 0, 0)
        start = session.observation["observation.state"].copy()
        play(session, START, FORWARD, START)
        assert session.phase is Phase.REVIEW
        play(session, press(SessionKey.UNDO))
        np.testing.assert_array_equal(session.observation["observation.state"], start)  # the same start again
        play(session, START, FORWARD, press(SessionKey.QUIT))
        assert session.finished
    with EpisodeStore.open(tmp_path / "d.zarr") as store:
        assert store.n_episodes == 0


def test_the_operator_is_asked_when_the_time_is_over(tmp_path: Path) -> None:
    env = make_playable("robopolicy_sim/PushPuck-v0", time_limit=0.5)
    with start_session(env, tmp_path / "d.zarr") as session:
        play(session, START, *[FORWARD] * 10)
        assert (session.phase, session.steps) == (Phase.REVIEW, 5)
        assert session.message.startswith("The time is over. Success or failure?")
        play(session, press(SessionKey.FAILURE))
        assert session.report.episodes_in_dataset == 1
    env.close()


def test_undo_takes_back_only_what_this_session_stored(push_puck: Any, tmp_path: Path) -> None:
    for _ in range(2):
        with start_session(push_puck, tmp_path / "d.zarr") as session:
            play(session, START, FORWARD, press(SessionKey.SUCCESS))
    with start_session(push_puck, tmp_path / "d.zarr") as session:
        assert session.seed == 2  # the first one that is free
        play(session, press(SessionKey.UNDO))
        assert session.message.startswith("Nothing to take back")
    with EpisodeStore.open(tmp_path / "d.zarr") as store:
        assert store.episode_seeds == [0, 1]


def test_a_killed_session_loses_only_the_episode_that_runs(tmp_path: Path) -> None:
    child = multiprocessing.get_context("fork").Process(target=_record_and_be_killed, args=(tmp_path / "d.zarr",))
    child.start()
    child.join()
    assert child.exitcode == -signal.SIGKILL
    env = make_playable("robopolicy_sim/PushPuck-v0", time_limit=20)
    with start_session(env, tmp_path / "d.zarr") as session:
        assert session.report.episodes_in_dataset == 2
        play(session, START, FORWARD, press(SessionKey.SUCCESS))
    with EpisodeStore.open(tmp_path / "d.zarr") as store:
        assert (store.episode_seeds, store.episode_lengths.tolist()) == ([0, 1, 2], [2, 3, 2])
    env.close()


def _record_and_be_killed(path: Path) -> None:
    env = make_playable("robopolicy_sim/PushPuck-v0", time_limit=20)
    session = start_session(env, path)
    play(session, START, FORWARD, press(SessionKey.SUCCESS))
    play(session, START, FORWARD, FORWARD, press(SessionKey.FAILURE))
    play(session, START, FORWARD)
    os.kill(os.getpid(), signal.SIGKILL)


def test_another_environment_cannot_be_recorded_into_a_dataset(push_puck: Any, tmp_path: Path) -> None:
    open_dataset(tmp_path / "d.zarr", push_puck).close()
    with pytest.raises(UserError, match="exists already. Add to it with --append"):
        open_dataset(tmp_path / "d.zarr", push_puck)
    env = make_playable("robopolicy_sim/PushPuck-v0", time_limit=20, cameras=("top",))
    with pytest.raises(UserError, match="(?s)does not fit the dataset.*observation.image.top: found nothing"):
        open_dataset(tmp_path / "d.zarr", env, append=True)
    env.close()
    EpisodeStore.open(tmp_path / "d.zarr", "a").close()  # the writer's lock was given back


def test_seeds_of_evaluation_are_not_recorded(push_puck: Any, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no seed is left from 100000.*kept for evaluation"):
        start_session(push_puck, tmp_path / "d.zarr", seed=100_000)


def test_an_arm_is_recorded_with_displacements(tmp_path: Path) -> None:
    """A person who moves as the scripted expert does lifts the cube, gripper included."""
    env = make_playable("robopolicy_sim/Lift-v0", time_limit=30, cameras=(), control="ee_delta_target")
    rate = env.metadata["render_fps"]
    with start_session(env, tmp_path / "d.zarr", episodes=1) as session:
        expert = env.unwrapped.make_expert(0)
        keys = frozenset({SessionKey.TOGGLE})
        while not session.finished and session.phase is not Phase.REVIEW:
            action = expert.act(session.observation)
            session.advance(Command(rate * action[:6].astype(np.float64), float(action[6]), keys))
            keys = frozenset()
        assert session.report.succeeded == 1
    with EpisodeStore.open(tmp_path / "d.zarr") as store:
        assert store.schema.arrays["action"].names == ("dx", "dy", "dz", "rx", "ry", "rz", "opening")
        assert store.tasks == ["lift the red cube"]
        assert store.read("action")[:, 6].min() < 0.5
    env.close()
