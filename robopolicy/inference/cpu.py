"""What the processor of this machine can do."""

from __future__ import annotations

from pathlib import Path

_CPU_FILE = Path("/proc/cpuinfo")
# What a compiler uses by itself under -march=native; other flags of a CPU do not decide whether a program runs.
_INSTRUCTIONS = frozenset(
    """ssse3 sse4_1 sse4_2 popcnt movbe abm bmi1 bmi2 f16c fma avx avx2 avx_vnni avx512f avx512bw avx512cd avx512dq
    avx512vl avx512ifma avx512vbmi avx512_vbmi2 avx512_vnni avx512_bitalg avx512_vpopcntdq avx512_bf16 avx512_fp16
    asimd asimdhp asimddp asimdfhm atomics fphp bf16 i8mm sve sve2 svebf16 svei8mm""".split()  # noqa: SIM905
)


def cpu_instructions(cpuinfo: str | None = None) -> list[str]:
    """Instruction sets of a CPU that compiled code may use; empty where they cannot be found out.

    Args:
        cpuinfo: the text of Linux' ``/proc/cpuinfo``; None: this machine's.
    """
    if cpuinfo is None:
        cpuinfo = _CPU_FILE.read_text() if _CPU_FILE.is_file() else ""
    for line in cpuinfo.splitlines():
        name, _, flags = line.partition(":")
        if name.strip() in ("flags", "Features"):
            return sorted(_INSTRUCTIONS.intersection(flags.split()))
    return []
