"""Engines of a bundle: ``BUNDLE/engines/NAME/`` with exported graphs, and ``engine.yaml`` that says what they are.

Reading one executes no code and does not import torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml

from robopolicy.configuration import dataclass_from
from robopolicy.errors import UserError, did_you_mean
from robopolicy.inference.session import TensorSpec
from robopolicy.manifest import bundle_fingerprint, file_sha256, read_manifest
from robopolicy.spec import PolicySpec

FORMAT_VERSION = 1
FOLDER = "engines"
FILE = "engine.yaml"
GOLDEN = "golden.safetensors"
STEPS = "steps.safetensors"

BackendName = Literal["onnxruntime", "openvino", "tensorrt_rtx", "tensorrt", "aot_inductor"]
Precision = Literal["fp32", "fp16", "bf16", "int8"]


@dataclass(frozen=True)
class GraphFile:
    """A graph of an engine.

    Attributes:
        file: its name, inside the engine's folder.
        sha256: of the file.
        inputs, outputs: of the graph.
    """

    file: str
    sha256: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]


@dataclass(frozen=True)
class Candidates:
    """How one of several chunks is chosen by the engine's critic.

    Attributes:
        count: chunks that are sampled for each that is returned.
        temperature: of the softmax that the choice is drawn from; 0 takes the best.
        steps: actions, from the newest observation on, that the critic scores.
    """

    count: int
    temperature: float
    steps: int


@dataclass(frozen=True)
class Guidance:
    """How a dynamics model guides the engine towards goals, see `robopolicy.inference.guided`.

    Attributes:
        dynamics: fingerprint of the model's bundle.
        scale: strength.
        temperature: in the units of latents; small, only the nearest goal counts.
        space: whether the gradient is taken at noisy chunks or at clean estimates.
        sha256: of the file of steps and goals.
    """

    dynamics: str
    scale: float
    temperature: float
    space: Literal["noisy", "clean"]
    sha256: str = ""


@dataclass(frozen=True)
class Parity:
    """How far an engine's chunks are from the policy's own, at the same noise.

    Attributes:
        observations: how many were compared.
        source: where they came from.
        max_error: largest error of each entry of the action, in physical units.
        mean_error: mean error of each entry, in physical units.
        max_share: largest error as a share of the entry's range in the training data.
        mean_share: mean error as a share of that range.
        tolerance: largest allowed ``max_share``.
    """

    observations: int
    source: str
    max_error: tuple[float, ...]
    mean_error: tuple[float, ...]
    max_share: float
    mean_share: float
    tolerance: float


@dataclass(frozen=True)
class EngineManifest:
    """What ``engine.yaml`` holds.

    Attributes:
        name: of the engine's folder.
        backend: what runs it.
        precision: in which networks compute.
        bundle: fingerprint of the bundle whose weights it holds.
        sampler: how it samples, for people: ``name``, ``steps``, ``guidance``.
        rows: observations of one call; None: any number.
        noises: standard normal tensors of a chunk.
        graphs: ``encoder``, ``sampler``, ``denoiser``; where a critic chooses, ``critic_encoder`` and ``critic``; where
            a dynamics model guides, ``dynamics_encoder``, ``guidance`` and ``goal_encoder``, and no ``sampler``.
        golden: hash of the file of golden observations, noises and chunks.
        parity: measured when it was built.
        command: that builds it again.
        candidates: None where one chunk is sampled.
        guidance: None where nothing guides.
        target: what the machine must be, by the backend's own names.
        versions: of what built it.
        quantization: what was done for int8, for people.
        evaluation: episodes that engine and policy both played, for people.
    """

    name: str
    backend: BackendName
    precision: Precision
    bundle: str
    sampler: dict[str, Any]
    rows: int | None
    noises: int
    graphs: dict[str, GraphFile]
    golden: str
    parity: Parity
    command: str
    candidates: Candidates | None = None
    guidance: Guidance | None = None
    target: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    quantization: dict[str, Any] = field(default_factory=dict)
    evaluation: dict[str, Any] = field(default_factory=dict)
    format_version: int = FORMAT_VERSION

    def write(self, folder: Path) -> None:
        """Write ``engine.yaml``."""
        (folder / FILE).write_text(yaml.safe_dump(_plain(asdict(self)), sort_keys=False))


def engine_names(bundle: Path) -> list[str]:
    """Names of a bundle's engines."""
    return sorted(file.parent.name for file in (Path(bundle) / FOLDER).glob(f"*/{FILE}"))


def read_engine(bundle: Path, name: str) -> tuple[EngineManifest, PolicySpec]:
    """Read an engine's manifest and check it against its files and the bundle.

    Raises:
        UserError: there is no such engine; its files are missing or changed; or the bundle's weights are not those
            that it was built from. The message holds the command that builds it again.
    """
    bundle = Path(bundle)
    about = read_manifest(bundle)
    folder = bundle / FOLDER / name
    known = engine_names(bundle)
    if name not in known:
        found = did_you_mean(name, known) or f" It has none; build one: robopolicy export bundle={bundle}"
        raise UserError(f"{bundle} has no engine '{name}'.{found}")
    manifest = _manifest(folder / FILE)
    if manifest.bundle != bundle_fingerprint(about):
        raise UserError(
            f"{folder} was built from other weights ({manifest.bundle}) than the bundle holds now "
            f"({bundle_fingerprint(about)}). Build it again: {manifest.command}"
        )
    files = [(graph.file, graph.sha256) for graph in manifest.graphs.values()] + [(GOLDEN, manifest.golden)]
    if manifest.guidance is not None:
        files.append((STEPS, manifest.guidance.sha256))
    for file, wanted in files:
        if Path(file).name != file:
            raise UserError(f"{folder / FILE}: the file name '{file}' points outside the engine.")
        if not (folder / file).is_file():
            raise UserError(f"{folder} is incomplete: '{file}' is missing. Build it again: {manifest.command}")
        if file_sha256(folder / file) != wanted:
            raise UserError(
                f"{folder / file} is truncated or changed: its SHA-256 is not the one in {FILE}. "
                f"Build it again: {manifest.command}"
            )
    return manifest, PolicySpec.from_dict(about["spec"], f"{bundle / 'bundle.yaml'}: spec")


def _manifest(file: Path) -> EngineManifest:
    try:
        values = yaml.safe_load(file.read_text())
    except yaml.YAMLError as error:
        raise UserError(f"{file} is not valid YAML: {error}") from error
    version = values.get("format_version") if isinstance(values, Mapping) else None
    if version != FORMAT_VERSION:
        command = values.get("command", "robopolicy export …") if isinstance(values, Mapping) else "robopolicy export …"
        raise UserError(
            f"{file} has format_version {version!r}, this version of robopolicy reads {FORMAT_VERSION}. Build the "
            f"engine again: {command}"
        )
    return dataclass_from(EngineManifest, values, str(file))


def _plain(value: Any) -> Any:
    """Tuples to lists: YAML keeps only plain values."""
    if isinstance(value, Mapping):
        return {k: _plain(v) for k, v in value.items()}
    return [_plain(v) for v in value] if isinstance(value, (list, tuple)) else value
