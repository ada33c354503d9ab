"""Building an engine: capture, lower the precision, compile, compare with the policy, and only then write it."""

from __future__ import annotations

import copy
import logging
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal

import numpy as np
import psutil
import torch
from torch import Tensor

import robopolicy
from robopolicy.data.durable import sync_path
from robopolicy.errors import UserError, require_extra
from robopolicy.export.borders import borders, torch_session
from robopolicy.export.critic import critic_graphs, own_candidates
from robopolicy.export.engine_policy import noise_of
from robopolicy.export.guidance import GuidanceExport, export_guidance
from robopolicy.export.loop import export_loop
from robopolicy.export.observations import Observations
from robopolicy.export.onnx_graphs import OPSET, Exporter, export_onnx, halve_weights
from robopolicy.export.parity import TOLERANCE, action_range, check_parity, compare
from robopolicy.export.quantize import QuantizeConfig, quantize
from robopolicy.inference.backends.open import OPENVINO_HINT, PACKAGES, cache_root, open_session
from robopolicy.inference.backends.openvino import check_device
from robopolicy.inference.cpu import cpu_instructions
from robopolicy.inference.device_memory import present_gpu
from robopolicy.inference.engine import (
    FOLDER,
    GOLDEN,
    STEPS,
    BackendName,
    Candidates,
    EngineManifest,
    GraphFile,
    Parity,
    Precision,
)
from robopolicy.inference.golden import save_golden
from robopolicy.inference.gpus import covers
from robopolicy.inference.policy import ExportedPolicy, exported_policy
from robopolicy.inference.session import Session
from robopolicy.manifest import bundle_fingerprint, file_sha256
from robopolicy.policies.base import ExportGraph
from robopolicy.policies.denoising import DenoisingPolicy
from robopolicy.policies.mode import Mode
from robopolicy.steering.base import Steering
from robopolicy.steering.dynaguide import DynaGuide, DynaGuideConfig
from robopolicy.steering.policy import SteeredPolicy
from robopolicy.steering.vgps import Vgps, VgpsConfig

log = logging.getLogger(__name__)

PRECISIONS: dict[str, tuple[Precision, ...]] = {
    "onnxruntime": ("fp32", "fp16", "int8"),
    "openvino": ("fp32", "fp16", "bf16", "int8"),
    "tensorrt_rtx": ("fp32", "fp16", "bf16", "int8"),
    "tensorrt": ("fp32", "fp16", "bf16", "int8"),
    "aot_inductor": ("fp32", "fp16", "bf16"),
}
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16, "int8": torch.float32}
GOLDEN_ROWS = 4


@dataclass(frozen=True, kw_only=True)
class ExportConfig:
    """What is built.

    Attributes:
        backend: what will run it.
        precision: in which networks compute; the solver and what crosses a border stay float32.
        name: of the engine; None: backend and precision.
        rows: observations of one call; None: any number up to ``max_rows``, with which values can rank candidates.
        max_rows: limit of TensorRT and AOTInductor where the number is free.
        exporter: which of torch's ONNX exporters.
        loop: the sampler as an ONNX loop instead of unrolled; None: where it pays, which is on CPUs, but for experts
            that an unrolled sampler has as constants.
        capabilities: of the GPUs that TensorRT builds for, e.g. ``sm89``; empty: the GPU of this machine.
        tolerance: largest error of a chunk as a share of the action's range; None: by precision.
        observations: how many are compared.
        calibration: how many int8 is calibrated with.
        threads: CPU threads while comparing.
        seed: of observations and noise.
        critic: bundle of a critic that chooses among candidates (V-GPS); None: none.
        candidates: chunks it chooses from; None: 10.
        temperature: of its choice; 0 takes the best; None: 0.
        device: where AOTInductor's graphs run, ``cpu`` or ``cuda``; it builds for the GPU of this machine.
        dynaguide: a dynamics model and goals that guide the sampling; None: none.
    """

    backend: BackendName = "openvino"
    precision: Precision = "fp32"
    name: str | None = None
    rows: int | None = 1
    max_rows: int = 16
    exporter: Exporter = "dynamo"
    loop: bool | None = None
    capabilities: tuple[str, ...] = ()
    tolerance: float | None = None
    observations: int = 64
    calibration: int = 64
    threads: int = 1
    seed: int = 0
    critic: str | None = None
    candidates: int | None = None
    temperature: float | None = None
    device: Literal["cpu", "cuda"] = "cpu"
    dynaguide: DynaGuideConfig | None = None

    def __post_init__(self) -> None:
        if self.precision not in PRECISIONS[self.backend]:
            known = ", ".join(PRECISIONS[self.backend])
            raise UserError(f"backend={self.backend} has no precision={self.precision}; it has {known}.")
        for name in ("rows", "max_rows", "observations", "calibration", "threads", "candidates"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"{name}={value} must be at least 1.")
        if (self.tolerance is not None and self.tolerance <= 0) or (self.temperature or 0) < 0:
            raise UserError(f"tolerance={self.tolerance} must be above 0, temperature={self.temperature} at least 0.")
        if self.critic is None and (self.candidates is not None or self.temperature is not None):
            raise UserError("candidates and temperature are for a critic that chooses; give one with critic=….")
        if self.device != "cpu" and self.backend != "aot_inductor":
            raise UserError("device is for backend=aot_inductor; other engines are told when they are opened.")
        if self.observations < GOLDEN_ROWS:
            raise UserError(f"observations={self.observations} must be at least {GOLDEN_ROWS}.")
        if self.name is not None and (Path(self.name).name != self.name or self.name.startswith(".")):
            raise UserError(f"name='{self.name}' must be a plain folder name.")
        if self.exporter == "torchscript" and _dtype(self) != torch.float32 and self.backend != "aot_inductor":
            raise UserError(
                f"exporter=torchscript mixes float32 into graphs of precision={self.precision}; use exporter=dynamo."
            )
        if self.loop and self.backend == "aot_inductor":
            raise UserError("loop=true is for ONNX graphs; backend=aot_inductor unrolls.")
        if self.loop and self.precision == "int8":
            raise UserError("precision=int8 quantises unrolled graphs; set loop=false.")
        if self.dynaguide is not None and (self.loop or self.precision == "int8"):
            raise UserError(
                "dynaguide samples call by call; loop=true and precision=int8 are for samplers in one graph."
            )
        if self.capabilities and not self.backend.startswith("tensorrt"):
            raise UserError(f"device_capability is for TensorRT; backend={self.backend} does not build for a GPU.")

    @property
    def engine(self) -> str:
        """Name of the engine's folder."""
        return self.name or f"{self.backend}-{self.precision}"

    @property
    def limit(self) -> float:
        """The tolerance."""
        return TOLERANCE[self.precision] if self.tolerance is None else self.tolerance


@dataclass(frozen=True)
class Built:
    """An engine that was written.

    Attributes:
        folder: where.
        manifest: what its ``engine.yaml`` holds.
        reports: what was said while building, for people: layers, precisions, sizes.
    """

    folder: Path
    manifest: EngineManifest
    reports: tuple[str, ...]


def build_engine(
    policy: DenoisingPolicy,
    about: Mapping[str, Any],
    bundle: Path,
    config: ExportConfig,
    observations: Observations,
    command: str,
    judge: Callable[[ExportedPolicy], dict[str, Any]] | None = None,
) -> Built:
    """Build an engine and write it into its bundle; an engine of that name is replaced once the new one is complete.

    Args:
        policy: the bundle's, in evaluation mode on the CPU, with the sampler to export.
        about: the bundle's manifest.
        bundle: its folder.
        config: what to build.
        observations: to compare with, at least as many as the larger of ``observations`` and ``calibration``.
        command: what builds it again, for messages.
        judge: plays episodes with the engine before it is written, raising where it fails, and says what it found.

    Raises:
        UserError: something cannot be built, or the engine is further from the policy than its tolerance. Then
            nothing is written.
    """
    folder = bundle / FOLDER / config.engine
    if judge is not None and not _runs_here(config):
        raise UserError("eval=true plays with the engine, which this machine cannot run; build it on the robot.")
    if config.precision == "int8" and not observations.real:
        raise UserError("precision=int8 is calibrated on real observations; give the dataset with data=….")
    check_backend(config)
    folder.parent.mkdir(exist_ok=True)
    partial = _unfinished(folder)
    try:
        build = _Build(policy, config, observations, partial)
        manifest = build.manifest(bundle_fingerprint(about), command)
        if judge is not None:
            manifest = replace(manifest, evaluation=judge(build.policy(manifest)))
        manifest.write(partial)
        for written in (*partial.iterdir(), partial):
            sync_path(written)
        old = partial.with_suffix(".old")
        if folder.exists():
            os.replace(folder, old)
        os.replace(partial, folder)
        sync_path(folder.parent)
        shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return Built(folder, manifest, tuple(build.reports))


class _Build:
    """One build: graphs are captured first, files written one after the other."""

    def __init__(self, policy: DenoisingPolicy, config: ExportConfig, observations: Observations, folder: Path) -> None:
        self._policy, self._config, self._observations, self._folder = policy, config, observations, folder
        self.reports: list[str] = []
        self._quantization: dict[str, Any] = {}
        self._target: dict[str, Any] = {}
        self.runs_here = _runs_here(config)
        self.candidates, critic = self._critic()
        ranked = self.candidates is not None
        if ranked and config.rows is not None:
            raise UserError("Candidates are sampled as rows of one call; set rows=null.")
        self._graphs = self._captured(_dtype(config)) | critic
        self._noises = self._graphs["sampler"].inputs[0].shape[1]
        self._guided = self._guidance()
        if self._guided is not None:
            plain = {name: self._graphs[name] for name in ("encoder", "denoiser")}
            self._graphs = plain | self._guided.graphs | critic
        self._plain: dict[str, Path] = {}
        for name, graph in self._graphs.items():
            self._write(name, graph)

    def _critic(self) -> tuple[Candidates | None, dict[str, ExportGraph]]:
        policy, config = self._policy, self._config
        own = own_candidates(policy)
        if config.critic is None:
            return (None if config.dynaguide else own), {}  # guided, it samples one chunk
        if own is not None:
            raise UserError(
                f"The policy draws {own.count} chunks and chooses with its own critic. Leave critic out, or export a "
                "policy with candidates=1."
            )
        batch = self._observations.rows(config.rows or 2)
        return critic_graphs(policy, Path(config.critic), batch, config.candidates or 10, config.temperature or 0.0)

    def _guidance(self) -> GuidanceExport | None:
        config = self._config
        if config.dynaguide is None:
            return None
        batch = self._observations.rows(config.rows or 2)
        return export_guidance(self._policy, config.dynaguide, batch, config.rows is None)

    def _captured(self, dtype: torch.dtype) -> dict[str, ExportGraph]:
        return self._policy.export_graphs(self._observations.rows(self._config.rows or 2), dtype)

    def _write(self, name: str, graph: ExportGraph) -> None:
        """Write a graph's file for the backend, and its ONNX form where there is one."""
        config = self._config
        free = config.rows is None
        if config.backend == "aot_inductor":
            from robopolicy.export.aot_inductor import build_package

            path = self._folder / f"{name}.pt2"
            build_package(self._on_device(name, graph), path, max_rows=self._most_rows if free else None)
            return
        log.info("capturing %s", name)
        path = self._folder / f"{name}.onnx"
        if name == "sampler" and self._looped:
            dtype = _dtype(config)
            export_loop(self._policy, graph, path, dtype=dtype, exporter=config.exporter, free_rows=free)
        else:
            # the other exporter has no form for operators of gradients, nor for resizing as dynamics models do
            exporter = "dynamo" if self._guided and name in self._guided.graphs else config.exporter
            export_onnx(graph, path, exporter=exporter, free_rows=free)
        if config.backend == "openvino" and config.precision == "fp16":
            halve_weights(path)
        self._plain[name] = path
        if config.precision == "int8" and name == "sampler":
            self._quantize(path)
        if config.backend.startswith("tensorrt"):
            self._plan(name, path)

    def _quantize(self, path: Path) -> None:
        """Replace the sampler by an int8 version that keeps the chunks within the tolerance."""
        config = self._config
        rows = config.rows or 1
        judged = self._observations.rows(config.observations)  # others than those that it is calibrated with
        with torch.no_grad():
            inputs, wanted = self._sampler_inputs(judged)
            seen, _ = self._sampler_inputs(self._observations.rows(config.calibration, config.observations))
        scale = action_range(self._policy, judged)

        def runs(values: Mapping[str, np.ndarray]) -> list[dict[str, np.ndarray]]:
            count = len(values["noise"])
            return [{k: v[i : i + rows] for k, v in values.items()} for i in range(0, count - rows + 1, rows)]

        judged_by = config.backend if self.runs_here else "onnxruntime"  # int8 differs from backend to backend

        def error(model: Path) -> float:
            with open_session(model, replace(self._draft(), backend=judged_by), threads=config.threads) as session:
                found = np.concatenate([session(run)["chunk"] for run in runs(inputs)])
            return compare(found, wanted[: len(found)], scale[: len(found)], "", 0).max_share

        plain = path.with_name("plain.onnx")
        os.replace(path, plain)
        report = quantize(plain, path, runs(seen), judge=error, tolerance=config.limit, config=self._int8())
        plain.unlink()
        self.reports.append(str(report))
        self._quantization = {
            "error": report.error,
            "error_all_int8": report.error_all_int8,
            "layers": len(report.layers),
            "float32": [layer.name for layer in report.kept],
        }

    def _int8(self) -> QuantizeConfig:
        """TensorRT wants int8 around zero; processors without VNNI overflow with weights of all 8 bits."""
        if self._config.backend.startswith("tensorrt"):
            return QuantizeConfig()
        return QuantizeConfig(symmetric=False, weight_bits=8 if "vnni" in " ".join(cpu_instructions()) else 7)

    def _sampler_inputs(self, batch: dict[str, Tensor]) -> tuple[dict[str, np.ndarray], np.ndarray]:
        """Inputs of the sampler on observations, and the chunks (B, H, A) in float."""
        encoder, sampler = (self._policy.export_graphs(batch)[name] for name in ("encoder", "sampler"))
        generator = torch.Generator().manual_seed(self._config.seed + 1)
        noise = torch.randn(sampler.inputs[0].shape, generator=generator)
        values = (noise, *sampler.inputs[1:3], *encoder.module(*encoder.inputs))
        inputs = {name: value.numpy() for name, value in zip(sampler.names, values, strict=True)}
        return inputs, sampler.module(*values).numpy()

    def _plan(self, name: str, path: Path) -> None:
        from robopolicy.export.tensorrt import build_plan

        config = self._config
        most = self._most_rows
        plan = build_plan(
            path,
            config.capabilities,
            _flavour(config),
            rows=(1, min(self.candidates.count if self.candidates else 1, most), most),
            timing_cache=_timing_cache() if _flavour(config) == "classic" else None,
        )
        path.with_suffix(".plan").write_bytes(plan.data)
        self._target = {"capabilities": list(plan.capabilities), "version": plan.version, **_driver(config)}
        kinds = ", ".join(f"{count} {kind}" for kind, count in sorted(plan.precisions.items()))
        self.reports.append(
            f"{name}: {plan.layers} layers ({kinds}), {len(plan.data) / 1e6:.1f} MB for "
            f"{', '.join(plan.capabilities)}, built in {plan.seconds:.1f} s"
        )

    @property
    def _looped(self) -> bool:
        config, policy = self._config, self._policy
        if config.loop is not None or config.precision == "int8":
            return bool(config.loop)
        return (
            config.backend in ("onnxruntime", "openvino") and policy.network_calls > 1 and not isinstance(policy, Mode)
        )

    @property
    def _most_rows(self) -> int:
        """Of a call: all candidates of one observation at least."""
        config = self._config
        count = self.candidates.count if self.candidates else 1
        return max(config.max_rows, count) if config.rows is None else config.rows

    @property
    def _suffix(self) -> str:
        if self._config.backend == "aot_inductor":
            return ".pt2"
        return ".plan" if self._config.backend.startswith("tensorrt") else ".onnx"

    def _draft(self) -> EngineManifest:
        """A manifest of what is known before parity."""
        config = self._config
        return EngineManifest(
            name=config.engine,
            backend=config.backend,
            precision=config.precision,
            bundle="",
            sampler=asdict(self._policy.sampler),
            rows=config.rows,
            noises=self._noises,
            graphs={},
            golden="",
            parity=Parity(0, "", (), (), 0.0, 0.0, config.limit),
            command="",
            candidates=self.candidates,
            guidance=self._guided.guidance if self._guided else None,
            target=self._target,
            versions=_versions(config),
            quantization=self._quantization,
        )

    def manifest(self, fingerprint: str, command: str) -> EngineManifest:
        """Compare, write the golden chunks, and say what was built.

        Raises:
            UserError: the engine is too far off.
        """
        files = {name: self._folder / f"{name}{self._suffix}" for name in self._graphs}
        graphs = {
            name: GraphFile(file.name, file_sha256(file), *borders(self._graphs[name], self._config.rows))
            for name, file in files.items()
        }
        draft = replace(self._draft(), bundle=fingerprint, command=command, graphs=graphs)
        if self._guided is not None:
            self._guided.steps.save(self._folder / STEPS)
            guidance = replace(self._guided.guidance, sha256=file_sha256(self._folder / STEPS))
            draft = replace(draft, guidance=guidance)
        exported, ran = self._runnable(draft)
        parity = self._parity(exported, ran)
        if self._guided is None:
            self._check_denoiser(draft)
        check_parity(parity, self._policy, f"The engine {self._config.engine}")
        exported.close()
        return replace(draft, parity=parity, golden=file_sha256(self._folder / GOLDEN))

    def policy(self, manifest: EngineManifest) -> ExportedPolicy:
        """The engine as it will be loaded."""
        return self._runnable(manifest)[0]

    def _runnable(self, manifest: EngineManifest) -> tuple[ExportedPolicy, str]:
        """The engine; where this machine cannot run it, what it was made from."""
        exported = exported_policy(
            manifest, self._policy.spec, lambda name: self._session(manifest, name), self._folder
        )
        if self.runs_here:
            return exported, manifest.backend
        ran = "torch" if self._config.precision == "bf16" else "ONNX Runtime"
        return exported, f"in {ran}, the plan itself was not run"

    def _session(self, manifest: EngineManifest, name: str) -> Session:
        """A graph, on the backend where it runs here."""
        threads = self._config.threads
        if self.runs_here:
            file = self._folder / manifest.graphs[name].file
            return open_session(file, manifest, threads=threads, allow_native_code=True)
        if self._config.precision == "bf16":  # for which ONNX Runtime has no CPU kernels
            return torch_session(self._graphs[name], threads=threads)
        return open_session(self._plain[name], replace(manifest, backend="onnxruntime"), threads=threads)

    def _parity(self, exported: ExportedPolicy, ran: str) -> Parity:
        config, policy = self._config, self._policy
        batch = self._observations.rows(config.observations)
        rows = len(next(iter(batch.values())))
        seeds = range(config.seed, config.seed + rows)
        with torch.no_grad():  # not inference mode: guides take gradients
            wanted = self._wanted(batch, [torch.Generator().manual_seed(s) for s in seeds])
        noise = noise_of(exported, [torch.Generator().manual_seed(s) for s in seeds])
        arrays = {key: value.numpy() for key, value in batch.items()}
        scale = action_range(policy, batch)
        previous, mask = self._kept(batch, scale)
        if mask.any():
            kept = self._masked(batch, noise, previous, mask)
            wanted = np.where(np.any(mask, axis=1, keepdims=True)[..., None], kept, wanted)
        few = slice(0, GOLDEN_ROWS)
        sampling = {"noise": noise, "previous": previous, "mask": mask, "chunk": wanted}
        golden = {name: value[few] for name, value in sampling.items()}
        save_golden(self._folder / GOLDEN, {k: v[few] for k, v in arrays.items()}, golden, scale[few])
        observations: dict[str, Any] = dict(arrays)
        if policy.spec.tasks:
            observations["instruction"] = [policy.spec.tasks[i].instruction for i in batch["task"].tolist()]
        found = exported.sample(observations, noise, previous, mask)
        source = f"{self._observations.source}; compared {ran}" if ran != config.backend else self._observations.source
        return compare(found, wanted, scale, source, config.limit)

    def _kept(self, batch: Mapping[str, Tensor], scale: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """For every other row a chunk to agree with and how far, as in real-time chunking; nothing where steered."""
        spec, rows = self._policy.spec, len(scale)
        rng = np.random.default_rng(self._config.seed)
        previous = np.zeros((rows, spec.horizon, spec.action.dim), np.float32)
        mask = np.zeros((rows, spec.horizon), np.float32)
        if self.candidates is None and self._guided is None:
            action = self._policy.normalizer[spec.action.key]
            middle = action.unnormalize(torch.zeros(rows, 1, spec.action.dim), self._policy.domain(batch)).numpy()
            previous[1::2] = (middle + scale * rng.uniform(-0.4, 0.4, previous.shape))[1::2]
            mask[1::2] = np.clip(np.linspace(1.5, -0.5, spec.horizon), 0, 1)
        return previous, mask

    def _masked(
        self, batch: dict[str, Tensor], noise: np.ndarray, previous: np.ndarray, mask: np.ndarray
    ) -> np.ndarray:
        """The policy's chunks that agree with a previous one."""
        graphs = self._policy.export_graphs(batch)
        with torch.no_grad():
            found = graphs["encoder"].module(*graphs["encoder"].inputs)
            given = (torch.from_numpy(value) for value in (noise, previous, mask))
            return graphs["sampler"].module(*given, *found).numpy()

    def _check_denoiser(self, manifest: EngineManifest) -> None:
        """Raise a `UserError` where the graph of the denoiser alone, which sampling does not use, is too far off."""
        rows, limit = self._config.rows or 2, self._config.limit
        graph = self._policy.export_graphs(self._observations.rows(rows))["denoiser"]
        generator = torch.Generator().manual_seed(self._config.seed)
        x = torch.randn(graph.inputs[0].shape, generator=generator) * self._policy.process.largest_noise
        values = (x, *graph.inputs[1:])
        with torch.no_grad():
            wanted = graph.module(*values).numpy()
        with self._session(manifest, "denoiser") as session:
            inputs = {name: value.numpy() for name, value in zip(graph.names, values, strict=True)}
            found = session(inputs)["clean"]
        share = float(np.abs(found - wanted).max() / max(2.0, np.abs(wanted).max()))  # of the normalised range
        if not share <= limit:
            raise UserError(
                f"The engine {self._config.engine} is refused: its denoiser is {100 * share:.3g} % off, allowed are "
                f"{100 * limit:.3g} %. Nothing was written. Choose a higher precision, or allow more with tolerance=…"
            )

    def _on_device(self, name: str, graph: ExportGraph) -> ExportGraph:
        """A graph for the GPU, where the engine is for one."""
        config = self._config
        if config.device == "cpu":
            return graph
        module = copy.deepcopy(graph.module).to(config.device)
        if name in ("encoder", "sampler", "denoiser"):  # they keep tabulated levels where their policy is
            policy = copy.deepcopy(self._policy).to(config.device)
            batch = {k: v.to(config.device) for k, v in self._observations.rows(config.rows or 2).items()}
            return policy.export_graphs(batch, _dtype(config))[name]
        return replace(graph, module=module, inputs=tuple(value.to(config.device) for value in graph.inputs))

    def _wanted(self, batch: Mapping[str, Tensor], generators: Sequence[torch.Generator]) -> np.ndarray:
        """The policy's own chunks (B, H, A), steered by the dynamics model and the critic where there are any."""
        config, policy = self._config, self._policy
        ways: dict[str, Steering] = {}
        if config.dynaguide is not None:
            ways["dynaguide"] = DynaGuide(config.dynaguide, policy)
        if config.critic is not None:
            assert self.candidates is not None
            chosen = {"candidates": self.candidates.count, "temperature": self.candidates.temperature}
            vgps = VgpsConfig(critic=config.critic, **chosen)  # type: ignore[arg-type]
            ways["vgps"] = Vgps(vgps, policy)
        return (SteeredPolicy(policy, ways) if ways else policy).sample(batch, generators).numpy()


def _dtype(config: ExportConfig) -> torch.dtype:
    """In which networks are captured; OpenVINO lowers the precision of float32 graphs itself."""
    return torch.float32 if config.backend == "openvino" else DTYPES[config.precision]


def check_backend(config: ExportConfig) -> None:
    """Refuse what the backend, its package or the GPU cannot take, before anything is built."""
    if config.backend.startswith("tensorrt"):
        from robopolicy.export.tensorrt import check_targets

        formats = {"fp16": ["float16"], "bf16": ["bfloat16"], "int8": ["int8"]}.get(config.precision, [])
        check_targets(config.capabilities, _flavour(config), formats)
    elif config.backend == "openvino":
        check_device("CPU", OPENVINO_HINT[config.precision])
    elif config.backend == "onnxruntime":
        require_extra("onnxruntime", "onnxruntime")


def _flavour(config: ExportConfig) -> Literal["rtx", "classic"]:
    return "rtx" if config.backend == "tensorrt_rtx" else "classic"


def _runs_here(config: ExportConfig) -> bool:
    """This machine can run what is built: for TensorRT there is a GPU that the plan is for."""
    try:
        return not config.backend.startswith("tensorrt") or covers(config.capabilities, present_gpu().capability)
    except UserError:
        return False


def _driver(config: ExportConfig) -> dict[str, str]:
    """The driver that a plan was tried with."""
    return {"driver": present_gpu().driver} if _runs_here(config) else {}


def _timing_cache() -> Path:
    cache_root().mkdir(mode=0o700, parents=True, exist_ok=True)
    return cache_root() / "timing.cache"


def _unfinished(folder: Path) -> Path:
    """A new folder beside an engine's; those that killed exports left are removed."""
    for left in folder.parent.glob(f".{folder.name}.*"):
        owner = left.name.split(".")[-2]
        if not (owner.isdigit() and psutil.pid_exists(int(owner)) and int(owner) != os.getpid()):
            shutil.rmtree(left, ignore_errors=True)
    partial = folder.with_name(f".{folder.name}.{os.getpid()}.partial")
    partial.mkdir()
    return partial


def _versions(config: ExportConfig) -> dict[str, str]:
    found = {"robopolicy": robopolicy.__version__, "torch": str(torch.__version__)}
    if config.backend != "aot_inductor":
        found |= {"onnx": version("onnx"), "opset": str(OPSET[config.exporter]), "exporter": config.exporter}
    for package in PACKAGES[config.backend]:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found
