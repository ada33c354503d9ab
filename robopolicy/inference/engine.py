"""Engines of a bundle: ``BUNDLE/engines/NAME/`` with exported graphs, and ``engine.yaml`` that says what they are.

Reading one executes no code and does not import torch.
"""

from __future__ import annotations

import re
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
_COMMAND = re.compile(r"robopolicy export [\w =.,:/+@?#{}\[\]'\"…-]*")
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
    """

    count: int
    temperature: float


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
        worst: entry of the action with the largest share.
    """

    observations: int
    source: str
    max_error: tuple[float, ...]
    mean_error: tuple[float, ...]
    max_share: float
    mean_share: float
    tolerance: float
    worst: int = 0


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
    found = [file.parent.name for file in (Path(bundle) / FOLDER).glob(f"*/{FILE}")]
    return sorted(name for name in found if not name.startswith("."))  # which are unfinished


def read_engine(bundle: Path, name: str) -> tuple[EngineManifest, PolicySpec]:
    """Read an engine's manifest and check it against its files and the bundle.

    Raises:
        UserError: there is no such engine; its files are missing or changed; or the bundle's weights are not those
            that it was built from. The message holds the command that builds it again.
    """
    bundle = Path(bundle)
    about = read_manifest(bundle, verify=False)  # its weights are not loaded, and take long to hash
    folder = bundle / FOLDER / name
    known = engine_names(bundle)
    if name not in known:
        found = did_you_mean(name, known) or f" It has none; build one: robopolicy export bundle={bundle}"
        raise UserError(f"{bundle} has no engine '{name}'.{found}")
    manifest = _manifest(folder / FILE)
    if manifest.name != name:
        raise UserError(f"{folder / FILE} is of an engine '{manifest.name}'. Give its folder that name again.")
    if manifest.bundle != bundle_fingerprint(about):
        raise UserError(
            f"{folder} was built from other weights ({manifest.bundle}) than the bundle holds now "
            f"({bundle_fingerprint(about)}). Build it again: {manifest.command}"
        )
    for graph in ("encoder", "sampler" if manifest.guidance is None else "denoiser"):
        if graph not in manifest.graphs:
            raise UserError(f"{folder / FILE} lacks the graph '{graph}'. Build the engine again: {manifest.command}")
    for file in [graph.file for graph in manifest.graphs.values()] + [GOLDEN]:
        if Path(file).name != file:
            raise UserError(f"{folder / FILE}: the file name '{file}' points outside the engine.")
        if not (folder / file).is_file():
            raise UserError(f"{folder} is incomplete: '{file}' is missing. Build it again: {manifest.command}")
    return manifest, PolicySpec.from_dict(about["spec"], f"{bundle / 'bundle.yaml'}: spec")


def check_file(path: Path, sha256: str, manifest: EngineManifest) -> None:
    """Raise a `UserError` where a file of an engine is not the one that its manifest names."""
    if not path.is_file() or file_sha256(path) != sha256:
        raise UserError(
            f"{path} is truncated or changed: its SHA-256 is not the one in {FILE}. Build it again: {manifest.command}"
        )


def _manifest(file: Path) -> EngineManifest:
    try:
        values = yaml.safe_load(file.read_text())
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise UserError(f"{file} is not valid YAML: {error}") from error
    if not isinstance(values, dict):
        raise UserError(f"{file} is damaged: expected a mapping, found {type(values).__name__}.")
    # it is shown as what to type: a bundle from elsewhere must not make that anything but an export
    if not _COMMAND.fullmatch(str(values.get("command"))):
        values["command"] = "robopolicy export bundle=…"
    version = values.get("format_version")
    if version != FORMAT_VERSION:
        raise UserError(
            f"{file} has format_version {version!r}, this version of robopolicy reads {FORMAT_VERSION}. Build the "
            f"engine again: {values['command']}"
        )
    return dataclass_from(EngineManifest, values, str(file))


def _plain(value: Any) -> Any:
    """Tuples to lists: YAML keeps only plain values."""
    if isinstance(value, Mapping):
        return {k: _plain(v) for k, v in value.items()}
    return [_plain(v) for v in value] if isinstance(value, (list, tuple)) else value
