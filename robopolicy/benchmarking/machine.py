"""What the numbers of a benchmark depend on: processor, instruction sets, memory, versions."""

from __future__ import annotations

import os
import platform
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import psutil

import robopolicy

_ISA = (
    *("avx", "avx2", "fma", "f16c", "avx512f", "avx512_vnni", "avx_vnni", "avx512_bf16", "avx512_fp16"),
    *("amx_bf16", "amx_int8", "asimd", "asimdhp", "asimddp", "sve", "bf16", "i8mm"),
)
"""Instruction sets that matrix products use, as Linux names them on x86-64 and ARM."""
_PACKAGES = ("torch", "onnxruntime", "onnxruntime-gpu", "openvino", "tensorrt", "tensorrt-rtx-cu13-libs", "numpy")


@dataclass(frozen=True)
class Machine:
    """A computer and what is installed on it.

    Attributes:
        processor: its name.
        isa: instruction sets for matrix products.
        cores: that this process may use.
        memory_gb: of the whole machine, GiB.
        system: operating system.
        python: version.
        versions: of the inference packages that are installed.
        load: processes that wanted to run in the minute before, on average: above 0.5 the machine was busy.
    """

    processor: str
    isa: tuple[str, ...]
    cores: int
    memory_gb: float
    system: str
    python: str
    versions: dict[str, str]
    load: float


def this_machine() -> Machine:
    """Describe the machine that this process runs on."""
    return Machine(
        processor_name(),
        instruction_sets(),
        len(psutil.Process().cpu_affinity()) if hasattr(psutil.Process, "cpu_affinity") else os.cpu_count() or 1,
        round(psutil.virtual_memory().total / 2**30, 1),
        platform.platform(terse=True),
        platform.python_version(),
        {"robopolicy": robopolicy.__version__} | _versions(),
        round(psutil.getloadavg()[0], 2),
    )


def processor_name() -> str:
    return _cpuinfo().get("model name") or platform.processor() or platform.machine()


def instruction_sets() -> tuple[str, ...]:
    """Those of `_ISA` that the processor has; empty where the system does not tell."""
    info = _cpuinfo()
    flags = set((info.get("flags") or info.get("Features") or "").split())
    return tuple(name for name in _ISA if name in flags)


def _cpuinfo() -> dict[str, str]:
    """The first processor's entries in Linux's table."""
    file = Path("/proc/cpuinfo")
    if not file.exists():
        return {}
    pairs = (line.partition(":") for line in file.read_text().partition("\n\n")[0].splitlines())
    return {key.strip(): value.strip() for key, _, value in pairs}


def _versions() -> dict[str, str]:
    found = {}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found
