"""``robopolicy bench``"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from robopolicy.cli.compose import compose_config
from robopolicy.errors import UserError

if TYPE_CHECKING:
    from robopolicy.benchmarking.ceilings import Ceilings
    from robopolicy.benchmarking.measure import BenchResult, EngineResult

HELP = """\
Measure how long a policy takes for a chunk of actions on this machine, engine by engine.

  robopolicy bench bundle=runs/pusht_state/diffusion_unet-seed42/bundles/last
  robopolicy bench bundle=… engines=[openvino-fp32,torch,torch-compile]
  robopolicy bench bundle=… threads=2 runs=1000 out=results/bench

Every engine runs in a process of its own; they take turns call by call, so that a busy machine slows all of them. A
call is all that a robot waits for: checks, encoding, all network calls, actions in physical units. First come the
machine's own limits, measured here and now: reading memory and multiplying matrices. From them follows the shortest
time that this policy's chunk can take here (bound); of bound is how much of it an engine reaches. An engine that
cannot run here is listed with the reason.

The folder `out` gets bench.json and bench.png. docs/bench.md explains every column.
"""


def add_parser(verbs: Any) -> None:
    parser = verbs.add_parser(
        "bench",
        help="latency, memory and roofline of a policy's engines here",
        description=HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="see above and configs/bench.yaml")
    parser.set_defaults(run=run)


@dataclass(frozen=True)
class Settings:
    """The entries of ``configs/bench.yaml``, explained there."""

    bundle: str
    runs: int
    warmup: int
    threads: int
    batch: int
    device: str
    allow_native_code: bool
    engines: tuple[str, ...] | None = None
    out: str | None = None

    def __post_init__(self) -> None:
        for name, least in {"runs": 1, "warmup": 0, "threads": 1, "batch": 1}.items():
            if getattr(self, name) < least:
                raise UserError(f"{name}={getattr(self, name)} must be at least {least}.")
        if self.engines == ():
            raise UserError("engines=[] measures nothing; leave it out to measure all of the bundle's engines.")


def run(args: argparse.Namespace) -> int:
    from robopolicy.configuration import dataclass_from

    settings = dataclass_from(Settings, compose_config("bench", args.overrides), "")
    from robopolicy.benchmarking.measure import benchmark
    from robopolicy.benchmarking.picture import write_picture

    bundle = Path(settings.bundle).resolve()
    result = benchmark(
        bundle,
        settings.engines,
        runs=settings.runs,
        warmup=settings.warmup,
        threads=settings.threads,
        rows=settings.batch,
        device=settings.device,
        allow_native_code=settings.allow_native_code,
    )
    out = Path(settings.out) if settings.out else bundle / "bench"
    result.save(out / "bench.json")
    write_picture(result, out / "bench.png")
    print_result(result)
    print(f"results: {out / 'bench.json'}, {out / 'bench.png'}")
    return 0


def print_result(result: BenchResult) -> None:
    machine, threads = result.machine, f"{result.threads} thread{'' if result.threads == 1 else 's'}"
    print(f"{machine.processor}, {' '.join(machine.isa)}; {threads}, {machine.cores} cores, load {machine.load}")
    for ceilings in result.ceilings.values():
        _print_ceilings(ceilings)
    print(f"times in ms over {result.engines[0].latency.runs} calls, batch {result.rows}")
    print()
    names = [r.facts.name for r in result.engines]
    width = max(map(len, (*names, *result.refused, "engine")))
    _print_latency(result, width)
    print()
    _print_costs(result, width)
    for name, reason in result.refused.items():
        print(f"{name:<{width}}  not measured: {reason}")


def _print_ceilings(ceilings: Ceilings) -> None:
    reads = ", ".join(
        f"{1e-9 * rate:.0f} ({size / 2**20:.3g} MiB)" for size, rate in sorted(ceilings.bandwidth.items())
    )
    products = ", ".join(f"{1e-9 * rate:.3g} ({precision})" for precision, rate in ceilings.flops.items())
    vector = f"times a vector {1e-9 * ceilings.gemv_flops:.3g}"
    print(f"{ceilings.device} reads GB/s: {reads}")
    print(f"{ceilings.device} multiplies matrices GFLOP/s: {products}; {vector}")


def _print_latency(result: BenchResult, width: int) -> None:
    columns = ("min", "p50", "p90", "p99", "max", "encode", "denoise", "other", "bound")
    print(f"{'engine':<{width}}  " + " ".join(f"{name:>8}" for name in columns) + " of bound  at best  binds")
    for r in result.engines:
        latency, stages = r.latency, r.stages
        other = stages["preprocess"].p50 + stages["postprocess"].p50
        times = (latency.min, latency.p50, latency.p90, latency.p99, latency.max)
        parts = (stages["encode"].p50, stages["denoise"].p50, other)
        numbers = " ".join(f"{1e3 * seconds:8.2f}" for seconds in (*times, *parts))
        print(f"{r.facts.name:<{width}}  {numbers} {_bound(r)}")


def _bound(r: EngineResult) -> str:
    if r.bound is None:
        return f"{'-':>8} {'-':>8} {'-':>8}  torch cannot measure this device"
    shares = f"{r.fraction:8.0%} {r.best_fraction:8.0%}"
    return f"{1e3 * r.bound.seconds:8.2f} {shares}  encode {r.bound.encode.binds}, denoise {r.bound.denoise.binds}"


def _print_costs(result: BenchResult, width: int) -> None:
    columns = ("open s", "first s", "memory MB", "files MB", "GFLOP", "calls")
    print(f"{'engine':<{width}}  " + " ".join(f"{name:>9}" for name in columns) + "  precision  sampler")
    for r in result.engines:
        sizes = f"{r.memory / 1e6:9.0f} {r.facts.file_bytes / 1e6:9.1f}"
        work = f"{r.work.flops / 1e9:9.3g} {len(r.work.denoise):9}"
        sampler = f"{r.facts.sampler.name} {r.facts.sampler.steps}"
        times = f"{r.open:9.2f} {r.first_chunk:9.2f}"
        print(f"{r.facts.name:<{width}}  {times} {sizes} {work}  {r.facts.precision:<9}  {sampler}")
