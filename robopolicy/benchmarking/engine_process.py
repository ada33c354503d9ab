"""Starting an engine in a fresh process, and calling it; see `robopolicy.benchmarking.serve_engine`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from dataclasses import asdict, dataclass
from types import TracebackType
from typing import Any, Self

from robopolicy.benchmarking.serve_engine import Job
from robopolicy.errors import UserError

_THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")


class EngineRefusedError(UserError):
    """The engine cannot run on this machine; the message is the reason."""


@dataclass(frozen=True)
class Start:
    """What it took until an engine was ready.

    Attributes:
        open: seconds to import the engine's package, load its files and check them.
        first_chunk: seconds from the start of the process to its first chunk.
        memory_before: resident bytes of the process before `open`: Python and NumPy.
        memory_after: resident bytes after the first chunk.
    """

    open: float
    first_chunk: float
    memory_before: int
    memory_after: int


@dataclass(frozen=True)
class Call:
    """One chunk: all of the call, and its stages, in seconds."""

    seconds: float
    preprocess: float
    encode: float
    denoise: float
    postprocess: float


class EngineProcess:
    """An engine that waits in a process of its own.

    Attributes:
        start: what it took until it was ready.

    Raises:
        EngineRefusedError: it cannot run here, or its process ended.
    """

    def __init__(self, bundle: str, engine: str, threads: int, rows: int, device: str, allow_native_code: bool) -> None:
        self.engine = engine
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 - open as long as the process
        job = Job(bundle, engine, threads, rows, device, allow_native_code, time.monotonic())
        self._process = subprocess.Popen(
            [sys.executable, "-m", "robopolicy.benchmarking.serve_engine", json.dumps(asdict(job))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
            # threads that spin while they wait would take time from the engine whose turn it is
            env={**os.environ, "OMP_WAIT_POLICY": "PASSIVE", **dict.fromkeys(_THREAD_VARIABLES, str(threads))},
        )
        try:
            answer = self._answer()
            if "refused" in answer:
                raise EngineRefusedError(answer["refused"])
        except BaseException:
            self.close()
            raise
        self.start = Start(**answer)

    def __call__(self) -> Call:
        """Compute one chunk."""
        stdin = self._process.stdin
        assert stdin is not None  # opened above
        with suppress(BrokenPipeError):  # _answer says why
            stdin.write("\n")
            stdin.flush()
        return Call(**self._answer())

    def _answer(self) -> dict[str, Any]:
        stdout = self._process.stdout
        assert stdout is not None  # opened above
        line = stdout.readline()
        if not line:
            code = self._process.wait()
            self._errors.seek(0)
            said = self._errors.read().decode(errors="replace").strip().splitlines()
            raise EngineRefusedError(f"its process ended with code {code}: {said[-1] if said else 'it said nothing'}")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def close(self) -> None:
        """End the process."""
        if self._process.stdin:
            with suppress(BrokenPipeError):  # what could not be written is still in its buffer
                self._process.stdin.close()
        try:
            self._process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        if self._process.stdout:
            self._process.stdout.close()
        self._errors.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()
