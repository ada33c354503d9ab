"""AdamW with 8-bit moments, and the state of any optimiser as tensors, which is what checkpoints hold."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from robopolicy.errors import UserError, require_extra
from robopolicy.training.config import OptimConfig

SMALLEST_8BIT = 4096
"""Parameters with fewer entries keep moments of 32 bits (bitsandbytes' default)."""


def adamw_8bit(parameters: Sequence[nn.Parameter], config: OptimConfig) -> Optimizer:
    """AdamW with blockwise 8-bit moments, 2 bytes for each parameter instead of 8 (Dettmers et al. 2022).

    Raises:
        UserError: bitsandbytes is not installed, or cannot update parameters on their device.
    """
    bitsandbytes = require_extra("bitsandbytes", "8bit")

    def build(of: Sequence[nn.Parameter]) -> Optimizer:
        return bitsandbytes.optim.AdamW8bit(
            of,
            lr=config.lr,
            betas=config.betas,
            weight_decay=config.weight_decay,
            eps=config.eps,
            min_8bit_size=SMALLEST_8BIT,
        )

    device = parameters[0].device
    probe = nn.Parameter(torch.zeros(SMALLEST_8BIT, device=device))
    probe.grad = torch.ones_like(probe)
    try:
        build([probe]).step()
    except Exception as error:  # what it raises without a kernel differs from version to version
        raise UserError(
            f"train.optim.name=adamw8bit: bitsandbytes {bitsandbytes.__version__} cannot update parameters on "
            f"{device} here ({type(error).__name__}: {error}). Train on a GPU that it supports, try a newer version, "
            "or set train.optim.name=adamw."
        ) from error
    return build(parameters)


def optimizer_tensors(optimizer: Optimizer) -> dict[str, Tensor]:
    """The moments and counters of all parameters, by ``index.name``; no two share memory."""
    tensors: dict[str, Tensor] = {}
    for i, parameter in enumerate(_parameters(optimizer)):
        for name, value in optimizer.state.get(parameter, {}).items():
            tensor = torch.as_tensor(value)
            # bitsandbytes gives all parameters one table of 8-bit values
            tensors[f"{i}.{name}"] = tensor.clone() if name.startswith("qmap") else tensor
    return tensors


def restore_optimizer(optimizer: Optimizer, tensors: Mapping[str, Tensor]) -> None:
    """Put back what `optimizer_tensors` gave.

    Raises:
        KeyError: the optimiser has fewer parameters.
        ValueError: a moment has a size that fits no parameter of its index.
    """
    parameters = dict(enumerate(_parameters(optimizer)))
    optimizer.state.clear()
    for name, value in tensors.items():
        index, _, field = name.partition(".")
        parameter = parameters[int(index)]
        state = optimizer.state[parameter]
        if value.ndim == 0 and not value.is_floating_point():
            state[field] = int(value)  # bitsandbytes counts steps in Python
        elif value.shape == parameter.shape:  # fused kernels want the parameter's memory layout (channels last)
            layout = torch.empty_like(parameter, dtype=value.dtype, requires_grad=False)
            state[field] = layout.copy_(value)
        elif value.ndim <= 1:  # counters, and bitsandbytes' tables and block maxima
            state[field] = value.to(parameter.device)
        else:
            raise ValueError(f"{field} of shape {tuple(value.shape)}, parameter of shape {tuple(parameter.shape)}")


def _parameters(optimizer: Optimizer) -> list[nn.Parameter]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]
