"""What ``robopolicy record`` and ``data`` say about tasks, paths and seeds that do not work."""

from __future__ import annotations

from pathlib import Path

import pytest

from robopolicy.data.store import EpisodeStore


def test_record_names_the_nearest_task(tmp_path: Path, fails) -> None:
    message = fails("record", "--task", "push_puk", "--out", tmp_path / "new.zarr")
    assert "Did you mean 'push_puck'?" in message
    assert not (tmp_path / "new.zarr").exists()


def test_record_never_overwrites(walks: Path, fails) -> None:
    before = EpisodeStore.open(walks).fingerprint()
    message = fails("record", "--task", "push_puck", "--out", walks, "--episodes", 1)
    assert "exists already" in message
    assert EpisodeStore.open(walks).fingerprint() == before


def test_appending_to_a_dataset_of_another_task_changes_nothing(walks: Path, fails) -> None:
    before = EpisodeStore.open(walks).fingerprint()
    message = fails("record", "--task", "push_puck", "--out", walks, "--append", "--episodes", 1, "--workers", 1)
    assert "observation.state: found shape" in message
    assert EpisodeStore.open(walks).fingerprint() == before


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--seed", 100_000), "are kept for evaluation"),
        (("--cameras", "wrist", "--workers", 1), "it has scene, top"),
        (("--episodes", 0), "at least one episode"),
        (("--noise", 2), "noise=2.0 must lie in 0"),
    ],
)
def test_record_refuses_impossible_wishes(options: tuple, words: str, tmp_path: Path, fails) -> None:
    assert words in fails("record", "--task", "push_puck", "--out", tmp_path / "new.zarr", *options)
    assert not (tmp_path / "new.zarr").exists()


def test_data_names_the_datasets_beside_a_wrong_path(walks: Path, fails) -> None:
    assert "Datasets beside it: walks.zarr" in fails("data", "show", walks.with_name("wlaks.zarr"))
