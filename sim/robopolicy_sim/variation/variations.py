"""The factors that one environment varies: fixed levels, and draws at each reset."""

from __future__ import annotations

from collections.abc import Mapping
from operator import attrgetter
from typing import TYPE_CHECKING, Any

import mujoco
import numpy as np

from robopolicy_sim.variation import camera, control, distractors, lighting, physics, surfaces
from robopolicy_sim.variation.distributions import Distribution, parse_distribution
from robopolicy_sim.variation.factor import BASE, Factor, Value
from robopolicy_sim.variation.presets import PRESETS

if TYPE_CHECKING:
    from robopolicy_sim.envs.arm_task import ArmTaskEnv

FACTORS: dict[str, Factor] = {
    factor.name: factor
    for theme in (lighting, surfaces, camera, distractors, physics, control)
    for factor in theme.FACTORS
}


class Variations:
    """What varies in one environment.

    Args:
        fixed: a level or number by factor, the same in every episode.
        random: a distribution by factor, see `distributions`, or the name of a preset.

    Raises:
        ValueError: a factor, level, distribution or preset is unknown, or a factor is both fixed and random.
    """

    def __init__(self, fixed: Mapping[str, Any], random: Mapping[str, Any] | str) -> None:
        random = _preset(random) if isinstance(random, str) else random
        for argument, given in (("variation", fixed), ("randomization", random)):
            if not isinstance(given, Mapping):
                raise ValueError(
                    f"{argument}={given!r} is no mapping; give values by factor, e.g. {{'friction': ...}}."
                )
        both = sorted(set(fixed) & set(random))
        if both:
            raise ValueError(f"variation and randomization both set {', '.join(both)}; give each factor once.")
        self._fixed: dict[str, Value] = {name: _factor(name).checked(value) for name, value in fixed.items()}
        self._random: dict[str, Distribution] = {
            name: parse_distribution(_factor(name), given) for name, given in random.items()
        }
        # In one order, whatever the order of the arguments: draws and effects then do not depend on it.
        self._used = [factor for name, factor in FACTORS.items() if name in self._fixed or name in self._random]
        self._nominal: dict[str, np.ndarray] = {}
        self._attributes: dict[str, Any] = {}
        self._values: dict[str, Value] = {}
        self._placing: list[tuple[Factor, np.random.Generator]] = []

    def edit(self, spec: mujoco.MjSpec, env: ArmTaskEnv) -> None:
        """Add to the scene what its variations need."""
        for factor in self._used:
            if factor.edit is not None:
                fixed = factor.name in self._fixed
                factor.edit(spec, env, (self._fixed[factor.name],) if fixed else self._random[factor.name].possible())

    def bind(self, env: ArmTaskEnv) -> None:
        """Take the environment, complete but for its first reset, as the nominal one."""
        self._nominal = {field: attrgetter(field)(env.model).copy() for factor in self._used for field in factor.fields}
        self._attributes = {name: getattr(env, name) for factor in self._used for name in factor.attributes}

    def restore(self, env: ArmTaskEnv) -> None:
        """Go back to the nominal model."""
        for field, value in self._nominal.items():
            attrgetter(field)(env.model)[...] = value
        for name, value in self._attributes.items():
            setattr(env, name, value)

    def apply(
        self, env: ArmTaskEnv, rng: np.random.Generator, chosen: Mapping[str, Any] | None = None
    ) -> dict[str, Any]:
        """Set this episode's values, which are returned by factor, on the nominal model.

        Args:
            chosen: values of random factors in place of draws.

        Raises:
            ValueError: a chosen value is unknown, or its factor is not random here.
        """
        given = self._fixed | self._checked_choice(chosen or {})
        self.restore(env)
        # A stream for each factor: one more factor does not change the draws of the others.
        seeds = dict(zip(FACTORS, rng.integers(2**63, size=(len(FACTORS), 2)), strict=True))
        self._values, self._placing = {}, []
        for factor in self._used:
            own, placing = (np.random.default_rng(int(seed)) for seed in seeds[factor.name])
            value = given[factor.name] if factor.name in given else self._random[factor.name].draw(own)
            self._values[factor.name] = value
            if factor.apply is not None and value != BASE:
                factor.apply(env, factor.meaning(value))
            if factor.place is not None:
                self._placing.append((factor, placing))
        return {name: list(value) if isinstance(value, tuple) else value for name, value in self._values.items()}

    def place(self, env: ArmTaskEnv) -> None:
        """Put what does not belong to the task among the objects, which have their places in ``env.data``."""
        for factor, rng in self._placing:
            value = self._values[factor.name]
            assert factor.place is not None
            factor.place(env, factor.nominal if value == BASE else factor.meaning(value), rng)

    def _checked_choice(self, chosen: Mapping[str, Any]) -> dict[str, Value]:
        """A scene holds only what its own distributions need: textures, things, nominal arrays."""
        for name, value in chosen.items():
            if name not in self._random:
                raise ValueError(
                    f"{name} cannot be chosen at a reset; it is not among the environment's randomization."
                )
            distribution = self._random[name]
            if distribution.kind == "choice" and _factor(name).checked(value) not in distribution.parameters:
                raise ValueError(f"{name}={value!r} is not among the environment's choices {distribution.parameters}.")
        return {name: _factor(name).checked(value) for name, value in chosen.items()}


def _factor(name: str) -> Factor:
    if name not in FACTORS:
        raise ValueError(f"There is no factor of variation '{name}'; choose from {', '.join(FACTORS)}.")
    return FACTORS[name]


def _preset(name: str) -> Mapping[str, Any]:
    if name not in PRESETS:
        raise ValueError(f"randomization='{name}' is unknown; give one of {', '.join(PRESETS)}, or distributions.")
    return PRESETS[name]
