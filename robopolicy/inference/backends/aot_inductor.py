"""AOTInductor: a graph that torch compiled to native code for one kind of machine."""

from __future__ import annotations

import json
import logging
import platform
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from robopolicy.errors import UserError
from robopolicy.inference.cpu import cpu_instructions
from robopolicy.inference.rows import rows_of
from robopolicy.inference.session import Session, TensorSpec

log = logging.getLogger(__name__)

ENTRY = "robopolicy"
"""Where our description lies in the metadata that torch keeps inside a package."""
_METADATA = "_metadata.json"
_LARGEST_METADATA = 1 << 20


def native_target(device: str = "cpu") -> dict[str, Any]:
    """What native code built here depends on: recorded in a package, compared before one is loaded."""
    import torch

    target: dict[str, Any] = {
        "device": device.partition(":")[0],
        "system": platform.system(),
        "machine": platform.machine(),
        "torch": torch.__version__.partition("+")[0],
        "instructions": cpu_instructions(),
    }
    if target["device"] == "cuda":
        if not torch.cuda.is_available():
            raise UserError("device=cuda: torch sees no GPU here. AOTInductor compiles for a GPU on that GPU alone.")
        major, minor = torch.cuda.get_device_capability()
        target |= {"capability": f"sm{major}{minor}", "cuda": str(torch.version.cuda).partition(".")[0]}
    return target


def target_mismatch(built: Mapping[str, Any], present: Mapping[str, Any]) -> list[str]:
    """Why code built for one target does not run on another; empty where it does."""
    wrong = [
        f"{key} {built[key]}, found {present.get(key)}"
        for key in ("system", "machine", "torch", "capability", "cuda")
        if key in built and built[key] != present.get(key)
    ]
    lacking = sorted(set(built.get("instructions", ())) - set(present.get("instructions", ())))
    return wrong + ([f"a CPU with {', '.join(lacking)}"] if lacking and not wrong else [])


@dataclass(frozen=True)
class PackageDescription:
    """What we write into a package beside torch's own entries.

    Attributes:
        inputs, outputs: in the graph's order.
        rows: fewest and most rows that it takes.
        target: of `native_target`.
    """

    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    rows: tuple[int, int]
    target: Mapping[str, Any]

    def to_json(self) -> str:
        tensors = {
            kind: [[spec.name, list(spec.shape), spec.dtype] for spec in specs]
            for kind, specs in (("inputs", self.inputs), ("outputs", self.outputs))
        }
        return json.dumps({**tensors, "rows": self.rows, "target": dict(self.target)})


def read_description(path: Path) -> PackageDescription:
    """Read a package's description; nothing in it is executed.

    Raises:
        UserError: the file is missing, damaged, or not a package of ours.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            files = [file for file in archive.infolist() if file.filename.endswith(_METADATA)]
            if not files or files[0].file_size > _LARGEST_METADATA:
                raise ValueError("it has no metadata of torch")
            found = json.loads(json.loads(archive.read(files[0]))[ENTRY])
        inputs, outputs = (
            tuple(TensorSpec(str(name), tuple(shape), str(dtype)) for name, shape, dtype in found[kind])
            for kind in ("inputs", "outputs")
        )
        least, most = (int(n) for n in found["rows"])
        return PackageDescription(inputs, outputs, (least, most), dict(found["target"]))
    except (OSError, ValueError, KeyError, TypeError, zipfile.BadZipFile) as error:
        raise UserError(
            f"{path} is not an AOTInductor package of robopolicy ({type(error).__name__}: {error}). Export the engine "
            "again."
        ) from error


class AotInductorSession(Session):
    """A ``.pt2`` package. On a GPU each number of rows is captured as a CUDA graph, where torch can.

    Args:
        path: of the package.
        allow_native_code: the package was built by someone whom the user trusts like a program that they start.
        threads: CPU threads; torch has one number for the whole process, which is set here.

    Raises:
        UserError: native code was not allowed, the package is damaged, or was compiled for another machine.
    """

    name = "aot_inductor"

    def __init__(self, path: Path, *, allow_native_code: bool = False, threads: int = 1) -> None:
        if not allow_native_code:
            raise UserError(
                f"{path} holds native code, which can do anything that you can do on this machine. Nothing else in a "
                "bundle executes code. If you built it yourself or trust who did, allow it (allow_native_code=true); "
                "or use an engine of ONNX Runtime, OpenVINO or TensorRT."
            )
        description = read_description(path)
        import torch

        self._device = str(description.target.get("device", "cpu"))
        wrong = target_mismatch(description.target, native_target(self._device))
        if wrong:
            raise UserError(
                f"{path} was compiled for another machine: wanted {'; '.join(wrong)}. Export the engine again here, "
                "with backend=aot_inductor."
            )
        self.inputs, self.outputs, self._limits = description.inputs, description.outputs, description.rows
        self.max_rows = self._limits[1]
        if self._device == "cpu":
            torch.set_num_threads(threads)
        # A session has one caller at a time, and torch's own locks cannot be part of a CUDA graph.
        self._model = torch._inductor.aoti_load_package(str(path), run_single_threaded=True)
        self._torch = torch
        self._graphs: dict[int, _CapturedRun | None] = {}

    def run(self, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        rows = rows_of(self.inputs, inputs, self._limits)
        with self._torch.inference_mode():
            values = [self._torch.tensor(inputs[spec.name], device=self._device) for spec in self.inputs]
            results = self._compute(values, rows) if self._device == "cuda" else self._call(values)
            return {
                spec.name: value.to("cpu", copy=True).numpy() for spec, value in zip(self.outputs, results, strict=True)
            }

    def _call(self, values: Sequence[Any]) -> tuple[Any, ...]:
        results = self._model(*values)
        return (results,) if isinstance(results, self._torch.Tensor) else tuple(results)

    def _compute(self, values: Sequence[Any], rows: int) -> tuple[Any, ...]:
        if rows not in self._graphs:
            try:
                self._graphs[rows] = _CapturedRun(self._torch, self._call, values)
            except RuntimeError as error:
                log.warning("AOTInductor runs without a CUDA graph: %s", error)
                self._graphs[rows] = None
        graph = self._graphs[rows]
        return self._call(values) if graph is None else graph(values)

    def close(self) -> None:
        self._graphs.clear()
        del self._model


class _CapturedRun:
    """One run as a CUDA graph, with inputs and outputs at fixed addresses."""

    def __init__(self, torch: Any, function: Any, values: Sequence[Any]) -> None:
        self._inputs = [value.clone() for value in values]
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):  # what a first run allocates cannot be captured
            function(self._inputs)
        torch.cuda.current_stream().wait_stream(side)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            self._outputs = function(self._inputs)

    def __call__(self, values: Sequence[Any]) -> tuple[Any, ...]:
        for fixed, value in zip(self._inputs, values, strict=True):
            fixed.copy_(value)
        self._graph.replay()
        return self._outputs
