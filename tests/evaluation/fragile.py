"""Push-T environments that break; a module without torch, so that worker processes open them quickly."""

from __future__ import annotations

import errno
import os
import signal
from collections.abc import Sequence

import gymnasium

from robopolicy.evaluation.pusht import PushT
from robopolicy.spec import KeySpec


class Deadly(gymnasium.Wrapper):
    """Ends its own process at the fourth step of the episode of seed 13."""

    def reset(self, *, seed=None, options=None):
        self.seed, self.steps = seed, 0
        return super().reset(seed=seed, options=options)

    def step(self, action):
        self.steps += 1
        if (self.seed, self.steps) == (13, 4):
            os.kill(os.getpid(), signal.SIGKILL)
        return super().step(action)


class Failing(gymnasium.Wrapper):
    """Raises what a broken pipe would raise, too."""

    def step(self, action):
        raise OSError(errno.ENOENT, "no such mesh")


class Stubborn(Exception):
    """Cannot be unpickled."""

    def __init__(self, first: str, second: str) -> None:
        super().__init__(f"{first} and {second}")


class FailingOddly(gymnasium.Wrapper):
    def step(self, action):
        raise Stubborn("this", "that")


def deadly(keys: Sequence[KeySpec]) -> gymnasium.Env:
    return Deadly(PushT(keys))


def failing(keys: Sequence[KeySpec]) -> gymnasium.Env:
    return Failing(PushT(keys))


def failing_oddly(keys: Sequence[KeySpec]) -> gymnasium.Env:
    return FailingOddly(PushT(keys))


def exit_at_once(keys: Sequence[KeySpec]) -> gymnasium.Env:
    os._exit(3)
