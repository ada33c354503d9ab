"""Search for the widest randomization of a simulated task in which a policy, or the scripted expert, still succeeds."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Any

import numpy as np

from robopolicy.data.record import EnvironmentRecipe, make_expert
from robopolicy.errors import UserError, did_you_mean, require_extra
from robopolicy.evaluation.doraemon import Betas, update
from robopolicy.evaluation.environments import environment
from robopolicy.evaluation.rollout import ChunkPolicy, rollout

Play = Callable[[Betas, Sequence[int]], tuple[np.ndarray, np.ndarray]]
"""Plays one episode for each seed, parameters drawn from the distributions; returns them (n, k) and success (n,)."""


@dataclass(frozen=True)
class Round:
    """Episodes under one set of distributions."""

    betas: Betas
    successes: int
    episodes: int

    @property
    def success_rate(self) -> float:
        return self.successes / self.episodes


def search(
    start: Betas,
    play: Play,
    *,
    rounds: int,
    episodes: int,
    first_seed: int,
    min_success: float,
    max_divergence: float,
    on_round: Callable[[Round], None] = lambda _: None,
) -> list[Round]:
    """Play and widen in turn, see `doraemon`; no seed is played twice.

    Args:
        rounds: how often episodes are played.
        episodes: in each round.
        min_success, max_divergence: see `doraemon.update`.
        on_round: is told about each round.
    """
    found: list[Round] = []
    current = start
    for i in range(rounds):
        values, success = play(current, range(first_seed + i * episodes, first_seed + (i + 1) * episodes))
        found.append(Round(current, int(success.sum()), episodes))
        on_round(found[-1])
        current = update(current, values, success, min_success=min_success, max_divergence=max_divergence).betas
    return found


def widest(rounds: Sequence[Round], min_success: float) -> Round | None:
    """The round of the highest entropy among those with at least this success rate; None where there is none."""
    good = [r for r in rounds if r.success_rate >= min_success]
    return max(good, key=lambda r: r.betas.entropy()) if good else None


def ranges_of(wanted: Mapping[str, tuple[float, float] | None]) -> dict[str, tuple[float, float, float]]:
    """Lowest, nominal and highest value by factor; None stands for the factor's own bounds.

    Raises:
        UserError: there is no such factor, it has no single number, or the range leaves its bounds.
    """
    factors = require_extra("robopolicy_sim.variation", "sim").FACTORS
    continuous = {n: f for n, f in factors.items() if f.bounds is not None and f.size == 1 and not f.integer}
    ranges = {}
    for name, given in wanted.items():
        if name not in continuous:
            raise UserError(f"'{name}' is no factor of variation with a range.{did_you_mean(name, continuous)}")
        factor = continuous[name]
        low, high = given or factor.bounds
        if not factor.bounds[0] <= low < high <= factor.bounds[1]:
            raise UserError(f"{name}={low:g}:{high:g} does not lie in {factor.bounds[0]:g}:{factor.bounds[1]:g}.")
        ranges[name] = (low, float(np.clip(factor.nominal, low, high)), high)
    return ranges


def play_expert(env_id: str, options: Mapping[str, Any], quality: str) -> Play:
    """Episodes of the scripted expert, without images."""

    def play(betas: Betas, seeds: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
        values, success = [], []
        with closing(EnvironmentRecipe(env_id, options=json.dumps(_randomized(options, betas))).make()) as env:
            for seed in seeds:
                observation, info = env.reset(seed=seed)
                values.append([info["variation"][name] for name in betas.names])
                expert = make_expert(env, seed, {"quality": quality})
                ended = False
                while not ended:
                    observation, _, terminated, truncated, info = env.step(expert.act(observation))
                    ended = terminated or truncated
                success.append(info["success"])
        return np.array(values), np.array(success)

    return play


def play_policy(policy: ChunkPolicy, name: str, options: Mapping[str, Any], **how: Any) -> Play:
    """Episodes of a policy in the environment ``name``; ``how``: ``batch_size``, ``workers``, see `rollout`."""

    def play(betas: Betas, seeds: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
        world = environment(name, _randomized(options, betas))
        results = rollout(policy, world, seeds, progress=False, **how)
        values = [[result.variation[name] for name in betas.names] for result in results]
        return np.array(values), np.array([result.success for result in results])

    return play


def _randomized(options: Mapping[str, Any], betas: Betas) -> dict[str, Any]:
    """Options with the distributions in place of what they may say about the same factors."""
    variation, others = options.get("variation") or {}, options.get("randomization") or {}
    if isinstance(others, str):
        raise UserError(f"randomization='{others}': a preset cannot be combined with a search; give distributions.")
    for name, value in (("variation", variation), ("randomization", others)):
        if not isinstance(value, Mapping):
            raise UserError(f"{name}={value!r}: wanted values by factor, e.g. {name}={{friction: …}}.")
    fixed = {name: value for name, value in variation.items() if name not in betas.names}
    return {**options, "variation": fixed, "randomization": {**others, **betas.randomization()}}
