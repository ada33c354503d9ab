from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import zarr

from robopolicy.data.edit import drop, merge, split
from robopolicy.data.store import EpisodeStore
from robopolicy.errors import UserError

from .episodes import ARRAYS, IMAGE, assert_same, smooth_episode, write_dataset


def digest(folder: Path) -> str:
    """Hash of every file name and content below a folder."""
    state = hashlib.sha256()
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        state.update(str(path.relative_to(folder)).encode() + path.read_bytes())
    return state.hexdigest()


@pytest.mark.parametrize("out", ["all.zarr", "all.zarr.zip"])
def test_merge_keeps_episodes_and_labels(tmp_path: Path, out: str) -> None:
    first = write_dataset(tmp_path / "a.zarr", (5, 8))
    second = write_dataset(tmp_path / "b.zarr", (6,))
    before = digest(tmp_path / "a.zarr"), digest(tmp_path / "b.zarr")
    merge(tmp_path / out, [tmp_path / "a.zarr", tmp_path / "b.zarr"])
    with EpisodeStore.open(tmp_path / out) as store:
        assert_same(store, first + second)
        assert store.tasks == ["fold", "push", "fold"]
        assert store.episode_seeds == [100, 101, 100]
        assert store.episode_success == [True, False, True]
        assert store.fps == 10
        assert all(store.array(key).shape[0] == 19 for key in store.keys)
    assert (digest(tmp_path / "a.zarr"), digest(tmp_path / "b.zarr")) == before
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(["a.zarr", "b.zarr", out])


def test_lossy_images_are_copied_byte_by_byte(tmp_path: Path) -> None:
    write_dataset(tmp_path / "a.zarr", (5, 8), image_codec="jpegxl")
    write_dataset(tmp_path / "b.zarr", (6,), image_codec="jpegxl")
    merge(tmp_path / "all.zarr.zip", [tmp_path / "b.zarr", tmp_path / "a.zarr"])
    drop(tmp_path / "all.zarr.zip", tmp_path / "less.zarr", [0, 1])
    with EpisodeStore.open(tmp_path / "less.zarr") as less, EpisodeStore.open(tmp_path / "a.zarr") as source:
        for step in range(8):
            ours = less.files.read(f"data/{IMAGE}/{step}.0.0.0")
            assert ours == source.files.read(f"data/{IMAGE}/{5 + step}.0.0.0")
        np.testing.assert_array_equal(less.read(IMAGE), source.read(IMAGE, 5))
    with EpisodeStore.open(tmp_path / "less.zarr", "a") as store:
        assert store.append(smooth_episode(3, 4)) == 1


def test_images_that_cannot_be_copied_are_encoded_losslessly(tmp_path: Path, caplog) -> None:
    write_dataset(tmp_path / "a.zarr", (5,), image_codec="jpegxl")
    write_dataset(tmp_path / "b.zarr", (6,), image_codec="jpeg2k")
    merge(tmp_path / "all.zarr", [tmp_path / "a.zarr", tmp_path / "b.zarr"])
    assert "encoded differently" in caplog.text
    with (
        EpisodeStore.open(tmp_path / "all.zarr") as store,
        EpisodeStore.open(tmp_path / "a.zarr") as a,
        EpisodeStore.open(tmp_path / "b.zarr") as b,
    ):
        np.testing.assert_array_equal(store.read(IMAGE), np.concatenate([a.read(IMAGE), b.read(IMAGE)]))


@pytest.mark.parametrize("formats", [(3, 3), (3, 2), (2, 3)])
def test_merge_across_formats_takes_the_first(tmp_path: Path, formats: tuple[int, int]) -> None:
    first = write_dataset(tmp_path / "a.zarr", (5,), zarr_format=formats[0])
    second = write_dataset(tmp_path / "b.zarr", (6,), zarr_format=formats[1])
    merge(tmp_path / "all.zarr", [tmp_path / "a.zarr", tmp_path / "b.zarr"])
    with EpisodeStore.open(tmp_path / "all.zarr") as store:
        assert_same(store, first + second)
        assert store.zarr_format == formats[0]


def test_merge_names_every_key_that_does_not_fit(tmp_path: Path) -> None:
    write_dataset(tmp_path / "a.zarr", (3,))
    other = [ARRAYS[0], replace(ARRAYS[1], unit="deg"), replace(ARRAYS[2], name="target")]
    EpisodeStore.create(tmp_path / "b.zarr", other, fps=30).close()
    with pytest.raises(UserError) as error:
        merge(tmp_path / "all.zarr", [tmp_path / "a.zarr", tmp_path / "b.zarr"])
    text = str(error.value)
    assert "fps: a.zarr has 10, b.zarr has 30" in text.replace(".0", "")
    assert "observation.state: unit rad here, deg in" in text
    assert "action: not in" in text and "target: only in" in text
    assert not (tmp_path / "all.zarr").exists()


def test_split_is_disjoint_complete_and_like_diffusion_policy(tmp_path: Path) -> None:
    episodes = write_dataset(tmp_path / "d.zarr", tuple(range(2, 12)))
    counts = split(tmp_path / "d.zarr", tmp_path / "t.zarr", tmp_path / "v.zarr", ratio=0.2, seed=3)
    assert counts == (8, 2)
    chosen = sorted(np.random.default_rng(3).choice(10, size=2, replace=False).tolist())
    with EpisodeStore.open(tmp_path / "t.zarr") as train, EpisodeStore.open(tmp_path / "v.zarr") as validation:
        assert_same(validation, [episodes[i] for i in chosen])
        assert_same(train, [episodes[i] for i in range(10) if i not in chosen])
        assert validation.episode_seeds == [100 + i for i in chosen]
    with pytest.raises(UserError, match="ratio 1.5; it must lie between 0 and 1"):
        split(tmp_path / "d.zarr", tmp_path / "x", tmp_path / "y", ratio=1.5, seed=0)


def test_split_writes_nothing_when_one_output_is_taken(tmp_path: Path) -> None:
    write_dataset(tmp_path / "d.zarr", (3, 3))
    with pytest.raises(UserError, match="d.zarr: already exists"):
        split(tmp_path / "d.zarr", tmp_path / "t.zarr", tmp_path / "d.zarr", ratio=0.5, seed=0)
    assert [p.name for p in tmp_path.iterdir()] == ["d.zarr"]


def test_drop_removes_the_named_episodes(tmp_path: Path) -> None:
    episodes = write_dataset(tmp_path / "d.zarr", (3, 4, 5, 6))
    assert drop(tmp_path / "d.zarr", tmp_path / "o.zarr", [2, 0]) == 2
    with EpisodeStore.open(tmp_path / "o.zarr") as store:
        assert_same(store, [episodes[1], episodes[3]])
        assert store.tasks == ["push", "push"]
    with pytest.raises(UserError, match="no episode 4; episodes are 0..3"):
        drop(tmp_path / "d.zarr", tmp_path / "p.zarr", [4])
    with pytest.raises(UserError, match="all 4 episodes would be dropped"):
        drop(tmp_path / "d.zarr", tmp_path / "p.zarr", range(4))


def test_a_damaged_dataset_is_not_copied_as_zeros(tmp_path: Path) -> None:
    write_dataset(tmp_path / "d.zarr", (3, 4))
    (tmp_path / "d.zarr" / "data" / IMAGE / "1.0.0.0").unlink()
    with pytest.raises(UserError, match=r"1\.0\.0\.0 is missing.*data doctor"):
        drop(tmp_path / "d.zarr", tmp_path / "o.zarr", [1])
    assert not (tmp_path / "o.zarr").exists()


def test_the_human_dataset_keeps_its_values(pusht_zarr: Path, tmp_path: Path) -> None:
    drop(pusht_zarr, tmp_path / "few.zarr", range(3, 206))
    with EpisodeStore.open(pusht_zarr) as source, EpisodeStore.open(tmp_path / "few.zarr") as few:
        assert few.n_episodes == 3
        for key in source.keys:
            np.testing.assert_array_equal(few.read(key), source.read(key, 0, few.n_steps))
    compressor = zarr.open_array(tmp_path / "few.zarr" / "data" / "img", mode="r").compressors[0]
    assert compressor.get_config()["id"] == "blosc"
