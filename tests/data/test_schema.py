from __future__ import annotations

import pytest

from robopolicy.data.schema import ArraySpec, DatasetSchema, infer_schema, infer_spec, override_schema
from robopolicy.errors import UserError


@pytest.mark.parametrize(
    ("name", "shape", "dtype", "role"),
    [
        ("camera0_rgb", (224, 224, 3), "uint8", "image"),
        ("img", (96, 96, 3), "float32", "image"),
        ("gray", (64, 48, 1), "uint8", "image"),
        ("tags", (4, 4, 3), "float32", "other"),
        ("keypoint", (9, 2), "float32", "state"),
        ("state", (5,), "float32", "state"),
        ("action", (2,), "float32", "action"),
        ("reward", (), "float32", "reward"),
        ("timestamp", (1,), "float64", "other"),
        ("done", (), "bool", "other"),
        ("depth", (64, 48, 1), "uint16", "other"),
    ],
)
def test_roles_are_inferred_from_name_shape_and_type(name: str, shape: tuple[int, ...], dtype: str, role: str) -> None:
    assert infer_spec(name, shape, dtype).role == role


def test_rotations_are_inferred_from_umi_names() -> None:
    assert infer_spec("robot0_eef_rot_axis_angle", (3,), "float32").rotation == "axis_angle"
    assert infer_spec("eef_quat", (4,), "float32").rotation == "quaternion_xyzw"


def test_attributes_round_trip() -> None:
    spec = ArraySpec("q", (2,), "float32", "state", "rad", "base_link", "", ("a", "b"))
    schema = DatasetSchema(30.0, {"q": spec}, {"source": "tests"})
    assert DatasetSchema.from_attributes(schema.to_attributes(), "here") == schema


def test_a_newer_format_is_refused_with_the_place() -> None:
    with pytest.raises(UserError, match=r"here: found dataset format version 2, wanted 1.*Update"):
        DatasetSchema.from_attributes({"format_version": 2}, "here")


def test_overrides_replace_fields_and_name_what_is_unknown() -> None:
    schema = infer_schema({"state": ((2,), "float32")}, overrides={"state": {"unit": "px"}})
    assert schema.arrays["state"].unit == "px"
    assert override_schema(schema, {}, fps=5).fps == 5
    with pytest.raises(UserError, match="no array 'stat'.*Did you mean 'state'"):
        override_schema(schema, {"stat": {"unit": "px"}})
    with pytest.raises(UserError, match="no field 'units'.*Did you mean 'unit'"):
        override_schema(schema, {"state": {"units": "px"}})


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"role": "picture"}, "unknown role"),
        ({"name": "a/b"}, "without '/'"),
        ({"names": ("only one",)}, "1 column names"),
        ({"dtype": "float33"}, "no NumPy element type"),
    ],
)
def test_impossible_arrays_are_refused(fields: dict[str, object], message: str) -> None:
    values = {"name": "a", "shape": (2,), "dtype": "float32", "role": "state", **fields}
    with pytest.raises(UserError, match=message):
        ArraySpec(**values)  # type: ignore[arg-type]
