"""A factor of variation: what it may be set to, and how it changes a scene."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import mujoco
import numpy as np

if TYPE_CHECKING:
    from robopolicy_sim.envs.arm_task import ArmTaskEnv

BASE = "base"  # every factor's level that changes nothing
DISTRACTOR = "distractor_"  # how the names of such bodies begin

Value = str | float | tuple[float, ...]


@dataclass(frozen=True)
class Factor:
    """One thing that can differ between episodes.

    Attributes:
        name: as in ``variation={name: value}``.
        description: one line, with the unit of its numbers.
        apply: changes the model, or ``env`` itself, at a reset; gets what a level stands for, or the numbers. It runs
            on the nominal model, before the episode's start is drawn.
        levels: what each named level stands for; `BASE` is added.
        bounds: lowest and highest number; None for a factor that has names only.
        nominal: the numbers that stand for `BASE`, where there are any.
        fields: dotted names of the model's arrays that ``apply`` or ``place`` write; restored before each episode.
        attributes: the same for attributes of the environment.
        edit: adds to the scene before it is compiled what the values, all that can come, need.
        place: puts things into ``env.data`` after the task's objects.
        integer: its numbers are whole.
    """

    name: str
    description: str
    apply: Callable[[ArmTaskEnv, Any], None] | None = None
    levels: Mapping[str, Any] = field(default_factory=dict)
    bounds: tuple[float, float] | None = None
    nominal: Value | None = None
    fields: tuple[str, ...] = ()
    attributes: tuple[str, ...] = ()
    edit: Callable[[mujoco.MjSpec, ArmTaskEnv, Sequence[Value]], None] | None = None
    place: Callable[[ArmTaskEnv, Any, np.random.Generator], None] | None = None
    integer: bool = False

    @property
    def size(self) -> int:
        """How many numbers a value has."""
        return len(self.nominal) if isinstance(self.nominal, tuple) else 1

    def checked(self, value: Any) -> Value:
        """Return a level's name or numbers as they are kept.

        Raises:
            ValueError: the level is unknown, or the numbers are out of bounds.
        """
        if isinstance(value, str):
            if value == BASE or value in self.levels:
                return value
        elif self.bounds is not None and not isinstance(value, bool):
            numbers = np.asarray(value)
            low, high = self.bounds
            if (
                np.issubdtype(numbers.dtype, np.number)
                and numbers.shape == (() if self.size == 1 else (self.size,))
                and ((numbers >= low) & (numbers <= high)).all()
                and (not self.integer or numbers == np.round(numbers))
            ):
                return self.plain(numbers)
        raise ValueError(f"{self.name}={value!r} is unknown; choose {self.choices()}.")

    def plain(self, numbers: np.ndarray) -> Value:
        """Numbers as JSON has them."""
        if self.size > 1:
            return tuple(float(number) for number in numbers)
        return int(numbers) if self.integer else float(numbers)

    def choices(self) -> str:
        """What it may be set to, for people."""
        named = ", ".join((BASE, *self.levels))
        if self.bounds is None:
            return f"one of {named}"
        numbers = f"{self.size} numbers, each" if self.size > 1 else ("a whole number" if self.integer else "a number")
        return f"one of {named}, or {numbers} from {self.bounds[0]:g} to {self.bounds[1]:g}"

    def meaning(self, value: Value) -> Any:
        """What ``apply`` gets for a value other than `BASE`."""
        return self.levels[value] if isinstance(value, str) else value


def task_bodies(model: mujoco.MjModel, env: ArmTaskEnv) -> np.ndarray:
    """Mask (n_bodies,) of the bodies that belong to the task: neither arm nor bench nor distractors."""
    scenery = [0, model.body(env.arm.base).id, model.body("bench").id]
    scenery += [i for i in range(model.nbody) if model.body(i).name.startswith(DISTRACTOR)]
    return ~np.isin(model.body_rootid, scenery)
