"""``robopolicy data``: each verb through the parser, as a user types it."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import matplotlib.image
import numpy as np
import pytest
import zarr

from robopolicy.cli.data import add_parser, parse_episodes
from robopolicy.data.store import EpisodeStore
from robopolicy.errors import UserError

from .episodes import write_dataset


def run(*words: object) -> int:
    parser = argparse.ArgumentParser(prog="robopolicy")
    add_parser(parser.add_subparsers(required=True))
    args = parser.parse_args(["data", *map(str, words)])
    return args.run(args)


@pytest.fixture
def dataset(tmp_path: Path) -> Path:
    write_dataset(tmp_path / "d.zarr", (12, 7, 20))
    return tmp_path / "d.zarr"


def test_show_describes_and_draws(dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("show", dataset, "--out", tmp_path / "pictures") == 0
    text = capsys.readouterr().out
    for words in ("3 episodes, 39 steps, 10 Hz, 0 min 04 s", "32x24x3", "jpegxl", "rad", "7..20 steps, median 12",
                  "2 x fold", "success: 2 of 3 judged episodes (67%)"):  # fmt: skip
        assert words in text
    pictures = {p.name: matplotlib.image.imread(p) for p in (tmp_path / "pictures").iterdir()}
    assert sorted(pictures) == ["frames_observation.image.top.png", "plot_action.png"]
    for picture in pictures.values():
        assert min(picture.shape[:2]) > 300
        assert np.std(picture[..., :3]) > 0.02  # not blank


def test_show_of_an_empty_dataset(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_dataset(tmp_path / "d.zarr", ())
    assert run("show", tmp_path / "d.zarr", "--out", tmp_path / "p") == 0
    assert "0 episodes, 0 steps" in capsys.readouterr().out
    assert run("stats", tmp_path / "d.zarr") == 0


def test_doctor_exit_codes_and_json(dataset: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("doctor", dataset) == 0
    assert "0 errors, 0 other findings" in capsys.readouterr().out
    zarr.open_array(dataset / "data" / "action", mode="r+")[13] = np.nan
    assert run("doctor", dataset) == 1
    assert "ERROR [not-finite] 'action' episode 1 step 1: NaN" in capsys.readouterr().out
    assert run("doctor", dataset, "--json") == 1
    (problem,) = json.loads(capsys.readouterr().out)
    assert (problem["severity"], problem["episode"], problem["step"]) == ("error", 1, 1)


def test_repair_says_what_it_did(dataset: Path, capsys: pytest.CaptureFixture[str]) -> None:
    zarr.open_array(dataset / "data" / "action", mode="r+").append(np.zeros((2, 3), np.float32))
    assert run("repair", dataset) == 0
    assert "cut data/action from 41 to 39 steps." in capsys.readouterr().out
    assert run("repair", dataset) == 0
    assert "nothing to repair" in capsys.readouterr().out


def test_stats_as_table_and_json(dataset: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("stats", dataset) == 0
    assert "shoulder" in capsys.readouterr().out
    assert run("stats", dataset, "--json") == 0
    values = json.loads(capsys.readouterr().out)
    with EpisodeStore.open(dataset) as store:
        assert values["action"]["mean"] == pytest.approx(store.read("action").astype(float).mean(axis=0).tolist())


def test_merge_split_and_drop(dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = {name: tmp_path / f"{name}.zarr" for name in ("twice", "train", "val", "clean")}
    assert run("merge", out["twice"], dataset, dataset) == 0
    assert run("split", out["twice"], "--train", out["train"], "--val", out["val"], "--ratio", 0.34, "--seed", 1) == 0
    assert run("drop", out["twice"], out["clean"], "--episodes", "0,3-4") == 0
    counts = {}
    for name, path in out.items():
        with EpisodeStore.open(path) as store:
            counts[name] = store.n_episodes
    assert counts == {"twice": 6, "train": 4, "val": 2, "clean": 3}
    assert "(4 episodes) and" in capsys.readouterr().out


def test_episode_lists() -> None:
    assert parse_episodes("3,7-9, 12") == [3, 7, 8, 9, 12]
    for wrong in ("", "a", "3-", "5-3", "1,,2"):
        with pytest.raises(UserError, match="wanted numbers and ranges such as 3,7-9"):
            parse_episodes(wrong)
