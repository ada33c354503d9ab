"""Milliseconds per chunk: a consistency policy with 1 and 3 steps against the diffusion policy that taught it.

A call is all of `Policy.act` for one observation: normalisation, encoding, the network calls, and back to physical
units. The samplers take turns, call by call, so that a busy machine slows all of them; the table has medians. The
teacher is sampled as its bundle says and as the paper does (Heun on 80 levels, Prasad et al. 2024).
"""

from __future__ import annotations

import argparse
import statistics
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from fresh_process import wait_passively
from results import machine, print_table, save_json

from robopolicy.diffusion.process import SamplerConfig
from robopolicy.errors import UserError
from robopolicy.policies.base import Policy
from robopolicy.policies.bundle import load_bundle
from robopolicy.policies.consistency import ConsistencyPolicy
from robopolicy.spec import GOAL, INSTRUCTION, PolicySpec


@dataclass(frozen=True)
class Result:
    """Median and 95th percentile of the milliseconds per chunk."""

    policy: str
    sampler: str
    steps: int
    network_calls: int
    median_ms: float
    p95_ms: float


def observation(spec: PolicySpec) -> dict[str, np.ndarray]:
    """Zeros for every key of one row; latency does not depend on the values."""
    kinds = {"image": np.uint8}
    found = {k.key: np.zeros((1, spec.n_obs_steps, *k.shape), kinds.get(k.role, np.float32)) for k in spec.observations}
    found |= {GOAL + k.key: np.zeros((1, *k.shape), np.float32) for k in spec.goals}
    return found | ({INSTRUCTION: np.array([spec.tasks[0].instruction])} if spec.tasks else {})


def milliseconds(policy: Policy, sampler: SamplerConfig, seen: dict[str, np.ndarray]) -> float:
    policy.sampler = sampler
    began = time.perf_counter()
    policy.act(seen, [torch.Generator().manual_seed(0)])
    return 1e3 * (time.perf_counter() - began)


def measure(cases: list[tuple[str, Policy, SamplerConfig]], repeats: int) -> list[Result]:
    """Time all cases in turn; the first two rounds are not counted."""
    times: list[list[float]] = [[] for _ in cases]
    seen = [observation(policy.spec) for _, policy, _ in cases]
    for _ in range(repeats + 2):
        for (_, policy, sampler), values, inputs in zip(cases, times, seen, strict=True):
            values.append(milliseconds(policy, sampler, inputs))
    results = []
    for (name, policy, sampler), values in zip(cases, times, strict=True):
        policy.sampler = sampler
        middle, high = statistics.median(values[2:]), float(np.quantile(values[2:], 0.95))
        results.append(Result(name, sampler.name, sampler.steps, policy.network_calls, middle, high))
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("teacher", type=Path, help="bundle of the diffusion policy")
    parser.add_argument("student", type=Path, help="bundle of the consistency policy")
    parser.add_argument("--repeats", type=int, default=100)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json", help="write the results to this file")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    about = machine()
    (teacher, _), (student, _) = (load_bundle(path, args.device) for path in (args.teacher, args.student))
    if not isinstance(student, ConsistencyPolicy):
        raise UserError(f"{args.student} is no consistency policy; make one with robopolicy distill.")
    cases = [("teacher, as in the paper", teacher, SamplerConfig("heun", 80)), ("teacher", teacher, teacher.sampler)]
    cases += [("student", student, SamplerConfig("consistency", steps)) for steps in (3, 1)]
    results = measure(cases, args.repeats)
    paper, usual = results[0].median_ms, results[1].median_ms
    rows = [
        [f"{r.policy}: {r.sampler} {r.steps}", str(r.network_calls), f"{r.median_ms:.1f}", f"{r.p95_ms:.1f}"]
        + [f"{usual / r.median_ms:.1f}", f"{paper / r.median_ms:.1f}"]
        for r in results
    ]
    columns = ["policy and sampler", "network calls", "ms", "ms (p95)", "faster than teacher", "than paper's teacher"]
    where = f"{about['processor']}, {args.threads} thread" if args.device == "cpu" else args.device
    print_table(f"one chunk, medians of {args.repeats}, {where}, load {about['load_before']:.1f}", columns, rows)
    save_json(args.json, [asdict(r) for r in results], about)


if __name__ == "__main__":
    wait_passively()
    main()
