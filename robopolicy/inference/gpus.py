"""NVIDIA GPUs by compute capability: which boards they are and in which number formats they compute."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from robopolicy.errors import UserError, did_you_mean


@dataclass(frozen=True)
class GpuFamily:
    """GPUs of one compute capability.

    Attributes:
        capability: such as ``sm89``.
        name: of the architecture.
        boards: examples.
    """

    capability: str
    name: str
    boards: str

    @property
    def formats(self) -> frozenset[str]:
        """Number formats that its arithmetic takes, as ONNX names them."""
        number = int(self.capability.removeprefix("sm"))
        formats = {"float32", "float16", "int8"}
        return frozenset(formats | ({"bfloat16"} if number >= 80 else set()) | ({"float8"} if number >= 89 else set()))

    def __str__(self) -> str:
        return f"{self.capability} ({self.name}: {self.boards})"


_FAMILIES = (
    GpuFamily("sm75", "Turing", "RTX 20, T4"),
    GpuFamily("sm80", "Ampere", "A100, A30"),
    GpuFamily("sm86", "Ampere", "RTX 30, RTX A6000, A10"),
    GpuFamily("sm87", "Jetson Orin", "AGX Orin, Orin NX, Orin Nano"),
    GpuFamily("sm89", "Ada Lovelace", "RTX 40, RTX 6000 Ada, L4, L40S"),
    GpuFamily("sm90", "Hopper", "H100, H200, GH200"),
    GpuFamily("sm100", "Blackwell data centre", "B200, GB200"),
    GpuFamily("sm103", "Blackwell Ultra", "B300, GB300"),
    GpuFamily("sm110", "Jetson Thor", "AGX Thor, T5000"),
    GpuFamily("sm120", "Blackwell", "RTX 50, RTX PRO 6000 Blackwell"),
    GpuFamily("sm121", "Grace Blackwell", "GB10 in DGX Spark"),
)
FAMILIES = {family.capability: family for family in _FAMILIES}


def gpu_families(capabilities: Sequence[str]) -> tuple[GpuFamily, ...]:
    """The families of these compute capabilities, each once.

    Raises:
        UserError: one is unknown.
    """
    unknown = [name for name in capabilities if name not in FAMILIES]
    if unknown:
        raise UserError(
            f"No GPU of compute capability '{unknown[0]}' is known; wanted names such as sm89."
            f"{did_you_mean(unknown[0], FAMILIES)} See docs/tensorrt.md for which board has which."
        )
    return tuple(FAMILIES[name] for name in dict.fromkeys(capabilities))


def covers(capabilities: Sequence[str], present: str) -> bool:
    """Whether a plan for these compute capabilities was built for the present one; where none is named, any GPU."""
    return not capabilities or present in capabilities
