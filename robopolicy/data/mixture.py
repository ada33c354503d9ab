"""Batches from several datasets in fixed shares.

The rows of all batches form one endless row. Dataset i, with share w_i of it, offers its j-th window (j = 0, 1, …) at
time ``(j + 1/2) / w_i``, and rows come in the order of their times (Webster's method of apportionment). So every
stretch of rows, a batch or one process's part of it, holds the datasets in their shares up to about one row; and how
many windows of a dataset come before the n-th row follows from n alone, so that training resumes anywhere.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import count

import numpy as np
import torch

from robopolicy.data.goals import draw_chances
from robopolicy.data.loader import Batch, HeldOut, WindowLoader, free_memory_mb, image_bytes
from robopolicy.data.store import EpisodeStore
from robopolicy.errors import UserError
from robopolicy.spec import PolicySpec


@dataclass(frozen=True)
class MixturePart:
    """One dataset of a mixture.

    Attributes:
        store: the dataset.
        weight: how often its windows are drawn, relative to the other datasets', whatever their sizes.
        episodes: mask (E,) of the episodes to train on.
        instructions: instruction of each episode, E texts.
    """

    store: EpisodeStore
    weight: float
    episodes: np.ndarray
    instructions: Sequence[str]


class MixtureDataset:
    """Endless, shuffled, resumable batches of windows of several datasets.

    Each dataset is walked through in its own shuffled order, as often as its share of the rows asks for.

    Args:
        parts: the datasets; all fit the spec.
        spec: keys, horizons and tasks.
        batch_size: windows of one global batch, over all processes.
        seed: seed of the orders and of the goals.
        memory_budget: bytes that images of all datasets may take in memory; None means half of what is free now.
        rank: index of this process; it gets the rank-th equal part of each global batch.
        world: number of processes.

    Raises:
        UserError: see `WindowLoader`; also a weight that is not above 0.
    """

    def __init__(
        self,
        parts: Sequence[MixturePart],
        spec: PolicySpec,
        *,
        batch_size: int,
        seed: int = 0,
        memory_budget: int | None = None,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        if batch_size % world:
            raise UserError(f"batch_size={batch_size} cannot be divided among {world} processes.")
        self.spec, self.batch_size, self._seed = spec, batch_size, seed
        self.shares = shares([part.weight for part in parts])
        self._part = slice(rank * batch_size // world, (rank + 1) * batch_size // world)
        budget = free_memory_mb() * 2**20 if memory_budget is None else memory_budget
        budgets = divide_memory([image_bytes(part.store, spec) for part in parts], budget)
        self.loaders = [
            WindowLoader(
                part.store,
                spec,
                batch_size=batch_size,
                episodes=part.episodes,
                instructions=part.instructions,
                seed=int(np.random.SeedSequence((seed, i)).generate_state(1)[0]),
                memory_budget=share,
            )
            for i, (part, share) in enumerate(zip(parts, budgets, strict=True))
        ]

    @property
    def streaming(self) -> bool:
        return any(loader.streaming for loader in self.loaders)

    def batches(self, start: int = 0) -> Iterator[Batch]:
        """Yield batches from the ``start``-th on, endless; see `WindowLoader.batches`."""
        size, part = self.batch_size, self._part
        served = rows_before(self.shares, start * size)
        walks = [loader.walk(int(first)) for loader, first in zip(self.loaders, served, strict=True)]
        for n in count(start):
            after = rows_before(self.shares, (n + 1) * size)
            low, high = (rows_before(self.shares, n * size + edge) for edge in (part.start, part.stop))
            places = _places(low, high, self.shares)  # of this process's rows
            chances = draw_chances(self._seed, n, size)[part] if self.spec.goals else None
            batches = []
            for i, (loader, walk) in enumerate(zip(self.loaders, walks, strict=True)):
                own = slice(int(low[i] - served[i]), int(high[i] - served[i]))
                windows, frames = walk.take(int(after[i] - served[i]), own)
                if len(windows):
                    batches.append(loader.batch(windows, frames, None if chances is None else chances[places[i]]))
            order = torch.from_numpy(np.argsort(np.concatenate(places)))
            yield {key: torch.cat([batch[key] for batch in batches]).index_select(0, order) for key in batches[0]}
            served = after


@dataclass(frozen=True)
class InTurn:
    """The held-out windows of several datasets, one dataset after the other."""

    sources: Sequence[HeldOut]

    def batches(self) -> Iterator[Batch]:
        for source in self.sources:
            yield from source.batches()


def shares(weights: Sequence[float]) -> np.ndarray:
    """Weights (K,) over their sum.

    Raises:
        UserError: a weight is not a number above 0.
    """
    values = np.asarray(weights, dtype=np.float64)
    for i in np.flatnonzero(~(np.isfinite(values) & (values > 0))):
        raise UserError(
            f"data.mixture[{i}].weight={weights[i]} must be a number above 0; leave the dataset out instead."
        )
    return values / values.sum()


def rows_before(shares: np.ndarray, total: int) -> np.ndarray:
    """How many of the first ``total`` rows come from each dataset, (K,) int64; their sum is ``total``.

    Rows are ordered by time, at equal times by dataset. At most ``t + K/2`` rows have a time up to t, so the rows up
    to ``total - K`` are counted in one step and only about K single ones are left.
    """
    rows = np.maximum(np.floor((total - len(shares)) * shares + 0.5), 0).astype(np.int64)
    times = (rows + 0.5) / shares
    for _ in range(total - int(rows.sum())):
        earliest = int(np.argmin(times))
        rows[earliest] += 1
        times[earliest] = (rows[earliest] + 0.5) / shares[earliest]
    return rows


def _places(low: np.ndarray, high: np.ndarray, shares: np.ndarray) -> list[np.ndarray]:
    """Places, in the order of times, of rows ``low_i .. high_i`` of each dataset."""
    times = [(np.arange(a, b) + 0.5) / share for a, b, share in zip(low, high, shares, strict=True)]
    places = np.empty(int((high - low).sum()), dtype=np.int64)
    places[np.argsort(np.concatenate(times), kind="stable")] = np.arange(len(places))
    return np.split(places, np.cumsum(high - low)[:-1])


def divide_memory(needed: Sequence[int], budget: int) -> list[int]:
    """Share a budget: whoever needs less than an equal part gets what it needs, the others share the rest equally."""
    granted = [0] * len(needed)
    smallest_first = sorted(range(len(needed)), key=lambda i: needed[i])
    for done, i in enumerate(smallest_first):
        granted[i] = min(needed[i], budget // (len(needed) - done))
        budget -= granted[i]
    return granted


def mixture_fingerprint(parts: Sequence[MixturePart], tasks: bool) -> str:
    """SHA-256 over the datasets' fingerprints, their weights and, where they name tasks, the instructions."""
    rows = [[part.store.fingerprint(), part.weight, list(part.instructions) if tasks else []] for part in parts]
    return hashlib.sha256(json.dumps(rows).encode()).hexdigest()
