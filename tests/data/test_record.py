"""Recording demonstrations: what is stored, seeds, workers, refusals; and the verb ``record``."""

from __future__ import annotations

import argparse
import importlib.util

import numpy as np
import pytest

from robopolicy.cli import record as verb
from robopolicy.data.record import EVALUATION_SEEDS_FROM, check_same_environment, record_demonstrations
from robopolicy.data.store import EpisodeStore
from robopolicy.errors import UserError
from robopolicy.simulator import task_id

pytest.importorskip("gymnasium")
needs_simulator = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("mujoco", "robopolicy_sim")),
    reason="the simulator (mujoco, robopolicy_sim) is not installed",
)
PUSH_PUCK = "robopolicy_sim/PushPuck-v0"


@pytest.fixture
def walk(monkeypatch):
    """Make the environments of ``recordable.py`` importable by their namespace."""
    from pathlib import Path

    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    from recordable import ENV_ID

    return ENV_ID


def record(env_id, path, **options):
    return record_demonstrations(env_id, path, **{"episodes": 4, "progress": False, **options})


def test_stores_observation_action_and_reward_of_each_step(tmp_path, walk):
    report = record(walk, tmp_path / "d.zarr")
    store = EpisodeStore.open(report.path)
    first = store.episode(0)
    assert set(first) == {"observation.state", "action", "reward"}
    # The action belongs to the observation before it, and leads to the next one.
    np.testing.assert_allclose(np.diff(first["observation.state"], axis=0), first["action"][:-1], atol=1e-6)
    np.testing.assert_array_equal(first["reward"], [0.0] * (len(first["reward"]) - 1) + [1.0])
    assert store.fps == 10 and store.tasks == ["walk to zero"] * 2
    spec = store.schema.arrays
    assert spec["observation.state"].unit == "m" and spec["action"].names == ("v",)
    assert [spec[key].role for key in ("observation.state", "action", "reward")] == ["state", "action", "reward"]


def test_failures_are_dropped_and_counted(tmp_path, walk):
    report = record(walk, tmp_path / "d.zarr", seed=10)
    store = EpisodeStore.open(report.path)
    assert (report.attempted, report.succeeded, report.stored, report.episodes_in_dataset) == (4, 2, 2, 2)
    assert report.steps == store.n_steps
    assert store.episode_seeds == [10, 12] and store.episode_success == [True, True]


def test_failures_can_be_kept(tmp_path, walk):
    report = record(walk, tmp_path / "d.zarr", keep_failures=True)
    store = EpisodeStore.open(report.path)
    assert store.episode_seeds == [0, 1, 2, 3] and store.episode_success == [True, False, True, False]
    assert store.episode_lengths[1] == 20


def test_noise_disturbs_the_path_and_not_the_stored_action(tmp_path, walk):
    record(walk, tmp_path / "d.zarr", noise=0.3, keep_failures=True)
    episode = EpisodeStore.open(tmp_path / "d.zarr").episode(1)
    state, action = episode["observation.state"], episode["action"]
    np.testing.assert_array_equal(action, np.clip(-state, -0.5, 0.5))
    disturbance = np.diff(state, axis=0) - action[:-1]
    assert 0.05 < disturbance.std() < 0.6


@pytest.mark.parametrize("workers", [2])
def test_the_dataset_does_not_depend_on_the_number_of_workers(tmp_path, walk, workers):
    for count in (1, workers):
        record(walk, tmp_path / f"{count}.zarr", episodes=10, workers=count, noise=0.1, keep_failures=True)
    one, many = (EpisodeStore.open(tmp_path / f"{count}.zarr") for count in (1, workers))
    assert one.fingerprint() == many.fingerprint()
    assert one.episode_seeds == many.episode_seeds == list(range(10))


def test_an_existing_path_is_never_overwritten(tmp_path, walk):
    record(walk, tmp_path / "d.zarr")
    before = EpisodeStore.open(tmp_path / "d.zarr").fingerprint()
    with pytest.raises(UserError, match=r"--append.*another path"):
        record(walk, tmp_path / "d.zarr")
    assert EpisodeStore.open(tmp_path / "d.zarr").fingerprint() == before


def test_appending_adds_new_seeds_only(tmp_path, walk):
    record(walk, tmp_path / "d.zarr")
    with pytest.raises(UserError, match="--seed 3"):
        record(walk, tmp_path / "d.zarr", append=True, seed=2)
    report = record(walk, tmp_path / "d.zarr", append=True, seed=4)
    assert (report.stored, report.episodes_in_dataset) == (2, 4)
    assert EpisodeStore.open(tmp_path / "d.zarr").episode_seeds == [0, 2, 4, 6]


def test_appending_what_another_environment_gives_is_refused(tmp_path, walk):
    store = EpisodeStore.open(record(walk, tmp_path / "d.zarr").path, "a")
    for env_id, options in ((walk, {"control": "other"}), ("recordable/Other-v0", {})):
        with pytest.raises(UserError, match=r"was recorded in recordable/Walk-v0 with the options \{\}, this is"):
            check_same_environment(store, env_id, options)
    check_same_environment(store, f"module:{walk}", {})
    with pytest.raises(UserError, match="'robopolicy data merge'"):
        record(walk, tmp_path / "d.zarr", append=True, seed=4, options={"control": "other"})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"episodes": 0}, "at least one episode"),
        ({"seed": -1}, "seeds -1 to"),
        ({"seed": EVALUATION_SEEDS_FROM - 3}, "kept for evaluation"),
        ({"noise": 1.5}, "noise=1.5"),
    ],
)
def test_impossible_arguments_are_refused_before_anything_is_written(tmp_path, walk, options, message):
    with pytest.raises(UserError, match=message):
        record(walk, tmp_path / "d.zarr", **options)
    assert not (tmp_path / "d.zarr").exists()


@pytest.mark.parametrize(
    ("env_id", "options", "message"),
    [
        ("recordable/NoExpert-v0", {}, "no scripted expert"),
        ("recordable/Missing-v0", {}, "cannot be made"),
        ("nowhere/Missing-v0", {}, "cannot be made"),
        ("recordable/Walk-v0", {"cameras": ("top",)}, "cannot be made.*cameras"),
    ],
)
def test_environments_that_cannot_be_recorded(tmp_path, walk, env_id, options, message):
    with pytest.raises(UserError, match=message):
        record(env_id, tmp_path / "d.zarr", **options)
    assert not (tmp_path / "d.zarr").exists()


@needs_simulator
def test_qualities_and_modes_are_mixed_and_labelled(tmp_path):
    options = {"qualities": {"good": 1, "sloppy": 1}, "modes": {"left": 3, "right": 1}, "workers": 2}
    report = record("robopolicy_sim/Reach-v0", tmp_path / "d.zarr", episodes=12, **options)
    store = EpisodeStore.open(report.path)
    qualities, modes = zip(*(behaviour.split(":") for behaviour in store.behaviours), strict=True)
    assert set(qualities) == {"good", "sloppy"} and set(modes) <= {"left", "right"}
    # The tool passes the post on the side that the label names.
    sideways = store.schema.arrays["observation.state"].names.index("tcp_y")
    for i, mode in enumerate(modes):
        path = store.episode(i)["observation.state"][:, sideways]
        assert (path[np.abs(path).argmax()] > 0) == (mode == "left")


@needs_simulator
def test_environment_options_are_used_and_kept(tmp_path):
    options = {"control": "joint_position", "control_hz": 10}
    report = record("robopolicy_sim/Lift-v0", tmp_path / "d.zarr", episodes=1, options=options)
    store = EpisodeStore.open(report.path)
    assert store.fps == 10 and store.schema.arrays["action"].shape == (8,)
    assert store.schema.attributes["environment_options"] == options


@needs_simulator
def test_push_puck_with_a_camera_in_two_processes(tmp_path):
    report = record(PUSH_PUCK, tmp_path / "d.zarr", episodes=2, workers=2, cameras=("top",), image_size=32, noise=0.03)
    store = EpisodeStore.open(report.path)
    assert report.stored == 2 and store.tasks[0] == "push the puck into the ring"
    assert store.schema.arrays["observation.image.top"].role == "image"
    episode = store.episode(0)
    assert episode["observation.image.top"].shape == (len(episode["action"]), 32, 32, 3)
    assert episode["reward"][-1] == 1
    assert store.schema.arrays["action"].unit == "m"


@needs_simulator
def test_noise_leads_the_pusher_elsewhere(tmp_path):
    states = []
    for noise in (0.0, 0.03):
        record(PUSH_PUCK, tmp_path / f"{noise}.zarr", episodes=1, noise=noise)
        states.append(EpisodeStore.open(tmp_path / f"{noise}.zarr").episode(0)["observation.state"][:15])
    clean, disturbed = states
    np.testing.assert_array_equal(clean[0], disturbed[0])
    assert 0.002 < np.abs(clean[:, :2] - disturbed[:, :2]).max() < 0.1


def parse(arguments):
    parser = argparse.ArgumentParser()
    verb.add_parser(parser.add_subparsers())
    return parser.parse_args(["record", *arguments])


@needs_simulator
def test_verb_records(tmp_path, capsys):
    out = tmp_path / "d.zarr"
    args = parse(["--task", "push_puck", "--episodes", "2", "--out", str(out), "--workers", "1", "--seed", "5"])
    assert args.run(args) == 0
    assert EpisodeStore.open(out).episode_seeds == [5, 6]
    assert "2 episodes" in capsys.readouterr().out


@needs_simulator
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"qualities": {"failing": 1}}, "--keep-failures"),
        ({"qualities": {"good": -1}}, "must be at least 0"),
        ({"modes": {"upside_down": 1}}, "cannot play mode 'upside_down'.*left, right"),
        ({"options": {"control": "impedance"}}, "control='impedance' is unknown; choose one of"),
    ],
)
@needs_simulator
def test_impossible_behaviours_are_refused(tmp_path, options, message):
    with pytest.raises(UserError, match=message):
        record("robopolicy_sim/Reach-v0", tmp_path / "d.zarr", episodes=1, **options)


@pytest.mark.parametrize("words", [["control"], ["=1"], ["control={a"]])
def test_options_that_cannot_be_read(words):
    with pytest.raises(UserError, match="--option"):
        verb.parse_options(words)


def test_shares_and_options_are_read():
    assert verb.parse_shares("good=0.7, sloppy=0.3") == {"good": 0.7, "sloppy": 0.3}
    assert verb.parse_shares("left") == {"left": 1.0}
    wanted = {"control_hz": 10, "variation": {"lighting": "darker"}}
    assert verb.parse_options(["control_hz=10", "variation={lighting: darker}"]) == wanted
    with pytest.raises(UserError, match="NAME=SHARE"):
        verb.parse_shares("good=much")


def test_verb_suggests_the_task_that_was_meant():
    with pytest.raises(UserError, match="Did you mean 'push_puck'"):
        task_id("push_pukc")
    assert task_id("push_puck") == PUSH_PUCK
    assert task_id("other/Thing-v2") == "other/Thing-v2"
