"""Policies side by side on the same episodes: success, network calls, latency and parameters, against the first one.

Each policy is given as ``NAME=BUNDLE``, with other samplers than its own as ``NAME=BUNDLE@SOLVER:STEPS``. Success comes
from the same seeds for all, with 95 % intervals, and the difference to the first policy from pairs of episodes. The
latency of a chunk (one observation, from NumPy to NumPy) is the median of rounds that alternate between the policies in
this process, so that a busy machine slows all of them.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from fresh_process import wait_passively
from results import machine, print_table, save_json

from robopolicy.errors import UserError
from robopolicy.evaluation.environments import Environment, environment
from robopolicy.evaluation.evaluate import evaluate
from robopolicy.evaluation.results import EvaluationResult, task_of
from robopolicy.evaluation.statistics import paired_difference
from robopolicy.manifest import bundle_fingerprint
from robopolicy.policies.base import Policy
from robopolicy.policies.bundle import load_bundle

WARM_UP = 3


@dataclass
class Entry:
    """One row of the table; latencies in milliseconds."""

    name: str
    policy: Policy
    result: EvaluationResult
    latencies: list[float]

    @property
    def latency(self) -> float:
        return statistics.median(self.latencies)


def main() -> None:
    args = parse_arguments()
    torch.set_num_threads(args.threads)
    wait_passively()
    entries = []
    for text in args.policies:
        name, policy, world, info = load(text)
        result = judge(policy, world, info, args.out / name if args.out else None, args)
        print(f"{name}: score {result.metric('mean_score').value:.3f}", file=sys.stderr, flush=True)
        entries.append(Entry(name, policy, result, []))
    time_alternating(entries, args.rounds)
    about = machine() | {"threads": args.threads, "episodes": args.episodes, "first_seed": args.first_seed}
    print(f"{about['processor']}, {args.threads} thread(s), torch {about['torch']}, n={args.episodes} paired episodes")
    columns = (
        "policy",
        "score",
        "95 %",
        "minus first",
        "success",
        "95 %",
        "calls",
        "ms/chunk",
        "times first",
        "M par.",
    )
    print_table("Policy families", columns, [row(entry, entries[0]) for entry in entries])
    save_json(args.json, [record(entry) for entry in entries], about)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("policies", nargs="+", metavar="NAME=BUNDLE[@SOLVER:STEPS]", help="the first is the reference")
    parser.add_argument("--episodes", type=int, default=200, help="episodes of each policy (default: %(default)s)")
    parser.add_argument("--first-seed", type=int, default=100_000, help="seed of the first (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=30, help="timed chunks of each policy (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads of the policies (default: %(default)s)")
    parser.add_argument("--out", type=Path, help="keep protocols, episodes and reports in this folder")
    parser.add_argument("--json", type=Path, help="also write the numbers to this file")
    return parser.parse_args()


def judge(
    policy: Policy, world: Environment, info: dict[str, Any], out: Path | None, args: argparse.Namespace
) -> EvaluationResult:
    """Play the episodes, unless ``out`` holds those of the same policy, sampler, environment and seeds."""
    seeds = range(args.first_seed, args.first_seed + args.episodes)
    if out is not None and (out / "protocol.json").exists():
        result = EvaluationResult.load(out)
        if result.protocol.policy == info and result.protocol.task == task_of(world, seeds):
            return result
    how = {"episodes": args.episodes, "first_seed": args.first_seed, "batch_size": 50, "videos": 0}
    return evaluate(policy, world, out=out, policy_info=info, **how)


def load(text: str) -> tuple[str, Policy, Environment, dict[str, Any]]:
    """Name, policy and environment of one argument, and what identifies the policy.

    Raises:
        UserError: it does not read NAME=BUNDLE[@SOLVER:STEPS].
    """
    name, equals, rest = text.partition("=")
    path, at, sampler = rest.partition("@")
    solver, _, steps = sampler.partition(":")
    if not equals or not path or (at and not steps.isdigit()):
        raise UserError(f"'{text}' should read NAME=BUNDLE or NAME=BUNDLE@SOLVER:STEPS.")
    policy, manifest = load_bundle(Path(path))
    if at:
        policy.sampler = replace(policy.sampler, name=solver, steps=int(steps))
    policy.check_sampler(policy.sampler)
    task = manifest["task"]
    info = {"fingerprint": bundle_fingerprint(manifest), "sampler": asdict(policy.sampler)}
    return name, policy, environment(task["environment"], task.get("environment_options")), info


def time_alternating(entries: list[Entry], rounds: int) -> None:
    for i in range(WARM_UP + rounds):
        for entry in entries:
            spec = entry.policy.spec
            observations = {
                k.key: np.zeros((1, spec.n_obs_steps, *k.shape), np.uint8 if k.role == "image" else np.float32)
                for k in spec.observations
            }
            began = time.perf_counter()
            entry.policy.act(observations, [torch.Generator().manual_seed(i)])
            if i >= WARM_UP:
                entry.latencies.append(1000 * (time.perf_counter() - began))


def row(entry: Entry, first: Entry) -> tuple[str, ...]:
    score, success = entry.result.metric("mean_score"), entry.result.metric("success_rate")
    minus = paired_difference(scores(entry), scores(first), successes(entry), successes(first)).score
    parameters = sum(p.numel() for p in entry.policy.parameters()) / 1e6
    return (
        entry.name,
        f"{score.value:.3f}",
        f"[{score.low:.3f}, {score.high:.3f}]",
        f"{minus.value:+.3f} [{minus.low:+.3f}, {minus.high:+.3f}]",
        f"{success.value:.3f}",
        f"[{success.low:.3f}, {success.high:.3f}]",
        str(entry.policy.network_calls),
        f"{entry.latency:.1f}",
        f"{first.latency / entry.latency:.1f}",
        f"{parameters:.2f}",
    )


def scores(entry: Entry) -> list[float]:
    return [episode.score for episode in entry.result.episodes]


def successes(entry: Entry) -> list[bool]:
    return [episode.success for episode in entry.result.episodes]


def record(entry: Entry) -> dict[str, object]:
    return {
        "name": entry.name,
        "score": entry.result.metric("mean_score").value,
        "success": entry.result.metric("success_rate").value,
        "network_calls": entry.policy.network_calls,
        "latency_ms": entry.latencies,
        "scores": scores(entry),
    }


if __name__ == "__main__":
    main()
