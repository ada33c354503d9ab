"""Shards: the fixed groups of episodes that make a result the same wherever it is computed.

A network rounds differently at another batch size, and an episode may amplify the last digit of an action. So the seeds
are cut into groups by their order alone, and an episode shares its batches with the episodes of its group only.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

from tqdm import tqdm

from robopolicy.errors import UserError
from robopolicy.evaluation.episode import EpisodeResult

SHARD_SIZE = 50  # episodes


def split_seeds(seeds: Sequence[int], shard_size: int) -> list[tuple[int, ...]]:
    """Cut into consecutive groups of ``shard_size`` seeds; the last one may be smaller.

    Raises:
        UserError: there are no seeds, they repeat, one is negative, or ``shard_size`` is below 1.
    """
    if len(set(seeds)) != len(seeds) or not seeds:
        raise UserError(f"Evaluation needs at least one seed and each seed once, found {list(seeds)}.")
    if min(seeds) < 0:
        raise UserError(f"Seeds must be at least 0, found {min(seeds)}.")
    if shard_size < 1:
        raise UserError(f"shard_size={shard_size} must be at least 1.")
    return [tuple(seeds[i : i + shard_size]) for i in range(0, len(seeds), shard_size)]


def describe_seeds(seeds: Sequence[int]) -> str:
    """``100000 to 100049``, or the list where they are not consecutive."""
    if len(seeds) > 2 and list(seeds) == list(range(seeds[0], seeds[-1] + 1)):
        return f"{seeds[0]} to {seeds[-1]}"
    return ", ".join(map(str, seeds))


class Results:
    """The results that have come in, shown as a progress bar."""

    def __init__(self, bar: tqdm) -> None:
        self._bar = bar
        self._by_seed: dict[int, EpisodeResult] = {}
        self._began = time.perf_counter()

    def add(self, results: Iterable[EpisodeResult]) -> None:
        new = {result.seed: result for result in results}
        self._by_seed |= new
        if new:
            done = self._by_seed.values()
            rate = sum(result.success for result in done) / len(done)
            self._bar.set_postfix_str(f"success {rate:.2f}, {self.steps / self.seconds:.0f} steps/s", False)
            self._bar.update(len(new))

    @property
    def steps(self) -> int:
        return sum(result.steps for result in self._by_seed.values())

    @property
    def seconds(self) -> float:
        return time.perf_counter() - self._began

    def in_order(self, seeds: Sequence[int]) -> list[EpisodeResult]:
        return [self._by_seed[seed] for seed in seeds]


@contextmanager
def collecting(name: str, episodes: int, progress: bool) -> Iterator[Results]:
    """Open a progress bar for this many episodes of the environment ``name``."""
    with tqdm(total=episodes, unit="episode", disable=not progress, desc=name) as bar:
        yield Results(bar)
