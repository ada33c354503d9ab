"""Reading camera frames from a dataset as uint8 RGB."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from robopolicy.data.store import EpisodeStore

BLOCK_BYTES = 8 * 2**20
"""Frames are read in blocks of about this size, one block per thread at a time."""


def readers() -> int:
    """Threads that read and decode side by side; codecs release the interpreter lock."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class FrameReader:
    """Reads ranges of frames of one camera, whatever the dtype on disk.

    Float images (Push-T) hold either 0..255 or 0..1; which of them is decided once, from three places of the dataset.
    """

    def __init__(self, store: EpisodeStore, array: str) -> None:
        self.store, self.array = store, array
        self.shape: tuple[int, ...] = tuple(store.schema.arrays[array].shape)
        stored = store.array(array)
        self.chunk = int(stored.chunks[0])
        self._factor: float | None = None
        if stored.dtype != np.uint8:
            places = (0, store.n_steps // 2, store.n_steps - 1)
            brightest = max(float(np.max(store.read(array, p, p + 1))) for p in places)
            self._factor = 255.0 if brightest <= 1.0 else 1.0

    def read(self, start: int, stop: int) -> np.ndarray:
        """Frames (stop - start, H, W, C) uint8."""
        frames = self.store.read(self.array, start, stop)
        if self._factor is None:
            return frames
        frames = frames.astype(np.float32, copy=False)
        frames *= self._factor  # in place: a float copy of a block is four times its bytes
        np.rint(frames, out=frames)
        return np.clip(frames, 0, 255, out=frames).astype(np.uint8)


def load_images(store: EpisodeStore, array: str) -> Tensor:
    """Read all frames of a camera into memory, (N, H, W, C) uint8."""
    reader = FrameReader(store, array)
    frames = torch.empty((store.n_steps, *reader.shape), dtype=torch.uint8)
    target = frames.numpy()
    frame_bytes = int(np.prod(reader.shape))
    block = -(-max(1, BLOCK_BYTES // frame_bytes) // reader.chunk) * reader.chunk  # whole chunks: none is decoded twice

    def load(start: int) -> int:
        stop = min(start + block, store.n_steps)
        target[start:stop] = reader.read(start, stop)
        return stop - start

    with (
        ThreadPoolExecutor(readers()) as pool,
        tqdm(total=store.n_steps, desc=f"loading {array}", unit="frame", leave=False) as bar,
    ):
        for done in pool.map(load, range(0, store.n_steps, block)):
            bar.update(done)
    return frames
