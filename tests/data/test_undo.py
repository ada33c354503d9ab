"""Undo: the dataset is as it was before the last episode, also when the process is killed half-way."""

from __future__ import annotations

import multiprocessing
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest

from robopolicy.data.doctor import diagnose
from robopolicy.data.edit import merge
from robopolicy.data.store import EpisodeStore
from robopolicy.data.undo import remove_last_episode
from robopolicy.errors import UserError

from .episodes import ARRAYS, IMAGE, assert_same, smooth_episode, write_dataset
from .test_edit import digest


@pytest.mark.parametrize("lengths", [(), (5,), (5, 4)])
def test_every_file_is_as_it_was_before_the_episode(tmp_path: Path, lengths: tuple[int, ...]) -> None:
    path = tmp_path / "d.zarr"
    write_dataset(path, lengths)
    before = digest(path)
    with EpisodeStore.open(path, "a") as store:
        store.append(smooth_episode(7, 6), task="a new task", success=True, seed=7)
    assert digest(path) != before
    remove_last_episode(EpisodeStore.open(path, "a")).close()
    assert digest(path) == before


@pytest.mark.parametrize("zarr_format", [2, 3])
def test_content_labels_and_tasks_are_as_before(tmp_path: Path, zarr_format: int) -> None:
    path = tmp_path / "d.zarr"
    episodes = write_dataset(path, (5, 4), zarr_format=zarr_format)
    with EpisodeStore.open(path) as store:
        before = store.fingerprint()
    store = EpisodeStore.open(path, "a")
    store.append(smooth_episode(7, 6), task="a new task", success=True, seed=7)
    store = remove_last_episode(store)
    assert store.fingerprint() == before
    assert (store.tasks, store.episode_seeds, store.episode_success) == (["fold", "push"], [100, 101], [True, False])
    episodes.append(smooth_episode(8, 3))  # the returned store goes on
    store.append(episodes[-1], task="fold", seed=8)
    assert_same(store, episodes)
    store.close()
    assert [p for p in diagnose(path) if p.severity == "error"] == []


def test_a_task_that_another_episode_has_too_is_kept(tmp_path: Path) -> None:
    write_dataset(tmp_path / "d.zarr", (3, 4, 5, 6))  # fold, push, fold, push
    with remove_last_episode(EpisodeStore.open(tmp_path / "d.zarr", "a")) as store:
        assert store.tasks == ["fold", "push", "fold"]


def test_the_first_entry_of_a_new_file_of_ends_can_be_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("robopolicy.data.layout.META_CHUNK", 2)
    episodes = write_dataset(tmp_path / "d.zarr", (3, 4))
    before = digest(tmp_path / "d.zarr")
    store = EpisodeStore.open(tmp_path / "d.zarr", "a")
    store.append(smooth_episode(9, 2), task="push")
    with remove_last_episode(store) as store:
        assert_same(store, episodes)
    assert digest(tmp_path / "d.zarr") == before


def kill_self_before(operation: int, path: Path) -> None:
    """Undo in this process, which is killed before the given change of a file; exits with 0 when it is not."""
    count = 0

    def counted(change: Callable[..., Any]) -> Callable[..., Any]:
        def changed(*args: Any, **kwargs: Any) -> Any:
            nonlocal count
            if count == operation:
                os.kill(os.getpid(), signal.SIGKILL)
            count += 1
            return change(*args, **kwargs)

        return changed

    store = EpisodeStore.open(path, "a")
    os.replace, os.unlink = counted(os.replace), counted(os.unlink)
    remove_last_episode(store).close()


def joints(seed: int, steps: int) -> dict[str, np.ndarray]:
    """An episode without images, whose many files would only take time."""
    return {key: values for key, values in smooth_episode(seed, steps).items() if key != IMAGE}


@pytest.mark.parametrize(("lengths", "zarr_format"), [((3,), 2), ((3, 2), 2), ((3, 2), 3)])
def test_a_kill_leaves_the_dataset_with_or_without_the_episode(
    tmp_path: Path, lengths: tuple[int, ...], zarr_format: Literal[2, 3]
) -> None:
    """SIGKILL before each change of a file in turn, in a process of its own."""
    written = [joints(seed, steps) for seed, steps in enumerate(lengths)]
    with EpisodeStore.create(tmp_path / "d.zarr", ARRAYS[1:], fps=10, zarr_format=zarr_format) as store:
        for seed, episode in enumerate(written):
            store.append(episode, task=f"task {seed}", seed=seed)
    operation, outcomes = 0, []
    while True:
        path = shutil.copytree(tmp_path / "d.zarr", tmp_path / f"{operation}.zarr")
        child = multiprocessing.get_context("fork").Process(target=kill_self_before, args=(operation, path))
        child.start()
        child.join()
        if child.exitcode == 0:
            break
        assert child.exitcode == -signal.SIGKILL
        with EpisodeStore.open(path) as store:  # a reader sees a whole dataset
            outcomes.append(store.n_episodes)
            episodes = written[: store.n_episodes]
            assert_same(store, episodes)
        with EpisodeStore.open(path, "a") as store:  # and the next writer goes on with it
            episodes.append(joints(8, 2))
            store.append(episodes[-1], task="after the kill")
            assert_same(store, episodes)
            assert store.tasks == [*(f"task {seed}" for seed in range(len(episodes) - 1)), "after the kill"]
            assert {store.array(key).shape[0] for key in store.keys} == {store.n_steps}
        operation += 1
    assert outcomes == sorted(outcomes, reverse=True)  # with the episode first, then without it
    assert set(outcomes) == {len(lengths), len(lengths) - 1}
    assert outcomes.count(len(lengths) - 1) > 5


def test_an_empty_dataset_and_a_zip_file_are_refused(tmp_path: Path) -> None:
    write_dataset(tmp_path / "empty.zarr", ())
    with (
        EpisodeStore.open(tmp_path / "empty.zarr", "a") as store,
        pytest.raises(UserError, match="no episode to remove"),
    ):
        remove_last_episode(store)
    write_dataset(tmp_path / "d.zarr", (3,))
    merge(tmp_path / "d.zarr.zip", [tmp_path / "d.zarr"])
    with pytest.raises(UserError, match="zip file cannot be changed"):
        remove_last_episode(EpisodeStore.open(tmp_path / "d.zarr.zip"))


def test_a_dataset_that_another_writer_has_grown_is_left_alone(tmp_path: Path) -> None:
    write_dataset(tmp_path / "d.zarr", (3,))
    reader = EpisodeStore.open(tmp_path / "d.zarr")
    with EpisodeStore.open(tmp_path / "d.zarr", "a") as other:
        other.append(smooth_episode(1, 4))
    with pytest.raises(UserError, match="another process has changed the dataset. Nothing was removed"):
        remove_last_episode(reader)
    with EpisodeStore.open(tmp_path / "d.zarr") as store:
        np.testing.assert_array_equal(store.episode_lengths, [3, 4])
