"""Evaluation suites: one policy in many settings of one environment, on the same seeds in each.

The two suites that ship follow SIMPLER (Li et al., "Evaluating Real-World Robot Manipulation Policies in Simulation",
CoRL 2024): *variant aggregation* changes one visual factor at a time and averages; *visual matching* puts a photograph
behind the simulated arm and averages over colours of the arm. Camera variants are reported but not averaged, as there.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf

from robopolicy.configuration import dataclass_from
from robopolicy.errors import UserError
from robopolicy.evaluation.environments import absolute_files

BASE = "base"  # the factor of the setting that all others are compared with
_FOLDER_NAME = re.compile(r"[\w+-][\w.+-]*")  # no leading dot: ".." would leave the suite's folder


@dataclass(frozen=True)
class Setting:
    """One environment of a suite.

    Attributes:
        name: names its results folder.
        factor: what differs from the base setting, e.g. ``lighting``; `BASE` for the base setting itself.
        level: what the factor is set to; numbers become points of a curve. None for the base setting.
        options: options of the environment, complete, see `environments.environment`.
        weight: weight in the aggregate.
        in_aggregate: counts in the aggregate.
    """

    name: str
    factor: str
    level: Any
    options: Mapping[str, Any]
    weight: float = 1.0
    in_aggregate: bool = True

    @property
    def label(self) -> str:
        """For people: factor and level where there is a level."""
        return (self.name if self.level is None else f"{self.factor} {self.level}").replace("_", " ")


@dataclass(frozen=True)
class Suite:
    """Settings that are evaluated on the same seeds.

    Attributes:
        name: for folders and titles.
        description: one sentence for the report.
        settings: all names differ; exactly one has the factor `BASE`.
        at_base: level that a numeric factor has in the base setting, where that is known.
    """

    name: str
    description: str
    settings: tuple[Setting, ...]
    at_base: Mapping[str, float] = field(default_factory=dict)

    @cached_property
    def base(self) -> Setting:
        return next(s for s in self.settings if s.factor == BASE)


@dataclass(frozen=True)
class _Entry:
    """One entry under ``settings`` of a suite's file: a factor at one level, or at each of several."""

    factor: str
    level: Any = None
    levels: tuple[Any, ...] | None = None
    at_base: float | None = None
    option: str | None = None
    environment_options: dict[str, Any] = field(default_factory=dict)
    weight: float = 1.0
    in_aggregate: bool = True
    name: str | None = None


@dataclass(frozen=True)
class _File:
    """The entries of a suite's file, explained in docs/evaluation.md."""

    name: str
    settings: tuple[_Entry, ...]
    description: str = ""
    environment_options: dict[str, Any] = field(default_factory=dict)


def load_suite(path: Path, options: Mapping[str, Any] | None = None) -> Suite:
    """Read a suite's file.

    Args:
        options: options of the environment for all settings, names of files absolute; they override those that the
            file gives for all settings, and a setting's own override both.

    Raises:
        UserError: the file is not there or not such a file, a setting is impossible, or an option that the file leaves
            open (``???``) was not given.
    """
    values = _read_yaml(path)
    file = dataclass_from(_File, values, str(path))
    if not _FOLDER_NAME.fullmatch(file.name):
        raise UserError(f"{path}: name '{file.name}' cannot name a folder; use letters, digits, '_', '-', '+' and '.'.")
    settings: list[Setting] = []
    for i, entry in enumerate(file.settings):
        where = f"{path}: settings[{i}]"
        for level in _levels(entry, where):
            name = entry.name or (entry.factor if level is None else f"{entry.factor}-{level}")
            if not _FOLDER_NAME.fullmatch(name):
                raise UserError(f"{where}: '{name}' cannot name a folder; give the setting a `name`.")
            merged = _merged(file.environment_options, options or {}, _at(entry, level), entry.environment_options)
            missing = sorted(OmegaConf.missing_keys(OmegaConf.create(merged)))
            if missing:
                raise UserError(
                    f"The suite {file.name} needs {' and '.join(missing)}. Give it with environment_options, e.g. "
                    f"environment_options='{_nested_example(missing[0])}'"
                )
            settings.append(
                Setting(
                    name, entry.factor, level, absolute_files(merged, path.parent), entry.weight, entry.in_aggregate
                )
            )
    at_base = {e.factor: e.at_base for e in file.settings if e.at_base is not None}
    suite = Suite(file.name, file.description, tuple(settings), at_base)
    _check(suite, path)
    return suite


def _read_yaml(path: Path) -> Any:
    try:
        return yaml.safe_load(path.read_text())
    except FileNotFoundError:
        raise UserError(f"{path} is not there; wanted the file of a suite.") from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"{path} cannot be read as YAML: {error}") from None


def _levels(entry: _Entry, where: str) -> tuple[Any, ...]:
    if entry.level is not None and entry.levels is not None:
        raise UserError(f"{where}: give `level` or `levels`, not both.")
    if entry.factor == BASE and (entry.level is not None or entry.levels is not None):
        raise UserError(f"{where}: the base setting has no level; its options are `environment_options`.")
    if entry.factor != BASE and entry.level is None and entry.levels is None and not entry.environment_options:
        raise UserError(
            f"{where}: give `level`, `levels` or `environment_options`; it would be the base setting again."
        )
    if entry.levels is not None and (not entry.levels or entry.name is not None):
        raise UserError(f"{where}: `levels` must not be empty and takes no `name`.")
    if not 0 < entry.weight < math.inf:
        raise UserError(f"{where}: weight={entry.weight:g} must be above 0; use in_aggregate: false to leave it out.")
    return entry.levels or (entry.level,)


def _at(entry: _Entry, level: Any) -> dict[str, Any]:
    """The level as an option: at ``entry.option``, by default ``variation.<factor>``."""
    option = entry.option or f"variation.{entry.factor}"
    for name in reversed(option.split(".")):
        level = {name: level}
    return level if entry.level is not None or entry.levels is not None else {}


def _merged(*options: Mapping[str, Any]) -> dict[str, Any]:
    """Nested mappings merged, the last one counts."""
    merged = OmegaConf.to_container(OmegaConf.merge(*(OmegaConf.create(dict(o)) for o in options)))
    assert isinstance(merged, dict)
    return {str(name): value for name, value in merged.items()}


def _nested_example(option: str) -> str:
    *outer, last = option.split(".")
    return "{" + "".join(f"{name}: {{" for name in outer) + f"{last}: …" + "}" * (len(outer) + 1)


def _check(suite: Suite, path: Path) -> None:
    names = [s.name for s in suite.settings]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise UserError(f"{path}: the names of settings must differ, found {', '.join(twice)} more than once.")
    bases = [s.name for s in suite.settings if s.factor == BASE]
    if len(bases) != 1:
        raise UserError(f"{path}: exactly one setting has `factor: {BASE}`, found {len(bases)}.")
    if not any(s.in_aggregate for s in suite.settings):
        raise UserError(f"{path}: no setting counts in the aggregate; one needs in_aggregate: true.")
