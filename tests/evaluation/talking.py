"""An environment that says what to do, another text in each episode; quick to open in worker processes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import gymnasium
import numpy as np

from robopolicy.evaluation.environments import Environment
from robopolicy.spec import KeySpec

STATE, ACTION = KeySpec("observation.state", (1,)), KeySpec("action", (1,), role="action")
TEXTS = ("go left", "go right", "bleib, wo du bist: über dem Würfel")
WANTED = dict(zip(TEXTS, (-1.0, 1.0, 0.0), strict=True))


def text_of(seed: int) -> str:
    return TEXTS[seed % 3]


def silent(seed: int) -> str:
    return ""


def longest(seed: int) -> str:
    return "ü" * 128


def too_long(seed: int) -> str:
    return "ü" * 129


class TalkingEnv(gymnasium.Env):
    """Observes its seed; a success is three actions as the episode's text wants them, an episode lasts 3 + seed % 4."""

    def __init__(self, say: Callable[[int], str]) -> None:
        self.say = say

    def reset(self, *, seed=None, options=None):
        self.seed, self.done, self.steps = seed, [], 3 + seed % 4
        return self._observation(), {"instruction": self.say(seed)}

    def step(self, action):
        self.done.append(float(action[0]))
        success = self.done[:3] == [WANTED.get(self.say(self.seed))] * 3
        return self._observation(), float(success), len(self.done) == self.steps, False, {"success": success}

    def _observation(self):
        return {STATE.key: np.array([self.seed], np.float32)}


def make(say: Callable[[int], str], keys: Sequence[KeySpec]) -> gymnasium.Env:
    return TalkingEnv(say)


def talking(say: Callable[[int], str] = text_of) -> Environment:
    return Environment(
        name="talking",
        keys={STATE.key: STATE},
        action=ACTION,
        fps=10,
        max_steps=10,
        score="1 on success",
        success="three actions as wanted",
        reset="seed",
        packages=("numpy",),
        build=partial(make, say),
    )
