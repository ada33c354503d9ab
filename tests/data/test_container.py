"""Opening what is a dataset of other projects, and saying clearly what is none."""

from __future__ import annotations

import json
import pickle
import zipfile
from pathlib import Path

import imagecodecs
import numcodecs
import numpy as np
import pytest
import zarr

from robopolicy.data.codecs import JpegXl, is_lossless
from robopolicy.data.store import EpisodeStore
from robopolicy.errors import UserError

from .episodes import smooth_episode, write_dataset

UMI_JPEGXL = dict.fromkeys(
    ["effort", "distance", "decodingspeed", "photometric", "planar", "usecontainer", "index", "keeporientation"]
) | {"id": "imagecodecs_jpegxl", "level": 99, "lossless": False, "numthreads": 1}


def write_zip(path: Path, arrays: dict[str, tuple[np.ndarray, dict | None, list[bytes]]], ends: list[int]) -> None:
    """Write a format 2 zip entry by entry, without zarr: name -> (values, compressor, encoded frames)."""

    def metadata(values: np.ndarray, chunks: list[int], compressor: dict | None) -> str:
        return json.dumps(
            {"zarr_format": 2, "shape": values.shape, "chunks": chunks, "dtype": values.dtype.str, "order": "C",
             "fill_value": 0, "compressor": compressor, "filters": None}
        )  # fmt: skip

    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        for group in ("", "data/", "meta/"):
            archive.writestr(f"{group}.zgroup", '{"zarr_format": 2}')
        for name, (values, compressor, frames) in arrays.items():
            archive.writestr(f"data/{name}/.zarray", metadata(values, [1, *values.shape[1:]], compressor))
            for step, frame in enumerate(frames):
                archive.writestr(f"data/{name}/" + ".".join([str(step), *"0" * (values.ndim - 1)]), frame)
        episode_ends = np.array(ends, dtype="<i8")
        archive.writestr("meta/episode_ends/.zarray", metadata(episode_ends, [len(ends)], None))
        archive.writestr("meta/episode_ends/0", episode_ends.tobytes())


def test_a_umi_zip_with_its_jpegxl_keys_opens(tmp_path: Path) -> None:
    images = smooth_episode(0, 6)["observation.image.top"]
    width = np.linspace(0, 0.08, 6, dtype=np.float32)[:, None]
    encoded = [imagecodecs.jpegxl_encode(frame, level=99, lossless=False) for frame in images]
    expected = np.stack([imagecodecs.jpegxl_decode(frame) for frame in encoded])
    arrays = {
        "camera0_rgb": (images, UMI_JPEGXL, encoded),
        "robot0_gripper_width": (width, None, [row.tobytes() for row in width]),
    }
    write_zip(tmp_path / "umi.zarr.zip", arrays, [4, 6])
    with EpisodeStore.open(tmp_path / "umi.zarr.zip") as store:
        np.testing.assert_array_equal(store.read("camera0_rgb"), expected)
        np.testing.assert_array_equal(store.read("robot0_gripper_width"), width)
        assert store.episode_lengths.tolist() == [4, 2]
        assert store.schema.arrays["camera0_rgb"].role == "image"


def test_a_robomimic_cache_with_jpeg2000_opens(tmp_path: Path) -> None:
    images = smooth_episode(0, 3)["observation.image.top"]
    encoded = [imagecodecs.jpeg2k_encode(frame, level=50) for frame in images]
    unset = ("codecformat", "colorspace", "tile", "reversible", "bitspersample", "resolutions", "numthreads")
    config = {"id": "imagecodecs_jpeg2k", "level": 50, "verbose": 0, **dict.fromkeys(unset)}
    write_zip(tmp_path / "can.hdf5.zarr.zip", {"agentview_image": (images, config, encoded)}, [3])
    with EpisodeStore.open(tmp_path / "can.hdf5.zarr.zip") as store:
        expected = np.stack([imagecodecs.jpeg2k_decode(frame) for frame in encoded])
        np.testing.assert_array_equal(store.read("agentview_image"), expected)


def test_our_jpegxl_configuration_has_exactly_umis_keys() -> None:
    assert JpegXl(effort=3, distance=0.3, lossless=False).get_config().keys() == UMI_JPEGXL.keys()
    assert isinstance(numcodecs.get_codec({**UMI_JPEGXL, "a_key_of_tomorrow": 1}), JpegXl)


@pytest.mark.parametrize(
    ("config", "lossless"),
    [
        (None, True),
        ({"id": "blosc"}, True),
        ({"id": "imagecodecs_jpegxl", "lossless": True}, True),
        (UMI_JPEGXL, False),
        ({"id": "imagecodecs_jpeg2k", "level": 50}, False),
    ],
)
def test_lossless_codecs_are_known(config: dict | None, lossless: bool) -> None:
    assert is_lossless(config) is lossless


def test_missing_paths_name_the_datasets_beside_them(tmp_path: Path) -> None:
    write_dataset(tmp_path / "demos.zarr", (3,))
    with pytest.raises(UserError, match=r"demo\.zarr: there is no such file or folder.*demos\.zarr"):
        EpisodeStore.open(tmp_path / "demo.zarr")


def test_files_and_folders_that_are_no_datasets_are_named(tmp_path: Path) -> None:
    (tmp_path / "a.hdf5").write_bytes(b"\x89HDF\r\n")
    with pytest.raises(UserError, match=r"a\.hdf5: found a file that is no zip archive"):
        EpisodeStore.open(tmp_path / "a.hdf5")
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures" / "cat.png").touch()
    with pytest.raises(UserError, match=r"this is no dataset. Found cat\.png; wanted arrays under 'data/'"):
        EpisodeStore.open(tmp_path / "pictures")
    group = zarr.create_group(tmp_path / "d.zarr", zarr_format=2)
    group.create_group("data").create_array("action", data=np.zeros((3, 2)))
    with pytest.raises(UserError, match="this is no dataset. Found .*data; wanted .*meta/episode_ends"):
        EpisodeStore.open(tmp_path / "d.zarr")


def test_lerobot_folders_are_recognised(tmp_path: Path) -> None:
    (tmp_path / "meta").mkdir()
    (tmp_path / "meta" / "info.json").write_text("{}")
    with pytest.raises(UserError, match="looks like a LeRobot dataset"):
        EpisodeStore.open(tmp_path)


def test_zip_files_are_for_reading(tmp_path: Path) -> None:
    write_zip(tmp_path / "a.zarr.zip", {"action": (np.zeros((1, 2), "<f4"), None, [bytes(8)])}, [1])
    with pytest.raises(UserError, match="a zip file cannot be changed.*data merge a.zarr"):
        EpisodeStore.open(tmp_path / "a.zarr.zip", "a")


class Malicious:
    """Unpickling this creates a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return open, (str(self.path), "w")


def test_a_codec_that_executes_code_is_refused_before_decoding(tmp_path: Path) -> None:
    write_dataset(tmp_path / "d.zarr", (3,))
    folder = tmp_path / "d.zarr" / "data" / "note"
    folder.mkdir()
    # zarr takes the first object codec for the real one and would accept the second.
    metadata = {"zarr_format": 2, "shape": [3], "chunks": [3], "dtype": "|O", "order": "C", "fill_value": 0,
                "compressor": {"id": "pickle", "protocol": 5}, "filters": [{"id": "vlen-utf8"}]}  # fmt: skip
    (folder / ".zarray").write_text(json.dumps(metadata))
    (folder / "0").write_bytes(pickle.dumps(Malicious(tmp_path / "executed")))
    with pytest.raises(UserError, match="array 'note' is encoded with 'pickle', which executes code"):
        EpisodeStore.open(tmp_path / "d.zarr").read("note")
    assert not (tmp_path / "executed").exists()


def test_an_unknown_codec_is_named(tmp_path: Path) -> None:
    write_zip(tmp_path / "a.zarr.zip", {"action": (np.zeros((1, 2), "<f4"), {"id": "holocodec"}, [b""])}, [1])
    with pytest.raises(UserError, match="cannot be opened.*holocodec.*install the package"):
        EpisodeStore.open(tmp_path / "a.zarr.zip")
