"""ONNX graphs on ONNX Runtime, on the CPU or an NVIDIA GPU."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from robopolicy.errors import UserError, require_extra
from robopolicy.inference.session import Session, TensorSpec

PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}
TYPES = {"tensor(float)": "float32", "tensor(uint8)": "uint8", "tensor(int64)": "int64"}


class OnnxRuntimeSession(Session):
    """An ONNX file on ONNX Runtime.

    Waiting threads sleep instead of spinning, since a robot's other processes need the cores. Operators of other
    libraries are never loaded, and products stay in float32 on a GPU (no TF32).

    Args:
        path: the ONNX file.
        provider: where it runs.
        threads: CPU threads of one operator.

    Raises:
        UserError: ONNX Runtime or the provider is missing, or the file is no graph that it can run.
    """

    name = "onnxruntime"

    def __init__(self, path: Path, *, provider: Literal["cpu", "cuda"] = "cpu", threads: int = 1) -> None:
        ort = require_extra("onnxruntime", "onnxruntime")
        if provider not in PROVIDERS:
            raise UserError(f"provider '{provider}' of ONNX Runtime is unknown; use {' or '.join(PROVIDERS)}.")
        if PROVIDERS[provider] not in ort.get_available_providers():
            raise UserError(_no_gpu(f"the ONNX Runtime {ort.__version__} that is installed is built for the CPU alone"))
        if threads < 1:
            raise UserError(f"threads={threads} of ONNX Runtime must be at least 1.")
        ort.disable_telemetry_events()
        options = ort.SessionOptions()
        options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_ALL
        options.log_severity_level = 3  # errors; what matters is raised
        providers: list[Any] = [PROVIDERS["cpu"]]
        if provider == "cuda":
            providers.insert(0, (PROVIDERS["cuda"], {"use_tf32": "0"}))
        try:
            self._session = ort.InferenceSession(str(path), options, providers=providers)
        except Exception as error:  # its exceptions have no base class of their own
            raise UserError(
                f"{path}: ONNX Runtime {ort.__version__} cannot load it ({error}). Export the policy again."
            ) from error
        if PROVIDERS[provider] not in self._session.get_providers():
            raise UserError(_no_gpu(f"{PROVIDERS[provider]} did not start; CUDA or cuDNN libraries may be missing"))
        self.inputs = _specs(self._session.get_inputs())
        self.outputs = _specs(self._session.get_outputs())
        self._buffers = DeviceBuffers(self._session, self.inputs, self.outputs, "cuda") if provider == "cuda" else None

    def run(self, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        if self._buffers is not None:
            return self._buffers.run(inputs)
        names = [spec.name for spec in self.outputs]
        return dict(zip(names, self._session.run(names, dict(inputs)), strict=True))

    def close(self) -> None:
        self._buffers = None
        del self._session


class DeviceBuffers:
    """Tensors of a session that stay on a device between calls, so that a call allocates nothing there.

    They are made anew when the number of rows changes.

    Args:
        session: of ONNX Runtime.
        inputs, outputs: its tensors.
        device: as ONNX Runtime names it: "cuda" or "cpu".
    """

    def __init__(self, session: Any, inputs: Sequence[TensorSpec], outputs: Sequence[TensorSpec], device: str) -> None:
        self.session, self.inputs, self.outputs, self.device = session, inputs, outputs, device
        self._rows: int | None = None
        self._values: dict[str, Any] = {}

    def run(self, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Copy inputs to the device, run, and copy outputs back."""
        rows = next((len(inputs[spec.name]) for spec in self.inputs if spec.shape[:1] == (None,)), 1)
        if rows != self._rows:
            self._allocate(rows)
        for spec in self.inputs:
            self._values[spec.name].update_inplace(inputs[spec.name])
        self.session.run_with_iobinding(self._binding)
        return {spec.name: np.array(self._values[spec.name].numpy()) for spec in self.outputs}

    def _allocate(self, rows: int) -> None:
        ort = require_extra("onnxruntime", "onnxruntime")
        self._binding = self.session.io_binding()
        for spec in (*self.inputs, *self.outputs):
            shape = [rows if n is None else n for n in spec.shape]
            value = ort.OrtValue.ortvalue_from_shape_and_type(shape, np.dtype(spec.dtype).type, self.device, 0)
            self._values[spec.name] = value
            bind = self._binding.bind_ortvalue_input if spec in self.inputs else self._binding.bind_ortvalue_output
            bind(spec.name, value)
        self._rows = rows


def _specs(tensors: Sequence[Any]) -> tuple[TensorSpec, ...]:
    return tuple(
        TensorSpec(t.name, tuple(n if isinstance(n, int) else None for n in t.shape), TYPES.get(t.type, t.type))
        for t in tensors
    )


def _no_gpu(why: str) -> str:
    return f"ONNX Runtime cannot use an NVIDIA GPU: {why}. Use its CPU, or: pip install onnxruntime-gpu"
