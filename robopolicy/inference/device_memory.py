"""The CUDA runtime without torch: checked calls, the GPU that is there, and buffers for a graph's borders."""

from __future__ import annotations

import ctypes
import math
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import numpy as np

from robopolicy.errors import UserError, require_extra
from robopolicy.inference.session import TensorSpec


class CudaError(RuntimeError):
    """A call into the CUDA runtime failed.

    Attributes:
        name: of the error, such as ``cudaErrorMemoryAllocation``.
    """

    def __init__(self, function: str, name: str, text: str) -> None:
        super().__init__(f"{function}: {text} ({name})")
        self.name = name


def cuda_runtime() -> ModuleType:
    """NVIDIA's Python bindings of the CUDA runtime; raises a `UserError` where they are not installed."""
    return require_extra("cuda.bindings.runtime", "tensorrt")


def call(function: str, *arguments: Any) -> Any:
    """Call a function of the CUDA runtime.

    Returns:
        What it returns besides its error code: nothing, one value or a tuple.

    Raises:
        CudaError: the code is not success.
    """
    runtime = cuda_runtime()
    code, *values = getattr(runtime, function)(*arguments)
    if code != runtime.cudaError_t.cudaSuccess:
        raise CudaError(function, code.name, _error_text(runtime, code))
    if not values:
        return None
    return values[0] if len(values) == 1 else tuple(values)


def _error_text(runtime: ModuleType, code: Any) -> str:
    return runtime.cudaGetErrorString(code)[1].decode()


@dataclass(frozen=True)
class PresentGpu:
    """The GPU that this process computes on: the first that CUDA_VISIBLE_DEVICES leaves visible.

    Attributes:
        name: as the driver gives it.
        capability: such as ``sm89``.
        driver: newest version of CUDA that the driver takes, such as ``12.9``.
    """

    name: str
    capability: str
    driver: str


def present_gpu() -> PresentGpu:
    """Find the GPU.

    Raises:
        UserError: there is no GPU, or no driver that fits; the message says which.
    """
    runtime = cuda_runtime()
    driver = version_text(call("cudaDriverGetVersion"))
    code, count = runtime.cudaGetDeviceCount()
    if code != runtime.cudaError_t.cudaSuccess or count == 0:
        raise UserError(no_gpu_message(code.name, _error_text(runtime, code), driver, _built_for(runtime)))
    properties = call("cudaGetDeviceProperties", 0)
    name = properties.name.split(b"\0")[0].decode()
    return PresentGpu(name, f"sm{properties.major}{properties.minor}", driver)


def version_text(number: int) -> str:
    """CUDA's 12090 as ``12.9``; 0 where there is none."""
    return f"{number // 1000}.{number % 1000 // 10}" if number else "none"


def _built_for(runtime: ModuleType) -> str:
    return version_text(runtime.cudaRuntimeGetVersion()[1])


def no_gpu_message(name: str, text: str, driver: str, wanted: str) -> str:
    """Why no GPU can be used, and what to do.

    Args:
        name, text: CUDA's error.
        driver: version of CUDA that the driver takes, or ``none``.
        wanted: version of CUDA that the installed packages need.
    """
    if driver == "none":
        advice = "No NVIDIA driver is loaded. On a machine with a GPU install the driver, then try nvidia-smi"
    elif name == "cudaErrorInsufficientDriver":
        advice = f"The driver takes CUDA up to {driver}, the installed packages need {wanted}: update the driver"
    else:
        advice = "Check nvidia-smi, and that CUDA_VISIBLE_DEVICES does not hide the GPU"
    return f"No usable NVIDIA GPU on this machine ({name}: {text}). {advice}."


def shape_of(spec: TensorSpec, rows: int) -> tuple[int, ...]:
    """The shape of an input or output where the number of rows is known."""
    return tuple(rows if n is None else n for n in spec.shape)


def buffer_bytes(spec: TensorSpec, rows: int) -> int:
    """Bytes of an input or output with so many rows."""
    return math.prod(shape_of(spec, rows)) * np.dtype(spec.dtype).itemsize


class Buffer:
    """Device memory of one input or output, and page-locked host memory beside it; allocated once, for the most rows.

    Attributes:
        spec: what it holds.
        address: on the device.
    """

    def __init__(self, spec: TensorSpec, max_rows: int) -> None:
        self.spec, self.address, self._host_address = spec, 0, 0
        size = max(1, buffer_bytes(spec, max_rows))
        try:
            self.address = call("cudaMalloc", size)
            self._host_address = call("cudaMallocHost", size)
        except CudaError as error:
            self.close()
            if error.name != "cudaErrorMemoryAllocation":
                raise
            raise UserError(
                f"The GPU has no room for '{spec.name}' ({size} bytes for {max_rows} rows). Close other programs that "
                "use it (nvidia-smi lists them), or export the engine for fewer rows."
            ) from error
        self._host = np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(self._host_address))

    def host(self, rows: int) -> np.ndarray:
        """The page-locked memory, seen as an array of so many rows; the next run overwrites it."""
        used = self._host[: buffer_bytes(self.spec, rows)]
        return used.view(self.spec.dtype).reshape(shape_of(self.spec, rows))

    def upload(self, rows: int, stream: Any) -> None:
        """Queue the copy to the device."""
        kind = cuda_runtime().cudaMemcpyKind.cudaMemcpyHostToDevice
        call("cudaMemcpyAsync", self.address, self._host_address, buffer_bytes(self.spec, rows), kind, stream)

    def download(self, rows: int, stream: Any) -> None:
        """Queue the copy to the host."""
        kind = cuda_runtime().cudaMemcpyKind.cudaMemcpyDeviceToHost
        call("cudaMemcpyAsync", self._host_address, self.address, buffer_bytes(self.spec, rows), kind, stream)

    def close(self) -> None:
        """Free both; arrays from `host` cannot be used afterwards."""
        if self._host_address:
            call("cudaFreeHost", self._host_address)
        if self.address:
            call("cudaFree", self.address)
        self.address = self._host_address = 0
