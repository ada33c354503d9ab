"""Plain values (YAML, JSON, Hydra) to frozen dataclasses, with errors that name the entry."""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Mapping
from typing import Any, TypeVar

from robopolicy.errors import UserError
from robopolicy.spec import checked_fields

T = TypeVar("T")


def dataclass_from(kind: type[T], values: Any, where: str) -> T:
    """Build ``kind`` from a mapping; nested dataclasses, tuples, literals and optionals are converted and checked.

    Args:
        kind: a dataclass.
        values: mapping of plain values.
        where: names the source in errors, e.g. ``train``; empty at the root of a configuration.

    Raises:
        UserError: an unknown or missing entry, or a value of the wrong type.
    """
    values = checked_fields(kind, values, where)
    hints = typing.get_type_hints(kind)
    prefix = f"{where}." if where else ""
    return kind(**{name: _convert(hints[name], value, prefix + name) for name, value in values.items()})


def _convert(hint: Any, value: Any, where: str) -> Any:
    if dataclasses.is_dataclass(hint):
        return dataclass_from(typing.cast(type, hint), value, where)
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (types.UnionType, typing.Union):
        if value is None and type(None) in arguments:
            return None
        kinds = [a for a in arguments if a is not type(None)]
        return _convert(_named_kind(kinds, value, where) if len(kinds) > 1 else kinds[0], value, where)
    if origin is typing.Literal:
        if value not in arguments:
            raise UserError(f"{where}={value!r} must be one of {', '.join(map(repr, arguments))}.")
        return value
    if origin is tuple:
        return _convert_tuple(arguments, value, where)
    if origin is dict:
        if not isinstance(value, Mapping):
            raise UserError(f"{where}: expected a mapping, found {value!r}.")
        return {str(k): _convert(arguments[1], v, f"{where}.{k}") for k, v in value.items()}
    return _convert_scalar(hint, value, where)


def _named_kind(kinds: list[type], value: Any, where: str) -> type:
    """Of several dataclasses, the one whose field ``name`` has the value's ``name`` as default; the first without."""
    names = {str(kind.__dataclass_fields__["name"].default): kind for kind in kinds}  # type: ignore[attr-defined]
    name = value.get("name", next(iter(names))) if isinstance(value, Mapping) else next(iter(names))
    if name not in names:
        raise UserError(f"{where}.name={name!r} must be one of {', '.join(map(repr, names))}.")
    return names[name]


def _convert_tuple(arguments: tuple[Any, ...], value: Any, where: str) -> tuple[Any, ...]:
    if not isinstance(value, (list, tuple)):
        raise UserError(f"{where}: expected a list, found {value!r}.")
    if arguments[-1] is Ellipsis:
        return tuple(_convert(arguments[0], v, f"{where}[{i}]") for i, v in enumerate(value))
    if len(value) != len(arguments):
        raise UserError(f"{where}: expected {len(arguments)} entries, found {value!r}.")
    return tuple(_convert(a, v, f"{where}[{i}]") for i, (a, v) in enumerate(zip(arguments, value, strict=True)))


def _convert_scalar(hint: Any, value: Any, where: str) -> Any:
    if hint is Any:
        return value
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if hint is float and isinstance(value, str):  # YAML 1.1 reads 1e-4 as text
        try:
            return float(value)
        except ValueError:
            pass
    if not isinstance(value, hint) or (isinstance(value, bool) and hint is not bool):
        raise UserError(f"{where}: expected {hint.__name__}, found {value!r}.")
    return value
