"""What a policy costs: parameters, floating-point operations and network calls of a chunk, and its latency here."""

from __future__ import annotations

import platform
import statistics
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from robopolicy.nets.denoiser import Denoiser
from robopolicy.policies.base import Policy
from robopolicy.spec import GOAL, TASK, PolicySpec


@dataclass(frozen=True)
class Cost:
    """What one chunk of one robot costs, independent of the machine.

    Attributes:
        parameters: of each part (encoder, denoiser, …).
        active_parameters: what one network call reads; less than the denoiser has where experts are chosen.
        network_calls: calls of the denoiser for a chunk.
        flops: floating-point operations of a chunk, observations included: two for each multiplication and addition
            of matrix products, convolutions and attention; element-wise operations are not counted.
    """

    parameters: dict[str, int]
    active_parameters: int
    network_calls: int
    flops: int

    @property
    def total_parameters(self) -> int:
        return sum(self.parameters.values())


@dataclass(frozen=True)
class Latency:
    """How long `Policy.act` takes for one robot on this machine.

    Attributes:
        median: seconds, over ``calls`` calls after a first one that does not count.
        slowest: seconds.
        calls: measured.
        device: its name.
        threads: CPU threads of torch.
    """

    median: float
    slowest: float
    calls: int
    device: str
    threads: int


def cost(policy: Policy) -> Cost:
    """Count a policy's parameters and operations with its present sampler."""
    denoiser = getattr(policy, "denoiser", None)
    parameters = parameters_by_part(policy)
    active = denoiser.active_parameters() if isinstance(denoiser, Denoiser) else sum(parameters.values())
    return Cost(parameters, active, policy.network_calls, chunk_flops(policy))


def parameters_by_part(policy: Policy) -> dict[str, int]:
    """Parameters of each module directly under the policy; those that two share count for the first."""
    counts: dict[str, int] = {}
    for name, parameter in policy.named_parameters():
        part = name.partition(".")[0]
        counts[part] = counts.get(part, 0) + parameter.numel()
    return counts


@torch.inference_mode()
def chunk_flops(policy: Policy) -> int:
    """Floating-point operations of one chunk for one robot, see `Cost`."""
    observations = {k: v.to(policy.device) for k, v in blank_observations(policy.spec).items()}
    policy.sample(observations, torch.Generator().manual_seed(0))  # fills tables that are kept between chunks
    # the counter knows attention as matrix products, but not the fused kernels of the CPU
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        policy.sample(observations, torch.Generator().manual_seed(0))
    return int(counter.get_total_flops())


def blank_observations(spec: PolicySpec, rows: int = 1) -> dict[str, Tensor]:
    """Zeros for `Policy.sample`: every key of the spec, goals and the first task included, ``rows`` rows."""

    def zeros(shape: tuple[int, ...], image: bool) -> Tensor:
        return torch.zeros(rows, *shape, dtype=torch.uint8 if image else torch.float32)

    blank = {k.key: zeros((spec.n_obs_steps, *k.shape), k.role == "image") for k in spec.observations}
    blank |= {GOAL + k.key: zeros(k.shape, k.role == "image") for k in spec.goals}
    return blank | ({TASK: torch.zeros(rows, dtype=torch.long)} if spec.tasks else {})


def act_latency(policy: Policy, calls: int = 20) -> Latency:
    """Time `Policy.act` for one robot; it ends with the actions on the CPU, so that all work is done."""
    observations: dict[str, np.ndarray] = {
        k: v.numpy() for k, v in blank_observations(policy.spec).items() if k != TASK
    }
    before = policy.instruction
    policy.instruction = policy.spec.tasks[0].instruction if policy.spec.tasks else None
    try:
        times = [_timed(policy, observations) for _ in range(calls + 1)][1:]
    finally:
        policy.instruction = before
    name = device_name(policy.device)
    return Latency(statistics.median(times), max(times), calls, name, torch.get_num_threads())


def _timed(policy: Policy, observations: dict[str, np.ndarray]) -> float:
    began = time.perf_counter()
    policy.act(observations, [torch.Generator().manual_seed(0)])
    return time.perf_counter() - began


def device_name(device: torch.device) -> str:
    """The GPU's or the processor's name."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
