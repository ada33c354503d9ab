"""TensorRT and TensorRT-RTX: plans on an NVIDIA GPU, replayed as CUDA graphs, without torch."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib.util
import logging
import os
import re
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, Literal, NoReturn

import numpy as np

from robopolicy.errors import UserError, require_extra
from robopolicy.inference.device_memory import Buffer, CudaError, PresentGpu, call, cuda_runtime, present_gpu, shape_of
from robopolicy.inference.gpus import FAMILIES, covers
from robopolicy.inference.rows import rows_of
from robopolicy.inference.session import Session, TensorSpec

log = logging.getLogger(__name__)

Flavour = Literal["rtx", "classic"]
"""``rtx``: TensorRT-RTX, plans are built anywhere and specialised where they run. ``classic``: TensorRT, plans are
built on the GPU that runs them."""
NAMES = {"rtx": "TensorRT-RTX", "classic": "TensorRT"}
CLASSIC_SINCE = 10  # before it, precision is not what the ONNX file says
MAX_LANES = 4
"""Numbers of rows that are kept ready at a time; each has its own working memory on the device."""
_KEPT_MESSAGES = 5
_BORDER_TYPES = {"FLOAT": "float32", "UINT8": "uint8", "INT64": "int64"}

Launch = Literal["plain", "capture", "replay"]


@functools.cache
def tensorrt_module(flavour: Flavour) -> ModuleType:
    """The Python package; both offer the same names.

    Raises:
        UserError: it is not installed, or too old.
    """
    if flavour == "classic":
        module = require_extra("tensorrt", "tensorrt-classic")
        if int(module.__version__.split(".")[0]) < CLASSIC_SINCE:
            raise UserError(
                f"TensorRT {module.__version__} is too old, wanted {CLASSIC_SINCE} or newer (JetPack 6.1 brings 10.3)."
            )
        return module
    name = "tensorrt_rtx" if importlib.util.find_spec("tensorrt_rtx") else "tensorrt_rtx_bindings"
    return require_extra(name, "tensorrt")


@functools.cache
def tensorrt_logger(flavour: Flavour) -> Any:
    """TensorRT's messages as `logging` records; the last errors are kept for messages to people, see `last_errors`.

    One for the process: TensorRT keeps the first that it gets for some of its messages.
    """
    trt: Any = tensorrt_module(flavour)
    severity = trt.ILogger.Severity
    levels = {
        severity.INTERNAL_ERROR: logging.ERROR,
        severity.ERROR: logging.ERROR,
        severity.WARNING: logging.WARNING,
        severity.INFO: logging.DEBUG,
    }

    class Log(trt.ILogger):
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.errors: list[str] = []

        def log(self, severity: Any, msg: str) -> None:
            level = levels.get(severity)
            if level == logging.ERROR:
                self.errors.append(msg)
                level = logging.DEBUG  # it is part of the exception that follows
            if "has Int64 binding" in msg:  # said of every int64 input, which `border_spec` sees to
                level = logging.DEBUG
            if level is not None:
                log.log(level, "%s: %s", NAMES[flavour], msg)

    return Log()


def last_errors(logger: Any) -> str:
    """What TensorRT complained about since the last call."""
    told = list(dict.fromkeys(logger.errors))[-_KEPT_MESSAGES:]
    logger.errors.clear()
    return " ".join(text if len(text) < 600 else f"{text[:600]}…" for text in told) or "It gave no reason."


def border_spec(name: str, shape: Sequence[int], dtype: Any) -> TensorSpec:
    """Describe an input or output of a network or engine, whose free dimensions are -1.

    Raises:
        UserError: of a type that does not cross the border, or with another free dimension than the rows.
    """
    if dtype.name not in _BORDER_TYPES:
        raise UserError(
            f"'{name}' is {dtype.name.lower()}, and only {', '.join(_BORDER_TYPES.values())} cross a graph's border. "
            "Export the graph again with float32 inputs and outputs; lower precisions stay inside."
        )
    if any(n < 0 for n in shape[1:]):
        raise UserError(f"'{name}' has shape {tuple(shape)}: only the first dimension, the rows, may be free.")
    return TensorSpec(name, tuple(None if n < 0 else n for n in shape), _BORDER_TYPES[dtype.name])


def cache_name(plan: bytes, gpu: PresentGpu) -> str:
    """File name of a plan's runtime cache: what is compiled for one GPU and driver serves no other."""
    where = re.sub(r"[^a-z0-9]+", "-", gpu.name.lower()).strip("-")
    return f"{hashlib.sha256(plan).hexdigest()[:16]}-{where}-cuda{gpu.driver}.cache"


def next_launch(runs: int, captured: bool, capturable: bool) -> Launch:
    """How a run is launched: TensorRT finishes its own set-up in the first, and only then a graph can be captured."""
    if captured:
        return "replay"
    return "capture" if capturable and runs > 0 else "plain"


def check_plan_fits(path: Path, capabilities: Sequence[str], gpu: PresentGpu) -> None:
    """Raise a `UserError` if a plan was built for other compute capabilities than the GPU's."""
    if not covers(capabilities, gpu.capability):
        family = FAMILIES.get(gpu.capability)
        raise UserError(
            f"{path} was built for {', '.join(capabilities)}; the GPU here, {gpu.name}, is {family or gpu.capability}. "
            f"Export the engine again for {gpu.capability}; docs/tensorrt.md says which package covers it."
        )


def invalid_reasons(trt: ModuleType, diagnostics: int) -> str:
    """The names of the bits in TensorRT-RTX's diagnostics of a plan, in words."""
    kinds = trt.EngineInvalidityDiagnostics.__members__.values()
    return ", ".join(k.name.lower().replace("_", " ") for k in kinds if diagnostics & int(k)) or "no reason given"


class _Lane:
    """An execution context for one number of rows.

    Its shapes and addresses never change after set-up: a captured graph is only valid as long as they do not.
    """

    def __init__(self, context: Any) -> None:
        self.context = context
        self.runs = 0
        self.graph: Any = None

    def close(self) -> None:
        if self.graph is not None:
            call("cudaGraphExecDestroy", self.graph)
            self.graph = None
        self.context = None


class TensorRtSession(Session):
    """A plan on the GPU: buffers allocated once, one stream, and a CUDA graph per number of rows where it is allowed.

    With TensorRT-RTX the graph is its own (whole-graph capture inside `execute_async_v3`); with classic TensorRT it is
    captured here and holds the copies to and from the device, too.

    Args:
        path: of the plan.
        flavour: which TensorRT built it.
        cache: folder for what TensorRT-RTX compiles at the first load on a GPU; written by `warmup` and `close`.
            Without it every process compiles again, which takes seconds.
        cuda_graph: whether to use CUDA graphs.
        capabilities: what the plan was built for, such as ``sm89``; empty where that is not known.

    Raises:
        UserError: no GPU or driver, a missing package, a plan for another GPU, TensorRT version or flavour.
    """

    def __init__(
        self,
        path: Path,
        flavour: Flavour = "rtx",
        *,
        cache: Path | None = None,
        cuda_graph: bool = True,
        capabilities: Sequence[str] = (),
    ) -> None:
        self.name = "tensorrt_rtx" if flavour == "rtx" else "tensorrt"
        gpu = _gpu_for(path, capabilities)
        check_plan_fits(path, capabilities, gpu)
        self._path, self._flavour = path, flavour
        self._trt, self._logger = tensorrt_module(flavour), tensorrt_logger(flavour)
        self._lanes: OrderedDict[int, _Lane] = OrderedDict()
        with contextlib.ExitStack() as cleanup:
            self._stream = call("cudaStreamCreateWithFlags", cuda_runtime().cudaStreamNonBlocking)
            cleanup.callback(call, "cudaStreamDestroy", self._stream)
            plan = path.read_bytes()
            self._engine = self._load(plan)
            self.inputs, self.outputs = self._borders()
            self._rows = self._profile_rows()
            self.max_rows = self._rows[1]
            self._buffers: dict[str, Buffer] = {}
            for spec in (*self.inputs, *self.outputs):
                self._buffers[spec.name] = Buffer(spec, self._rows[1])
                cleanup.callback(self._buffers[spec.name].close)
            self._graphs = cuda_graph
            self._config, self._cache, self._cache_file = self._runtime_config(cache, plan, gpu)
            cleanup.callback(self._drop_lanes)
            self._lane(self._rows[1])
            self._cleanup = cleanup.pop_all()

    def _load(self, plan: bytes) -> Any:
        self._runtime = self._trt.Runtime(self._logger)
        self._logger.errors.clear()
        if self._flavour == "rtx":
            validity, diagnostics = self._runtime.get_engine_validity(plan)
            if validity == self._trt.EngineValidity.INVALID:
                self._refuse(invalid_reasons(self._trt, diagnostics))
            if validity == self._trt.EngineValidity.SUBOPTIMAL:
                log.warning("%s may be slower than a plan built for this GPU.", self._path)
        engine = self._runtime.deserialize_cuda_engine(plan)
        if engine is None:
            self._refuse("it cannot be deserialised")
        return engine

    def _refuse(self, reason: str) -> NoReturn:
        raise UserError(
            f"{self._path} does not fit {NAMES[self._flavour]} {self._trt.__version__} on this machine: {reason}. "
            f"{last_errors(self._logger)} Export the engine again for this GPU and version."
        )

    def _borders(self) -> tuple[tuple[TensorSpec, ...], tuple[TensorSpec, ...]]:
        engine, mode = self._engine, self._trt.TensorIOMode
        names = [engine.get_tensor_name(i) for i in range(engine.num_io_tensors)]
        specs = {n: border_spec(n, tuple(engine.get_tensor_shape(n)), engine.get_tensor_dtype(n)) for n in names}
        inputs = tuple(specs[n] for n in names if engine.get_tensor_mode(n) == mode.INPUT)
        return inputs, tuple(specs[n] for n in names if engine.get_tensor_mode(n) == mode.OUTPUT)

    def _profile_rows(self) -> tuple[int, int]:
        """The fewest and most rows that the plan takes; (1, 1) where their number is fixed."""
        ranges = [self._engine.get_tensor_profile_shape(spec.name, 0) for spec in self.inputs if None in spec.shape]
        if not ranges:
            return 1, 1
        return max(int(low[0]) for low, _, _ in ranges), min(int(high[0]) for _, _, high in ranges)

    def _runtime_config(self, folder: Path | None, plan: bytes, gpu: PresentGpu) -> tuple[Any, Any, Path | None]:
        """TensorRT-RTX's settings, its cache of compiled kernels, and the cache's file; classic TensorRT has none."""
        if self._flavour == "classic":
            return None, None, None
        config = self._engine.create_runtime_config()
        # Compiled in warm-up, not swapped in during later calls: latency and the last bits stay the same.
        config.dynamic_shapes_kernel_specialization_strategy = self._trt.DynamicShapesKernelSpecializationStrategy.EAGER
        if folder is None:
            return config, None, None
        cache, file = config.create_runtime_cache(), folder / cache_name(plan, gpu)
        if file.is_file() and not cache.deserialize(file.read_bytes()):
            log.warning("%s does not fit this GPU, driver or TensorRT-RTX; it is written anew.", file)
        if not config.set_runtime_cache(cache):
            log.warning("TensorRT-RTX took no runtime cache: every process compiles its kernels again.")
            return config, None, None
        return config, cache, file

    def _context(self) -> Any:
        if self._flavour == "classic":
            context = self._engine.create_execution_context()
        else:
            strategy = self._trt.CudaGraphStrategy
            self._config.cuda_graph_strategy = strategy.WHOLE_GRAPH_CAPTURE if self._graphs else strategy.DISABLED
            context = self._engine.create_execution_context(self._config)
        if context is None:
            raise UserError(
                f"{NAMES[self._flavour]} cannot make room on the GPU for {self._path}: {last_errors(self._logger)} "
                "Close other programs that use the GPU (nvidia-smi lists them), or export the engine for fewer rows."
            )
        return context

    def _bound_context(self, rows: int) -> Any:
        """A context whose shapes and addresses are set."""
        context = self._context()
        for spec in self.inputs:
            self._must(context.set_input_shape(spec.name, shape_of(spec, rows)), f"set the shape of '{spec.name}'")
        for name, buffer in self._buffers.items():
            self._must(context.set_tensor_address(name, buffer.address), f"bind '{name}'")
        missing = context.infer_shapes()
        self._must(not missing, f"infer shapes from {missing}")
        for spec in self.outputs:
            found = tuple(context.get_tensor_shape(spec.name))
            self._must(found == shape_of(spec, rows), f"infer the shape of '{spec.name}', which is {found}")
        return context

    def _must(self, done: bool, what: str) -> None:
        if not done:
            raise RuntimeError(f"{self._path}: {NAMES[self._flavour]} cannot {what}: {last_errors(self._logger)}")

    def _lane(self, rows: int) -> _Lane:
        """The context for so many rows, kept for the next call."""
        if rows not in self._lanes:
            if len(self._lanes) >= MAX_LANES:
                self._lanes.popitem(last=False)[1].close()
            context = self._bound_context(rows)
            if self._graphs and self._flavour == "rtx" and not context.is_stream_capturable(int(self._stream)):
                log.info("%s holds control flow that no CUDA graph takes; it runs without one.", self._path)
                self._graphs = False
                context = self._bound_context(rows)
            self._lanes[rows] = _Lane(context)
        self._lanes.move_to_end(rows)
        return self._lanes[rows]

    def _enqueue(self, lane: _Lane, rows: int) -> None:
        for spec in self.inputs:
            self._buffers[spec.name].upload(rows, self._stream)
        self._must(lane.context.execute_async_v3(int(self._stream)), "run")
        for spec in self.outputs:
            self._buffers[spec.name].download(rows, self._stream)

    def _capture(self, lane: _Lane, rows: int) -> Any:
        """The CUDA graph of one run, or None where the plan does not allow one."""
        # Thread-local: what other threads do with the GPU meanwhile cannot spoil the capture.
        call(
            "cudaStreamBeginCapture",
            self._stream,
            cuda_runtime().cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal,
        )
        failure: Exception | None = None
        try:
            self._enqueue(lane, rows)
        except RuntimeError as error:
            failure = error
        try:
            graph = call("cudaStreamEndCapture", self._stream)
        except CudaError as error:
            failure = failure or error
        if failure is not None:
            cuda_runtime().cudaGetLastError()
            log.warning("%s runs without a CUDA graph: %s", self._path, failure)
            return None
        try:
            return call("cudaGraphInstantiate", graph, 0)
        finally:
            call("cudaGraphDestroy", graph)

    def _launch(self, lane: _Lane, rows: int) -> None:
        step = next_launch(lane.runs, lane.graph is not None, self._graphs and self._flavour == "classic")
        lane.runs += 1
        if step == "capture":
            lane.graph = self._capture(lane, rows)
            self._graphs = lane.graph is not None
        if lane.graph is not None:
            call("cudaGraphLaunch", lane.graph, self._stream)
        else:
            self._enqueue(lane, rows)

    def run(self, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        rows = rows_of(self.inputs, inputs, self._rows)
        lane = self._lane(rows)
        for spec in self.inputs:
            np.copyto(self._buffers[spec.name].host(rows), inputs[spec.name])
        self._launch(lane, rows)
        call("cudaStreamSynchronize", self._stream)
        return {spec.name: self._buffers[spec.name].host(rows).copy() for spec in self.outputs}

    def warmup(self, runs: int = 3, rows: int = 1) -> None:
        super().warmup(runs, rows)
        self._save_cache()

    def _save_cache(self) -> None:
        if self._cache is None or self._cache_file is None:
            return
        content = bytes(memoryview(self._cache.serialize()))
        try:
            replace_file(self._cache_file, content)
        except OSError as error:
            log.warning("%s cannot be written (%s): the next start compiles again.", self._cache_file, error)

    def _drop_lanes(self) -> None:
        while self._lanes:
            self._lanes.popitem()[1].close()
        self._config = self._cache = self._engine = self._runtime = None

    def close(self) -> None:
        self._save_cache()  # with what later numbers of rows added
        self._cleanup.close()


def _gpu_for(path: Path, capabilities: Sequence[str]) -> PresentGpu:
    try:
        return present_gpu()
    except UserError as error:
        needed = f" for {', '.join(capabilities)}" if capabilities else ""
        raise UserError(
            f"{path} is a TensorRT plan{needed} and runs on an NVIDIA GPU only. {error} "
            "On a machine without one use an engine of ONNX Runtime or OpenVINO."
        ) from error


def replace_file(path: Path, content: bytes) -> None:
    """Write a file so that nobody sees half of it; leave it alone where it holds this already."""
    if path.is_file() and path.read_bytes() == content:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.{os.getpid()}")
    partial.write_bytes(content)
    os.replace(partial, path)
