"""Several processes: torchrun (or accelerate launch) starts them, torch.distributed averages their gradients."""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch
import torch.distributed as dist

from robopolicy.errors import UserError


@dataclass(frozen=True)
class Processes:
    """This process's place among all of them."""

    rank: int = 0
    world: int = 1
    device: torch.device = torch.device("cpu")

    @property
    def main(self) -> bool:
        return self.rank == 0

    @property
    def several(self) -> bool:
        return self.world > 1

    def barrier(self) -> None:
        if self.several:
            dist.barrier()

    def rows(self, batch_size: int) -> slice:
        """This process's rows of a global batch."""
        return slice(self.rank * batch_size // self.world, (self.rank + 1) * batch_size // self.world)


def join_processes(device: str) -> Processes:
    """Read the launcher's environment variables and join the group when there is one.

    Args:
        device: ``auto`` takes a GPU when there is one; each process of a node takes its own.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        kind = torch.device(device).type
    except RuntimeError as error:
        raise UserError(f"There is no device '{device}'. Use auto, cpu, cuda or cuda:1.") from error
    if kind == "cuda" and not torch.cuda.is_available():
        raise UserError(f"The device is '{device}', but torch sees no GPU here. Use cpu.")
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if world == 1:
        return Processes(device=torch.device(device))
    place = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if device.startswith("cuda") else torch.device(device)
    if place.type == "cuda":
        torch.cuda.set_device(place)
    if not dist.is_initialized():
        dist.init_process_group("nccl" if place.type == "cuda" else "gloo")
    return Processes(dist.get_rank(), world, place)
