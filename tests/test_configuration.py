from dataclasses import dataclass, field
from typing import Literal

import pytest

from robopolicy.configuration import dataclass_from
from robopolicy.errors import UserError


@dataclass(frozen=True)
class Inner:
    rate: float = 0.1
    kind: Literal["a", "b"] = "a"


@dataclass(frozen=True)
class Outer:
    name: str
    dims: tuple[int, ...] = ()
    pair: tuple[float, float] = (0.0, 1.0)
    limit: int | None = None
    on: bool = False
    inner: Inner = field(default_factory=Inner)
    modes: dict[str, str] = field(default_factory=dict)


def build(**values):
    return dataclass_from(Outer, {"name": "x", **values}, "train")


def test_values_are_converted():
    built = build(dims=[1, 2], pair=[1, "1e-4"], limit=None, inner={"rate": 3, "kind": "b"}, modes={"state": "minmax"})
    assert built == Outer("x", (1, 2), (1.0, 1e-4), None, False, Inner(3.0, "b"), {"state": "minmax"})
    assert isinstance(built.inner.rate, float)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"nam": 1}, "train: unknown entry 'nam'. Did you mean 'name'"),
        ({"dims": 3}, "train.dims: expected a list, found 3"),
        ({"dims": [1, "b"]}, r"train.dims\[1\]: expected int, found 'b'"),
        ({"pair": [1]}, "train.pair: expected 2 entries"),
        ({"limit": "many"}, "train.limit: expected int, found 'many'"),
        ({"limit": True}, "train.limit: expected int, found True"),
        ({"on": 1}, "train.on: expected bool, found 1"),
        ({"inner": {"kind": "c"}}, "train.inner.kind='c' must be one of 'a', 'b'"),
        ({"inner": 5}, "train.inner: expected a mapping"),
        ({"modes": [1]}, "train.modes: expected a mapping"),
    ],
)
def test_wrong_values_are_named(values, message):
    with pytest.raises(UserError, match=message):
        build(**values)


def test_missing_values_are_named():
    with pytest.raises(UserError, match="train: the entry 'name' is missing"):
        dataclass_from(Outer, {}, "train")
