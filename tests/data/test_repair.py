"""Torn tails, locks and repair: what a crash leaves behind."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import zarr

from robopolicy.data import store as store_module
from robopolicy.data.durable import WRITER_FOLDER, DurableStore, WriterLock, complete_or_absent
from robopolicy.data.repair import repair
from robopolicy.data.store import EpisodeStore
from robopolicy.errors import UserError

from .episodes import ARRAYS, IMAGE, assert_same, smooth_episode, write_dataset


class PowerCut(BaseException):
    """Stops an append at a chosen file operation."""


def append_until(path: Path, operation: int, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Append one episode, but stop for good before file write number ``operation``; True if it came that far."""
    count, one_at_a_time = 0, threading.Lock()
    write = DurableStore.write

    def counted(self: DurableStore, key: str, content: bytes) -> None:
        nonlocal count
        with one_at_a_time:  # a write that zarr's threads have begun ends before the power does
            count += 1
            if count > operation:
                raise PowerCut
            write(self, key, content)

    store = EpisodeStore.open(path, "a")
    with monkeypatch.context() as patch:
        patch.setattr(DurableStore, "write", counted)
        try:
            store.append(smooth_episode(7, 6), task="a new task", success=True, seed=7)
            return False
        except PowerCut:
            return True
        finally:
            # What a killed process does: the lock goes, everything else stays as it is.
            os.close(store._lock._descriptor)  # type: ignore[union-attr]


@pytest.mark.parametrize("zarr_format", [2, 3])
def test_an_append_is_complete_or_absent_wherever_it_stops(
    tmp_path: Path, zarr_format: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stop an append before each of its file writes in turn, as SIGKILL could."""
    path = tmp_path / "d.zarr"
    episodes = write_dataset(path, (5, 4), zarr_format=zarr_format)
    new = smooth_episode(7, 6)
    operation, outcomes = 0, set()
    while append_until(path, operation, monkeypatch):
        operation += 1
        with EpisodeStore.open(path) as store:  # a reader ignores the torn tail
            if store.n_episodes == 3:
                break  # committed, though not acknowledged
            assert_same(store, episodes)
            assert all(len(store.read(key)) == 9 for key in store.keys)
        outcomes.add("torn" if _lengths(path) != {9} else "clean")
        with EpisodeStore.open(path, "a") as store:  # a writer removes it
            assert_same(store, episodes)
            assert store.tasks == ["fold", "push"]
        assert _lengths(path) == {9}
        assert not (path / WRITER_FOLDER).exists()
    assert operation >= 10 + (6 if zarr_format == 2 else 0)
    assert outcomes == {"torn", "clean"}
    with EpisodeStore.open(path) as store:
        assert_same(store, [*episodes, new])
        assert (store.tasks[2], store.episode_seeds[2]) == ("a new task", 7)


def test_chunks_beyond_the_end_do_not_leak_into_the_next_episode(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "d.zarr"
    episodes = write_dataset(path, (5,))
    assert append_until(path, 9, monkeypatch)
    leftovers = [p for p in (path / "data" / IMAGE).iterdir() if p.name.split(".")[0].isdigit()]
    assert len(leftovers) > 5
    with EpisodeStore.open(path, "a") as store:
        assert len([p for p in (path / "data" / IMAGE).iterdir() if p.name.split(".")[0].isdigit()]) == 5
        episodes.append(smooth_episode(8, 3))
        store.append(episodes[-1])
        assert_same(store, episodes)


def test_a_failed_append_can_be_followed_by_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """E.g. a full disk while the array lengths are being written."""
    episodes = write_dataset(tmp_path / "d.zarr", (5,))
    with EpisodeStore.open(tmp_path / "d.zarr", "a") as store:
        with monkeypatch.context() as patch:
            patch.setattr(store_module, "resize", _full_disk)
            with pytest.raises(OSError, match="No space"):
                store.append(smooth_episode(6, 9), task="fails")
        episodes.append(smooth_episode(8, 3))
        assert store.append(episodes[-1]) == 1
        assert_same(store, episodes)
    with EpisodeStore.open(tmp_path / "d.zarr") as store:
        assert_same(store, episodes)
        assert store.tasks == ["fold", ""]


def _full_disk(array: zarr.Array, length: int) -> None:
    raise OSError(28, "No space left on device")


def test_two_writers_at_once_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "d.zarr"
    episodes = write_dataset(path, (3,))
    with (
        EpisodeStore.open(path, "a") as first,
        pytest.raises(UserError, match=f"process {os.getpid()} writes this dataset"),
    ):
        EpisodeStore.open(path, "a")
    first.close()
    with EpisodeStore.open(path, "a") as store:
        assert_same(store, episodes)


def test_the_lock_of_a_killed_process_is_free_again(tmp_path: Path) -> None:
    write_dataset(tmp_path / "d.zarr", (3,))
    code = (
        "import sys, time; from pathlib import Path; from robopolicy.data.durable import WriterLock;"
        "lock = WriterLock(Path(sys.argv[1])); print('locked', flush=True); time.sleep(60)"
    )
    child = subprocess.Popen([sys.executable, "-c", code, str(tmp_path / "d.zarr")], stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None and child.stdout.readline() == "locked\n"
    with pytest.raises(UserError, match=f"process {child.pid} writes"):
        WriterLock(tmp_path / "d.zarr")
    child.send_signal(signal.SIGKILL)
    child.wait()
    with WriterLock(tmp_path / "d.zarr") as lock:
        assert lock.was_killed
    assert not (tmp_path / "d.zarr" / WRITER_FOLDER).exists()


def test_a_file_is_replaced_whole_and_synchronised_before_it_takes_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = DurableStore(tmp_path)
    store.write("a/0", b"old")
    calls: list[str] = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda fd: (calls.append("fsync"), fsync(fd)))
    monkeypatch.setattr(os, "replace", lambda a, b: (calls.append(f"replace {Path(b).name}"), replace(a, b)))
    store.write("a/0", b"new")
    assert calls == ["fsync", "replace 0"]
    store.write("a/1", b"first")  # a new name may wait for the flush
    assert calls[2:] == ["replace 1"]
    store.flush()
    assert calls.count("fsync") >= 4  # the two new files and their folders
    assert (tmp_path / "a" / "0").read_bytes() == b"new"


def test_nothing_is_left_of_a_dataset_whose_creation_fails(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), complete_or_absent(tmp_path / "d.zarr") as unfinished:
        unfinished.mkdir()
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []


def test_repair_cuts_arrays_of_different_length(tmp_path: Path) -> None:
    """As diffusion_policy leaves a buffer when it is killed in add_episode."""
    path = tmp_path / "d.zarr"
    episodes = write_dataset(path, (5, 4))
    action = zarr.open_array(path / "data" / "action", mode="r+")
    action.append(np.ones((3, 3), np.float32))
    done = repair(path)
    assert done == ["cut data/action from 12 to 9 steps."]
    assert _lengths(path) == {9}
    assert repair(path) == []
    with EpisodeStore.open(path) as store:
        assert_same(store, episodes)


def test_repair_drops_incomplete_episodes_only_when_told(tmp_path: Path) -> None:
    path = tmp_path / "d.zarr"
    episodes = write_dataset(path, (5, 4, 6))
    zarr.open_array(path / "data" / "action", mode="r+").resize((7, 3))
    with pytest.raises(UserError, match="arrays shorter than the 15 steps .*: action 7.*data doctor"):
        EpisodeStore.open(path)
    with pytest.raises(UserError, match="episodes 1..2 are incomplete.*Nothing was changed.*--drop-incomplete"):
        repair(path)
    assert _lengths(path) == {7, 15}
    assert repair(path, drop_incomplete=True)[0] == "removed the incomplete episodes 1..2."
    with EpisodeStore.open(path) as store:
        assert_same(store, episodes[:1])
        assert store.tasks == ["fold"]


def test_repair_of_what_is_no_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="there is no such file or folder"):
        repair(tmp_path / "nothing.zarr")


def test_append_cost_does_not_grow_with_the_dataset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Counted in files written, which is what an append waits for."""
    written: list[int] = []
    write = DurableStore.write

    def counted(self: DurableStore, key: str, content: bytes) -> None:
        written.append(1)
        write(self, key, content)

    monkeypatch.setattr(DurableStore, "write", counted)
    with EpisodeStore.create(tmp_path / "d.zarr", ARRAYS, fps=10, image_codec="blosc") as store:
        counts = []
        for _ in range(6):
            written.clear()
            store.append(smooth_episode(0, 5), task="same")
            counts.append(len(written))
    assert counts[1] == counts[-1]


def test_killed_writers_lose_nothing() -> None:
    """The benchmark with few kills, in its own process because it starts a fork server."""
    repository = Path(__file__).resolve().parents[2]
    script = repository / "benchmarks" / "append_kill.py"
    environment = {**os.environ, "PYTHONPATH": str(repository)}
    result = subprocess.run(
        [sys.executable, str(script), "--kills", "15", "--seed", "1"], env=environment, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stdout + result.stderr
    table = {line[:28].strip(): line[28:].split()[0] for line in result.stdout.splitlines()}
    assert table["kills"] == "15"
    assert int(table["acknowledged"]) > 0
    assert int(table["killed inside append"]) > 0
    assert table["lost"] == table["damaged"] == table["unreadable datasets"] == table["torn after repair"] == "0"


def _lengths(path: Path) -> set[int]:
    return {array.shape[0] for _, array in zarr.open_group(path, mode="r")["data"].arrays()}


def test_a_store_can_be_read_in_a_forked_process(tmp_path: Path) -> None:
    episodes = write_dataset(tmp_path / "d.zarr", (5,))
    with EpisodeStore.open(tmp_path / "d.zarr") as store:
        store.read("action")  # zarr's event loop runs in the parent by now
        with multiprocessing.get_context("fork").Pool(1) as pool:
            np.testing.assert_array_equal(pool.apply(store.read, ("action",)), episodes[0]["action"])
