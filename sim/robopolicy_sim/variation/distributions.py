"""Distributions of a factor's values."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from robopolicy_sim.variation.factor import Factor, Value

KINDS = {
    "uniform": "[low, high]",
    "normal": "[mean, standard deviation], cut at the factor's bounds",
    "beta": "[a, b, low, high]",
    "choice": "[value, value, ...]",
}


@dataclass(frozen=True)
class Distribution:
    """Where a factor's values are drawn from: one of `KINDS` with its parameters, checked against the factor."""

    factor: Factor
    kind: str
    parameters: tuple[Any, ...]

    def draw(self, rng: np.random.Generator) -> Value:
        """One value."""
        if self.kind == "choice":
            return self.parameters[rng.integers(len(self.parameters))]
        assert self.factor.bounds is not None
        first, second, *ends = (np.asarray(parameter, dtype=np.float64) for parameter in self.parameters)
        shape = () if self.factor.size == 1 else (self.factor.size,)
        if self.kind == "uniform":
            numbers = rng.uniform(first, second, shape)
        elif self.kind == "normal":
            numbers = np.clip(rng.normal(first, second, shape), *self.factor.bounds)
        else:
            low, high = ends
            numbers = low + (high - low) * rng.beta(first, second, shape)
        return self.factor.plain(np.asarray(numbers))

    def possible(self) -> tuple[Value, ...]:
        """The values that can come; of a range, its ends."""
        if self.kind == "choice":
            return self.parameters
        assert self.factor.bounds is not None
        ends = {"uniform": self.parameters, "beta": self.parameters[2:], "normal": self.factor.bounds}
        return tuple(self.factor.plain(np.broadcast_to(end, self.factor.size).squeeze()) for end in ends[self.kind])


def parse_distribution(factor: Factor, given: Any) -> Distribution:
    """Read ``{kind: parameters}``.

    Raises:
        ValueError: the kind is unknown, or its parameters are impossible or leave the factor's bounds.
    """
    where = f"randomization of {factor.name}"
    if not isinstance(given, Mapping) or len(given) != 1 or next(iter(given)) not in KINDS:
        wanted = "; ".join(f"{{{kind}: {parameters}}}" for kind, parameters in KINDS.items())
        raise ValueError(f"{where}: {given!r} is no distribution; give one of {wanted}.")
    kind, parameters = next(iter(given.items()))
    parameters = tuple(parameters) if isinstance(parameters, (list, tuple)) else ()
    if kind == "choice":
        if not parameters:
            raise ValueError(f"{where}: choice needs a list of values.")
        return Distribution(factor, kind, tuple(factor.checked(value) for value in parameters))
    if factor.bounds is None or factor.integer:
        raise ValueError(f"{where}: it takes {{choice: [...]}} only, found {kind}.")
    if len(parameters) != (4 if kind == "beta" else 2):
        raise ValueError(f"{where}: {kind} takes {KINDS[kind]}, found {given[kind]!r}.")
    ends = {"uniform": parameters, "beta": parameters[2:], "normal": parameters[:1]}[kind]
    named = [end for end in ends if isinstance(end, str)]
    if named:
        raise ValueError(f"{where}: {kind} takes numbers, found '{named[0]}'; levels go with {{choice: [...]}}.")
    ends = tuple(np.asarray(factor.checked(end)) for end in ends)
    spread = {"uniform": (), "beta": parameters[:2], "normal": parameters[1:]}[kind]
    if any(not isinstance(number, (int, float)) or not 0 < number < np.inf for number in spread):
        raise ValueError(f"{where}: {kind} takes {KINDS[kind]}, each shape or spread above 0, found {given[kind]!r}.")
    if len(ends) == 2 and (ends[0] > ends[1]).any():
        raise ValueError(f"{where}: the low end must not lie above the high end, found {given[kind]!r}.")
    return Distribution(factor, kind, parameters)
