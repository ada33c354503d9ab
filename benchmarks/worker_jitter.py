"""How much inference disturbs a command loop: in a thread of its process, against a process of its own.

A loop wakes up every 10 ms, takes the chunk that is ready, and asks for the next one where none is computed; so
inference never pauses. The error of a period is how far it is from 10 ms. The cases take turns, so that a busy machine
disturbs all of them; the case without inference is what the machine itself does. Both run the same engine with one
thread, and the same requests.
"""

from __future__ import annotations

import argparse
import os
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Protocol

import numpy as np

from robopolicy.export.open import open_policy
from robopolicy.runtime.exchange import Chunk, Request
from robopolicy.runtime.inference_process import infer
from robopolicy.runtime.worker import ProcessWorker
from robopolicy.spec import GOAL, PolicySpec


class Asks(Protocol):
    """What the loop uses of a worker."""

    def submit(self, request: Request) -> None: ...

    def poll(self) -> Chunk | None: ...


class ThreadWorker:
    """Inference in a thread of this process; the newest request wins here, too."""

    def __init__(self, bundle: Path, engine: str | None) -> None:
        self._policy = open_policy(bundle, engine)
        self._policy.warmup()
        self._request: Request | None = None
        self._chunk: Chunk | None = None
        self._wake = threading.Event()
        self._closing = False
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def submit(self, request: Request) -> None:
        self._request = request
        self._wake.set()

    def poll(self) -> Chunk | None:
        chunk, self._chunk = self._chunk, None
        return chunk

    def close(self) -> None:
        self._closing = True
        self._wake.set()
        self._thread.join()
        self._policy.close()

    def _run(self) -> None:
        while self._wake.wait() and not self._closing:
            self._wake.clear()
            request = self._request
            if request is None:
                continue
            started = time.monotonic_ns()
            actions = infer(self._policy, request)
            self._chunk = Chunk(request.id, 0, request.observed_at, actions, started, time.monotonic_ns())


@dataclass
class Tally:
    """Errors of the periods in milliseconds, and seconds that inferences took."""

    errors: list[float] = field(default_factory=list)
    inferences: list[float] = field(default_factory=list)


@dataclass
class Row:
    """One case; milliseconds."""

    inference: str
    chunks: int
    chunk_p50: float
    error_p50: float
    error_p99: float
    error_max: float


def requests(spec: PolicySpec, count: int = 8) -> list[Request]:
    """Observations of noise."""
    rng = np.random.default_rng(0)
    steps = spec.n_obs_steps

    def values() -> dict[str, np.ndarray]:
        found: dict[str, np.ndarray] = {
            k.key: rng.integers(256, size=(steps, *k.shape), dtype=np.uint8)
            if k.role == "image"
            else rng.uniform(-0.5, 0.5, (steps, *k.shape))
            for k in spec.observations
        }
        return found | {GOAL + k.key: np.zeros(k.shape) for k in spec.goals}

    instruction = spec.tasks[0].instruction if spec.tasks else None
    return [Request(i, 0, 0, values(), seed=i, instruction=instruction) for i in range(count)]


def loop(worker: Asks | None, asked: list[Request], hz: float, seconds: float, tally: Tally) -> None:
    """Keep a period and note by how much it fails."""
    period = 1 / hz
    waiting, number = False, 0
    due = last = time.perf_counter()
    for _ in range(int(seconds * hz)):
        due += period
        time.sleep(max(0.0, due - time.perf_counter()))
        now = time.perf_counter()
        tally.errors.append(1e3 * abs(now - last - period))
        last = now
        if worker is None:
            continue
        if chunk := worker.poll():
            tally.inferences.append((chunk.finished - chunk.started) / 1e9)
            waiting = False
        if not waiting:
            worker.submit(asked[number % len(asked)])
            waiting, number = True, number + 1
        due = max(due, now - period)  # what was missed is not made up for


@contextmanager
def workers(bundle: Path, engine: str | None) -> Iterator[dict[str, Asks | None]]:
    with ExitStack() as stack:
        process = stack.enter_context(closing(ProcessWorker(bundle, engine)))
        thread = stack.enter_context(closing(ThreadWorker(bundle, engine)))
        while not process.health().ready:
            if not process.health().alive:
                raise SystemExit(process.health().error)
            time.sleep(0.01)
        yield {"none": None, "thread": thread, "process": process}


def row(name: str, tally: Tally) -> Row:
    p50, p99 = np.percentile(tally.errors, [50, 99])
    chunk = 1e3 * float(np.median(tally.inferences)) if tally.inferences else 0.0
    return Row(name, len(tally.inferences), chunk, float(p50), float(p99), max(tally.errors))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path, help="of a policy")
    parser.add_argument("--engine", help="as for robopolicy serve")
    parser.add_argument("--hz", type=float, default=100.0)
    parser.add_argument("--seconds", type=float, default=10.0, help="of each case")
    parser.add_argument("--turns", type=int, default=5, help="pieces in which the cases alternate")
    parser.add_argument("--json", help="where to write the numbers")
    arguments = parser.parse_args()

    from results import machine, print_table, save_json

    about = machine()
    with workers(arguments.bundle, arguments.engine) as cases:
        process = cases["process"]
        assert isinstance(process, ProcessWorker)
        asked = requests(process.spec)
        tallies = {name: Tally() for name in cases}
        for _ in range(arguments.turns):
            for name, worker in cases.items():
                loop(worker, asked, arguments.hz, arguments.seconds / arguments.turns, tallies[name])
                time.sleep(0.2)  # until the last chunk is computed: it must not disturb the next case
                if worker is not None:
                    worker.poll()
    rows = [row(name, tally) for name, tally in tallies.items()]
    columns = ["inference", "chunks", "chunk p50 ms", "period error p50 ms", "p99 ms", "max ms"]
    texts = [[f"{v:.2f}" if isinstance(v, float) else str(v) for v in asdict(r).values()] for r in rows]
    print_table(f"A loop at {arguments.hz:g} Hz for {arguments.seconds:g} s", columns, texts)
    ratio = rows[1].error_p99 / rows[2].error_p99
    print(f"p99 of the period error, thread / process: {ratio:.1f}")
    print(f"load of the machine: {about['load_before']:.1f} before, {os.getloadavg()[0]:.1f} after")
    save_json(arguments.json, [asdict(r) for r in rows], about | {"p99_ratio": ratio, "load_after": os.getloadavg()[0]})


if __name__ == "__main__":
    main()
