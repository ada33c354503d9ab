"""Checkpoints to resume from: weights, averaged weights, optimiser moments, position. Safetensors and JSON only.

A checkpoint is written beside the old one and becomes current through one atomic rename of a pointer file, so that a
process killed while writing leaves the previous checkpoint intact.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

from diffusers.training_utils import EMAModel
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.optim import Optimizer

from robopolicy.data.durable import sync_path
from robopolicy.errors import UserError
from robopolicy.training.optimizers import optimizer_tensors, restore_optimizer

POINTER = "last"


def save_checkpoint(
    folder: Path, step: int, model: nn.Module, ema: EMAModel, optimizer: Optimizer, extra: dict[str, Any]
) -> Path:
    """Write the state after ``step`` updates and make it the one to resume from; older ones are removed.

    Args:
        folder: the run's ``checkpoints`` folder.
        step: updates done.
        model: the trained (not averaged) weights.
        ema: the averaged weights and their update count.
        optimizer: its moments.
        extra: anything else as plain JSON values.
    """
    target = folder / f"step_{step:08d}"
    partial = folder / f".{target.name}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    names = [name for name, _ in model.named_parameters()]
    _save(partial / "model.safetensors", dict(model.state_dict()))
    _save(partial / "ema.safetensors", dict(zip(names, ema.shadow_params, strict=True)))
    _save(partial / "optimizer.safetensors", optimizer_tensors(optimizer))
    (partial / "state.json").write_text(json.dumps({"step": step, "ema_step": ema.optimization_step, **extra}))
    for file in partial.iterdir():
        sync_path(file)
    shutil.rmtree(target, ignore_errors=True)
    os.replace(partial, target)
    sync_path(folder)
    write_whole(folder / POINTER, target.name)
    for old in folder.glob("step_*"):
        if old != target:
            shutil.rmtree(old, ignore_errors=True)
    return target


def load_checkpoint(folder: Path, model: nn.Module, ema: EMAModel, optimizer: Optimizer) -> dict[str, Any]:
    """Restore the state in place.

    Returns:
        The step and the extra values.

    Raises:
        UserError: there is no checkpoint, or it does not fit the model.
    """
    pointer = folder / POINTER
    if not pointer.is_file():
        raise UserError(f"{folder} holds no checkpoint to resume from (no file '{POINTER}'). Start with a new run.")
    source = folder / pointer.read_text().strip()
    try:
        state = json.loads((source / "state.json").read_text())
        weights = load_file(source / "model.safetensors")
        averaged = load_file(source / "ema.safetensors")
        moments = load_file(source / "optimizer.safetensors")
    except (OSError, SafetensorError, json.JSONDecodeError) as error:
        raise UserError(f"The checkpoint {source} cannot be read ({error}).") from error
    try:
        model.load_state_dict(weights)
        for (name, _), shadow in zip(model.named_parameters(), ema.shadow_params, strict=True):
            shadow.copy_(averaged[name])
        ema.optimization_step = state["ema_step"]
        restore_optimizer(optimizer, moments)
    except (RuntimeError, KeyError, ValueError) as error:
        raise UserError(f"The checkpoint {source} is damaged or of another architecture: {error}") from error
    return state


def write_whole(path: Path, text: str) -> None:
    """Replace a small file; readers, and a crash, see the old text or the new one. Makes the folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(text)
    sync_path(partial)
    os.replace(partial, path)
    sync_path(path.parent)


def has_checkpoint(folder: Path) -> bool:
    return (folder / POINTER).is_file()


def _save(path: Path, tensors: dict[str, Tensor]) -> None:
    save_file({name: t.detach().contiguous().cpu() for name, t in tensors.items()}, path)
