"""Batched rollouts: many episodes at once, one call of the policy per chunk for all of them."""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Mapping, Sequence
from contextlib import closing
from typing import Protocol

import numpy as np
import torch
from tqdm import tqdm

from robopolicy.errors import UserError
from robopolicy.evaluation.environments import Environment
from robopolicy.evaluation.episode import EpisodeResult
from robopolicy.evaluation.simulators import Simulators, simulators
from robopolicy.spec import PolicySpec

log = logging.getLogger(__name__)


class ChunkPolicy(Protocol):
    """What can be evaluated."""

    @property
    def spec(self) -> PolicySpec: ...

    def act(self, observations: Mapping[str, np.ndarray], generators: Sequence[torch.Generator]) -> np.ndarray:
        """Predict the next actions of a batch of episodes.

        Args:
            observations: per key ``(B, n_obs_steps, *key.shape)``, oldest first, physical units, images uint8 RGB.
            generators: one per row and the only source of randomness for that row, so that its actions do not depend
                on the batch it is in.

        Returns:
            ``(B, n_action_steps, action dim)`` in physical units; the first action is for the newest observation.
        """


def rollout(
    policy: ChunkPolicy,
    environment: Environment,
    seeds: Sequence[int],
    *,
    batch_size: int = 50,
    workers: int = 0,
    progress: bool = True,
) -> list[EpisodeResult]:
    """Play one episode for each seed.

    An episode's start and the policy's random generator depend on the seed only, so neither ``batch_size`` nor
    ``workers`` change a result (for a network: up to how its matrix products round at another batch size).

    Args:
        seeds: all different.
        batch_size: episodes that run at the same time; when one ends, the next seed takes its place.
        workers: processes that simulate; 0 simulates in this one.

    Returns:
        One result per seed, in the order of ``seeds``.

    Raises:
        UserError: policy and environment do not fit, seeds repeat, or the policy's actions are not finite.
        ValueError: the policy's chunk has the wrong shape.
    """
    if len(set(seeds)) != len(seeds) or not seeds:
        raise UserError(f"Evaluation needs at least one seed and each seed once, found {list(seeds)}.")
    if batch_size < 1 or workers < 0:
        raise UserError(f"batch_size={batch_size} must be at least 1 and workers={workers} at least 0.")
    environment.check(policy.spec)
    began = time.perf_counter()
    with (
        closing(simulators(environment, policy.spec, min(batch_size, len(seeds)), workers)) as slots,
        tqdm(total=len(seeds), unit="episode", disable=not progress, desc=environment.name) as bar,
    ):
        results, policy_s = _play(policy, slots, min(batch_size, len(seeds)), deque(seeds), bar)
    wall = time.perf_counter() - began
    steps = sum(result.steps for result in results.values())
    log.info(
        "%d episodes of %s in %.1f s: %.0f steps/s, %.0f %% of the time in the policy",
        len(results), environment.name, wall, steps / wall, 100 * policy_s / wall,
    )  # fmt: skip
    return [results[seed] for seed in seeds]


def _play(
    policy: ChunkPolicy, slots: Simulators, count: int, waiting: deque[int], bar: tqdm
) -> tuple[dict[int, EpisodeResult], float]:
    """Run until no seed waits; returns the results by seed and the seconds spent in the policy."""
    results: dict[int, EpisodeResult] = {}
    generators: dict[int, torch.Generator] = {}  # of the running slots
    free, policy_s, steps, began = list(range(count)), 0.0, 0, time.perf_counter()
    while waiting or generators:
        begin = {slot: waiting.popleft() for slot in free[: len(waiting)]}
        slots.start(begin)
        generators |= {slot: torch.Generator().manual_seed(seed) for slot, seed in begin.items()}
        running = sorted(generators)
        asked = time.perf_counter()
        chunks = _chunks(policy, {key: rows[running] for key, rows in slots.histories.items()}, generators, running)
        policy_s += time.perf_counter() - asked
        ended = slots.execute(chunks)
        for slot, result in ended.items():
            results[result.seed] = result
            steps += result.steps
            del generators[slot]
        free = sorted(ended)
        if ended:
            rate = sum(result.success for result in results.values()) / len(results)
            bar.set_postfix_str(f"success {rate:.2f}, {steps / (time.perf_counter() - began):.0f} steps/s", False)
            bar.update(len(ended))
    return results, policy_s


def _chunks(
    policy: ChunkPolicy,
    observations: Mapping[str, np.ndarray],
    generators: Mapping[int, torch.Generator],
    running: Sequence[int],
) -> dict[int, np.ndarray]:
    actions = np.asarray(policy.act(observations, [generators[slot] for slot in running]), dtype=np.float32)
    wanted = (len(running), policy.spec.n_action_steps, policy.spec.action.dim)
    if actions.shape != wanted:
        raise ValueError(f"The policy's chunk has shape {actions.shape}, wanted {wanted}.")
    return dict(zip(running, actions, strict=True))
