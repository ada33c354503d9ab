"""What the control process and the inference process share: requests one way, chunks the other way.

A request is written into one of three slots: one may be read by the inference process, one may be on offer, so one is
always free and the control process never waits; the newest offer replaces the one before. Which slot is what, and the
chunk, change under a record lock of the kernel. That lock orders memory on every processor, is released when its holder
dies, and the control process only ever tries it: where it is taken, the tick after does the rest.

The memory is a file without a name, so nothing is left when both processes are gone, however they ended.
"""

from __future__ import annotations

import fcntl
import mmap
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import numpy as np

from robopolicy.errors import UserError
from robopolicy.runtime.exchange import Chunk, Request
from robopolicy.spec import GOAL, PolicySpec

_SLOTS = 3
_TEXT = 4096
"""Bytes of a text: an instruction, an error."""
_NONE = -1
_ALIGNMENT = 64

# words of the state, int64; READY is 0 until the policy is warm, then the ns of a usual inference, at least 1
_OFFERED, _IN_USE, _CLOSING = 0, 1, 2
BEAT, BUSY_SINCE, READY, FAILURES = 3, 4, 5, 6
_REPORTS, _REPORT_BYTES = 7, 8
_ANSWERS, _ANSWER = 9, slice(10, 15)
_WORDS = 16

# words of a request, int64
_ID, _EPOCH, _OBSERVED_AT, _SEED, _AGREES, _INSTRUCTION_BYTES, _GIVEN = range(7)


class SharedMemory:
    """The memory of one control and one inference process.

    Words of the state that one process writes and the other only shows (`BEAT`, `BUSY_SINCE`, `READY`, `FAILURES`) are
    read without the lock: they are aligned integers that a processor writes whole, and nothing else depends on them.

    Args:
        spec: of the policy.
        file: descriptor from the other process; None: make the memory.

    Attributes:
        file: the descriptor, to be inherited by the other process.
        state: words, int64.
    """

    def __init__(self, spec: PolicySpec, file: int | None = None) -> None:
        self.spec = spec
        layout = _layout(spec)
        size = sum(_padded(shape, dtype) for shape, dtype in layout.values())
        if file is None:
            self.file = os.memfd_create("robopolicy-inference")
            os.ftruncate(self.file, size)
        else:
            self.file = file
        if os.fstat(self.file).st_size != size:
            raise UserError("The shared memory is of another size: both processes must run the same robopolicy.")
        # page faults now, and not in the command loop
        self._map = mmap.mmap(self.file, size, flags=mmap.MAP_SHARED | mmap.MAP_POPULATE)
        self._arrays: dict[str, np.ndarray] = {}
        begin = 0
        for name, (shape, dtype) in layout.items():
            count = int(np.prod(shape))
            self._arrays[name] = np.frombuffer(self._map, dtype, count, begin).reshape(shape)
            begin += _padded(shape, dtype)
        self.state = self._arrays["state"]
        self._requests = [_Slot(spec, self._arrays, i) for i in range(_SLOTS)]
        if file is None:
            self.state[_OFFERED] = self.state[_IN_USE] = _NONE

    # the control process

    def free_slot(self, last: int, in_use: int) -> int:
        """A slot that is neither on offer nor read.

        Args:
            last: the slot that was offered last; the inference process may have taken it since.
            in_use: the slot that was read when ``last`` was offered.
        """
        return next(slot for slot in range(_SLOTS) if slot not in (last, in_use))

    def write(self, slot: int, request: Request) -> None:
        """Copy a request into a slot that is free.

        Raises:
            UserError: a value is missing or has another shape than the policy's.
        """
        self._requests[slot].write(request)

    def offer(self, slot: int) -> tuple[int, bool] | None:
        """Offer a slot in place of the one before.

        Returns:
            The slot that is read now, and whether the one before was never taken; None if the lock is taken.
        """
        if not self._try_lock():
            return None
        replaces = bool(self.state[_OFFERED] != _NONE)
        self.state[_OFFERED] = slot
        in_use = int(self.state[_IN_USE])
        self._unlock()
        return in_use, replaces

    def newest_chunk(self, seen: int) -> tuple[int, Chunk | None]:
        """The newest chunk, unless it was seen.

        Args:
            seen: chunks that there were when one was last taken.

        Returns:
            Chunks that there were, and the chunk; None if it was seen, or the lock is taken.
        """
        if int(self.state[_ANSWERS]) == seen or not self._try_lock():
            return seen, None
        count = int(self.state[_ANSWERS])
        words, actions = self.state[_ANSWER].tolist(), self._arrays["answer"].copy()
        self._unlock()
        identity, epoch, observed_at, started, finished = words
        return count, Chunk(identity, epoch, observed_at, actions, started, finished)

    def newest_report(self, seen: int) -> tuple[int, str | None]:
        """The newest report, unless it was seen; see `newest_chunk`."""
        if int(self.state[_REPORTS]) == seen or not self._try_lock():
            return seen, None
        count = int(self.state[_REPORTS])
        text = self._arrays["report"][: int(self.state[_REPORT_BYTES])].tobytes()
        self._unlock()
        return count, text.decode(errors="replace")

    def ask_to_end(self) -> None:
        self.state[_CLOSING] = 1

    # the inference process

    @property
    def closing(self) -> bool:
        return bool(self.state[_CLOSING])

    def take(self) -> Request | None:
        """The request on offer, as views that hold until the next call; None if there is none."""
        with self._locked():
            slot = int(self.state[_OFFERED])
            if slot == _NONE:
                return None
            self.state[_OFFERED], self.state[_IN_USE] = _NONE, slot
        return self._requests[slot].read()

    def answer(self, chunk: Chunk) -> None:
        """Put a chunk in the place of the one before."""
        with self._locked():
            self._arrays["answer"][:] = chunk.actions
            self.state[_ANSWER] = (chunk.id, chunk.epoch, chunk.observed_at, chunk.started, chunk.finished)
            self.state[_ANSWERS] += 1

    def report(self, text: str) -> None:
        """Tell a person what went wrong; empty: nothing does any more."""
        data = text.encode()[:_TEXT]
        if data == self._arrays["report"][: int(self.state[_REPORT_BYTES])].tobytes():
            return
        with self._locked():
            self._arrays["report"][: len(data)] = np.frombuffer(data, np.uint8)
            self.state[_REPORT_BYTES] = len(data)
            self.state[_REPORTS] += 1

    def close(self) -> None:
        """Give the memory back; the last process to do so frees it."""
        self._arrays.clear()
        self._requests.clear()
        del self.state
        self._map.close()
        os.close(self.file)

    def _try_lock(self) -> bool:
        try:
            fcntl.lockf(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            return False
        return True

    @contextmanager
    def _locked(self) -> Iterator[None]:
        fcntl.lockf(self.file, fcntl.LOCK_EX)
        try:
            yield
        finally:
            self._unlock()

    def _unlock(self) -> None:
        fcntl.lockf(self.file, fcntl.LOCK_UN)


class _Slot:
    """The arrays of one request."""

    def __init__(self, spec: PolicySpec, arrays: Mapping[str, np.ndarray], number: int) -> None:
        self._words = arrays[f"{number}.words"]
        self._instruction = arrays[f"{number}.instruction"]
        self._previous, self._mask = arrays[f"{number}.previous"], arrays[f"{number}.mask"]
        self._values = {key: arrays[f"{number}.{key}"] for key in _keys(spec)}
        self._needed = [key.key for key in spec.observations]

    def write(self, request: Request) -> None:
        for key in self._needed:
            if key not in request.values:
                raise UserError(f"The observation lacks '{key}'; found {sorted(request.values)}.")
        given = 0
        for i, (key, place) in enumerate(self._values.items()):
            if key in request.values:
                _copy(place, request.values[key], key)
                given |= 1 << i
        if (request.previous is None) != (request.mask is None):
            raise UserError("previous and mask belong together; give both or none.")
        if request.previous is not None and request.mask is not None:
            _copy(self._previous, request.previous, "previous")
            _copy(self._mask, request.mask, "mask")
        length = _NONE
        if request.instruction is not None:
            text = request.instruction.encode()
            length = len(text)
            if length > _TEXT:
                raise UserError(f"instruction: found {length} bytes, at most {_TEXT} fit.")
            self._instruction[:length] = np.frombuffer(text, np.uint8)
        words = self._words
        words[_ID], words[_EPOCH], words[_OBSERVED_AT] = request.id, request.epoch, request.observed_at
        words[_SEED], words[_AGREES] = request.seed, request.previous is not None
        words[_INSTRUCTION_BYTES], words[_GIVEN] = length, given

    def read(self) -> Request:
        words = self._words.tolist()
        length = words[_INSTRUCTION_BYTES]
        return Request(
            id=words[_ID],
            epoch=words[_EPOCH],
            observed_at=words[_OBSERVED_AT],
            values={key: value for i, (key, value) in enumerate(self._values.items()) if words[_GIVEN] >> i & 1},
            previous=self._previous if words[_AGREES] else None,
            mask=self._mask if words[_AGREES] else None,
            seed=words[_SEED],
            instruction=None if length == _NONE else self._instruction[:length].tobytes().decode(),
        )


Layout = dict[str, tuple[tuple[int, ...], type]]
"""Shape and type by name."""


def _keys(spec: PolicySpec) -> Layout:
    steps = spec.n_obs_steps
    keys: Layout = {
        k.key: ((steps, *k.shape), np.uint8 if k.role == "image" else np.float32) for k in spec.observations
    }
    return keys | {GOAL + k.key: (k.shape, np.float32) for k in spec.goals}


def _layout(spec: PolicySpec) -> Layout:
    chunk = (spec.horizon, spec.action.dim)
    slot: Layout = {
        "words": ((_GIVEN + 1,), np.int64),
        "instruction": ((_TEXT,), np.uint8),
        "previous": (chunk, np.float32),
        "mask": (chunk[:1], np.float32),
        **_keys(spec),
    }
    return {
        "state": ((_WORDS,), np.int64),
        "report": ((_TEXT,), np.uint8),
        "answer": (chunk, np.float32),
        **{f"{number}.{name}": about for number in range(_SLOTS) for name, about in slot.items()},
    }


def _padded(shape: tuple[int, ...], dtype: type) -> int:
    """Bytes of an array, up to where the next one begins."""
    return -(-int(np.prod(shape)) * np.dtype(dtype).itemsize // _ALIGNMENT) * _ALIGNMENT


def _copy(place: np.ndarray, value: np.ndarray, name: str) -> None:
    if np.shape(value) != place.shape:
        raise UserError(f"{name}: found shape {np.shape(value)}, wanted {place.shape}.")
    if place.dtype == np.uint8 and np.asarray(value).dtype != np.uint8:
        raise UserError(f"{name}: found an image of {np.asarray(value).dtype}, wanted uint8 from 0 to 255.")
    np.copyto(place, value, casting="same_kind")
