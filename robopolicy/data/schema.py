"""What the arrays of a dataset mean: role, unit, frame and rotation of each, and the rate of the recording.

The schema is stored in the attributes of the dataset's root group under ``robopolicy``. Datasets of other projects
(diffusion_policy, UMI, converted robomimic) carry no such attributes; their schema is inferred from names and shapes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any, Literal, get_args

import numpy as np

from robopolicy.errors import UserError, did_you_mean
from robopolicy.spec import checked_fields

ArrayRole = Literal["image", "state", "action", "reward", "other"]

ATTRIBUTES_KEY = "robopolicy"
FORMAT_VERSION = 1
FILES_KEY = "every_file_stored"

# Float arrays count as images only from this edge length on: (9, 2, 3) is a set of points, not a picture.
_SMALLEST_FLOAT_IMAGE = 16
_BOOKKEEPING = {"timestamp", "frame_index", "episode_index", "index", "task_index", "done", "success"}


@dataclass(frozen=True)
class ArraySpec:
    """One array under ``data/``.

    Attributes:
        name: name of the array, e.g. ``observation.state``.
        shape: shape of one time step.
        dtype: NumPy name of the element type, e.g. ``float32``.
        role: ``image``, ``state``, ``action``, ``reward`` or ``other``.
        unit: physical unit, e.g. ``m``, ``rad``, ``px``; empty when unknown.
        frame: coordinate frame, e.g. ``base_link``; empty when unknown.
        rotation: representation of orientations, e.g. ``axis_angle``, ``quaternion_xyzw``, ``6d``.
        names: names of the columns, e.g. joint names; empty or as many as the last axis has entries.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    role: ArrayRole
    unit: str = ""
    frame: str = ""
    rotation: str = ""
    names: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "shape", tuple(int(n) for n in self.shape))
        object.__setattr__(self, "names", tuple(self.names))
        try:
            object.__setattr__(self, "dtype", np.dtype(self.dtype).name)
        except TypeError as error:
            raise UserError(f"array '{self.name}': '{self.dtype}' is no NumPy element type.") from error
        if not self.name or "/" in self.name or self.name.startswith("."):
            raise UserError(f"array '{self.name}': a name must be non-empty, without '/' and without a leading '.'.")
        if self.role not in get_args(ArrayRole):
            raise UserError(f"array '{self.name}': unknown role.{did_you_mean(str(self.role), get_args(ArrayRole))}")
        if self.names and (not self.shape or len(self.names) != self.shape[-1]):
            raise UserError(f"array '{self.name}': {len(self.names)} column names for shape {self.shape}.")

    @property
    def frame_bytes(self) -> int:
        """Bytes of one time step in memory."""
        return int(np.prod(self.shape, dtype=np.int64)) * np.dtype(self.dtype).itemsize

    @property
    def columns(self) -> tuple[str, ...]:
        """A label for each entry of the last axis (one for a scalar array)."""
        if self.names:
            return self.names
        return tuple(f"{self.name}[{i}]" for i in range(self.shape[-1])) if self.shape else (self.name,)


@dataclass(frozen=True)
class DatasetSchema:
    """Rate and arrays of a dataset.

    Attributes:
        fps: steps per second; None when the dataset does not say.
        arrays: the arrays by name.
        attributes: free provenance that the recorder or importer left, e.g. the source and its licence.
    """

    fps: float | None
    arrays: Mapping[str, ArraySpec]
    attributes: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.fps is not None and not (np.isfinite(self.fps) and self.fps > 0):
            raise UserError(f"fps must be a positive number of steps per second, found {self.fps}.")

    def of_role(self, *roles: ArrayRole) -> tuple[ArraySpec, ...]:
        """The arrays that have one of ``roles``, in the dataset's order."""
        return tuple(a for a in self.arrays.values() if a.role in roles)

    def to_attributes(self) -> dict[str, Any]:
        """The JSON value that is stored under ``robopolicy`` in the root group."""
        arrays = {name: asdict(spec) for name, spec in self.arrays.items()}
        for values in arrays.values():
            del values["name"]
        return {
            "format_version": FORMAT_VERSION,
            "fps": self.fps,
            "arrays": arrays,
            "attributes": dict(self.attributes),
        }

    @classmethod
    def from_attributes(cls, values: Mapping[str, Any], where: str) -> DatasetSchema:
        """Read what :meth:`to_attributes` wrote.

        Raises:
            UserError: an entry is missing, unknown or of a newer format; the message starts with ``where``.
        """
        version = values.get("format_version")
        if version != FORMAT_VERSION:
            raise UserError(
                f"{where}: found dataset format version {version}, wanted {FORMAT_VERSION}. "
                "Update robopolicy to read this dataset."
            )
        arrays = {}
        for name, entry in dict(values.get("arrays", {})).items():
            entry = checked_fields(ArraySpec, {"name": name, **entry}, f"{where}, array '{name}'")
            arrays[name] = ArraySpec(**entry)
        return cls(fps=values.get("fps"), arrays=arrays, attributes=dict(values.get("attributes", {})))


def infer_spec(name: str, shape: Sequence[int], dtype: str) -> ArraySpec:
    """Guess the role and rotation of an array without attributes from its name, step shape and element type."""
    spec = ArraySpec(name, tuple(shape), dtype, _infer_role(name, tuple(shape), np.dtype(dtype)))
    if spec.role in ("state", "action"):
        if "axis_angle" in name:
            return replace(spec, rotation="axis_angle")
        if "quat" in name and spec.shape == (4,):
            return replace(spec, rotation="quaternion_xyzw")
    return spec


def infer_schema(
    steps: Mapping[str, tuple[tuple[int, ...], str]],
    *,
    fps: float | None = None,
    overrides: Mapping[str, Mapping[str, Any]] | None = None,
) -> DatasetSchema:
    """Schema of a dataset that carries none.

    Args:
        steps: shape of one step and element type of each array, by name.
        fps: steps per second, where the task configuration knows it.
        overrides: fields of :class:`ArraySpec` by array name that replace what was inferred.

    Raises:
        UserError: ``overrides`` names an array or a field that does not exist.
    """
    schema = DatasetSchema(fps, {name: infer_spec(name, shape, dtype) for name, (shape, dtype) in steps.items()})
    return override_schema(schema, overrides or {})


def override_schema(
    schema: DatasetSchema, overrides: Mapping[str, Mapping[str, Any]], fps: float | None = None
) -> DatasetSchema:
    """Replace fields of single arrays (``{"state": {"unit": "px"}}``) and, where given, the rate.

    Raises:
        UserError: ``overrides`` names an array or a field that does not exist.
    """
    known = {f.name for f in fields(ArraySpec)} - {"name", "shape", "dtype"}
    arrays = dict(schema.arrays)
    for name, values in overrides.items():
        if name not in arrays:
            raise UserError(f"schema override: the dataset has no array '{name}'.{did_you_mean(name, arrays)}")
        for entry in values:
            if entry not in known:
                raise UserError(f"schema override of '{name}': no field '{entry}'.{did_you_mean(entry, known)}")
        arrays[name] = replace(arrays[name], **values)
    return replace(schema, arrays=arrays, fps=schema.fps if fps is None else fps)


def _infer_role(name: str, shape: tuple[int, ...], dtype: np.dtype) -> ArrayRole:
    if name in ("action", "reward"):
        return name  # type: ignore[return-value]
    if len(shape) == 3 and shape[-1] in (1, 3):
        big_enough = min(shape[:2]) >= _SMALLEST_FLOAT_IMAGE
        if dtype == np.uint8 or (dtype.kind == "f" and big_enough):
            return "image"
    if name not in _BOOKKEEPING and dtype.kind == "f" and 1 <= len(shape) <= 2:
        return "state"
    return "other"
