"""Push-T as a LeRobotDataset: written once by LeRobot's own recorder, then read with LeRobot's windows."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import av
import datasets
import lerobot
import numpy as np
import zarr
from lerobot.datasets.lerobot_dataset import LeRobotDataset
from lerobot.datasets.sampler import EpisodeAwareSampler
from torch.utils.data import DataLoader
from tqdm import tqdm

from peers.item_dataset import read_array

datasets.disable_progress_bars()

REPO_ID = "benchmark/pusht"
IMAGE = "observation.image"
FPS = 10


def written_dataset(source: Path, cache: Path, episodes: int, video: bool) -> Path:
    """Write the first ``episodes`` episodes with LeRobot, in its default video codec; reuse what is there.

    Args:
        source: Push-T in the Zarr replay-buffer layout.
        cache: folder that keeps the datasets between runs.
        episodes: number of episodes.
        video: with the camera, or state and action only.

    Returns:
        The folder of the dataset.
    """
    target = cache / f"pusht-lerobot{lerobot.__version__}-{episodes}-{'video' if video else 'state'}"
    if target.exists():
        return target
    partial = target.with_name(target.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    cache.mkdir(parents=True, exist_ok=True)
    state, action = read_array(source, "data/state"), read_array(source, "data/action")
    ends = read_array(source, "meta/episode_ends")[:episodes]
    images = zarr.open_array(str(source), path="data/img", mode="r")
    features: dict[str, dict[str, Any]] = {
        "observation.state": {"dtype": "float32", "shape": (state.shape[1],), "names": None},
        "action": {"dtype": "float32", "shape": (action.shape[1],), "names": None},
    }
    if video:
        features[IMAGE] = {
            "dtype": "video",
            "shape": images.shape[1:],
            "names": ["height", "width", "channel"],
        }
    dataset = LeRobotDataset.create(REPO_ID, FPS, features, root=partial, use_videos=video)
    starts = np.concatenate([[0], ends[:-1]]).tolist()
    for start, end in zip(starts, tqdm(ends.tolist(), desc=f"writing {target.name}"), strict=True):
        frames = np.asarray(images[start:end]).astype(np.uint8) if video else None
        for step in range(start, end):
            frame = {"observation.state": state[step], "action": action[step], "task": "push the T onto the target"}
            if frames is not None:
                frame[IMAGE] = frames[step - start]
            dataset.add_frame(frame)
        dataset.save_episode()
    dataset.finalize()
    partial.rename(target)
    return target


def window_dataset(folder: Path, video: bool, horizon: int = 16, n_obs: int = 2) -> LeRobotDataset:
    """The dataset with windows that end ``n_obs - 1`` steps before and begin at the newest observation's step."""
    history = [(i - n_obs + 1) / FPS for i in range(n_obs)]
    chunk = [(i - n_obs + 1) / FPS for i in range(horizon)]
    deltas = {"observation.state": history, "action": chunk} | ({IMAGE: history} if video else {})
    return LeRobotDataset(REPO_ID, root=folder, delta_timestamps=deltas, video_backend=video_backend())


def video_backend() -> str:
    """LeRobot's default decoder torchcodec where it finds FFmpeg's libraries, otherwise LeRobot's other one."""
    try:
        import torchcodec.decoders  # noqa: F401
    except (ImportError, OSError, RuntimeError):
        return "pyav"
    return "torchcodec"


def link_ffmpeg(folder: Path) -> None:
    """Give PyAV's own FFmpeg libraries the names under which torchcodec looks for them, as links in ``folder``.

    Processes started with ``folder`` on LD_LIBRARY_PATH can then use torchcodec without an FFmpeg of the system.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for library in (Path(av.__file__).parent.parent / "av.libs").glob("lib*.so.*"):
        name = re.match(r"(lib(?:av|sw)[a-z]+)-[0-9a-f]+\.so\.(\d+)\.", library.name)
        if name is not None:
            link = folder / f"{name[1]}.so.{name[2]}"
            link.unlink(missing_ok=True)
            link.symlink_to(library)


def window_sampler(dataset: LeRobotDataset) -> EpisodeAwareSampler:
    """The sampler of LeRobot's training script for diffusion: it leaves out the last 7 frames of every episode."""
    episodes = dataset.meta.episodes
    return EpisodeAwareSampler(
        episodes["dataset_from_index"], episodes["dataset_to_index"], drop_n_last_frames=7, shuffle=True
    )


def window_batches(dataset: LeRobotDataset, batch_size: int, workers: int) -> DataLoader:
    """The DataLoader of LeRobot's training script; the workers live on between epochs, which favours LeRobot."""
    return DataLoader(
        dataset,
        batch_size,
        sampler=window_sampler(dataset),
        num_workers=workers,
        multiprocessing_context="fork",
        persistent_workers=True,
    )
