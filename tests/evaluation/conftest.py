"""Small policies and a scripted environment for the tests of evaluation."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import gymnasium
import numpy as np
import pytest
import torch

from robopolicy.evaluation import pusht
from robopolicy.evaluation.environments import Environment
from robopolicy.evaluation.episode import EpisodeResult
from robopolicy.spec import KeySpec, PolicySpec


@dataclass
class RandomPusher:
    """Push-T: walks towards random points around the block, drawn from each row's own generator."""

    spec: PolicySpec = PolicySpec((pusht.STATE,), pusht.ACTION, fps=10)
    spread: float = 60.0

    def act(self, observations: Mapping[str, np.ndarray], generators: Sequence[torch.Generator]) -> np.ndarray:
        newest = observations["observation.state"][:, -1]
        noise = np.stack([torch.randn(2, generator=g).numpy() for g in generators])
        target = newest[:, 2:4] + self.spread * noise
        return np.linspace(newest[:, :2], target, self.spec.n_action_steps, axis=1)


@dataclass
class Script:
    """What the scripted environment does: one reward per step, the episode's length is that of the rewards."""

    rewards: Callable[[int], Sequence[float]]
    success_at: Callable[[int], int | None] = lambda seed: None
    steps_taken: int = 0


class ScriptedEnv(gymnasium.Env):
    """Observes ``[seed, step]``; counts every step that anybody asks for."""

    def __init__(self, script: Script) -> None:
        self.script = script

    def reset(self, *, seed: int | None = None, options=None):
        self.seed, self.time = seed, 0
        return self._observation(), {}

    def step(self, action):
        rewards = self.script.rewards(self.seed)
        self.script.steps_taken += 1
        self.time += 1
        info = {"success": self.script.success_at(self.seed) == self.time}
        return self._observation(), rewards[self.time - 1], self.time == len(rewards), False, info

    def _observation(self):
        return {"observation.state": np.array([self.seed, self.time], np.float32)}


def scripted_environment(script: Script, max_steps: int = 100) -> Environment:
    key = KeySpec("observation.state", (2,))
    return Environment(
        name="scripted",
        keys={key.key: key},
        action=KeySpec("action", (1,), role="action"),
        fps=10,
        max_steps=max_steps,
        score="max over steps of the reward",
        success="the script said so",
        reset="seed",
        packages=("numpy",),
        build=lambda keys: ScriptedEnv(script),
    )


@dataclass
class Counter:
    """Scripted environment: action ``k`` of a chunk is the number of the step at which it must be executed."""

    n_obs_steps: int = 2
    n_action_steps: int = 3
    seen: list[np.ndarray] = field(default_factory=list)

    @property
    def spec(self) -> PolicySpec:
        return PolicySpec(
            (KeySpec("observation.state", (2,)),),
            KeySpec("action", (1,), role="action"),
            fps=10,
            n_obs_steps=self.n_obs_steps,
            n_action_steps=self.n_action_steps,
        )

    def act(self, observations: Mapping[str, np.ndarray], generators: Sequence[torch.Generator]) -> np.ndarray:
        state = observations["observation.state"]
        self.seen.append(state.copy())
        return state[:, -1:, 1:] + np.arange(self.n_action_steps)[:, None]


@pytest.fixture
def pusher() -> RandomPusher:
    return RandomPusher()


def same(a: Sequence[EpisodeResult], b: Sequence[EpisodeResult]) -> bool:
    """Equal to the last bit, except for the time taken."""
    return all(
        x == replace(y, wall_s=x.wall_s) and np.array_equal(x.actions, y.actions) for x, y in zip(a, b, strict=True)
    )
