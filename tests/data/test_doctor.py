"""The doctor finds each planted problem at its place and is silent on clean data."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import zarr

from robopolicy.data.doctor import Problem, diagnose
from robopolicy.data.motion import step_sizes
from robopolicy.data.schema import ArraySpec
from robopolicy.data.store import EpisodeStore
from robopolicy.errors import UserError

from .episodes import IMAGE, write_dataset

LENGTHS = (60, 50, 80)  # enough steps for the statistics of jumps


@pytest.fixture(scope="module")
def clean(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("clean") / "d.zarr"
    write_dataset(path, LENGTHS, image_codec="blosc")
    return path


@pytest.fixture
def dataset(clean: Path, tmp_path: Path) -> Path:
    """A copy that a test may damage."""
    return Path(shutil.copytree(clean, tmp_path / "d.zarr"))


def places(problems: list[Problem]) -> list[tuple[str, str, str, int | None, int | None]]:
    return [(p.severity, p.check, p.key, p.episode, p.step) for p in problems]


def edit(path: Path, key: str, step: int, value: float) -> None:
    array = zarr.open_array(path / "data" / key, mode="r+")
    array[step] = value


@pytest.mark.parametrize("zarr_format", [2, 3])
def test_a_clean_dataset_has_no_problems(tmp_path: Path, zarr_format: int) -> None:
    write_dataset(tmp_path / "d.zarr", LENGTHS, zarr_format=zarr_format)
    assert diagnose(tmp_path / "d.zarr", deep=True) == []


def test_human_demonstrations_are_clean(pusht_zarr: Path) -> None:
    assert diagnose(pusht_zarr) == []


def test_values_that_are_not_finite(dataset: Path) -> None:
    edit(dataset, "observation.state", 60 + 4, np.nan)
    edit(dataset, "observation.state", 60 + 9, np.inf)
    found = [p for p in diagnose(dataset) if p.check == "not-finite"]
    assert places(found) == [("error", "not-finite", "observation.state", 1, 4)]
    assert "in 2 steps" in found[0].message


def test_a_jump(dataset: Path) -> None:
    edit(dataset, "action", 110 + 30, 25.0)
    found = diagnose(dataset)
    assert {(p.severity, p.check, p.key, p.episode) for p in found} == {("warning", "jump", "action", 2)}
    assert {p.step for p in found} == {30, 31}  # there and back
    assert any("action[0] moves by" in p.message for p in found)


def test_the_border_between_episodes_is_no_jump(tmp_path: Path) -> None:
    spec = ArraySpec("q", (1,), "float32", "state")
    with EpisodeStore.create(tmp_path / "d.zarr", [spec], fps=10) as store:
        for offset in (0.0, 1000.0):
            store.append({"q": offset + np.sin(0.1 * np.arange(200))[:, None]})
    assert diagnose(tmp_path / "d.zarr") == []


def test_a_gripper_that_opens_and_closes_is_no_jump(tmp_path: Path) -> None:
    spec = ArraySpec("gripper", (1,), "float32", "action")
    with EpisodeStore.create(tmp_path / "d.zarr", [spec], fps=10) as store:
        store.append({"gripper": (np.arange(30_000) // 250 % 2).astype(np.float32)[:, None]})
    assert diagnose(tmp_path / "d.zarr") == []


def test_angles_and_orientations_do_not_jump_when_they_wrap() -> None:
    angle = np.linspace(0, 20, 400)
    wrapped = ArraySpec("yaw", (1,), "float64", "state")
    assert step_sizes((angle % (2 * np.pi))[:, None], wrapped).max() < 0.06
    vectors = np.outer(angle, [0.0, 0.6, 0.8])
    turns = np.round(angle / (2 * np.pi))[:, None] * 2 * np.pi * np.array([0.0, 0.6, 0.8])
    spec = ArraySpec("r", (3,), "float64", "state", rotation="axis_angle")
    np.testing.assert_allclose(step_sizes(vectors - turns, spec)[:, 0], np.diff(angle), atol=1e-6)
    half = np.stack([0 * angle, 0 * angle, np.sin(angle / 2), np.cos(angle / 2)], axis=1)
    half[::2] *= -1
    spec = ArraySpec("q", (4,), "float64", "state", rotation="quaternion_xyzw")
    np.testing.assert_allclose(step_sizes(half, spec)[:, 0], np.diff(angle), atol=1e-6)


def test_time_gaps_and_reversed_time(tmp_path: Path) -> None:
    spec = ArraySpec("timestamp", (), "int64", "other", unit="ns")
    stamps = np.arange(50, dtype=np.int64) * 100_000_000
    gap = stamps + (np.arange(50) >= 20) * 300_000_000
    reversed_ = stamps.copy()
    reversed_[[7, 8]] = reversed_[[8, 7]]
    with EpisodeStore.create(tmp_path / "d.zarr", [spec], fps=10) as store:
        for values in (stamps, gap, reversed_):
            store.append({"timestamp": values})
    found = diagnose(tmp_path / "d.zarr")
    assert ("warning", "time-gap", "timestamp", 1, 20) in places(found)
    assert ("error", "time-order", "timestamp", 2, 8) in places(found)
    assert "400.0 ms since the step before, expected 100.0 ms" in next(p for p in found if p.episode == 1).message
    assert {p.episode for p in found} == {1, 2}


def test_short_and_falling_episodes(dataset: Path) -> None:
    ends = zarr.open_array(dataset / "meta" / "episode_ends", mode="r+")
    ends[:] = [59, 60, 190]
    assert ("warning", "short-episode", "", 1, None) in places(diagnose(dataset))
    ends[:] = [60, 60, 190]
    assert ("warning", "short-episode", "", 1, None) in places(diagnose(dataset))
    ends[:] = [60, 50, 190]
    found = diagnose(dataset)
    assert places(found) == [("error", "episode-ends", "", 1, None)]
    assert "its end 50 lies before its start 60" in found[0].message


def test_arrays_of_different_length(dataset: Path) -> None:
    zarr.open_array(dataset / "data" / "action", mode="r+").resize((100, 3))
    found = diagnose(dataset)
    assert places(found) == [("error", "length", "action", 1, 40)]
    assert "100 steps, meta/episode_ends needs 190" in found[0].message


def test_a_torn_tail(dataset: Path) -> None:
    zarr.open_array(dataset / "data" / "action", mode="r+").append(np.zeros((5, 3), np.float32))
    (dataset / ".robopolicy").mkdir()
    found = diagnose(dataset)
    assert places(found) == [("warning", "torn-tail", "action", None, None), ("warning", "writer", "", None, None)]
    assert "5 steps after the last episode" in found[0].message


def test_a_missing_a_cut_and_a_broken_file(dataset: Path) -> None:
    images = dataset / "data" / IMAGE
    (images / "61.0.0.0").unlink()
    (images / "112.0.0.0").write_bytes(b"")
    found = diagnose(dataset)
    assert places(found) == [("error", "missing-file", IMAGE, 1, 1), ("error", "missing-file", IMAGE, 2, 2)]
    assert "61.0.0.0 is missing" in found[0].message and "112.0.0.0 is empty" in found[1].message


@pytest.mark.parametrize("codec", ["blosc", "jpegxl-lossless"])
def test_a_file_that_cannot_be_decoded(tmp_path: Path, codec: str) -> None:
    write_dataset(tmp_path / "d.zarr", (3, 6), image_codec=codec)
    (tmp_path / "d.zarr" / "data" / IMAGE / "8.0.0.0").write_bytes(b"no image")
    assert places(diagnose(tmp_path / "d.zarr", deep=True)) == [("error", "undecodable", IMAGE, 1, 5)]


def test_a_broken_file_of_vectors(dataset: Path) -> None:
    (dataset / "data" / "action" / "0.0").write_bytes(b"broken")
    assert places(diagnose(dataset)) == [("error", "undecodable", "action", 0, 0)]


def test_steps_of_zeros_are_no_missing_files(tmp_path: Path) -> None:
    spec = ArraySpec("mask", (8, 8, 1), "uint8", "image")
    with EpisodeStore.create(tmp_path / "d.zarr", [spec], fps=10, image_codec="blosc") as store:
        store.append({"mask": np.zeros((3, 8, 8, 1), np.uint8)})
    assert {p.check for p in diagnose(tmp_path / "d.zarr")} == {"blank-image"}


def test_missing_files_of_other_writers_may_be_zeros(tmp_path: Path) -> None:
    root = zarr.create_group(tmp_path / "d.zarr", zarr_format=2)
    action = np.ones((6, 1), np.float32)
    action[2:4] = 0
    root.create_group("data").create_array("action", data=action, chunks=(2, 1))
    root.create_group("meta").create_array("episode_ends", data=np.array([6]))
    assert ("warning", "missing-file", "action", 0, 2) in places(diagnose(tmp_path / "d.zarr"))


def test_constant_columns(dataset: Path) -> None:
    array = zarr.open_array(dataset / "data" / "action", mode="r+")
    array[:, 1] = 0.25
    found = diagnose(dataset)
    assert places(found) == [("warning", "constant", "action", None, None)]
    assert "entry 1 is 0.25 in every step" in found[0].message


def test_a_blank_camera(dataset: Path) -> None:
    edit(dataset, IMAGE, 65, 7)
    assert places(diagnose(dataset, deep=True)) == [("warning", "blank-image", IMAGE, 1, 5)]


def test_types_that_changed_or_are_not_numeric(dataset: Path) -> None:
    data = zarr.open_group(dataset / "data", mode="r+")
    values = data["action"][:].astype(np.int32)
    data.create_array("action", data=values, overwrite=True)
    data.create_array("note", data=np.array(["x"] * 190, dtype="<U1"))
    checks = {(p.severity, p.check, p.key) for p in diagnose(dataset)}
    assert {("error", "dtype", "action"), ("warning", "dtype", "note")} <= checks
    with EpisodeStore.open(dataset) as store:
        assert "note" not in store.keys
    with pytest.raises(UserError, match="'note' is not numeric and would stay behind"):
        EpisodeStore.open(dataset, "a")


def float_images(path: Path, scales: list[tuple[float, float]]) -> None:
    rng = np.random.default_rng(0)
    spec = ArraySpec("img", (16, 16, 3), "float32", "image")
    with EpisodeStore.create(path, [spec], fps=10) as store:
        for low, high in scales:
            values = rng.uniform(low, high, (4, 16, 16, 3))
            values[0, 0, 0, 0], values[2, 3, 3, 1] = low, high
            store.append({"img": values})


@pytest.mark.parametrize(
    ("scales", "expected"),
    [
        ([(0, 1), (0, 1)], []),
        ([(0, 255), (0, 255)], []),
        ([(0, 255), (0, 1)], [("error", "image-range", "img", 1, 0)]),
        ([(0, 255), (0, 300)], [("error", "image-range", "img", 1, 2)]),
        ([(-5, 255), (0, 255)], [("error", "image-range", "img", 0, 0)]),
        ([(0, 1.5), (0, 1)], [("warning", "image-range", "img", None, None)]),
    ],
)
def test_ranges_of_float_images(tmp_path: Path, scales, expected) -> None:
    float_images(tmp_path / "d.zarr", scales)
    found = places(diagnose(tmp_path / "d.zarr"))
    if scales[0][0] < 0 or scales[1][1] == 300:
        found = [(*f[:4], expected[0][4]) for f in found if f[4] is not None and f[4] <= expected[0][4]]
    assert found == expected


def test_nan_in_a_float_image(tmp_path: Path) -> None:
    float_images(tmp_path / "d.zarr", [(0, 255), (0, 255)])
    array = zarr.open_array(tmp_path / "d.zarr" / "data" / "img", mode="r+")
    array[6, 2, 2, 0] = np.nan
    assert places(diagnose(tmp_path / "d.zarr")) == [("error", "not-finite", "img", 1, 2)]


def test_many_findings_of_one_kind_are_summed_up(dataset: Path) -> None:
    for step in range(65, 95):
        (dataset / "data" / IMAGE / f"{step}.0.0.0").unlink()
    found = diagnose(dataset)
    assert len(found) == 21
    assert found[-1].message == "10 more of these."
