"""An operator that has decided everything beforehand."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from robopolicy.teleoperation.command import Command, SessionKey


class ScriptedOperator:
    """A device that plays a list of commands, one in each control period, and quits after the last."""

    name = "script"
    hints: tuple[tuple[str, str], ...] = ()

    def __init__(self, commands: Iterable[Command]) -> None:
        self._commands = iter(commands)

    def read(self, events: Sequence[Any]) -> Command:
        return next(self._commands, press(SessionKey.QUIT))

    def reset(self) -> None: ...

    def close(self) -> None: ...


def press(*keys: SessionKey) -> Command:
    """No motion, some keys."""
    return Command(np.zeros(6), keys=frozenset(keys))


def expert_commands(env: Any, seed: int) -> list[Command]:
    """The twists with which a person would do what the scripted expert of PushPuck does from this start."""
    expert = env.unwrapped.make_expert(seed)
    observation, _ = env.reset(seed=seed)
    target, period, commands, ended = observation["observation.state"][:2], 1 / env.metadata["render_fps"], [], False
    while not ended:
        action = expert.act(observation)
        commands.append(Command(np.array([*(action - target) / period, 0, 0, 0, 0])))
        target = action
        observation, _, terminated, truncated, _ = env.step(action)
        ended = terminated or truncated
    return commands
