"""Milliseconds per chunk on a CPU, robopolicy's engines against LeRobot's DiffusionPolicy, in one run.

Both sides have the same network: U-Net, and for images ResNet-18 (numbers of parameters are checked), random weights,
batch 1. A call is all that a robot waits for: LeRobot's is `predict_action` of its control loop at a step where a chunk
is computed, robopolicy's is `ExportedPolicy.act`. The cases take turns, call by call, so that a busy machine slows all;
the table has medians, and the fastest time that this machine allows for the chunk (see docs/bench.md).

LeRobot runs as it is by default (DDPM, 100 steps), with 10 steps of DDIM, and with its `compile_model`. Robopolicy runs
DDIM with 10 steps, and a consistency policy with one.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from fresh_process import run_fresh, wait_passively
from results import machine, print_table, save_json
from train_step import CROP, Case, lerobot_batch, normalizer_of, our_batch, our_spec, parameter_count

from robopolicy.benchmarking.ceilings import measure_ceilings
from robopolicy.benchmarking.latency import Distribution, take_turns
from robopolicy.benchmarking.machine import instruction_sets
from robopolicy.benchmarking.roofline import ChunkBound, chunk_bound, working_sets
from robopolicy.benchmarking.work import ChunkWork, chunk_work
from robopolicy.errors import UserError, require_extra
from robopolicy.export.build import ExportConfig, build_engine
from robopolicy.export.observations import find_observations
from robopolicy.export.open import TORCH, open_policy
from robopolicy.inference.engine import BackendName, Precision
from robopolicy.policies.base import Policy
from robopolicy.policies.bundle import load_bundle, save_bundle
from robopolicy.policies.consistency import STOP
from robopolicy.policies.cost import blank_observations
from robopolicy.policies.denoising import DenoisingPolicy
from robopolicy.policies.registry import build_policy

SIZES = {"small": (64, 128, 256), "middle": (128, 256, 512), "large": (256, 512, 1024)}
STEPS = {"ddim-10": {"name": "ddim", "steps": 10}, "consistency-1": {"name": "consistency", "steps": 1}}
LEROBOT: dict[str, dict[str, Any]] = {
    "LeRobot DDPM 100 (default)": {},
    "LeRobot DDIM 10": {"noise_scheduler_type": "DDIM", "num_inference_steps": 10},
}
DEFAULT, TEN = LEROBOT
COLUMNS = ("case", "parameters", "ms", "best", "p99", "x default", "x DDIM 10", "bound", "of bound", "streaming")
"""Times in ms; x: times faster than LeRobot's; streaming: the share of the median that reading the weights takes."""
PARITY_ROWS = 4
STATISTICS_ROWS = 64
"""Rows of the batch whose statistics normalise; their number does not matter for the latency."""


@dataclass(frozen=True)
class Result:
    """One case.

    Attributes:
        parameters: of the whole policy.
        latency: seconds of a call.
        bound: what this machine needs at least for the chunk; None for LeRobot.
        faster: times faster than LeRobot's default, and with 10 steps.
    """

    observations: str
    name: str
    parameters: int
    latency: Distribution
    bound: ChunkBound | None
    faster: tuple[float, float]


@dataclass(frozen=True)
class Side:
    """One contestant: what it computes, its size and what its chunk costs."""

    call: Callable[[], object]
    parameters: int
    bound: ChunkBound | None = None


def main() -> None:
    args = parse_arguments()
    require_extra("lerobot", "lerobot")
    wait_passively()
    about = machine() | {"threads": args.threads, "isa": instruction_sets(), "size": args.size}
    if not bf16_here():
        print("bf16 is not measured: this processor has no instructions for it.")
    results = []
    for observations in args.observations:
        results += run_fresh(measure, observations, SIZES[args.size], args.threads, args.rounds, args.compile)
    for observations in args.observations:
        title = (
            f"{observations}: one chunk, medians of {args.rounds} calls, {about['processor']}, {args.threads} thread(s)"
        )
        print_table(title, COLUMNS, [row(r) for r in results if r.observations == observations])
    save_json(args.json, [asdict(r) for r in results], about)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--observations", nargs="+", choices=("state", "image"), default=["state", "image"])
    parser.add_argument("--size", choices=SIZES, default="middle", help="of the U-Net (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=15, help="timed calls of each case (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads of both sides (default: %(default)s)")
    parser.add_argument("--compile", action="store_true", help="also torch.compile on both sides (minutes more)")
    parser.add_argument("--json", metavar="FILE", help="also write the results to this file")
    return parser.parse_args()


def measure(observations: str, dims: tuple[int, ...], threads: int, rounds: int, compiled: bool) -> list[Result]:
    """Time all cases of one kind of observations in turn.

    Raises:
        UserError: the two networks differ in size by more than 2 %, so that the comparison would be worth nothing.
    """
    torch.set_num_threads(threads)
    case = Case(observations, dims, STATISTICS_ROWS, "fp32")
    with tempfile.TemporaryDirectory() as folder:
        sides = lerobot_sides(case, compiled) | our_sides(case, Path(folder), threads, compiled)
        check_sizes({name: side.parameters for name, side in sides.items()})
        seconds = take_turns({name: timed(side.call) for name, side in sides.items()}, rounds, warmup=2)
    default, ten = (statistics.median(seconds[name]) for name in (DEFAULT, TEN))
    return [
        Result(
            observations,
            name,
            side.parameters,
            Distribution.of(seconds[name]),
            side.bound,
            (default / statistics.median(seconds[name]), ten / statistics.median(seconds[name])),
        )
        for name, side in sides.items()
    ]


def timed(call: Callable[[], object]) -> Callable[[], float]:
    def seconds() -> float:
        began = time.perf_counter()
        call()
        return time.perf_counter() - began

    return seconds


def check_sizes(parameters: Mapping[str, int]) -> None:
    wanted = parameters[TEN]
    for name, found in parameters.items():
        if abs(found - wanted) > 0.02 * wanted:
            raise UserError(f"{name} has {found:,} parameters against LeRobot's {wanted:,}; wanted equal sizes.")


def lerobot_sides(case: Case, compiled: bool) -> dict[str, Side]:
    from peers.lerobot_inference import lerobot_chunk
    from peers.lerobot_policy import build_lerobot_policy

    batch = lerobot_batch(case)
    crop = {"crop_shape": (CROP, CROP)} if case.observations == "image" else {}
    seen = {key: value[0, -1].numpy() for key, value in batch.items() if key.startswith("observation.")}
    if "observation.image" in seen:
        seen["observation.image"] = np.ascontiguousarray(our_batch(case)["observation.image.top"][0, -1].numpy())
    configs = dict(LEROBOT)
    if compiled:
        configs["LeRobot DDIM 10, compiled"] = LEROBOT[TEN] | {"compile_model": True}
    sides = {}
    for name, config in configs.items():
        torch.manual_seed(0)
        policy = build_lerobot_policy(batch, down_dims=case.down_dims, **crop, **config)
        chunk = lerobot_chunk(policy, batch)
        sides[name] = Side(partial(chunk, seen), parameter_count(policy))
    return sides


def our_sides(case: Case, folder: Path, threads: int, compiled: bool) -> dict[str, Side]:
    """All engines, for DDIM with 10 steps and for one step of a consistency policy."""
    spec, batch = our_spec(case), our_batch(case)
    seen = {k.key: batch[k.key][:1].numpy() for k in spec.observations}
    works: dict[str, tuple[ChunkWork, int]] = {}
    for name, sampler in STEPS.items():
        torch.manual_seed(0)
        policy = our_policy(case, sampler)
        save_bundle(policy, folder / name)
        works[name] = chunk_work(policy, blank_observations(spec)), comparable_parameters(policy)
    precisions = ["fp32", "bf16"] if bf16_here() else ["fp32"]
    sets = [size for work, _ in works.values() for p in precisions for size in working_sets(work, p)]
    ceilings = measure_ceilings(threads, sets, precisions)
    sides = {}
    for name, (work, parameters) in works.items():
        for engine, precision in export(folder / name, compiled).items():
            bound = chunk_bound(work, ceilings, precision)
            opened = open_policy(folder / name, engine, threads=threads)
            noise = opened.draw_noise(1, np.random.default_rng(0))
            sides[f"{name} {engine}"] = Side(partial(opened.act, seen, noise), parameters, bound)
    return sides


def export(bundle: Path, compiled: bool) -> dict[str, str]:
    """Build the engines that this machine runs; returns the precision of each, torch included, by name."""
    policy, about = load_bundle(bundle)
    assert isinstance(policy, DenoisingPolicy)
    observations = find_observations(policy, about, PARITY_ROWS)
    engines: list[tuple[BackendName, Precision]] = [("onnxruntime", "fp32"), ("openvino", "fp32")]
    built: dict[str, str] = {}
    for backend, precision in [*engines, ("openvino", "bf16")] if bf16_here() else engines:
        config = ExportConfig(
            backend=backend,
            precision=precision,
            exporter="torchscript",  # several times faster than dynamo; the engines are equally fast
            observations=PARITY_ROWS,
        )
        build_engine(policy, about, bundle, config, observations, "python benchmarks/inference.py")
        built[config.engine] = precision
    return built | dict.fromkeys(TORCH if compiled else TORCH[:1], "fp32")


def bf16_here() -> bool:
    return bool({"avx512_bf16", "amx_bf16"} & set(instruction_sets()))


def our_policy(case: Case, sampler: dict[str, Any]) -> Policy:
    """A policy like LeRobot's of this case, with random weights."""
    spec = our_spec(case)
    config = {
        "down_dims": list(case.down_dims),
        "step_embed_dim": 128,
        "sampler": sampler,
        "augmentation": {"crop": CROP / 96},
    }
    name = "consistency" if sampler["name"] == "consistency" else "diffusion_unet"
    return build_policy(name, config, spec, normalizer_of(spec, our_batch(case))).eval()


def comparable_parameters(policy: Policy) -> int:
    """All but the projection of a consistency policy's stop level: a constant in its engines, and LeRobot has none."""
    return sum(p.numel() for name, p in policy.named_parameters() if name != STOP)


def row(r: Result) -> tuple[str, ...]:
    milliseconds = (f"{1e3 * seconds:.2f}" for seconds in (r.latency.p50, r.latency.min, r.latency.p99))
    bound = ("", "", "")
    if r.bound:
        streaming = r.bound.encode.memory + r.bound.denoise.memory
        bound = (
            f"{1e3 * r.bound.seconds:.2f}",
            f"{r.bound.seconds / r.latency.p50:.0%}",
            f"{streaming / r.latency.p50:.0%}",
        )
    ratios = (f"{ratio:.1f}" for ratio in r.faster)
    return (r.name, f"{r.parameters:,}", *milliseconds, *ratios, *bound)


if __name__ == "__main__":
    main()
