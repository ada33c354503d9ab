"""One optimiser update, and the randomness that it uses."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from robopolicy.policies.base import Draws, Policy
from robopolicy.training.config import OptimConfig
from robopolicy.training.optimizers import adamw_8bit


class LossModule(nn.Module):
    """Makes `Policy.loss` a forward call, which is what DistributedDataParallel and torch.compile wrap."""

    def __init__(self, policy: Policy) -> None:
        super().__init__()
        self.policy = policy

    def forward(self, batch: Mapping[str, Tensor], draws: Draws) -> Tensor:
        return self.policy.loss(batch, draws)


def step_generator(seed: int, step: int) -> torch.Generator:
    """The randomness of one step, a function of (seed, step): resuming needs no generator states."""
    state = np.random.SeedSequence((seed, step)).generate_state(1, np.uint64)[0]
    return torch.Generator().manual_seed(int(state))


def learning_rate(config: OptimConfig, step: int, steps: int) -> float:
    """Linear warm-up, then half a cosine that reaches zero after the last of ``steps`` updates."""
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    progress = (step - config.warmup_steps) / max(1, steps - config.warmup_steps)
    return config.lr * 0.5 * (1 + float(np.cos(np.pi * min(progress, 1.0))))


def build_optimizer(model: nn.Module, config: OptimConfig) -> Optimizer:
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if config.name == "adamw8bit":
        return adamw_8bit(parameters, config)
    return torch.optim.AdamW(
        parameters,
        lr=config.lr,
        betas=config.betas,
        weight_decay=config.weight_decay,
        eps=config.eps,
        fused=True,
    )


def train_step(
    loss_module: nn.Module,
    optimizer: Optimizer,
    batch: Mapping[str, Tensor],
    draws: Draws,
    *,
    lr: float,
    clip_norm: float,
    accumulate: int = 1,
    bf16: bool = False,
) -> tuple[Tensor, Tensor]:
    """Update the weights once.

    Args:
        loss_module: `LossModule`, possibly wrapped.
        optimizer: its learning rate is set to ``lr``.
        batch: this process's windows (B, …), on the model's device.
        draws: this process's randomness (B, …), on the model's device.
        lr: learning rate of this step.
        clip_norm: largest gradient norm.
        accumulate: equal parts that the batch is split into.
        bf16: run the loss under bfloat16 autocast.

    Returns:
        The mean loss and the gradient norm before clipping, both still on the device.
    """
    total = torch.zeros((), device=next(loss_module.parameters()).device)
    rows = len(next(iter(draws.values())))
    for first in range(0, rows, rows // accumulate):
        part = slice(first, first + rows // accumulate)
        with torch.autocast(total.device.type, dtype=torch.bfloat16, enabled=bf16):
            loss = loss_module({k: v[part] for k, v in batch.items()}, {k: v[part] for k, v in draws.items()})
        (loss / accumulate).backward()
        total += loss.detach() / accumulate
    norm = nn.utils.clip_grad_norm_(loss_module.parameters(), clip_norm, foreach=True)
    for group in optimizer.param_groups:
        group["lr"] = lr
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return total, norm
