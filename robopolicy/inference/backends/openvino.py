"""ONNX graphs on OpenVINO."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from robopolicy.errors import UserError, require_extra
from robopolicy.inference.cpu import cpu_instructions
from robopolicy.inference.session import Session, TensorSpec

Precision = Literal["f32", "bf16", "f16"]
CAPABILITIES = {"f32": "FP32", "bf16": "BF16", "f16": "FP16"}
TYPES = {"f32": "float32", "u8": "uint8", "i64": "int64"}


class OpenVinoSession(Session):
    """An ONNX file on OpenVINO, tuned for the latency of one call.

    Args:
        path: the ONNX file.
        precision: of the arithmetic. It is always set: left alone, OpenVINO computes in bfloat16 on some CPUs.
        threads: CPU threads.
        device: as OpenVINO names it: "CPU", "GPU", "GPU.1".
        cache: a folder of this user's for compiled graphs, which makes later starts faster. A graph is found again by
            the hash of its file. Never a folder that came with a bundle: compiled graphs are not checked when read.

    Raises:
        UserError: OpenVINO or the device is missing, it cannot compute in this precision, other users may write
            to the cache, or the file is no graph that it can run.
    """

    name = "openvino"

    def __init__(
        self,
        path: Path,
        *,
        precision: Precision,
        threads: int = 1,
        device: str = "CPU",
        cache: Path | None = None,
    ) -> None:
        core = check_device(device, precision)
        if threads < 1:
            raise UserError(f"threads={threads} of OpenVINO must be at least 1.")
        config: dict[str, Any] = {
            "INFERENCE_PRECISION_HINT": precision,
            "PERFORMANCE_HINT": "LATENCY",
            "NUM_STREAMS": "1",
        }
        if device.startswith("CPU"):
            # Two processes that pin their threads may choose the same core.
            config |= {"INFERENCE_NUM_THREADS": threads, "ENABLE_CPU_PINNING": False}
            if "avx512f" not in cpu_instructions():
                # 2026.4 fuses Mish with its neighbours and crashes there; what it fuses otherwise gains nothing here.
                config["SNIPPETS_MODE"] = "DISABLE"
        if cache is not None:
            config["CACHE_DIR"] = str(_own_folder(cache) / f"{_digest(path)}-{precision}")
        self._compiled = _compile(core, path, device, config)
        used = self._compiled.get_property("INFERENCE_PRECISION_HINT").to_string()
        if used != precision:
            raise UserError(f"OpenVINO's {device} computes in {used}, not in {precision}; use precision={used}.")
        self.inputs = _specs(self._compiled.inputs)
        self.outputs = _specs(self._compiled.outputs)
        self._request = self._compiled.create_infer_request()

    def run(self, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        values = [inputs[spec.name] for spec in self.inputs]
        results = self._request.infer(values, share_inputs=True, share_outputs=False)
        return {spec.name: results[i] for i, spec in enumerate(self.outputs)}

    def close(self) -> None:
        del self._request, self._compiled


def check_device(device: str, precision: str) -> Any:
    """OpenVINO's core; a `UserError` where it is not installed, or the device cannot compute so."""
    core = require_extra("openvino", "openvino").Core()
    if precision not in CAPABILITIES:
        raise UserError(f"precision '{precision}' of OpenVINO is unknown; use {', '.join(CAPABILITIES)}.")
    try:
        able = core.get_property(device, "OPTIMIZATION_CAPABILITIES")
    except RuntimeError as error:
        found = ", ".join(core.available_devices)
        raise UserError(f"OpenVINO has no device '{device}' here; found {found}.") from error
    if CAPABILITIES[precision] not in able:
        usable = [name for name, capability in CAPABILITIES.items() if capability in able]
        raise UserError(
            f"{core.get_property(device, 'FULL_DEVICE_NAME')} cannot compute in {precision}; "
            f"use precision={' or '.join(usable)}."
        )
    return core


def _compile(core: Any, path: Path, device: str, config: Mapping[str, Any]) -> Any:
    try:
        return core.compile_model(str(path), device, dict(config))
    except RuntimeError as error:
        raise UserError(
            f"{path}: OpenVINO cannot load it ({' '.join(str(error).split())}). Export the policy again."
        ) from error


def _own_folder(folder: Path) -> Path:
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    state = folder.stat()
    if state.st_uid != os.getuid() or state.st_mode & 0o022:
        raise UserError(
            f"{folder}: other users may write to this cache of compiled graphs, which is read unchecked. "
            f"Use a folder of yours, or: chmod go-w {folder}"
        )
    return folder


def _digest(path: Path) -> str:
    # OpenVINO's own key is the file's path, size and time: a graph replaced by another one can go unnoticed.
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error}). Export the policy again.") from error


def _specs(ports: Sequence[Any]) -> tuple[TensorSpec, ...]:
    specs = []
    for port in ports:
        kind = port.get_element_type().to_string()
        shape = tuple(n.get_length() if n.is_static else None for n in port.get_partial_shape())
        # A port also answers to names of nodes that were folded into it; its own node has the graph's name.
        name = port.get_node().get_friendly_name().removesuffix("/sink_port_0")
        specs.append(TensorSpec(name, shape, TYPES.get(kind, kind)))
    return tuple(specs)
