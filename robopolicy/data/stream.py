"""Streaming image windows from disk within a memory budget.

The windows are cut into blocks, runs of neighbours in one episode, so that a frame is decoded about once an epoch
(twice where a stored chunk spans two blocks).
Blocks in random order fill a pool; the windows of a pool are shuffled; while one pool is served, threads read the next.
Two pools make up the budget. The order is a function of the seed and of the budget.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from robopolicy.data.images import FrameReader, readers
from robopolicy.data.store import EpisodeStore
from robopolicy.data.windows import WindowTable
from robopolicy.errors import UserError
from robopolicy.spec import PolicySpec


@dataclass(frozen=True)
class Pool:
    """Windows served together, and where their frames lie in the pool's buffer.

    Attributes:
        windows: (W,) windows in the order in which they are served.
        ranges: (K, 2) ranges of dataset steps held by the pool.
        shift: (W,) what to add to a step of the dataset to get its place in the buffer.
    """

    windows: np.ndarray
    ranges: np.ndarray
    shift: np.ndarray

    @property
    def frames(self) -> int:
        return int(np.sum(self.ranges[:, 1] - self.ranges[:, 0]))


class ImageStream:
    """Image batches of windows in a pool-wise shuffled order; see the module's text.

    Raises:
        UserError: the budget holds less than two blocks.
    """

    def __init__(
        self, store: EpisodeStore, spec: PolicySpec, windows: WindowTable, budget: int, seed: int, shuffle: bool
    ) -> None:
        self._spec, self._windows, self._seed, self._shuffle = spec, windows, seed, shuffle
        self._readers = {k.key: FrameReader(store, k.array) for k in spec.images}
        chunk = max(r.chunk for r in self._readers.values())
        self._block = max(16, chunk)
        frame_bytes = sum(int(np.prod(k.shape)) for k in spec.images)
        self._pool_frames = budget // (2 * frame_bytes)
        needed = self._block + spec.n_obs_steps - 1
        if self._pool_frames < needed:
            raise UserError(
                f"data.memory_budget is {budget / 2**20:.1f} MiB, but streaming {store.path} needs at least "
                f"{2 * needed * frame_bytes / 2**20:.1f} MiB (two blocks of {needed} frames)."
            )
        self._blocks = self._cut_blocks()
        everything = int(np.sum(self._blocks[:, 1] - self._blocks[:, 0] + spec.n_obs_steps - 1))
        self._pool_frames = min(self._pool_frames, everything)

    def _cut_blocks(self) -> np.ndarray:
        """Ranges (K, 2) of neighbouring windows, none of which crosses an episode."""
        edges = np.flatnonzero(np.diff(self._windows.episode)) + 1
        firsts = np.concatenate([[0], edges])
        lasts = np.concatenate([edges, [len(self._windows)]])
        return np.array(
            [(a, min(a + self._block, last)) for first, last in zip(firsts, lasts, strict=True)
             for a in range(first, last, self._block)]
        )  # fmt: skip

    def _pools(self, epoch: int) -> Iterator[Pool]:
        rng = np.random.default_rng((self._seed, epoch))
        order = rng.permutation(len(self._blocks)) if self._shuffle else np.arange(len(self._blocks))
        blocks = self._blocks[order]
        table, last = self._windows, self._spec.n_obs_steps - 1
        low = np.clip(table.start[blocks[:, 0]], table.low[blocks[:, 0]], table.high[blocks[:, 0]])
        final = blocks[:, 1] - 1
        high = np.clip(table.start[final] + last, table.low[final], table.high[final]) + 1
        size = high - low
        first = 0
        while first < len(blocks):
            used = np.cumsum(size[first:])
            count = max(1, int(np.searchsorted(used, self._pool_frames, side="right")))
            chosen = slice(first, first + count)
            place = used[:count] - size[chosen]
            lengths = blocks[chosen, 1] - blocks[chosen, 0]
            windows = np.concatenate([np.arange(a, b) for a, b in blocks[chosen]])
            shift = np.repeat(place - low[chosen], lengths)
            mixed = rng.permutation(len(windows)) if self._shuffle else np.arange(len(windows))
            yield Pool(windows[mixed], np.stack([low[chosen], high[chosen]], axis=1), shift[mixed])
            first += count

    def _plan(self, skip: int) -> Iterator[tuple[Pool, int]]:
        """Pools in order, each with the number of its windows to skip, once ``skip`` windows have been served."""
        epoch = skip // len(self._windows) if self._shuffle else 0
        skip -= epoch * len(self._windows)
        while True:
            for pool in self._pools(epoch):
                if skip < len(pool.windows):
                    yield pool, skip
                skip = max(0, skip - len(pool.windows))
            if not self._shuffle:
                return
            epoch += 1

    def batches(self, batch_size: int, start: int) -> Iterator[tuple[np.ndarray, dict[str, Tensor]]]:
        """Yield windows (B,) and their frames ``key -> (B, n_obs_steps, H, W, C)`` from the ``start``-th batch on."""
        windows: list[np.ndarray] = []
        frames: list[dict[str, Tensor]] = []
        missing = batch_size
        for pool, skip, buffers in self._filled(start * batch_size):
            while skip < len(pool.windows):
                part = slice(skip, skip + missing)
                windows.append(pool.windows[part])
                frames.append(self._gather(pool, part, buffers))
                missing -= len(windows[-1])
                skip = part.stop
                if missing == 0:
                    yield np.concatenate(windows), {k: torch.cat([f[k] for f in frames]) for k in frames[0]}
                    windows, frames, missing = [], [], batch_size
        if windows:
            yield np.concatenate(windows), {k: torch.cat([f[k] for f in frames]) for k in frames[0]}

    def _gather(self, pool: Pool, part: slice, buffers: dict[str, Tensor]) -> dict[str, Tensor]:
        steps = self._windows.steps(pool.windows[part], self._spec.n_obs_steps) + pool.shift[part, None]
        index = torch.from_numpy(steps.reshape(-1))
        return {key: b.index_select(0, index).view(*steps.shape, *b.shape[1:]) for key, b in buffers.items()}

    def _filled(self, skip: int) -> Iterator[tuple[Pool, int, dict[str, Tensor]]]:
        """Pools with their frames read; the next pool is read while the caller uses the current one."""
        spare = [self._buffers(), self._buffers()]
        plan = self._plan(skip)
        threads = ThreadPoolExecutor(readers())
        try:
            ahead = self._start(threads, plan, spare[0])
            turn = 0
            while ahead is not None:
                pool, pool_skip, work = ahead
                for future in work:
                    future.result()
                turn += 1
                ahead = self._start(threads, plan, spare[turn % 2])
                yield pool, pool_skip, spare[(turn - 1) % 2]
        finally:
            threads.shutdown(cancel_futures=True)  # whoever stops early does not wait for the next pool

    def _buffers(self) -> dict[str, Tensor]:
        return {
            key: torch.empty((self._pool_frames, *reader.shape), dtype=torch.uint8)
            for key, reader in self._readers.items()
        }

    def _start(
        self, threads: ThreadPoolExecutor, plan: Iterator[tuple[Pool, int]], buffers: dict[str, Tensor]
    ) -> tuple[Pool, int, list[Future[None]]] | None:
        item = next(plan, None)
        if item is None:
            return None
        pool, skip = item
        work = []
        for key, reader in self._readers.items():
            target, place = buffers[key].numpy(), 0
            for a, b in pool.ranges.tolist():
                work.append(threads.submit(_fill, reader, target[place : place + b - a], a, b))
                place += b - a
        return pool, skip, work


def _fill(reader: FrameReader, target: np.ndarray, start: int, stop: int) -> None:
    target[:] = reader.read(start, stop)
