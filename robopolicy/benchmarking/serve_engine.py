"""One engine in a process of its own: opens it, says what that cost, then computes a chunk for each line on stdin.

Run by `robopolicy.benchmarking.engine_process`. Imports neither torch nor an inference package by itself, so that time
and memory are those of a program on a robot that only runs this engine.
"""

from __future__ import annotations

import json
import os
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from robopolicy.errors import UserError
from robopolicy.spec import GOAL, INSTRUCTION, PolicySpec

STAGES = ("preprocess", "encode", "denoise", "postprocess")


@dataclass(frozen=True)
class Job:
    """What to run.

    Attributes:
        bundle: folder.
        engine: name, as for `robopolicy.export.open.open_policy`.
        threads: CPU threads.
        rows: of each call.
        device: see `open_policy`, as the next.
        allow_native_code: load compiled code.
        started: ``time.monotonic()`` when the process was started.
    """

    bundle: str
    engine: str
    threads: int
    rows: int
    device: str
    allow_native_code: bool
    started: float


def some_observations(spec: PolicySpec, rows: int, seed: int = 0) -> dict[str, np.ndarray]:
    """Observations, goals and instructions of robots that see noise; latency does not depend on the values."""
    rng = np.random.default_rng(seed)

    def value(shape: tuple[int, ...], image: bool) -> np.ndarray:
        return rng.integers(0, 256, shape, np.uint8) if image else np.zeros(shape, np.float32)

    seen = {k.key: value((rows, spec.n_obs_steps, *k.shape), k.role == "image") for k in spec.observations}
    seen |= {GOAL + k.key: value((rows, *k.shape), k.role == "image") for k in spec.goals}
    return seen | ({INSTRUCTION: np.array([spec.tasks[0].instruction] * rows)} if spec.tasks else {})


def main() -> None:
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w", buffering=1)
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # libraries print; the pipe is for answers only
    job = Job(**json.loads(sys.argv[1]))

    def answer(content: dict[str, Any]) -> None:
        answers.write(json.dumps(content) + "\n")

    before = psutil.Process().memory_info().rss
    began = time.perf_counter()
    try:
        from robopolicy.export.open import open_policy

        policy = open_policy(
            Path(job.bundle),
            job.engine,
            threads=job.threads,
            device=job.device,
            allow_native_code=job.allow_native_code,
        )
        opened = time.perf_counter() - began
        seen = some_observations(policy.spec, job.rows)
        noise = policy.draw_noise(job.rows, np.random.default_rng(0))
        policy.act(seen, noise)
    except UserError as error:
        answer({"refused": str(error)})
        return
    first_chunk = time.monotonic() - job.started
    after = psutil.Process().memory_info().rss
    answer({"open": opened, "first_chunk": first_chunk, "memory_before": before, "memory_after": after})
    for _ in sys.stdin:
        start = time.perf_counter()
        policy.act(seen, noise)
        seconds = time.perf_counter() - start
        answer({"seconds": seconds} | {stage: asdict(policy.timings)[stage] for stage in STAGES})
    policy.close()


if __name__ == "__main__":
    main()
