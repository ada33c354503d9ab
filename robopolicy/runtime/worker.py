"""Inference in a process of its own, so that the command loop keeps its period."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path

from robopolicy.export.rtc_config import RtcConfig
from robopolicy.manifest import read_manifest
from robopolicy.runtime.clock import NS
from robopolicy.runtime.exchange import Chunk, Health, Request
from robopolicy.runtime.inference_process import Job
from robopolicy.runtime.shared_memory import BEAT, BUSY_SINCE, FAILURES, READY, SharedMemory
from robopolicy.spec import PolicySpec

_THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")


class ProcessWorker:
    """A policy in its own process.

    It loads and warms up while the control process goes on; `health` says when it is ready, or why it never will be.
    The process runs in a session of its own and ends with the control process, however that ends.

    Args:
        bundle: of the policy.
        engine: name of one of its engines, see `robopolicy.export.open.open_policy`; engines need no torch.
        threads: of the inference; leave a core to the command loop.
        device: of torch and of ONNX Runtime, see `robopolicy.export.open.open_policy`.
        allow_native_code: load engines that are compiled code.
        extra_delay: seconds that every inference takes longer, for experiments.
        rtc: of the engine ``torch-rtc``, see `robopolicy.export.open.open_policy`.

    Raises:
        UserError: the bundle is not there or not a policy's.
    """

    def __init__(
        self,
        bundle: Path,
        engine: str | None,
        *,
        threads: int = 1,
        device: str | None = None,
        allow_native_code: bool = False,
        extra_delay: float = 0.0,
        rtc: RtcConfig | None = None,
    ) -> None:
        self._spec = PolicySpec.from_dict(read_manifest(bundle, verify=False)["spec"])
        self._memory = SharedMemory(self._spec)
        self._memory.state[BEAT] = time.monotonic_ns()
        self._wake = os.eventfd(0)
        job = Job(
            str(Path(bundle).resolve()),
            engine,
            threads,
            device,
            allow_native_code,
            self._spec.to_dict(),
            self._memory.file,
            self._wake,
            extra_delay,
            None if rtc is None else asdict(rtc),
        )
        self._process = subprocess.Popen(
            [sys.executable, "-m", "robopolicy.runtime.inference_process", json.dumps(asdict(job))],
            stdin=subprocess.PIPE,
            pass_fds=(self._memory.file, self._wake),
            start_new_session=True,
            # threads that spin while they wait would take time from the command loop
            env={**os.environ, "OMP_WAIT_POLICY": "PASSIVE", **dict.fromkeys(_THREAD_VARIABLES, str(threads))},
        )
        self._last = self._in_use = -1
        self._unoffered: int | None = None
        self._answers = self._reports = self._superseded = 0
        self._error = ""
        self._last_health = Health()
        self._closed = False

    @property
    def spec(self) -> PolicySpec:
        return self._spec

    @property
    def pid(self) -> int:
        """Of the inference process."""
        return self._process.pid

    def submit(self, request: Request) -> None:
        """Ask for a chunk; see `robopolicy.runtime.exchange.Worker.submit`.

        Raises:
            UserError: a value is missing or has another shape than the policy's.
        """
        if self._closed:
            return
        slot = self._unoffered
        if slot is None:
            slot = self._memory.free_slot(self._last, self._in_use)
        else:
            self._superseded += 1
        self._unoffered = None  # a request that is half written is never offered
        self._memory.write(slot, request)
        self._unoffered = slot
        self._offer()

    def poll(self) -> Chunk | None:
        """See `robopolicy.runtime.exchange.Worker.poll`."""
        if self._closed:
            return None
        self._offer()
        self._answers, chunk = self._memory.newest_chunk(self._answers)
        return chunk

    def health(self) -> Health:
        """See `robopolicy.runtime.exchange.Worker.health`."""
        if self._closed:
            return self._last_health
        self._reports, report = self._memory.newest_report(self._reports)
        self._error = self._error if report is None else report
        code = self._process.poll()
        error = self._error
        if code and not error:
            how = f"was ended by signal {-code} ({signal.strsignal(-code)})" if code < 0 else f"ended with code {code}"
            error = f"The inference process {how}."
        state = self._memory.state
        busy_since, ready = int(state[BUSY_SINCE]), int(state[READY])
        return Health(
            ready=bool(ready),
            alive=code is None,
            beat=int(state[BEAT]),
            busy_since=busy_since or None,
            error=error,
            failures=int(state[FAILURES]),
            superseded=self._superseded,
            usual=ready / NS,
        )

    def close(self, grace: float = 1.0) -> None:
        """End the process.

        Args:
            grace: seconds that it may take before it is killed.
        """
        if self._closed:
            return
        self._memory.ask_to_end()
        os.eventfd_write(self._wake, 1)
        try:
            self._process.wait(grace)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._last_health = self.health()
        self._closed = True
        assert self._process.stdin is not None
        self._process.stdin.close()
        os.close(self._wake)
        self._memory.close()

    def _offer(self) -> None:
        """Offer what was written; where the other process holds the lock at this moment, the next call does."""
        if self._unoffered is None or (found := self._memory.offer(self._unoffered)) is None:
            return
        self._in_use, replaced = found
        self._superseded += replaced
        self._last, self._unoffered = self._unoffered, None
        os.eventfd_write(self._wake, 1)
