"""The shortest time that a chunk can take on a machine (roofline, Williams et al. 2009).

Whatever the software, the weights must come from memory and the multiplications must be made:

    time of a stage >= max(bytes / bandwidth, FLOPs / peak)

and the stages of a chunk follow each other. Weights that fit a cache come from there from the second network call on.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from robopolicy.benchmarking.ceilings import Ceilings
from robopolicy.benchmarking.work import ChunkWork, Work

BYTES = {"fp32": 4, "fp16": 2, "bf16": 2, "int8": 1}
"""Bytes of a weight by an engine's precision."""


@dataclass(frozen=True)
class Bound:
    """The shortest time of a stage.

    Attributes:
        memory: seconds for all bytes.
        compute: seconds for all FLOPs.
    """

    memory: float
    compute: float

    @property
    def seconds(self) -> float:
        return max(self.memory, self.compute)

    @property
    def binds(self) -> Literal["memory", "compute"]:
        return "memory" if self.memory >= self.compute else "compute"


@dataclass(frozen=True)
class ChunkBound:
    """The shortest time of a chunk: encoding, then all network calls."""

    encode: Bound
    denoise: Bound

    @property
    def seconds(self) -> float:
        return self.encode.seconds + self.denoise.seconds

    @property
    def binds(self) -> str:
        """What limits the longer stage."""
        return max(self.encode, self.denoise, key=lambda bound: bound.seconds).binds


def chunk_bound(work: ChunkWork, ceilings: Ceilings, precision: str) -> ChunkBound:
    """The shortest time of a chunk.

    Args:
        work: what it costs.
        ceilings: what the machine can do.
        precision: of weights and products, a key of `BYTES`.
    """
    total = working_sets(work, precision)[0]
    encode = stage_bound([work.encode], [total], ceilings, precision)
    # the first call finds in the caches what the last chunk left there; the others what the call before left
    sets = [total, *(BYTES[precision] * call.weights for call in work.denoise[1:])]
    return ChunkBound(encode, stage_bound(work.denoise, sets, ceilings, precision))


def stage_bound(calls: Sequence[Work], sets: Sequence[float], ceilings: Ceilings, precision: str) -> Bound:
    """The shortest time of calls that follow each other.

    Args:
        sets: for each call, bytes that are read again and again, out of which its weights come.
    """
    memory = 0.0
    for call, working_set in zip(calls, sets, strict=True):
        passing = 2 * BYTES["fp32"] * call.activations  # written once, read once
        memory += BYTES[precision] * call.weights / ceilings.bandwidth_at(working_set)
        memory += passing / ceilings.bandwidth_at(0)
    return Bound(memory, sum(call.flops for call in calls) / ceilings.flops_at(precision))


def working_sets(work: ChunkWork, precision: str) -> tuple[int, int]:
    """Bytes of all weights of a chunk, and of those that its largest network call reads."""
    call = max((call.weights for call in work.denoise), default=0)
    return BYTES[precision] * (work.encode.weights + call), BYTES[precision] * call
