"""The inference process: ``python -m robopolicy.runtime.inference_process JOB`` is started by `ProcessWorker`.

It ends when it is told to or when the control process is gone. Ctrl-C and SIGTERM, which a terminal or a service
manager sends to all processes of a node, are left to the control process: it needs the policy until the robot stands.
"""

from __future__ import annotations

import fcntl
import json
import os
import select
import signal
import sys
import threading
import time
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from robopolicy.errors import UserError
from robopolicy.export.rtc_config import RtcConfig
from robopolicy.runtime.clock import nanoseconds
from robopolicy.runtime.exchange import Chunk, Request
from robopolicy.runtime.shared_memory import BEAT, BUSY_SINCE, FAILURES, READY, SharedMemory
from robopolicy.spec import INSTRUCTION, PolicySpec

if TYPE_CHECKING:
    from robopolicy.inference.policy import ExportedPolicy

BEAT_PERIOD = 0.05
"""Seconds between heartbeats."""


@dataclass(frozen=True)
class Job:
    """What the process does, as plain values.

    Attributes:
        bundle, engine, threads, device, allow_native_code, rtc: see `robopolicy.export.open.open_policy`.
        spec: of the policy, from its manifest.
        memory: descriptor of the shared memory.
        wake: descriptor of the event that tells of requests.
        extra_delay: seconds that every inference takes longer, for experiments.
    """

    bundle: str
    engine: str | None
    threads: int
    device: str | None
    allow_native_code: bool
    spec: dict[str, Any]
    memory: int
    wake: int
    extra_delay: float = 0.0
    rtc: dict[str, Any] | None = None


class Samples(Protocol):
    """A policy as `robopolicy.inference.policy.ExportedPolicy` is one."""

    spec: PolicySpec

    def draw_noise(self, rows: int, rng: np.random.Generator) -> np.ndarray: ...

    def sample(
        self, observations: dict[str, Any], noise: np.ndarray, previous: np.ndarray | None, mask: np.ndarray | None
    ) -> np.ndarray: ...


def infer(policy: Samples, request: Request) -> np.ndarray:
    """The chunk (H, A) of a request, in physical units."""
    rows: dict[str, Any] = {key: value[None] for key, value in request.values.items()}
    if request.instruction is not None:
        rows[INSTRUCTION] = [request.instruction]
    noise = policy.draw_noise(1, np.random.default_rng(request.seed))
    previous = None if request.previous is None else request.previous[None]
    mask = None if request.mask is None else request.mask[None]
    return policy.sample(rows, noise, previous, mask)[0]


def explained(error: Exception) -> str:
    """An error for a person."""
    return str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"


def main() -> int:
    for ignored in (signal.SIGINT, signal.SIGTERM):
        signal.signal(ignored, signal.SIG_IGN)
    end_with_the_control_process()
    job = Job(**json.loads(sys.argv[1]))
    memory = SharedMemory(PolicySpec.from_dict(job.spec), job.memory)
    threading.Thread(target=_beat, args=(memory,), daemon=True).start()
    try:
        policy = _open(job, memory.spec)
        usual = policy.usual_seconds() + job.extra_delay
    except Exception as error:
        memory.report(explained(error))
        if not isinstance(error, UserError):
            traceback.print_exc()
        return 1
    memory.state[READY] = max(1, nanoseconds(usual))
    while not memory.closing:
        os.eventfd_read(job.wake)
        while not memory.closing and (request := memory.take()) is not None:
            _serve(policy, request, memory, job.extra_delay)
    return 0


def end_with_the_control_process() -> None:
    """Have the kernel end this process when the other end of stdin is closed, whatever Python is doing then.

    A thread that waits for the end would not run while an engine holds the interpreter, and Linux's parent death signal
    also comes when the thread that started this process ends.
    """
    signal.signal(signal.SIGIO, signal.SIG_DFL)
    fcntl.fcntl(0, fcntl.F_SETOWN, os.getpid())
    fcntl.fcntl(0, fcntl.F_SETFL, fcntl.fcntl(0, fcntl.F_GETFL) | os.O_ASYNC)
    already = select.poll()
    already.register(0)
    if any(event & select.POLLHUP for _, event in already.poll(0)):
        raise SystemExit("The control process is gone.")


def _open(job: Job, spec: PolicySpec) -> ExportedPolicy:
    from robopolicy.export.open import open_policy

    policy = open_policy(
        Path(job.bundle),
        job.engine,
        threads=job.threads,
        device=job.device,
        allow_native_code=job.allow_native_code,
        rtc=None if job.rtc is None else RtcConfig(**job.rtc),
    )
    if policy.spec != spec:
        raise UserError(f"{job.bundle} changed while it was opened. Start again.")
    policy.warmup()
    return policy


def _serve(policy: Samples, request: Request, memory: SharedMemory, extra_delay: float) -> None:
    started = time.monotonic_ns()
    memory.state[BUSY_SINCE] = started
    try:
        actions = infer(policy, request)
        time.sleep(extra_delay)
        chunk = Chunk(request.id, request.epoch, request.observed_at, actions, started, time.monotonic_ns())
        memory.answer(chunk)
        memory.report("")
    except Exception as error:
        memory.state[FAILURES] += 1
        memory.report(explained(error))
    memory.state[BUSY_SINCE] = 0


def _beat(memory: SharedMemory) -> None:
    while True:
        memory.state[BEAT] = time.monotonic_ns()
        time.sleep(BEAT_PERIOD)


if __name__ == "__main__":
    sys.exit(main())
