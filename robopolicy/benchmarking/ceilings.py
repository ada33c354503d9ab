"""What a machine can do at best, measured: reading memory, and multiplying matrices."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch

_SIZES_MIB = (0.25, 1, 4, 16, 64, 256)
_COLUMNS = 1024


@dataclass(frozen=True)
class Ceilings:
    """Limits of a device with a number of threads.

    Attributes:
        device: ``cpu`` or ``cuda``.
        threads: of the CPU.
        bandwidth: bytes/s of reading an array again and again, by the array's bytes: caches count.
        flops: FLOP/s of the product of two large matrices, by precision.
        gemv_flops: FLOP/s of a matrix of the largest array's size times a vector, fp32: what one robot's chunk is like.
    """

    device: str
    threads: int
    bandwidth: dict[int, float]
    flops: dict[str, float]
    gemv_flops: float

    def bandwidth_at(self, working_set: float) -> float:
        """Bytes/s at which an array of so many bytes can be read again and again.

        It is the best of what was measured from the next smaller array on: a limit must not be too low, and noise only
        ever slows a measurement.
        """
        sizes = sorted(self.bandwidth)
        start = max((size for size in sizes if size <= working_set), default=sizes[0])
        return max(self.bandwidth[size] for size in sizes if size >= start)

    def best(self, other: Ceilings) -> Ceilings:
        """The higher of two measurements of one device for the same sizes, number by number: noise only ever slows."""
        return Ceilings(
            self.device,
            self.threads,
            {size: max(rate, other.bandwidth[size]) for size, rate in self.bandwidth.items()},
            {precision: max(rate, other.flops[precision]) for precision, rate in self.flops.items()},
            max(self.gemv_flops, other.gemv_flops),
        )

    def flops_at(self, precision: str) -> float:
        """FLOP/s in a precision; never below fp32, which an engine may use instead."""
        return max(self.flops["fp32"], self.flops.get(precision, 0.0))


def measure_ceilings(
    threads: int = 1, working_sets: Sequence[int] = (), precisions: Sequence[str] = ("fp32",), device: str = "cpu"
) -> Ceilings:
    """Measure this machine; takes about two seconds.

    Args:
        threads: CPU threads to use.
        working_sets: bytes of arrays to read, beside some usual sizes.
        precisions: ``fp32``, ``fp16``, ``bf16``: of the matrix products. Others (int8) are not measured.
        device: ``cpu``, or a CUDA device.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        sizes = {round(mib * 2**20) for mib in _SIZES_MIB} | {max(int(size), 4 * _COLUMNS) for size in working_sets}
        with torch.inference_mode():
            bandwidth = {size: read_bandwidth(size, device) for size in sorted(sizes)}
            flops = {p: product_flops(p, device) for p in {"fp32": 0, **dict.fromkeys(precisions)} if p in _DTYPES}
            gemv = gemv_flops(max(sizes), device)
    finally:
        torch.set_num_threads(before)
    return Ceilings(torch.device(device).type, threads, bandwidth, flops, gemv)


_DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def read_bandwidth(size: int, device: str = "cpu") -> float:
    """Bytes/s of reading an fp32 array of so many bytes, the best of several ways to read it."""
    rows = max(1, size // (4 * _COLUMNS))
    array, vector = torch.ones(rows, _COLUMNS, device=device), torch.ones(_COLUMNS, device=device)
    ways: list[Callable[[], object]] = [array.sum, array.amax, lambda: array.mv(vector)]
    return array.nbytes / min(shortest(way, device) for way in ways)


def gemv_flops(size: int, device: str = "cpu") -> float:
    """FLOP/s of an fp32 matrix of so many bytes times a vector."""
    array = torch.ones(size // (4 * _COLUMNS), _COLUMNS, device=device)
    vector = torch.ones(_COLUMNS, device=device)
    return 2 * array.numel() / shortest(lambda: array.mv(vector), device)


def product_flops(precision: str, device: str = "cpu") -> float:
    """FLOP/s of the product of two large square matrices."""
    best = 0.0
    # stops early where a processor has no instructions for a short format: it is then a hundred times slower
    for side in (256, 512, 1024) if device == "cpu" else (2048, 8192):
        a = torch.ones(side, side, device=device, dtype=_DTYPES[precision])
        seconds = shortest(partial(torch.mm, a, a), device)
        best = max(best, 2 * side**3 / seconds)
        if seconds > 0.05:
            break
    return best


def shortest(call: Callable[[], object], device: str = "cpu", at_least: float = 0.03, runs: int = 5) -> float:
    """The shortest of several durations of a call, in seconds, after one that does not count.

    Args:
        at_least: seconds to go on for; a call that is longer is still made ``runs`` times.
    """
    wait = torch.cuda.synchronize if torch.device(device).type == "cuda" else lambda: None
    call()
    wait()
    best, began, done = math.inf, time.perf_counter(), 0
    while done < runs or time.perf_counter() - began < at_least:
        start = time.perf_counter()
        call()
        wait()
        best = min(best, time.perf_counter() - start)
        done += 1
    return best
