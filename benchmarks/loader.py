"""Training windows per second, and memory, of robopolicy's loader against the usual ways to load Push-T.

Every side shuffles and delivers windows of 2 observation and 16 action steps. Each case runs in a process of its own,
which does nothing but take batches. Memory is the proportional set size (memory shared between workers counts once) of
that process and its workers: the peak, and how much of it came on top of the imports.

Before anything is timed, windows of robopolicy, of the per-item dataset and of LeRobot are compared value by value;
LeRobot's images only roughly, since they went through its video codec. LeRobot delivers images as floats, as always.
"""

from __future__ import annotations

import argparse
import ctypes.util
import multiprocessing
import os
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from fresh_process import run_fresh, wait_passively
from peers.item_dataset import ItemDataset
from results import machine, print_table, save_json
from torch.utils.data import DataLoader

from robopolicy.data.loader import WindowLoader
from robopolicy.data.store import EpisodeStore
from robopolicy.errors import UserError, require_extra
from robopolicy.spec import KeySpec, PolicySpec

WORKERS = 2
BATCH = {"state": 256, "image": 64}
STATE, AGENT, IMAGE = "observation.state", "observation.agent_pos", "observation.image.top"
SIDES = {
    "state": ("ours", "items", "lerobot"),
    "image": ("ours", "ours-streaming", "items-cached", "items-from-disk", "lerobot"),
}
NAMES = {
    "ours": "robopolicy, in memory",
    "ours-streaming": "robopolicy, streaming",
    "items": "torch Dataset, in memory",
    "items-cached": "torch Dataset, uint8 in memory",
    "items-from-disk": "torch Dataset, Zarr per item",
    "lerobot": "LeRobotDataset",
}


@dataclass(frozen=True)
class Options:
    """What all cases share; see --help."""

    data: Path
    cache: Path
    seconds: float
    repeats: int
    budget: int
    lerobot_episodes: int


@dataclass(frozen=True)
class Result:
    """Rates are windows per second, one for each repeat; memory is in MiB."""

    observations: str
    side: str
    rates: list[float]
    peak: float
    increase: float

    @property
    def rate(self) -> float:
        return statistics.median(self.rates)


def main() -> None:
    args = parse_arguments()
    options = Options(
        args.data, args.cache, args.seconds, args.repeats, round(args.budget_mb * 2**20), args.lerobot_episodes
    )
    if not (options.data / "meta").is_dir():
        raise UserError(f"--data: no Zarr dataset at {options.data}; point --data or ROBOPOLICY_DATA at Push-T's Zarr.")
    about = machine()
    wait_passively()
    with_lerobot = prepare_lerobot(options)
    run_fresh(verify, options, with_lerobot)
    results = []
    for observations, sides in SIDES.items():
        for side in sides:
            if with_lerobot or side != "lerobot":
                print(f"measuring {observations}: {NAMES[side]}", file=sys.stderr, flush=True)
                results.append(measured_alone(observations, side, options))
    print(f"{about['processor']}, {about['cores']} cores; DataLoaders with {WORKERS} workers; median of {args.repeats}")
    for observations in SIDES:
        print_results(observations, [r for r in results if r.observations == observations], options)
    save_json(args.json, [asdict(r) | {"rate": r.rate} for r in results], about)


def parse_arguments() -> argparse.Namespace:
    here = Path(os.environ.get("ROBOPOLICY_DATA", Path(__file__).parents[2] / "shared/data"))
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="example: python benchmarks/loader.py --data pusht_cchi_v7_replay.zarr --seconds 5",
    )
    parser.add_argument(
        "--data",
        type=Path,
        default=here / "pusht_cchi_v7_replay.zarr",
        help="Push-T in diffusion_policy's Zarr layout (default: in the folder that ROBOPOLICY_DATA names)",
    )
    parser.add_argument(
        "--seconds", type=float, default=10, help="time of each case, over all repeats (default: %(default)s)"
    )
    parser.add_argument("--repeats", type=int, default=5, help="parts that the time is cut into (default: %(default)s)")
    parser.add_argument(
        "--budget-mb", type=float, default=64, help="memory budget of the streaming case (default: %(default)s MiB)"
    )
    parser.add_argument(
        "--lerobot-episodes",
        type=int,
        default=40,
        help="episodes in LeRobot's video dataset; encoding takes a second or so each (default: %(default)s)",
    )
    parser.add_argument(
        "--cache",
        type=Path,
        default=Path(tempfile.gettempdir()) / "robopolicy-benchmark",
        help="folder that keeps LeRobot's datasets between runs (default: %(default)s)",
    )
    parser.add_argument("--json", metavar="FILE", help="also write all numbers to this file")
    return parser.parse_args()


def prepare_lerobot(options: Options) -> bool:
    """Write LeRobot's datasets where they are missing; False without the lerobot package."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    os.environ.setdefault("SVT_LOG", "1")  # the video encoder: errors only
    try:
        require_extra("lerobot", "lerobot")
    except UserError as error:
        print(f"LeRobot is left out. {error}", file=sys.stderr)
        return False
    from peers.lerobot_data import link_ffmpeg

    if ctypes.util.find_library("avutil") is None:
        link_ffmpeg(options.cache / "ffmpeg")
        path = [os.environ.get("LD_LIBRARY_PATH", ""), str(options.cache / "ffmpeg")]
        os.environ["LD_LIBRARY_PATH"] = ":".join(filter(None, path))
    run_fresh(write_lerobot, options)
    return True


def write_lerobot(options: Options) -> None:
    for observations in SIDES:
        lerobot_folder(options, observations)


def lerobot_folder(options: Options, observations: str) -> Path:
    from peers.lerobot_data import written_dataset

    episodes = (
        options.lerobot_episodes if observations == "image" else len(EpisodeStore.open(options.data).episode_ends)
    )
    return written_dataset(options.data, options.cache, episodes, video=observations == "image")


# ---------------------------------------------------------------------------------------------------------------- sides


def our_loader(options: Options, observations: str, memory_budget: int | None = None) -> WindowLoader:
    keys = {
        "state": (KeySpec(STATE, (5,), "state", unit="px", source="state", angles=(4,)),),
        "image": (
            KeySpec(AGENT, (2,), "state", unit="px", source="state", columns=(0, 1)),
            KeySpec(IMAGE, (96, 96, 3), "image", source="img"),
        ),
    }
    spec = PolicySpec(keys[observations], KeySpec("action", (2,), "action", unit="px", source="action"), fps=10.0)
    store = EpisodeStore.open(options.data)
    return WindowLoader(store, spec, batch_size=BATCH[observations], memory_budget=memory_budget)


def item_dataset(options: Options, observations: str, cached: bool = True) -> ItemDataset:
    if observations == "state":
        return ItemDataset(options.data, {STATE: [0, 1, 2, 3, 4]}, None, cached)
    return ItemDataset(options.data, {AGENT: [0, 1]}, IMAGE, cached)


def batches(options: Options, observations: str, side: str) -> Iterator[dict[str, Any]]:
    """Endless shuffled batches of one side."""
    if side == "ours":
        return our_loader(options, observations, memory_budget=2**40).batches()
    if side == "ours-streaming":
        return our_loader(options, observations, memory_budget=options.budget).batches()
    if side == "lerobot":
        from peers.lerobot_data import window_batches, window_dataset

        dataset = window_dataset(lerobot_folder(options, observations), video=observations == "image")
        return endless(window_batches(dataset, BATCH[observations], WORKERS))
    items = item_dataset(options, observations, cached=side != "items-from-disk")
    # fork, the default on Linux: workers share the arrays; a spawned process would otherwise spawn its workers too
    return endless(
        DataLoader(
            items,
            BATCH[observations],
            shuffle=True,
            num_workers=WORKERS,
            multiprocessing_context="fork",
            persistent_workers=True,
        )
    )


def endless(loader: Iterable[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    while True:
        yield from loader


# ------------------------------------------------------------------------------------------------------- verification


def verify(options: Options, with_lerobot: bool) -> None:
    """Compare windows of all sides; raises AssertionError where they differ."""
    for observations in SIDES:
        loader, items = our_loader(options, observations, memory_budget=2**40), item_dataset(options, observations)
        assert len(loader.windows) == len(items), (len(loader.windows), len(items))
        chosen = np.unique(np.linspace(0, len(items) - 1, 500).astype(int))
        ours = loader.batch(chosen)
        for key, value in ours.items():
            theirs = torch.stack([items[i][key] for i in chosen.tolist()])
            assert value.dtype == theirs.dtype and torch.equal(value, theirs), f"{key} differs from the item dataset"
        print(f"{observations}: {len(chosen)} windows equal to the item dataset's, {', '.join(ours)}")
        if with_lerobot:
            print(f"{observations}: {compare_lerobot(options, observations, loader)}")


def compare_lerobot(options: Options, observations: str, loader: WindowLoader) -> str:
    """Compare the windows of the first episodes with LeRobot's, whose images went through a lossy video codec."""
    from peers.lerobot_data import IMAGE as LEROBOT_IMAGE
    from peers.lerobot_data import window_dataset, window_sampler

    dataset = window_dataset(lerobot_folder(options, observations), video=observations == "image")
    order = window_sampler(dataset).indices
    chosen = np.arange(0, len(order), max(1, len(order) // 20))
    ours = loader.batch(chosen)
    theirs = [dataset[order[i]] for i in chosen.tolist()]
    assert torch.equal(ours["action"], torch.stack([x["action"] for x in theirs])), "action differs from LeRobot"
    state = torch.stack([x["observation.state"] for x in theirs])
    if observations == "state":
        assert torch.equal(ours[STATE], state), "state differs from LeRobot"
        return f"{len(chosen)} windows equal to LeRobot's"
    assert torch.equal(ours[AGENT], state[..., :2]), "agent position differs from LeRobot"
    images = torch.stack([x[LEROBOT_IMAGE] for x in theirs]).permute(0, 1, 3, 4, 2) * 255
    error = (images - ours[IMAGE]).abs().mean().item()
    assert error < 4, f"LeRobot's images differ by {error:.1f} of 255: not the same frames"
    return (
        f"{len(chosen)} windows equal to LeRobot's; its images, decoded by {dataset.video_backend}, "
        f"differ by {error:.2f} of 255 on average (video codec)"
    )


# -------------------------------------------------------------------------------------------------------- measurement


def measured_alone(observations: str, side: str, options: Options) -> Result:
    """Measure one case in a fresh process, watching its memory from outside."""
    context = multiprocessing.get_context("spawn")
    mine, theirs = context.Pipe()
    process = context.Process(target=measure, args=(observations, side, options, theirs))
    process.start()
    theirs.close()
    watched = MemoryWatch(process.pid)
    try:
        mine.recv()
        baseline = watched.now()
        watched.start()
        mine.send("go")
        rates = mine.recv()
    except EOFError:
        raise UserError(
            f"{observations}, {NAMES[side]}: the measuring process failed; see its message above."
        ) from None
    finally:
        watched.stop()
        process.terminate()
        process.join()
    return Result(observations, side, rates, watched.peak, watched.peak - baseline)


def measure(observations: str, side: str, options: Options, parent: Connection) -> None:
    """Runs in the measuring process: send when the imports are done, then the rates."""
    if side == "lerobot":
        import peers.lerobot_data  # noqa: F401
    parent.send("imported")
    parent.recv()
    stream = batches(options, observations, side)
    for _ in range(2 * WORKERS + 1):  # more than DataLoader's workers have made ahead
        next(stream)
    parent.send([rate(stream, options.seconds / options.repeats) for _ in range(options.repeats)])
    parent.recv()  # the parent ends this process, whose workers would otherwise finish an epoch


def rate(stream: Iterator[dict[str, Any]], seconds: float) -> float:
    began, windows = time.perf_counter(), 0
    while time.perf_counter() - began < seconds:
        windows += len(next(stream)["action"])
    return windows / (time.perf_counter() - began)


class MemoryWatch:
    """Peak of the memory of a process and its descendants, in MiB, sampled ten times a second."""

    def __init__(self, pid: int | None) -> None:
        self._process = psutil.Process(pid)
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self.peak = 0.0

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._done.set()
        if self._thread.is_alive():
            self._thread.join()

    def now(self) -> float:
        total = 0
        for process in (self._process, *self._process.children(recursive=True)):
            try:
                memory = process.memory_full_info()
                total += getattr(memory, "pss", memory.rss)  # pss: Linux only
            except psutil.NoSuchProcess:
                continue
        return total / 2**20

    def _watch(self) -> None:
        while not self._done.wait(0.1):
            try:
                self.peak = max(self.peak, self.now())
            except psutil.NoSuchProcess:
                return


def print_results(observations: str, results: list[Result], options: Options) -> None:
    ours = [r for r in results if r.side.startswith("ours")]
    rows = []
    for r in results:
        ratios = ["" if r in ours else f"{o.rate / r.rate:.1f}" for o in ours]
        rows.append((NAMES[r.side], f"{r.rate:,.0f}", f"{min(r.rates):,.0f}-{max(r.rates):,.0f}", *ratios,
                     f"{r.peak:,.0f}", f"{r.increase:,.0f}"))  # fmt: skip
    notes = {
        "state": "",
        "image": f", streaming within {options.budget / 2**20:.0f} MiB; LeRobot: {options.lerobot_episodes} episodes",
    }
    print_table(
        f"{observations.capitalize()} windows, batch {BATCH[observations]}{notes[observations]}",
        ("loader", "windows/s", "min-max", *(f"{NAMES[o.side].split(', ')[1]} is x times" for o in ours),
         "peak MiB", "above imports MiB"),
        rows,
    )  # fmt: skip


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
