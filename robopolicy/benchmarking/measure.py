"""A benchmark of all engines of a bundle: see `benchmark`."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from robopolicy.benchmarking.ceilings import Ceilings, measure_ceilings
from robopolicy.benchmarking.engine_process import Call, EngineProcess, EngineRefusedError, Start
from robopolicy.benchmarking.latency import Distribution, take_turns
from robopolicy.benchmarking.machine import Machine, this_machine
from robopolicy.benchmarking.roofline import ChunkBound, chunk_bound, working_sets
from robopolicy.benchmarking.serve_engine import STAGES
from robopolicy.benchmarking.work import ChunkWork, chunk_work
from robopolicy.diffusion.process import SamplerConfig
from robopolicy.errors import UserError, did_you_mean
from robopolicy.export.open import TORCH
from robopolicy.inference.engine import FOLDER, engine_names, read_engine
from robopolicy.manifest import bundle_fingerprint
from robopolicy.policies.base import Policy
from robopolicy.policies.bundle import load_bundle
from robopolicy.policies.cost import blank_observations


@dataclass(frozen=True)
class EngineFacts:
    """What an engine is, before it runs.

    Attributes:
        name: folder under ``engines/``, or one of `robopolicy.export.open.TORCH`.
        precision: of its weights, a key of `robopolicy.benchmarking.roofline.BYTES`.
        device: ``cpu``, ``cuda``, or another by the backend's own name.
        file_bytes: of its files, or of the bundle's weights.
        sampler: how it samples.
        candidates: chunks that it samples for each that it returns.
    """

    name: str
    precision: str
    device: str
    file_bytes: int
    sampler: SamplerConfig
    candidates: int = 1


@dataclass(frozen=True)
class EngineResult:
    """What was measured of one engine.

    Attributes:
        work: what its chunk costs.
        latency: of all of `ExportedPolicy.act`: it ends with the actions in NumPy, so that all work is done.
        stages: of its parts.
        open: seconds to import the package, load the files and check them.
        first_chunk: seconds from the start of a fresh process to its first chunk.
        memory: bytes that the process grew by until its first chunk, the package included.
        bound: the shortest time of a chunk on this machine; None where torch cannot measure the engine's device.
    """

    facts: EngineFacts
    work: ChunkWork
    latency: Distribution
    stages: dict[str, Distribution]
    open: float
    first_chunk: float
    memory: int
    bound: ChunkBound | None

    @property
    def fraction(self) -> float | None:
        """How much of the median the machine needs at least; 1: no engine can be faster here."""
        return self.bound.seconds / self.latency.p50 if self.bound else None

    @property
    def best_fraction(self) -> float | None:
        """The same of the fastest call, which a busy machine disturbs least."""
        return self.bound.seconds / self.latency.min if self.bound else None


@dataclass(frozen=True)
class BenchResult:
    """A benchmark's results.

    Attributes:
        refused: engines that cannot run on this machine, and why.
    """

    bundle: str
    fingerprint: str
    machine: Machine
    threads: int
    rows: int
    ceilings: dict[str, Ceilings]
    engines: tuple[EngineResult, ...]
    refused: dict[str, str]

    def to_dict(self) -> dict[str, Any]:
        """Plain values, with what is computed from them."""
        plain = asdict(self)
        for entry, result in zip(plain["engines"], self.engines, strict=True):
            if result.bound:
                bound = result.bound
                entry |= {"bound_seconds": bound.seconds, "binds": bound.binds, "fraction": result.fraction}
                entry["best_fraction"] = result.best_fraction
            entry["work"] |= {"flops": result.work.flops, "network_calls": len(result.work.denoise)}
        return plain

    def save(self, path: Path) -> None:
        """Write JSON."""
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(self.to_dict(), indent=2) + "\n")


def benchmark(
    bundle: Path,
    engines: Sequence[str] | None = None,
    *,
    runs: int = 200,
    warmup: int = 10,
    threads: int = 1,
    rows: int = 1,
    device: str = "cpu",
    allow_native_code: bool = False,
    progress: bool = True,
) -> BenchResult:
    """Measure a policy's engines on this machine: each in a process of its own, taking turns call by call.

    Args:
        bundle: of a policy.
        engines: names; None: all of the bundle, and torch.
        runs: timed calls of each.
        warmup: calls of each before them.
        threads: CPU threads of each engine, and of the ceilings.
        rows: robots that share a call.
        device: of torch, ONNX Runtime and OpenVINO; the others have one of their own.
        allow_native_code: run engines that are compiled code, see `robopolicy.export.open.open_policy`.

    Raises:
        UserError: no such engine, not a policy's bundle, or none of the engines runs here.
    """
    names = chosen_engines(bundle, engines)
    machine = this_machine()
    policy, manifest = load_bundle(bundle)
    refused: dict[str, str] = {}
    facts = _readable(bundle, names, policy.sampler, device, refused)
    works = {fact.name: engine_work(policy, fact, rows) for fact in facts}
    before = device_ceilings(facts, works, threads)
    with ExitStack() as until_here:
        processes: dict[str, EngineProcess] = {}
        for fact in tqdm(facts, desc="opening", unit="engine", disable=not progress):
            try:
                process = EngineProcess(str(bundle), fact.name, threads, rows, device, allow_native_code)
            except EngineRefusedError as error:
                refused[fact.name] = str(error)
            else:
                processes[fact.name] = until_here.enter_context(process)
        if not processes:
            reasons = "\n".join(f"  {name}: {reason}" for name, reason in refused.items())
            raise UserError(f"No engine of {bundle} runs on this machine:\n{reasons}")
        calls = take_turns(processes, runs, warmup, progress)
    after = device_ceilings(facts, works, threads)
    ceilings = {device: found.best(after[device]) for device, found in before.items()}
    measured = [fact for fact in facts if fact.name in processes]
    results = tuple(
        engine_result(f, works[f.name], processes[f.name].start, calls[f.name], ceilings.get(f.device))
        for f in measured
    )
    return BenchResult(str(bundle), bundle_fingerprint(manifest), machine, threads, rows, ceilings, results, refused)


def engine_result(
    facts: EngineFacts, work: ChunkWork, start: Start, calls: Sequence[Call], ceilings: Ceilings | None
) -> EngineResult:
    """What the calls of one engine say together."""
    stages = {stage: Distribution.of([getattr(call, stage) for call in calls]) for stage in STAGES}
    latency = Distribution.of([call.seconds for call in calls])
    memory = start.memory_after - start.memory_before
    bound = chunk_bound(work, ceilings, facts.precision) if ceilings else None
    return EngineResult(facts, work, latency, stages, start.open, start.first_chunk, memory, bound)


def chosen_engines(bundle: Path, engines: Sequence[str] | None) -> list[str]:
    """Names of the engines to measure, each once.

    Raises:
        UserError: the bundle has no engine of that name.
    """
    there = engine_names(bundle)
    if engines is None:
        return [*there, TORCH[0]]
    for name in engines:
        if name not in (*there, *TORCH):
            hint = did_you_mean(name, (*there, *TORCH))
            raise UserError(f"{bundle} has no engine '{name}'.{hint} robopolicy export bundle={bundle} builds one.")
    return list(dict.fromkeys(engines))


def _readable(
    bundle: Path, names: Sequence[str], sampler: SamplerConfig, device: str, refused: dict[str, str]
) -> list[EngineFacts]:
    """What the bundle says of its engines; the reason for those that were damaged or built from other weights."""
    facts = []
    for name in names:
        try:
            facts.append(engine_facts(bundle, name, sampler, device))
        except UserError as error:
            refused[name] = str(error)
    return facts


def engine_facts(bundle: Path, name: str, sampler: SamplerConfig, device: str) -> EngineFacts:
    """What the bundle says of an engine.

    Args:
        sampler: the policy's own.
        device: of the engines that can be run on several.

    Raises:
        UserError: see `read_engine`.
    """
    if name in TORCH:
        return EngineFacts(name, "fp32", device, (bundle / "model.safetensors").stat().st_size, sampler)
    manifest, _ = read_engine(bundle, name)
    size = sum(file.stat().st_size for file in (bundle / FOLDER / name).rglob("*") if file.is_file())
    fixed = {"tensorrt": "cuda", "tensorrt_rtx": "cuda", "aot_inductor": "cpu"}
    sampled = SamplerConfig(**manifest.sampler)
    count = manifest.candidates.count if manifest.candidates else 1
    return EngineFacts(name, manifest.precision, fixed.get(manifest.backend, device), size, sampled, count)


def engine_work(policy: Policy, facts: EngineFacts, rows: int) -> ChunkWork:
    """What a call of an engine costs; a critic that chooses among candidates is not counted."""
    policy.sampler = facts.sampler
    once = chunk_work(policy, blank_observations(policy.spec, rows))
    if facts.candidates == 1:
        return once
    return ChunkWork(once.encode, chunk_work(policy, blank_observations(policy.spec, rows * facts.candidates)).denoise)


def device_ceilings(facts: Sequence[EngineFacts], works: Mapping[str, ChunkWork], threads: int) -> dict[str, Ceilings]:
    """Limits of every device that engines run on and torch sees, for the sizes that the engines read."""
    found = {}
    for device in sorted({fact.device for fact in facts}):
        if device == "cpu" or (device == "cuda" and torch.cuda.is_available()):
            here = [fact for fact in facts if fact.device == device]
            sets = [size for fact in here for size in working_sets(works[fact.name], fact.precision)]
            found[device] = measure_ceilings(threads, sets, sorted({fact.precision for fact in here}), device)
    return found
