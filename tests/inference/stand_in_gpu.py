"""A GPU and a TensorRT in a few lines of Python that keep the rules of the real ones and complain where one is broken.

For machines without a GPU: what a session asks for, in which order, and what it gives back at the end. The engine adds
one to its input ``x`` of any number of rows. Rules kept: work is done when the stream is waited for; a capture runs
nothing; a graph holds the addresses and shapes of its capture and dies with a change of its context; nothing is freed
twice or forgotten.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from enum import Enum
from types import SimpleNamespace

import numpy as np

from robopolicy.inference.device_memory import CudaError, PresentGpu

GPU = PresentGpu("Stand-in 1", "sm89", "13.0")


class Gpu:
    """Memory, one kind of stream, and graphs, behind the functions of the CUDA runtime.

    Args:
        memory: bytes that can be allocated.
        capture_fails: as for an engine with control flow on the device.
    """

    def __init__(self, memory: int = 1 << 20, capture_fails: bool = False) -> None:
        self.memory, self.capture_fails = memory, capture_fails
        self.blocks: dict[int, ctypes.Array] = {}
        self.alive: set[object] = set()
        self.queue: list[Callable[[], None]] = []
        self.captured: list[Callable[[], None]] | None = None
        self.launches = {"graph": 0, "plain": 0}

    def call(self, function: str, *arguments):
        return getattr(self, function)(*arguments)

    def submit(self, work: Callable[[], None]) -> None:
        (self.queue if self.captured is None else self.captured).append(work)

    def cudaMalloc(self, size):
        if sum(len(b) for b in self.blocks.values()) + size > self.memory:
            raise CudaError("cudaMalloc", "cudaErrorMemoryAllocation", "out of memory")
        block = (ctypes.c_uint8 * size)()
        self.blocks[ctypes.addressof(block)] = block
        return ctypes.addressof(block)

    cudaMallocHost = cudaMalloc

    def cudaFree(self, address):
        del self.blocks[address]

    cudaFreeHost = cudaFree

    def cudaStreamCreateWithFlags(self, flags):
        assert flags == "non-blocking"
        self.alive.add("stream")
        return 77

    def cudaStreamDestroy(self, stream):
        self.alive.remove("stream")

    def cudaMemcpyAsync(self, to, source, size, kind, stream):
        assert stream == 77 and size <= len(self.blocks[to]) and size <= len(self.blocks[source])
        self.submit(lambda: ctypes.memmove(to, source, size))

    def cudaStreamSynchronize(self, stream):
        assert self.captured is None, "waiting spoils a capture"
        while self.queue:
            self.queue.pop(0)()

    def cudaStreamBeginCapture(self, stream, mode):
        assert not self.queue and mode == "thread-local"
        self.captured = []

    def cudaStreamEndCapture(self, stream):
        work, self.captured = self.captured, None
        if self.capture_fails:
            raise CudaError("cudaStreamEndCapture", "cudaErrorStreamCaptureInvalidated", "invalidated")
        graph = SimpleNamespace(work=work)
        self.alive.add(id(graph))
        return graph

    def cudaGraphInstantiate(self, graph, flags):
        executable = SimpleNamespace(work=graph.work)
        self.alive.add(id(executable))
        return executable

    def cudaGraphDestroy(self, graph):
        self.alive.remove(id(graph))

    cudaGraphExecDestroy = cudaGraphDestroy

    def cudaGraphLaunch(self, graph, stream):
        assert id(graph) in self.alive
        self.launches["graph"] += 1
        self.queue += graph.work

    @property
    def runtime(self):
        return SimpleNamespace(
            cudaStreamNonBlocking="non-blocking",
            cudaMemcpyKind=SimpleNamespace(cudaMemcpyHostToDevice=1, cudaMemcpyDeviceToHost=2),
            cudaStreamCaptureMode=SimpleNamespace(cudaStreamCaptureModeThreadLocal="thread-local"),
            cudaGetLastError=lambda: None,
        )


class Context:
    def __init__(self, gpu: Gpu, strategy: str | None, capturable: bool) -> None:
        self.gpu, self.strategy, self.capturable = gpu, strategy, capturable
        self.shape: tuple[int, ...] | None = None
        self.addresses: dict[str, int] = {}
        self.version = 0

    def set_input_shape(self, name, shape):
        self.shape, self.version = shape, self.version + 1
        return name == "x"

    def set_tensor_address(self, name, address):
        self.addresses[name], self.version = address, self.version + 1
        return name in "xy"

    def infer_shapes(self):
        return [] if self.shape else ["x"]

    def get_tensor_shape(self, name):
        return self.shape

    def is_stream_capturable(self, stream):
        return self.capturable

    def execute_async_v3(self, stream):
        count, version = int(np.prod(self.shape)), self.version
        source, to = (self.gpu.blocks[self.addresses[name]] for name in "xy")
        self.gpu.launches["plain"] += self.gpu.captured is None

        def work() -> None:
            assert self.version == version, "the context changed after its graph was captured"
            values = np.frombuffer(source, np.float32, count) + 1
            ctypes.memmove(to, values.ctypes.data, values.nbytes)

        self.gpu.submit(work)
        return True


class RuntimeCache:
    def __init__(self) -> None:
        self.content = b"empty"

    def deserialize(self, content):
        fits = content == b"compiled"
        self.content = content if fits else self.content
        return fits

    def serialize(self):
        return b"compiled"


class Engine:
    """Takes ``x`` and gives ``y``, (rows, 2), for 1 to 8 rows."""

    num_io_tensors = 2

    def __init__(self, gpu: Gpu, capturable: bool) -> None:
        self.gpu, self.capturable = gpu, capturable
        self.contexts: list[Context] = []
        self.cache = RuntimeCache()

    def get_tensor_name(self, i):
        return "xy"[i]

    def get_tensor_shape(self, name):
        return (-1, 2)

    def get_tensor_dtype(self, name):
        return Enum("DataType", ["FLOAT"]).FLOAT

    def get_tensor_mode(self, name):
        return "in" if name == "x" else "out"

    def get_tensor_profile_shape(self, name, profile):
        return [(1, 2), (1, 2), (8, 2)]

    def create_runtime_config(self):
        return SimpleNamespace(create_runtime_cache=lambda: self.cache, set_runtime_cache=lambda cache: True)

    def create_execution_context(self, config=None):
        strategy = None if config is None else config.cuda_graph_strategy
        self.contexts.append(Context(self.gpu, strategy, self.capturable))
        return self.contexts[-1]


def stand_in_tensorrt(engine: Engine | None):
    """The module's names that a session uses; None for the engine is a plan that cannot be deserialised."""

    class Runtime:
        def __init__(self, logger) -> None:
            pass

        def get_engine_validity(self, plan):
            return "valid", 0

        def deserialize_cuda_engine(self, plan):
            return engine

    return SimpleNamespace(
        __version__="0",
        Runtime=Runtime,
        EngineValidity=SimpleNamespace(VALID="valid", SUBOPTIMAL="suboptimal", INVALID="invalid"),
        TensorIOMode=SimpleNamespace(INPUT="in", OUTPUT="out"),
        DynamicShapesKernelSpecializationStrategy=SimpleNamespace(EAGER="eager"),
        CudaGraphStrategy=SimpleNamespace(WHOLE_GRAPH_CAPTURE="whole", DISABLED="disabled"),
    )
