"""Moved demonstrations: the geometry, and replays that the simulator confirms."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from robopolicy.data.edit import merge
from robopolicy.data.guided_augmentation import Guidance, augment_demonstrations
from robopolicy.data.planar import PlanarLayout, PlanarTransform
from robopolicy.data.record import record_demonstrations
from robopolicy.data.store import EpisodeStore
from robopolicy.errors import UserError

from .test_quality import run

PUSH_PUCK = "robopolicy_sim/PushPuck-v0"
POSE = ("x", "y", "z", "r11", "r21", "r31", "r12", "r22", "r32", "opening")


@pytest.fixture(scope="module")
def demos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("robopolicy_sim")
    path = tmp_path_factory.mktemp("data") / "demos.zarr"
    record_demonstrations(PUSH_PUCK, path, episodes=4, progress=False)
    return path


def rotation(vector: np.ndarray) -> np.ndarray:
    """(3, 3) matrix whose first columns are the entries 3..9."""
    first, second = vector[3:6], vector[6:9]
    return np.stack([first, second, np.cross(first, second)], axis=1)


@pytest.mark.parametrize("mirror", [False, True])
def test_a_pose_moves_as_a_rigid_body_does(mirror: bool) -> None:
    rng = np.random.default_rng(0)
    matrix, _ = np.linalg.qr(rng.normal(size=(3, 3)))
    matrix *= np.sign(np.linalg.det(matrix))
    pose = np.array([0.3, 0.1, 0.2, *matrix[:, 0], *matrix[:, 1], 0.7])
    transform = PlanarTransform(angle=0.4, mirror=mirror, shift=(0.01, 0.02), centre=(0.5, 0.0))
    moved = transform.move(pose, PlanarLayout.of(POSE, "action"))
    flip = np.diag([1.0, -1.0 if mirror else 1.0, 1.0])
    turn = np.array([[np.cos(0.4), -np.sin(0.4), 0], [np.sin(0.4), np.cos(0.4), 0], [0, 0, 1]])
    centre = np.array([0.5, 0, 0])
    np.testing.assert_allclose(moved[:3], turn @ flip @ (pose[:3] - centre) + centre + [0.01, 0.02, 0])
    np.testing.assert_allclose(rotation(moved), turn @ flip @ matrix @ flip, atol=1e-12)
    assert np.linalg.det(rotation(moved)) == pytest.approx(1)
    assert moved[9] == 0.7


def test_headings_turn_and_mirror() -> None:
    layout = PlanarLayout.of(("block_x", "block_y", "block_yaw"), "state")
    moved = PlanarTransform(angle=np.pi / 2, mirror=True).move(np.array([0.1, 0.2, 0.3]), layout)
    np.testing.assert_allclose(moved, [0.2, 0.1, np.pi / 2 - 0.3])
    assert PlanarTransform(angle=2.0).move(np.array([0, 0, 3.0]), layout)[2] == pytest.approx(5.0 - 2 * np.pi)


def test_pace_keeps_the_path_and_its_ends() -> None:
    layout = PlanarLayout.of(("x", "y"), "action")
    path = np.stack([np.arange(11.0), np.arange(11.0) ** 2], axis=1)
    fast = PlanarTransform(pace=2.0).repace(path, layout)
    np.testing.assert_allclose(fast, path[::2])
    slow = PlanarTransform(pace=0.5).repace(path, layout)
    assert len(slow) == 21
    np.testing.assert_allclose(slow[::2], path)


def test_columns_without_known_motion_are_refused() -> None:
    with pytest.raises(UserError, match="columns joint1, dx move"):
        PlanarLayout.of(("x", "y", "joint1", "dx"), "action")


def test_kept_copies_succeed_and_are_the_moved_demonstrations(demos: Path, tmp_path: Path) -> None:
    report = augment_demonstrations(demos, tmp_path / "more.zarr", PUSH_PUCK, Guidance(), copies=3, progress=False)
    assert report.sources == report.reproduced == 4
    assert report.tried == 12
    assert report.kept >= 8  # this physics is all but symmetric
    with EpisodeStore.open(demos) as source, EpisodeStore.open(tmp_path / "more.zarr") as store:
        assert store.n_episodes == report.kept
        assert all(store.episode_success)
        origins = store.schema.attributes["episodes"]
        assert len(origins) == report.kept
        assert store.schema.attributes["augmented"]["fingerprint"] == source.fingerprint()
        for i, origin in enumerate(origins):
            copy, original = store.episode(i), source.episode(origin["source_episode"])
            transform = PlanarTransform(origin["angle"], origin["mirror"], tuple(origin["shift"]), origin["pace"])
            for key in ("observation.state", "action"):
                names = store.schema.arrays[key].names
                moved = transform.move(original[key], PlanarLayout.of(names, key))
                shared = min(len(moved), len(copy[key]))
                # Contact amplifies rounding a little; actions are exact.
                tolerance = 1e-6 if key == "action" else 0.02
                np.testing.assert_allclose(copy[key][: len(moved)][:shared], moved[:shared], atol=tolerance)
            assert len(copy["action"]) <= len(original["action"]) + 5
            assert copy["reward"][-1] == 1
    merge(tmp_path / "all.zarr", [demos, tmp_path / "more.zarr"])


def test_copies_that_fail_are_not_kept(demos: Path, tmp_path: Path) -> None:
    """Actions at half the size belong to another scene: the pusher passes the puck."""
    store = EpisodeStore.open(demos)
    with EpisodeStore.create(tmp_path / "wrong.zarr", list(store.schema.arrays.values()), fps=10) as wrong:
        for episode in map(store.episode, range(store.n_episodes)):
            wrong.append({**episode, "action": 0.5 * episode["action"]})
    out = tmp_path / "more.zarr"
    report = augment_demonstrations(tmp_path / "wrong.zarr", out, PUSH_PUCK, Guidance(), copies=2, progress=False)
    assert report.path is None and report.kept == report.reproduced == 0
    assert report.failed + report.impossible == 8
    assert not out.exists()


def test_command_counts_and_tells(demos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "more.zarr"
    words = ("augment", demos, out, "--task", "push_puck", "--transforms", "mirror", "--copies", 1)
    assert run(*words) == 0
    assert "4 demonstrations, 4 copies tried: 4 kept" in capsys.readouterr().out
    with EpisodeStore.open(out) as store, EpisodeStore.open(demos) as source:
        flip = np.array([1, -1] * 3)
        np.testing.assert_allclose(
            store.read("observation.state")[0], flip * source.read("observation.state")[0], atol=1e-6
        )


def test_mistakes_are_refused_before_anything_is_played(demos: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no 'rotat'. Did you mean 'rotate'"):
        Guidance(("rotat",))
    with pytest.raises(UserError, match="0 to 180 degrees"):
        Guidance(max_angle=10.0)
    with pytest.raises(UserError, match="--centre: found '0'"):
        run("augment", demos, tmp_path / "o.zarr", "--task", "push_puck", "--centre", "0")
    with pytest.raises(UserError, match="was not recorded in robopolicy_sim/Reach-v0"):
        augment_demonstrations(demos, tmp_path / "o.zarr", "robopolicy_sim/Reach-v0", Guidance(), copies=1)
