"""openpi's wire format: msgpack with NumPy arrays, no pickle.

An array is the map ``{b"__ndarray__": True, b"data": bytes, b"dtype": dtype.str, b"shape": [...]}`` (C order), a NumPy
scalar ``{b"__npgeneric__": True, b"data": value, b"dtype": dtype.str}``. `pack` writes the same bytes as
``openpi_client.msgpack_numpy``; `unpack` is meant for frames from strangers.
"""

from __future__ import annotations

import math
from typing import Any

import msgpack
import numpy as np

from robopolicy.errors import UserError

MAX_DEPTH = 8
"""Maps and lists inside one another; arrays do not count."""
MAX_ELEMENTS = 4096
"""Entries of all maps and lists of a frame together."""
MAX_LENGTH = 1024
"""Entries of one map or list."""
MAX_DIMENSIONS = 8
MAX_BYTES = 2**31
"""Of one array, empty dimensions counted as 1."""

_NAMES = ("b1", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "f2", "f4", "f8")
_DTYPES = {dtype.str: dtype for dtype in (np.dtype(order + name) for name in _NAMES for order in "<>")}
_ARRAY = {b"__ndarray__", b"data", b"dtype", b"shape"}
_SCALAR = {b"__npgeneric__", b"data", b"dtype"}


class WireError(UserError):
    """A frame that is not openpi's format, or larger than it may be."""


def pack(value: Any) -> bytes:
    """Bytes of a frame.

    Args:
        value: maps, lists, texts, bytes, numbers, NumPy arrays and scalars of numbers or booleans.

    Raises:
        WireError: something else.
    """
    try:
        return bytes(msgpack.packb(value, default=_plain))
    except (TypeError, ValueError, OverflowError) as error:
        raise WireError(f"This cannot be sent: {error}.") from error


def unpack(frame: bytes) -> Any:
    """What a frame holds; arrays are read-only.

    Raises:
        WireError: for every frame that does not follow the format or exceeds a limit of this module.
    """
    elements = 0

    def counted(length: int) -> None:
        nonlocal elements
        elements += length
        if elements > MAX_ELEMENTS:
            raise WireError(f"A frame has at most {MAX_ELEMENTS} entries.")

    def list_hook(values: list[Any]) -> list[Any]:
        counted(len(values))
        return values

    def object_hook(values: dict[Any, Any]) -> Any:
        counted(len(values))
        if b"__ndarray__" in values:
            return _array(values)
        if b"__npgeneric__" in values:
            return _scalar(values)
        return values

    try:
        value = msgpack.unpackb(
            frame,
            list_hook=list_hook,
            object_hook=object_hook,
            ext_hook=_no_extension,
            max_array_len=MAX_LENGTH,
            max_map_len=MAX_LENGTH,
        )
    except WireError:
        raise
    except (msgpack.UnpackException, ValueError, TypeError, OverflowError) as error:
        raise WireError(f"The frame is not msgpack: {str(error)[:120] or type(error).__name__}.") from error
    _check(value, 0)
    return value


def _plain(value: Any) -> Any:
    if isinstance(value, (np.ndarray, np.generic)):
        if value.dtype.str not in _DTYPES:
            raise ValueError(f"arrays of {value.dtype} are not numbers")
        if isinstance(value, np.ndarray):
            return {b"__ndarray__": True, b"data": value.tobytes(), b"dtype": value.dtype.str, b"shape": value.shape}
        return {b"__npgeneric__": True, b"data": value.item(), b"dtype": value.dtype.str}
    raise TypeError(f"{type(value).__name__} is no part of the format")


def _array(values: dict[Any, Any]) -> np.ndarray:
    _check_names(values, _ARRAY, b"__ndarray__")
    data, shape, dtype = values[b"data"], values[b"shape"], _dtype(values[b"dtype"])
    if not isinstance(data, bytes) or not isinstance(shape, list) or len(shape) > MAX_DIMENSIONS:
        raise WireError(f"An array needs bytes and a shape of at most {MAX_DIMENSIONS} dimensions.")
    if any(type(n) is not int or n < 0 for n in shape):
        raise WireError("The dimensions of an array are whole numbers from 0.")
    if math.prod(max(n, 1) for n in shape) * dtype.itemsize > MAX_BYTES:
        raise WireError(f"An array has at most {MAX_BYTES} bytes.")
    wanted = math.prod(shape) * dtype.itemsize
    if wanted != len(data):
        raise WireError(f"An array of shape {tuple(shape)} and type {dtype} has {wanted} bytes, found {len(data)}.")
    array: np.ndarray = np.ndarray(tuple(shape), dtype, data)
    if dtype.kind == "b" and np.frombuffer(data, np.uint8).max(initial=0) > 1:
        raise WireError("A boolean is 0 or 1.")
    return array


def _scalar(values: dict[Any, Any]) -> Any:
    _check_names(values, _SCALAR, b"__npgeneric__")
    value, dtype = values[b"data"], _dtype(values[b"dtype"])
    if type(value) not in (bool, int, float):
        raise WireError("A scalar is a number or a boolean.")
    try:
        with np.errstate(over="ignore"):  # a float that is too large becomes infinite, as everywhere in NumPy
            return dtype.type(value)
    except (OverflowError, ValueError, TypeError) as error:
        raise WireError(f"The scalar does not fit its type {dtype}.") from error


def _dtype(name: Any) -> np.dtype:
    found = _DTYPES.get(name) if isinstance(name, str) else None
    if found is None:
        raise WireError("An array's type is one of b, i, u or f with its size, such as '<f4'.")
    return found


def _check_names(values: dict[Any, Any], wanted: set[bytes], mark: bytes) -> None:
    if set(values) != wanted or values[mark] is not True:
        raise WireError(f"A map with {mark!r} has the entries {sorted(wanted)}.")


def _no_extension(code: int, data: bytes) -> Any:
    raise WireError("msgpack's extension types are no part of the format.")


def _check(value: Any, depth: int) -> None:
    if depth > MAX_DEPTH:
        raise WireError(f"A frame has at most {MAX_DEPTH} levels.")
    if isinstance(value, dict):
        for entry in value.values():
            _check(entry, depth + 1)
    elif isinstance(value, list):
        for entry in value:
            _check(entry, depth + 1)
    elif value is not None and not isinstance(value, (bool, int, float, str, bytes, np.ndarray, np.generic)):
        raise WireError(f"{type(value).__name__} is no part of the format.")
