"""Kill a recorder at random moments and count what was lost.

A writer process appends episodes (low-dimensional arrays and losslessly stored images) and acknowledges each one; it
is killed with SIGKILL after a random time, mostly in the middle of an append. The dataset is then opened again and
every acknowledged episode compared bit by bit with what was written. The next writer goes on with the same dataset.

    python benchmarks/append_kill.py --kills 300
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import shutil
import signal
import tempfile
import time
from dataclasses import dataclass, fields
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np

from robopolicy.data.schema import ArraySpec
from robopolicy.data.store import EpisodeStore
from robopolicy.errors import UserError

ARRAYS = (
    ArraySpec("observation.image.top", (48, 48, 3), "uint8", "image"),
    ArraySpec("observation.state", (6,), "float32", "state"),
    ArraySpec("action", (6,), "float32", "action"),
)
_KILLS_PER_DATASET = 10
_LONGEST_DELAY = 0.4  # seconds; a few appends


@dataclass
class Tally:
    """What happened over all kills."""

    kills: int = 0
    killed_inside_append: int = 0
    acknowledged: int = 0
    committed_unacknowledged: int = 0
    lost: int = 0
    damaged: int = 0
    unreadable_datasets: int = 0
    torn_after_repair: int = 0

    @property
    def failures(self) -> int:
        return self.lost + self.damaged + self.unreadable_datasets + self.torn_after_repair


def episode(seed: int) -> dict[str, np.ndarray]:
    """The episode number ``seed``: 4 to 15 steps of noise around an image colour that differs between episodes."""
    rng = np.random.default_rng(seed)
    steps = int(rng.integers(4, 16))
    base = rng.integers(0, 200, size=(1, 1, 1, 3))
    images = base + rng.integers(0, 50, size=(steps, 48, 48, 3))
    return {
        "observation.image.top": images.astype(np.uint8),
        "observation.state": rng.normal(size=(steps, 6)).astype(np.float32),
        "action": rng.normal(size=(steps, 6)).astype(np.float32),
    }


def write(path: Path, reports: Connection) -> None:
    """Append episodes for ever; reports ``("begin" | "done", index)``."""
    with EpisodeStore.open(path, "a") as store:
        while True:
            index = store.n_episodes
            values = episode(index)
            reports.send(("begin", index))
            store.append(values, task=f"task {index % 3}", success=index % 2 == 0, seed=index)
            reports.send(("done", index))


def kill_once(path: Path, delay: float, acknowledged: int, tally: Tally) -> int:
    """Run a writer, kill it ``delay`` seconds after its first append began; returns the acknowledged episodes."""
    context = multiprocessing.get_context("forkserver")
    ours, theirs = context.Pipe(duplex=False)
    writer = context.Process(target=write, args=(path, theirs))
    writer.start()
    theirs.close()
    assert writer.pid is not None
    inside = False
    deadline: float | None = None
    try:
        while deadline is None or ours.poll(max(0.0, deadline - time.monotonic())):
            event, index = ours.recv()
            deadline = deadline or time.monotonic() + delay
            inside = event == "begin"
            acknowledged = max(acknowledged, index + (event == "done"))
        os.kill(writer.pid, signal.SIGKILL)
        while True:
            event, index = ours.recv()
            inside = event == "begin"
            acknowledged = max(acknowledged, index + (event == "done"))
    except EOFError:
        pass
    writer.join()
    if writer.exitcode != -signal.SIGKILL:
        raise RuntimeError(f"the writer ended by itself with exit code {writer.exitcode}")
    tally.kills += 1
    tally.killed_inside_append += inside
    return acknowledged


def check(path: Path, acknowledged: int, tally: Tally) -> None:
    """Read as a bystander, then open for appending (which repairs) and read again."""
    try:
        with EpisodeStore.open(path) as store:
            compare(store, acknowledged, tally)
        with EpisodeStore.open(path, "a") as store:
            tally.torn_after_repair += any(store.array(key).shape[0] != store.n_steps for key in store.keys)
            compare(store, acknowledged, tally)
    except UserError as error:
        print(f"unreadable: {error}")
        tally.unreadable_datasets += 1


def compare(store: EpisodeStore, acknowledged: int, tally: Tally) -> None:
    tally.lost += max(0, acknowledged - store.n_episodes)
    data = {key: store.read(key) for key in store.keys}
    for index in range(store.n_episodes):
        rows = slice(*store.bounds(index))
        same = all(np.array_equal(data[key][rows], values) for key, values in episode(index).items())
        labels = (store.tasks[index], store.episode_success[index], store.episode_seeds[index])
        tally.damaged += not same or labels != (f"task {index % 3}", index % 2 == 0, index)


def run(kills: int, seed: int, zarr_format: int, folder: Path) -> Tally:
    """Kill ``kills`` writers; a fresh dataset every ten kills keeps the comparisons short."""
    multiprocessing.get_context("forkserver").set_forkserver_preload(["robopolicy.data.store"])
    rng, tally = np.random.default_rng(seed), Tally()
    for first in range(0, kills, _KILLS_PER_DATASET):
        path = folder / "killed.zarr"
        codec = "jpegxl-lossless" if zarr_format == 2 else "blosc"
        EpisodeStore.create(path, ARRAYS, fps=10, zarr_format=zarr_format, image_codec=codec).close()  # type: ignore[arg-type]
        acknowledged = 0
        for _ in range(min(_KILLS_PER_DATASET, kills - first)):
            acknowledged = kill_once(path, float(rng.uniform(0, _LONGEST_DELAY)), acknowledged, tally)
            check(path, acknowledged, tally)
            with EpisodeStore.open(path) as store:
                tally.committed_unacknowledged += store.n_episodes - acknowledged
                acknowledged = store.n_episodes
        tally.acknowledged += acknowledged
        shutil.rmtree(path)
    return tally


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--zarr-format", type=int, choices=(2, 3), default=2)
    args = parser.parse_args()
    # Killed writers cannot give back their semaphores; Python's tracker frees them and would warn about each.
    os.environ["PYTHONWARNINGS"] = "ignore:resource_tracker"
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        tally = run(args.kills, args.seed, args.zarr_format, Path(folder))
    for field in fields(tally):
        print(f"{field.name.replace('_', ' '):28} {getattr(tally, field.name):8d}")
    print(f"{'killed inside an append':28} {tally.killed_inside_append / tally.kills:8.0%}")
    print(f"{'seconds':28} {time.monotonic() - start:8.1f}")
    return 1 if tally.failures else 0


if __name__ == "__main__":
    raise SystemExit(main())
