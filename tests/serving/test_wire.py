"""The wire format: the same bytes as openpi's, and every bad frame ends in one short error."""

from __future__ import annotations

import random

import msgpack
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from robopolicy.serving.wire import MAX_DEPTH, MAX_ELEMENTS, WireError, pack, unpack
from tests.serving.conftest import task_frame

DTYPES = [
    np.dtype(f"{order}{name}") for order in "<>" for name in ("i1", "i2", "i4", "i8", "u1", "u4", "f2", "f4", "f8")
]
SAMPLES = [
    task_frame(),
    {"a": {"b": [1, -2.5, "text", None, True, b"raw"]}},
    {"array": np.arange(24, dtype=np.int16).reshape(2, 3, 4)[:, ::2], "empty": np.zeros((0, 3), np.float32)},
    {"flag": np.array([True, False]), "scalar": np.float32(1.5), "zero": np.array(3, np.uint8), "int": np.int64(-7)},
    {"big": np.arange(4, dtype=">f8"), "half": np.ones(3, np.float16)},
]


def same(a, b) -> bool:
    if isinstance(a, dict):
        return isinstance(b, dict) and list(a) == list(b) and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    if isinstance(a, np.ndarray):
        return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()
    return type(a) is type(b) and a == b


@pytest.mark.parametrize("value", SAMPLES, ids=range(len(SAMPLES)))
def test_the_bytes_are_openpis(value) -> None:
    theirs = pytest.importorskip("openpi_client.msgpack_numpy")
    assert pack(value) == theirs.packb(value) == theirs.Packer().pack(value)
    assert same(unpack(theirs.packb(value)), theirs.unpackb(pack(value)))


@given(hnp.arrays(st.sampled_from(DTYPES), hnp.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=4)))
def test_arrays_come_back(array: np.ndarray) -> None:
    found = unpack(pack({"x": array}))["x"]
    assert found.dtype == array.dtype and found.shape == array.shape and found.tobytes() == array.tobytes()
    assert not found.flags.writeable


@pytest.mark.parametrize("value", SAMPLES, ids=range(len(SAMPLES)))
def test_values_come_back(value) -> None:
    assert same(unpack(pack(value)), value)


def array(**changes) -> bytes:
    """A frame with one array of two float32; ``changes`` by name, None leaves an entry out."""
    entries = {"__ndarray__": True, "data": bytes(8), "dtype": "<f4", "shape": [2]} | changes
    return msgpack.packb({"x": {k.encode(): v for k, v in entries.items() if v is not None}})


def scalar(data, dtype="<i4", **more) -> bytes:
    return msgpack.packb({b"__npgeneric__": True, b"data": data, b"dtype": dtype, **more})


def test_the_helper_makes_a_good_frame() -> None:
    assert unpack(array())["x"].tolist() == [0, 0] and unpack(scalar(5)) == 5


@pytest.mark.parametrize(
    ("frame", "reason"),
    [
        (b"", "not msgpack"),
        (b"\xc1", "not msgpack"),
        (msgpack.packb({"a": 1}) + b"\x00", "not msgpack"),
        (msgpack.packb({"a": "text"})[:-1], "not msgpack"),
        (b"\xa2\xff\xfe", "not msgpack"),
        (b"\x81\x01\x02", "not msgpack"),  # a number as name
        (b"\xdd\xff\xff\xff\xff", "not msgpack"),  # a list of 2**32 - 1 entries
        (b"\xc6\xff\xff\xff\xff", "not msgpack"),  # as many bytes
        (b"\x91" * 5000 + b"\xc0", "not msgpack"),
        (b"\x91" * (MAX_DEPTH + 1) + b"\xc0", "levels"),
        (msgpack.packb([[None] * 1000] * 5), f"{MAX_ELEMENTS} entries"),
        (msgpack.packb([{str(i): None for i in range(900)}] * 5), f"{MAX_ELEMENTS} entries"),
        (msgpack.packb([None] * 1025), "not msgpack"),
        (msgpack.packb(msgpack.ExtType(5, b"x")), "extension"),
        (msgpack.packb(msgpack.Timestamp(5)), "Timestamp"),
        (array(data=bytes(7)), "has 8 bytes, found 7"),
        (array(data="text"), "needs bytes"),
        (array(data=None), "has the entries"),
        (array(extra=1), "has the entries"),
        (array(__ndarray__=1), "has the entries"),
        (array(shape=[-2]), "whole numbers"),
        (array(shape=[2.0]), "whole numbers"),
        (array(shape=[True, 2]), "whole numbers"),
        (array(shape=2), "needs bytes"),
        (array(shape=[1] * 9 + [2]), "at most 8 dimensions"),
        (array(shape=[2**40, 2**40]), "at most"),
        (array(shape=[0, 2**62], data=b""), "at most"),
        (array(shape=[2**63, 2]), "at most"),
        (array(dtype="|O"), "type is one of"),
        (array(dtype="O"), "type is one of"),
        (array(dtype="<c8", shape=[1]), "type is one of"),
        (array(dtype="|V4"), "type is one of"),
        (array(dtype="<U1"), "type is one of"),
        (array(dtype="<M8[ns]", shape=[1]), "type is one of"),
        (array(dtype="f4,f4", shape=[1]), "type is one of"),
        (array(dtype="(2,)f4", shape=[1]), "type is one of"),
        (array(dtype=["<f4"]), "type is one of"),
        (array(dtype=b"<f4"), "type is one of"),
        (array(dtype="|b1", shape=[8], data=b"\x00\x01\x02" + bytes(5)), "boolean"),
        (scalar("text"), "scalar is a number"),
        (scalar([1]), "scalar is a number"),
        (scalar(300, "|i1"), "does not fit"),
        (scalar(-1, "<u8"), "does not fit"),
        (scalar(float("nan")), "does not fit"),
        (scalar(1, "<M8[s]"), "type is one of"),
    ],
)
def test_bad_frames(frame: bytes, reason: str) -> None:
    with pytest.raises(WireError) as error:
        unpack(frame)
    assert reason in str(error.value) and len(str(error.value)) < 200


@pytest.mark.parametrize(
    "value",
    [
        {"a": object()},
        np.array([object()]),
        np.array([1j]),
        np.array(["text"]),
        {"a": {1, 2}},
        2**70,
        np.datetime64(1, "s"),
    ],
)
def test_what_cannot_be_sent(value) -> None:
    with pytest.raises(WireError, match="cannot be sent"):
        pack(value)


def mutated(frame: bytes, rng: random.Random) -> bytes:
    """A frame with a few bytes flipped, cut out, repeated, replaced by markers of msgpack, or its end cut off."""
    data = bytearray(frame)
    for _ in range(rng.randint(1, 6)):
        at, length = rng.randrange(len(data)), rng.randint(1, 8)
        kind = rng.randrange(6)
        if kind == 0:
            data[at] ^= 1 << rng.randrange(8)
        elif kind == 1:
            data[at] = rng.choice(
                b"\xc0\xc1\xc4\xc6\xc7\xc9\xca\xcb\xcf\xd3\xd4\xd9\xdb\xdc\xdd\xde\xdf\x80\x90\xa0\xff"
            )
        elif kind == 2:
            del data[at : at + length]
        elif kind == 3:
            data[at:at] = data[at : at + length]
        elif kind == 4:
            data[at : at + length] = rng.randbytes(length)
        else:
            del data[max(1, at) :]
        if not data:
            return b"\x00"
    return bytes(data)


def test_mutated_frames_never_crash() -> None:
    """20,000 frames, most of them broken: each is read or refused with a WireError."""
    rng = random.Random(0)
    seeds = [pack(value) for value in SAMPLES] + [array(), scalar(5), msgpack.packb([[1, {"a": []}], "x" * 40])]
    read = refused = 0
    for _ in range(20_000):
        frame = mutated(rng.choice(seeds), rng)
        try:
            unpack(frame)
            read += 1
        except WireError as error:
            assert len(str(error)) < 200
            refused += 1
    assert read > 1000 and refused > 10_000
