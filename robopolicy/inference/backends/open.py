"""Opening the graphs of an engine with the backend that it was built for."""

from __future__ import annotations

import os
from pathlib import Path

from robopolicy.errors import UserError
from robopolicy.inference.engine import EngineManifest
from robopolicy.inference.session import Session

OPENVINO_HINT = {"fp32": "f32", "fp16": "f32", "bf16": "bf16", "int8": "f32"}
"""In which OpenVINO computes; fp16 stores half-precision weights, int8 is in the graph itself."""


def open_session(
    path: Path,
    engine: EngineManifest,
    *,
    threads: int = 1,
    device: str = "cpu",
    cache: Path | None = None,
    allow_native_code: bool = False,
) -> Session:
    """Load one graph.

    Args:
        path: of its file.
        engine: whose graph it is.
        threads: CPU threads.
        device: ``cpu`` or ``cuda``, for ONNX Runtime; OpenVINO's devices by its own names; others have their own.
        cache: folder for what a backend compiles at the first load; None: none is kept.
        allow_native_code: see `AotInductorSession`.

    Raises:
        UserError: the backend is not installed, or the machine is not one that the graph was built for. The message
            holds the command that builds it again.
    """
    try:
        return _open(path, engine, threads, device, cache, allow_native_code)
    except UserError as error:
        raise UserError(f"{error}\nTo build the engine again: {engine.command}") from error


def _open(
    path: Path, engine: EngineManifest, threads: int, device: str, cache: Path | None, allow_native_code: bool
) -> Session:
    if engine.backend == "onnxruntime":
        from robopolicy.inference.backends.onnxruntime import OnnxRuntimeSession

        return OnnxRuntimeSession(path, provider="cuda" if device == "cuda" else "cpu", threads=threads)
    if engine.backend == "openvino":
        from robopolicy.inference.backends.openvino import OpenVinoSession

        return OpenVinoSession(
            path,
            precision=OPENVINO_HINT[engine.precision],  # type: ignore[arg-type]
            threads=threads,
            device=device.upper(),
            cache=cache,
        )
    if engine.backend == "aot_inductor":
        from robopolicy.inference.backends.aot_inductor import AotInductorSession

        return AotInductorSession(path, allow_native_code=allow_native_code, threads=threads)
    from robopolicy.inference.backends.tensorrt import TensorRtSession

    return TensorRtSession(
        path,
        "rtx" if engine.backend == "tensorrt_rtx" else "classic",
        cache=cache,
        capabilities=engine.target.get("capabilities", ()),
    )


def cache_folder(engine: EngineManifest) -> Path:
    """Where backends keep what they compile for this user, never inside a bundle that came from elsewhere."""
    root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return root / "robopolicy" / "engines" / f"{engine.bundle}-{engine.name}"
