from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import zarr

from robopolicy.data.edit import drop
from robopolicy.data.layout import IMAGE_SHARD_BYTES
from robopolicy.data.schema import ArraySpec
from robopolicy.data.store import EpisodeStore
from robopolicy.data.summary import describe
from robopolicy.errors import UserError

from .episodes import ARRAYS, IMAGE, assert_same, smooth_episode, write_dataset


@pytest.mark.parametrize(("zarr_format", "codec"), [(2, "jpegxl-lossless"), (2, "blosc"), (3, "blosc")])
def test_round_trip_is_exact(tmp_path: Path, zarr_format: int, codec: str) -> None:
    episodes = write_dataset(tmp_path / "d.zarr", zarr_format=zarr_format, image_codec=codec)
    with EpisodeStore.open(tmp_path / "d.zarr") as store:
        assert_same(store, episodes)
        assert store.zarr_format == zarr_format
        assert store.fps == 10
        assert store.schema.arrays == {spec.name: spec for spec in ARRAYS}
        assert store.episode_ends.tolist() == [12, 19, 39]
        assert store.tasks == ["fold", "push", "fold"]
        assert store.episode_success == [True, False, True]
        assert store.episode_seeds == [100, 101, 102]


@pytest.mark.parametrize(("codec", "largest"), [("jpegxl", 1.5), ("jpeg2k", 3.0)])
def test_lossy_codecs_stay_close_and_are_smaller(tmp_path: Path, codec: str, largest: int) -> None:
    episodes = write_dataset(tmp_path / "d.zarr", (10,), image_codec=codec)
    write_dataset(tmp_path / "raw.zarr", (10,), image_codec="blosc")
    with EpisodeStore.open(tmp_path / "d.zarr") as store, EpisodeStore.open(tmp_path / "raw.zarr") as raw:
        error = np.abs(store.read(IMAGE).astype(int) - episodes[0][IMAGE])
        assert 0 < error.mean() < largest
        assert sum(store.files.sizes(f"data/{IMAGE}").values()) < sum(raw.files.sizes(f"data/{IMAGE}").values())


def test_labels_are_none_where_unknown(tmp_path: Path) -> None:
    with EpisodeStore.create(tmp_path / "d.zarr", ARRAYS, fps=None) as store:
        assert store.append(smooth_episode(0, 3)) == 0
        assert store.append(smooth_episode(1, 3), task="push", seed=0, success=False) == 1
        assert (store.tasks, store.episode_success, store.episode_seeds) == (["", "push"], [None, False], [None, 0])
    with EpisodeStore.open(tmp_path / "d.zarr") as store:
        assert (store.tasks, store.episode_success, store.episode_seeds) == (["", "push"], [None, False], [None, 0])


def test_behaviours_are_named_once_and_survive_edits(tmp_path: Path) -> None:
    with EpisodeStore.create(tmp_path / "d.zarr", ARRAYS, fps=None) as store:
        for seed, behaviour in enumerate(("good:left", "", "sloppy:right", "good:left")):
            store.append(smooth_episode(seed, 3), behaviour=behaviour)
    drop(tmp_path / "d.zarr", tmp_path / "clean.zarr", [0])
    with EpisodeStore.open(tmp_path / "clean.zarr") as store:
        assert store.behaviours == ["", "sloppy:right", "good:left"]
    assert "2 x good:left" in describe(EpisodeStore.open(tmp_path / "d.zarr"))


def test_reads_are_clipped_to_the_committed_steps(tmp_path: Path) -> None:
    episodes = write_dataset(tmp_path / "d.zarr")
    with EpisodeStore.open(tmp_path / "d.zarr") as store:
        assert store.read("action", 30, 99).shape == (9, 3)
        assert store.read("action", -4).shape == (4, 3)
        assert store.read("action", 8, 3).shape == (0, 3)
        np.testing.assert_array_equal(store.episode(-1, ["action"])["action"], episodes[-1]["action"])
        with pytest.raises(UserError, match="no episode 3; the dataset has 3 episodes"):
            store.episode(3)
        with pytest.raises(UserError, match="no array 'actoin'.*Did you mean 'action'"):
            store.read("actoin")


def test_append_goes_on_after_reopening(tmp_path: Path) -> None:
    episodes = write_dataset(tmp_path / "d.zarr")
    with EpisodeStore.open(tmp_path / "d.zarr", "a") as store:
        episodes.append(smooth_episode(9, 5))
        assert store.append(episodes[-1], task="new task") == 3
        assert_same(store, episodes)
    with EpisodeStore.open(tmp_path / "d.zarr") as store:
        assert_same(store, episodes)
        assert store.tasks[-1] == "new task"


def test_a_replay_buffer_reader_finds_its_layout(tmp_path: Path) -> None:
    """What diffusion_policy asserts and expects, read from the files without our code."""
    episodes = write_dataset(tmp_path / "d.zarr")
    root = zarr.open_group(tmp_path / "d.zarr", mode="r")
    assert root.metadata.zarr_format == 2
    ends = root["meta/episode_ends"][:]
    assert ends.dtype == np.int64
    assert all(array.shape[0] == ends[-1] for _, array in root["data"].arrays())
    np.testing.assert_array_equal(root["data/action"][12:19], episodes[1]["action"])
    image = json.loads((tmp_path / "d.zarr" / "data" / IMAGE / ".zarray").read_text())
    assert image["chunks"] == [1, 32, 24, 3]
    assert image["compressor"]["id"] == "imagecodecs_jpegxl"
    action = json.loads((tmp_path / "d.zarr/data/action/.zarray").read_text())
    assert (action["compressor"]["id"], action["compressor"]["cname"]) == ("blosc", "zstd")
    assert (tmp_path / "d.zarr" / "data" / IMAGE / "38.0.0.0").exists()
    assert sorted(p.name for p in (tmp_path / "d.zarr").iterdir()) == [".zattrs", ".zgroup", "data", "meta"]


def test_format_3_puts_many_frames_into_a_shard(tmp_path: Path) -> None:
    write_dataset(tmp_path / "d.zarr", zarr_format=3)
    with EpisodeStore.open(tmp_path / "d.zarr") as store:
        assert store.array(IMAGE).chunks[0] == 1
        assert store.array(IMAGE).shards[0] == IMAGE_SHARD_BYTES // (32 * 24 * 3)
        assert len(store.files.sizes(f"data/{IMAGE}")) == 2  # one shard and zarr.json
    with pytest.raises(UserError, match="standard codecs only.*Use format 2 for jpegxl"):
        EpisodeStore.create(tmp_path / "e.zarr", ARRAYS, fps=10, zarr_format=3, image_codec="jpegxl")
    assert not (tmp_path / "e.zarr").exists()


def test_a_foreign_replay_buffer_opens_and_grows(tmp_path: Path) -> None:
    """A dataset as zarr 2 and diffusion_policy leave it: no attributes, ends in one compressed chunk."""
    rng = np.random.default_rng(0)
    action = rng.normal(size=(10, 2)).astype(np.float32)
    root = zarr.create_group(tmp_path / "d.zarr", zarr_format=2)
    data, meta = root.create_group("data"), root.create_group("meta")
    data.create_array("action", data=action, chunks=(4, 2))
    data.create_array("img", data=np.full((10, 32, 32, 3), 200.0, np.float32), chunks=(3, 32, 32, 3))
    meta.create_array("episode_ends", data=np.array([6, 10]), chunks=(2,))
    added = {"action": action[:3], "img": np.zeros((3, 32, 32, 3), np.float32)}
    with EpisodeStore.open(tmp_path / "d.zarr", "a", overrides={"action": {"unit": "px"}}, fps=10) as store:
        assert (store.fps, store.schema.arrays["action"].unit, store.schema.arrays["img"].role) == (10, "px", "image")
        assert store.tasks == ["", ""]
        store.append(added, task="push", seed=4)
    with EpisodeStore.open(tmp_path / "d.zarr") as store:
        np.testing.assert_array_equal(store.read("action"), np.concatenate([action, action[:3]]))
        np.testing.assert_array_equal(store.episode(2)["img"], added["img"])
        assert store.episode_ends.tolist() == [6, 10, 13]
        assert (store.tasks, store.episode_seeds) == (["", "", "push"], [None, None, 4])


def test_the_human_pusht_dataset_opens_unchanged(pusht_zarr: Path) -> None:
    with EpisodeStore.open(pusht_zarr) as store:
        assert (store.n_episodes, store.n_steps, store.fps) == (206, 25650, None)
        roles = {name: spec.role for name, spec in store.schema.arrays.items()}
        assert roles.pop("action") == "action" and roles.pop("img") == "image"
        assert roles == dict.fromkeys(["keypoint", "n_contacts", "state"], "state")
        raw = zarr.open_array(pusht_zarr / "data" / "img", mode="r")
        start, stop = store.bounds(205)
        np.testing.assert_array_equal(store.episode(205, ["img"])["img"], raw[start:stop])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"action": None}, "action: not there"),
        ({"actions": np.zeros((5, 3))}, "actions: unknown.*Did you mean 'action'"),
        ({"action": np.zeros((5, 4), np.float32)}, r"action: found shape \(5, 4\), wanted \(T, 3\)"),
        ({"action": np.zeros((4, 3), np.float32)}, "lengths differ: .*action 4"),
        ({IMAGE: np.zeros((5, 32, 24, 3), np.float32)}, "found type float32, wanted uint8"),
    ],
)
def test_an_episode_that_does_not_fit_is_refused_and_leaves_no_trace(tmp_path: Path, change, message) -> None:
    write_dataset(tmp_path / "d.zarr", (5,))
    episode = {**smooth_episode(1, 5), **change}
    episode = {key: values for key, values in episode.items() if values is not None}
    with EpisodeStore.open(tmp_path / "d.zarr", "a") as store:
        with pytest.raises(UserError, match=message):
            store.append(episode)
        assert store.n_episodes == 1
        assert all(store.array(key).shape[0] == 5 for key in store.keys)


def test_an_empty_episode_and_a_negative_seed_are_refused(tmp_path: Path) -> None:
    with EpisodeStore.create(tmp_path / "d.zarr", ARRAYS, fps=10) as store:
        with pytest.raises(UserError, match="no steps"):
            store.append(smooth_episode(0, 0))
        with pytest.raises(UserError, match="seed must be at least 0"):
            store.append(smooth_episode(0, 2), seed=-1)


def test_a_reader_cannot_append_and_survives_a_writer(tmp_path: Path) -> None:
    episodes = write_dataset(tmp_path / "d.zarr")
    with EpisodeStore.open(tmp_path / "d.zarr") as reader:
        with pytest.raises(UserError, match="opened for reading"):
            reader.append(smooth_episode(0, 2))
        with EpisodeStore.open(tmp_path / "d.zarr", "a") as writer:
            writer.append(smooth_episode(5, 4))
        assert_same(reader, episodes)


def test_fingerprint_changes_with_data_order_labels_and_schema(tmp_path: Path) -> None:
    first, second = smooth_episode(0, 6), smooth_episode(1, 6)
    changed = {**second, "action": second["action"].copy()}
    changed["action"][3, 1] += 1e-6
    repainted = {**second, IMAGE: second[IMAGE].copy()}
    repainted[IMAGE][2, 5, 5, 0] ^= 1
    variants = {
        "same": ([first, second], {}),
        "again": ([first, second], {}),
        "order": ([second, first], {}),
        "value": ([first, changed], {}),
        "pixel": ([first, repainted], {}),
        "fewer": ([first], {}),
        "task": ([first, second], {"task": "other"}),
    }
    prints = {}
    for name, (episodes, labels) in variants.items():
        with EpisodeStore.create(tmp_path / name, ARRAYS, fps=10, image_codec="jpegxl-lossless") as store:
            for episode in episodes:
                store.append(episode, **labels)
            prints[name] = store.fingerprint()
    assert prints.pop("again") == prints["same"]
    assert len(set(prints.values())) == len(prints)
    with EpisodeStore.open(tmp_path / "same", overrides={"action": {"unit": "m"}}) as store:
        assert store.fingerprint() not in prints.values()


def test_scalar_and_boolean_arrays_round_trip(tmp_path: Path) -> None:
    arrays = [ArraySpec("reward", (), "float32", "reward"), ArraySpec("done", (), "bool", "other")]
    with EpisodeStore.create(tmp_path / "d.zarr", arrays, fps=1) as store:
        store.append({"reward": np.arange(4.0), "done": np.array([False, False, False, True])})
        assert store.read("reward").tolist() == [0, 1, 2, 3]
        assert store.read("done").tolist() == [False, False, False, True]


def test_create_refuses_a_taken_path_and_zip_files(tmp_path: Path) -> None:
    write_dataset(tmp_path / "d.zarr")
    with pytest.raises(UserError, match="already exists. Choose another name"):
        EpisodeStore.create(tmp_path / "d.zarr", ARRAYS, fps=10)
    with pytest.raises(UserError, match="zip file cannot be appended to"):
        EpisodeStore.create(tmp_path / "d.zarr.zip", ARRAYS, fps=10)
    with pytest.raises(UserError, match="codec 'jpegxll' is unknown.*Did you mean 'jpegxl'"):
        EpisodeStore.create(tmp_path / "e.zarr", ARRAYS, fps=10, image_codec="jpegxll")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["d.zarr"]
