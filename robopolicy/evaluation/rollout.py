"""Batched rollouts: many episodes at once, one call of the policy per chunk for all of them."""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import replace
from typing import Protocol

import numpy as np
import torch

from robopolicy.errors import UserError
from robopolicy.evaluation.environments import Environment
from robopolicy.evaluation.episode import EpisodeResult, read_instructions
from robopolicy.evaluation.launch.shards import SHARD_SIZE, collecting, split_seeds
from robopolicy.evaluation.simulators import Ended, Simulators, simulators
from robopolicy.spec import INSTRUCTION, PolicySpec

log = logging.getLogger(__name__)


class ChunkPolicy(Protocol):
    """What can be evaluated.

    A policy whose spec has tasks is told what each row's environment asks for, unless its attribute ``instruction`` is
    there and not None: then that is what it does in all.
    """

    @property
    def spec(self) -> PolicySpec: ...

    def act(self, observations: Mapping[str, np.ndarray], generators: Sequence[torch.Generator]) -> np.ndarray:
        """Predict the next actions of a batch of episodes.

        Args:
            observations: per key ``(B, n_obs_steps, *key.shape)``, oldest first, physical units, images uint8 RGB; for
                a policy that is told, ``instruction`` (B,) texts.
            generators: one per row and the only source of randomness for that row, so that its actions do not depend
                on the batch it is in.

        Returns:
            ``(B, n_action_steps, action dim)`` in physical units; the first action is for the newest observation.
        """


class Player(Protocol):
    """What plays the episodes of an evaluation: `rollout`, or a launcher that spreads them over machines."""

    def __call__(
        self,
        policy: ChunkPolicy,
        environment: Environment,
        seeds: Sequence[int],
        *,
        batch_size: int = ...,
        workers: int = ...,
        progress: bool = ...,
    ) -> list[EpisodeResult]: ...


def rollout(
    policy: ChunkPolicy,
    environment: Environment,
    seeds: Sequence[int],
    *,
    batch_size: int = 50,
    workers: int = 0,
    progress: bool = True,
    shard_size: int = SHARD_SIZE,
    threads: int | None = None,
) -> list[EpisodeResult]:
    """Play one episode for each seed.

    An episode's start and the policy's random generator depend on the seed only. What else it shares with other
    episodes is a network's batch, whose size decides how matrix products round; so batches are formed within shards
    (see `launch.shards`), always in the same way. With the same ``batch_size``, ``shard_size``, ``threads``, package
    versions and kind of processor the results are therefore equal to the last bit, whatever ``workers`` is and on
    however many machines the shards are played.

    With worker processes two shards are played at a time: while one is simulated, the policy computes for the other.

    Args:
        seeds: all different.
        batch_size: episodes of a shard that run at the same time; when one ends, the next seed takes its place.
        workers: processes that simulate; 0 simulates in this one.
        shard_size: episodes per shard.
        threads: CPU threads of the policy; None leaves torch's setting.

    Returns:
        One result per seed, in the order of ``seeds``.

    Raises:
        UserError: policy and environment do not fit, seeds repeat, a policy that must be told what to do gets no
            instruction, the policy's actions are not finite, or a worker process dies again and again.
        ValueError: the policy's chunk has the wrong shape.
    """
    shards = split_seeds(seeds, shard_size)
    if batch_size < 1 or workers < 0:
        raise UserError(f"batch_size={batch_size} must be at least 1 and workers={workers} at least 0.")
    environment.check(policy.spec)
    count = min(batch_size, shard_size, len(seeds))
    lanes = min(2, len(shards)) if workers else 1
    with (
        collecting(environment.name, len(seeds), progress) as results,
        closing(simulators(environment, _told_spec(policy), lanes * count, workers)) as slots,
        torch_threads(threads),
    ):
        run = [_Lane(slots, range(i * count, (i + 1) * count)) for i in range(lanes)]
        for ended in _play(policy, run, deque(shards)):
            results.add(ended.values())
    log.info(
        "%d episodes of %s in %.1f s: %.0f steps/s, %.0f %% of the time in the policy",
        len(seeds), environment.name, results.seconds, results.steps / results.seconds,
        100 * sum(lane.policy_s for lane in run) / results.seconds,
    )  # fmt: skip
    return results.in_order(seeds)


def _told_spec(policy: ChunkPolicy) -> PolicySpec:
    """What the environments must provide: no instructions where the policy has its own."""
    return policy.spec if getattr(policy, INSTRUCTION, None) is None else replace(policy.spec, tasks=())


def _observed(histories: Mapping[str, np.ndarray], running: Sequence[int], spec: PolicySpec) -> dict[str, np.ndarray]:
    """What the policy sees of the running slots."""
    observations = {key: rows[running] for key, rows in histories.items()}
    if INSTRUCTION in observations:
        texts = read_instructions(observations[INSTRUCTION])
        if "" in texts:
            known = ", ".join(repr(task.instruction) for task in spec.tasks)
            raise UserError(
                f"The environment does not say what to do, and the policy must be told: instruction='…', of {known}."
            )
        observations[INSTRUCTION] = np.array(texts)
    return observations


@contextmanager
def torch_threads(threads: int | None) -> Iterator[None]:
    """Set torch's CPU threads for a while; None changes nothing."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _play(policy: ChunkPolicy, lanes: Sequence[_Lane], shards: deque[Sequence[int]]) -> Iterator[Ended]:
    """Play all shards; a lane that has finished its shard takes the next one."""
    lanes = list(lanes)
    while lanes:
        for lane in tuple(lanes):
            yield lane.finish()
            if not lane.busy:
                if not shards:
                    lanes.remove(lane)
                    continue
                lane.waiting.extend(shards.popleft())
            lane.begin(policy)


class _Lane:
    """Slots that play one shard at a time.

    Attributes:
        waiting: the shard's seeds that have no slot yet.
        policy_s: seconds spent in the policy.
    """

    def __init__(self, simulators: Simulators, slots: Sequence[int]) -> None:
        self._simulators = simulators
        self._slots = slots
        self._generators: dict[int, torch.Generator] = {}  # of the running slots
        self._executed: Callable[[], Ended] = dict
        self.waiting: deque[int] = deque()
        self.policy_s = 0.0

    @property
    def busy(self) -> bool:
        return bool(self.waiting or self._generators)

    def begin(self, policy: ChunkPolicy) -> None:
        """Fill the free slots, ask the policy for the running ones, begin to execute its chunks."""
        free = [slot for slot in self._slots if slot not in self._generators]
        starts = {slot: self.waiting.popleft() for slot in free[: len(self.waiting)]}
        if starts:
            self._simulators.start(starts)
        self._generators |= {slot: torch.Generator().manual_seed(seed) for slot, seed in starts.items()}
        running = sorted(self._generators)
        observations = _observed(self._simulators.histories, running, policy.spec)
        asked = time.perf_counter()
        actions = policy.act(observations, [self._generators[slot] for slot in running])
        self.policy_s += time.perf_counter() - asked
        actions = np.asarray(actions, dtype=np.float32)
        wanted = (len(running), policy.spec.n_action_steps, policy.spec.action.dim)
        if actions.shape != wanted:
            raise ValueError(f"The policy's chunk has shape {actions.shape}, wanted {wanted}.")
        self._executed = self._simulators.execute(dict(zip(running, actions, strict=True)))

    def finish(self) -> Ended:
        """Wait until the chunks are executed; returns the results of the episodes that ended."""
        ended = self._executed()
        self._executed = dict
        for slot in ended:
            del self._generators[slot]
        return ended
