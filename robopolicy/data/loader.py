"""Batches of training windows without a Python loop over samples.

Vectors always live in memory as one array, and a batch of them is one gather. Images do too when they fit the memory
budget; otherwise they are streamed from disk (see `robopolicy.data.stream`). The n-th batch is a function of the seed
and of n alone, so that training can resume at any step and several processes can share one global batch.
"""

from __future__ import annotations

import copy
import logging
import os
from collections.abc import Iterator

import numpy as np
import psutil
import torch
from torch import Tensor

from robopolicy.data.images import load_images
from robopolicy.data.schema import ArraySpec
from robopolicy.data.store import EpisodeStore
from robopolicy.data.stream import ImageStream
from robopolicy.data.windows import build_windows
from robopolicy.errors import UserError
from robopolicy.spec import KeySpec, PolicySpec, check_keys

log = logging.getLogger(__name__)

Batch = dict[str, Tensor]


class WindowLoader:
    """Endless, shuffled, resumable batches of windows of a dataset.

    Args:
        store: the dataset.
        spec: keys and horizons; `build_windows` says which windows exist.
        batch_size: windows of one global batch, over all processes.
        episodes: boolean mask (E,) of the episodes to use; None means all.
        seed: seed of the order.
        shuffle: False walks through the windows in order, once (validation).
        memory_budget: bytes that image data may take in memory; None means half of what is free now. The order of
            streamed windows depends on it: give it to get the same order on another day.
        rank: index of this process; it gets the rank-th equal part of each global batch.
        world: number of processes.

    Raises:
        UserError: the dataset lacks a key or has another shape, or the batch cannot be divided by ``world``.
    """

    def __init__(
        self,
        store: EpisodeStore,
        spec: PolicySpec,
        *,
        batch_size: int,
        episodes: np.ndarray | None = None,
        seed: int = 0,
        shuffle: bool = True,
        memory_budget: int | None = None,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        if batch_size % world:
            raise UserError(f"batch_size={batch_size} cannot be divided among {world} processes.")
        wanted = (*spec.observations, spec.action)
        check_keys(
            {k.key: dataset_key(store, k) for k in wanted if k.array in store.keys},
            wanted,
            f"dataset {store.path} and task",
        )
        self.spec = spec
        self._store = store
        self.batch_size = batch_size
        self.windows = build_windows(store.episode_ends, spec.horizon, spec.pad_before, spec.pad_after, episodes)
        self._seed, self._shuffle = seed, shuffle
        self._part = slice(rank * batch_size // world, (rank + 1) * batch_size // world)
        self._vectors, self._columns = _stack_vectors(store, spec)
        self._images: dict[str, Tensor] = {}
        self._stream: ImageStream | None = None
        if spec.images:
            self._open_images(store, memory_budget)

    def _open_images(self, store: EpisodeStore, memory_budget: int | None) -> None:
        self._budget = budget = free_memory_mb() * 2**20 if memory_budget is None else memory_budget
        needed = store.n_steps * sum(int(np.prod(k.shape)) for k in self.spec.images)
        if needed <= budget:
            log.info("images: %.0f MiB in memory", needed / 2**20)
            self._images = {k.key: load_images(store, k.array) for k in self.spec.images}
        else:
            log.info("images: %.0f MiB, streamed within %.0f MiB", needed / 2**20, budget / 2**20)
            self._stream = ImageStream(store, self.spec, self.windows, budget, self._seed, self._shuffle)

    def subset(self, episodes: np.ndarray, batch_size: int, limit: int) -> WindowLoader:
        """The first ``limit`` windows of other episodes of the same dataset, in order, for one process.

        Images in memory are shared with this loader; streamed ones are read again, in buffers no larger than needed.
        """
        other = copy.copy(self)
        other.batch_size, other._shuffle, other._part = batch_size, False, slice(None)
        other.windows = build_windows(
            self._store.episode_ends, self.spec.horizon, self.spec.pad_before, self.spec.pad_after, episodes
        ).first(limit)
        if self._stream is not None:
            other._stream = ImageStream(self._store, self.spec, other.windows, self._budget, 0, shuffle=False)
        return other

    @property
    def streaming(self) -> bool:
        return self._stream is not None

    def batches(self, start: int = 0) -> Iterator[Batch]:
        """Yield batches from the ``start``-th on; endless when shuffling, one pass otherwise.

        Yields:
            ``observation key -> (B, n_obs_steps, *shape)`` (uint8 for images, else float32, physical units) and
            ``action -> (B, horizon, A)`` float32, with B the part of this process.
        """
        if self._stream is not None:
            for windows, images in self._stream.batches(self.batch_size, start):
                part = {key: value[self._part] for key, value in images.items()}
                yield self._vector_batch(windows[self._part]) | part
            return
        for windows in window_order(len(self.windows), self.batch_size, self._seed, self._shuffle, start):
            yield self.batch(windows[self._part])

    def batch(self, windows: np.ndarray) -> Batch:
        """Gather the given windows (B,); only for data in memory."""
        batch = self._vector_batch(windows)
        if self._images:
            steps = torch.from_numpy(self.windows.steps(windows, self.spec.n_obs_steps))
            for key, images in self._images.items():
                batch[key] = gather_frames(images, steps)
        return batch

    def _vector_batch(self, windows: np.ndarray) -> Batch:
        steps = torch.from_numpy(self.windows.steps(windows, self.spec.horizon))
        rows = self._vectors.index_select(0, steps.view(-1)).view(*steps.shape, -1)
        batch = {k.key: rows[:, : self.spec.n_obs_steps, self._columns[k.key]] for k in self.spec.states}
        batch[self.spec.action.key] = rows[..., self._columns[self.spec.action.key]]
        return batch

    def vectors(self, key: KeySpec) -> np.ndarray:
        """All steps (N, D) of a state or action key, e.g. to fit its normaliser."""
        return self._vectors[:, self._columns[key.key]].numpy()


def free_memory_mb() -> int:
    """Half of the memory that is free now, shared among the processes of this machine, in MiB."""
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return int(psutil.virtual_memory().available // 2 // 2**20 // processes)


def dataset_key(store: EpisodeStore, key: KeySpec) -> KeySpec:
    """Describe what the dataset offers under the array behind ``key``, in the terms of a policy.

    Raises:
        UserError: ``key.columns`` are outside the array.
    """
    array: ArraySpec = store.schema.arrays[key.array]
    shape = tuple(array.shape) or (1,)
    if key.columns is not None:
        if len(shape) != 1 or not key.columns or min(key.columns) < 0 or max(key.columns) >= shape[0]:
            raise UserError(f"{store.path}: columns {key.columns} of '{key.array}' do not exist; its shape is {shape}.")
        shape = (len(key.columns),)
    role = array.role if array.role in ("image", "action") else "state"
    if key.role != "image" and role != "image":
        role = key.role  # any vector of the dataset may serve as state or action
    return KeySpec(key.key, shape, role, unit=array.unit, rotation=array.rotation)


def gather_frames(images: Tensor, steps: Tensor) -> Tensor:
    """Pick frames (B, T, H, W, C) from images (N, H, W, C) by steps (B, T)."""
    flat = images.view(len(images), -1)
    return flat.index_select(0, steps.reshape(-1)).view(*steps.shape, *images.shape[1:])


def window_order(n_windows: int, batch_size: int, seed: int, shuffle: bool, start: int) -> Iterator[np.ndarray]:
    """Yield the windows of each batch from the ``start``-th on.

    Shuffled, the batches cut an endless row of permutations, one for each epoch; so all batches have the same size.
    """
    if not shuffle:
        for first in range(start * batch_size, n_windows, batch_size):
            yield np.arange(first, min(first + batch_size, n_windows))
        return
    epoch, skip = divmod(start * batch_size, n_windows)
    left = _permutation(n_windows, seed, epoch)[skip:]
    while True:
        while len(left) < batch_size:
            epoch += 1
            left = np.concatenate([left, _permutation(n_windows, seed, epoch)])
        yield left[:batch_size]
        left = left[batch_size:]


def _permutation(n: int, seed: int, epoch: int) -> np.ndarray:
    return np.random.default_rng((seed, epoch)).permutation(n)


def _stack_vectors(store: EpisodeStore, spec: PolicySpec) -> tuple[Tensor, dict[str, slice]]:
    """Put all vector keys side by side in one (N, D) float32 array, so that a batch is one gather."""
    parts, columns, first = [], {}, 0
    for key in (*spec.states, spec.action):
        values: np.ndarray = np.asarray(store.read(key.array), dtype=np.float32).reshape(store.n_steps, -1)
        if key.columns is not None:
            values = values[:, list(key.columns)]
        parts.append(values)
        columns[key.key] = slice(first, first + values.shape[1])
        first += values.shape[1]
    return torch.from_numpy(np.concatenate(parts, axis=1)), columns
