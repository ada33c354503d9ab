"""Several processes: torchrun (or accelerate launch) starts them, torch.distributed averages their gradients."""

from __future__ import annotations

import os
from dataclasses import dataclass
from datetime import timedelta

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

    def leave(self) -> None:
        """Wait for all processes and take the group apart."""
        if self.several:
            dist.barrier()
            dist.destroy_process_group()

    def share(self, value: int) -> int:
        """The main process's value, on every process."""
        if not self.several:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0, device=self.device)
        return box[0]

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
        wanted = torch.device(device)
    except RuntimeError as error:
        raise UserError(f"There is no device '{device}'. Use auto, cpu, cuda or cuda:1.") from error
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if wanted.type == "cuda" and (wanted.index or 0) >= gpus:
        seen = f"{gpus} GPUs" if gpus else "no GPU"
        raise UserError(f"The device is '{device}', but torch sees {seen} here. Use another one, or cpu.")
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if world == 1:
        return Processes(device=torch.device(device))
    if "LOCAL_RANK" not in os.environ:
        raise UserError("WORLD_SIZE is set but LOCAL_RANK is not. Start several processes with torchrun.")
    place = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if device.startswith("cuda") else torch.device(device)
    if place.type == "cuda":
        torch.cuda.set_device(place)
    if not dist.is_initialized():
        # the others wait in a collective while the main process evaluates
        dist.init_process_group("nccl" if place.type == "cuda" else "gloo", timeout=timedelta(hours=12))
    return Processes(dist.get_rank(), world, place)
