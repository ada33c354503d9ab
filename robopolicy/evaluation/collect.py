"""Episodes that a policy plays, in the form in which datasets hold them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import gymnasium
import numpy as np

from robopolicy.data.record import Episode
from robopolicy.evaluation.environments import Environment
from robopolicy.evaluation.rollout import ChunkPolicy, rollout
from robopolicy.spec import KeySpec

Steps = list[dict[str, np.ndarray]]


class _Recorder(gymnasium.Wrapper):
    """Notes every step under the seed of its episode: the observation before the action, the action, the reward."""

    def __init__(self, env: gymnasium.Env, keys: Sequence[KeySpec], action: str, played: dict[int, Steps]) -> None:
        super().__init__(env)
        self._keys, self._action, self._played = [key.key for key in keys], action, played

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        observation, info = self.env.reset(seed=seed, options=options)
        assert seed is not None
        self._steps = self._played[seed] = []
        self._before = self._kept(observation)
        return observation, info

    def step(self, action: np.ndarray) -> tuple[Any, Any, bool, bool, dict[str, Any]]:
        observation, reward, terminated, truncated, info = self.env.step(action)
        self._steps.append({**self._before, self._action: np.array(action), "reward": np.float32(reward)})  # type: ignore[dict-item]
        self._before = self._kept(observation)
        return observation, reward, terminated, truncated, info

    def _kept(self, observation: Any) -> dict[str, np.ndarray]:
        return {key: np.array(observation[key]) for key in self._keys}


def collect_episodes(
    policy: ChunkPolicy, environment: Environment, seeds: Sequence[int], *, batch_size: int = 50
) -> list[Episode]:
    """Play one episode for each seed; an episode ends with its first success or at the environment's limit.

    Args:
        seeds: all different; they decide the starts and the policy's randomness.
        batch_size: episodes that run side by side.

    Returns:
        In the order of ``seeds``, with the policy's observation keys, its action key and ``reward``.

    Raises:
        UserError: see `rollout`.
    """
    played: dict[int, Steps] = {}

    def recorded(keys: Sequence[KeySpec]) -> gymnasium.Env:
        return _Recorder(environment.build(keys), keys, policy.spec.action.key, played)

    world = replace(environment, build=recorded)
    results = rollout(policy, world, seeds, batch_size=batch_size, progress=False)
    return [
        Episode(
            {name: np.stack([step[name] for step in played[result.seed]]) for name in played[result.seed][0]},
            result.instruction,
            result.success,
            result.seed,
            "policy",
        )
        for result in results
    ]
