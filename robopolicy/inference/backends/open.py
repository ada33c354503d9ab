"""Opening the graphs of an engine with the backend that it was built for."""

from __future__ import annotations

import hashlib
import os
import re
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from robopolicy.errors import UserError
from robopolicy.inference.device_memory import present_gpu
from robopolicy.inference.engine import EngineManifest
from robopolicy.inference.session import Session

PACKAGES = {
    "onnxruntime": ("onnxruntime", "onnxruntime-gpu"),
    "openvino": ("openvino",),
    "tensorrt_rtx": ("tensorrt_rtx_cu13_bindings",),
    "tensorrt": ("tensorrt",),
    "aot_inductor": (),
}
"""Names of the Python packages behind each backend."""
OPENVINO_HINT = {"fp32": "f32", "fp16": "f32", "bf16": "bf16", "int8": "f32"}
"""In which OpenVINO computes; fp16 stores half-precision weights, int8 is in the graph itself."""


def open_session(
    path: Path,
    engine: EngineManifest,
    *,
    threads: int = 1,
    device: str | None = None,
    cache: Path | None = None,
    allow_native_code: bool = False,
) -> Session:
    """Load one graph.

    Args:
        path: of its file.
        engine: whose graph it is.
        threads: CPU threads.
        device: ``cpu`` or ``cuda`` for ONNX Runtime, OpenVINO's devices by its own names; None: the usual one, which
            is the only one of the other backends.
        cache: folder for what a backend compiles at the first load; None: none is kept.
        allow_native_code: see `AotInductorSession`.

    Raises:
        UserError: the backend is not installed, or the machine is not one that the graph was built for. The message
            holds the command that builds it again.
    """
    try:
        check_versions(engine)
        session = _open(path, engine, threads, device, cache, allow_native_code)
        _check_borders(path, engine, session)
        return session
    except UserError as error:
        raise UserError(f"{error}\nTo build the engine again: {engine.command}") from error


def _open(
    path: Path, engine: EngineManifest, threads: int, device: str | None, cache: Path | None, allow_native_code: bool
) -> Session:
    if engine.backend not in ("onnxruntime", "openvino") and device not in (None, "cpu"):
        raise UserError(f"device={device}: an engine of {engine.backend} runs where it was built for; leave it out.")
    device = device or "cpu"
    if engine.backend == "onnxruntime":
        from robopolicy.inference.backends.onnxruntime import PROVIDERS, OnnxRuntimeSession

        if device not in PROVIDERS:
            raise UserError(f"device={device}: ONNX Runtime runs on {' or '.join(PROVIDERS)}.")
        return OnnxRuntimeSession(path, provider=device, threads=threads)  # type: ignore[arg-type]
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


def check_versions(engine: EngineManifest) -> None:
    """Raise a `UserError` where a backend here is not one that runs what another version built.

    TensorRT runs only plans of its own version, on a driver that is no older; graphs in ONNX run on newer packages.
    """
    for package in PACKAGES[engine.backend]:
        built = engine.versions.get(package)
        try:
            found = version(package)
        except PackageNotFoundError:
            continue
        if built is None:
            continue
        exact = engine.backend.startswith("tensorrt")
        if (found != built) if exact else (_numbers(found)[:1] < _numbers(built)[:1]):
            wanted = built if exact else f"{_numbers(built)[0]} or newer"
            raise UserError(f"{engine.name} was built with {package} {built}; found {found}, wanted {wanted}.")
    driver = engine.target.get("driver")
    if driver is not None and _numbers(present_gpu().driver) < _numbers(str(driver)):
        raise UserError(
            f"The engine {engine.name} was built with a driver for CUDA {driver}; found one for CUDA "
            f"{present_gpu().driver}. Update the driver."
        )


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", text)) or (0,)


def _check_borders(path: Path, engine: EngineManifest, session: Session) -> None:
    """Raise a `UserError` where a graph takes or gives something else than the manifest says."""
    said = next((graph for graph in engine.graphs.values() if graph.file == path.name), None)
    if said is None:
        return
    known = {(kind, spec.name): spec for kind, specs in (("in", said.inputs), ("out", said.outputs)) for spec in specs}
    for kind, specs in (("in", session.inputs), ("out", session.outputs)):
        for spec in specs:
            if known.get((kind, spec.name)) != spec:
                session.close()
                raise UserError(f"{path}: its {kind}put '{spec.name}' is not the one that engine.yaml describes.")


def cache_root() -> Path:
    """Where backends keep what they compile for this user."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "robopolicy" / "engines"


def cache_folder(engine: EngineManifest) -> Path:
    """The engine's part of it; never inside a bundle that came from elsewhere, whatever its names are."""
    return cache_root() / hashlib.sha256(f"{engine.bundle} {engine.name}".encode()).hexdigest()[:32]
