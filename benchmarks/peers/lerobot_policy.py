"""LeRobot's DiffusionPolicy and its training update, built offline."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from lerobot.configs.types import FeatureType, PolicyFeature
from lerobot.policies.diffusion.configuration_diffusion import DiffusionConfig
from lerobot.policies.diffusion.modeling_diffusion import DiffusionPolicy
from lerobot.policies.diffusion.processor_diffusion import make_diffusion_pre_post_processors
from torch import Tensor

Batch = dict[str, Tensor]


def build_lerobot_policy(example: Batch, **config: Any) -> DiffusionPolicy:
    """Build a DiffusionPolicy with random weights on the CPU.

    Args:
        example: a batch as `training_step` takes it; its keys and shapes become the policy's features.
        config: further fields of DiffusionConfig, e.g. ``down_dims``, ``crop_shape``.
    """
    inputs = {key: _feature(key, value) for key, value in example.items() if key.startswith("observation.")}
    outputs = {"action": PolicyFeature(FeatureType.ACTION, (example["action"].shape[-1],))}
    return DiffusionPolicy(DiffusionConfig(input_features=inputs, output_features=outputs, device="cpu", **config))


def lerobot_training_step(policy: DiffusionPolicy, example: Batch, bf16: bool) -> Callable[[Batch], float]:
    """Return one training update as LeRobot 0.4.4 does it (`update_policy` in its lerobot_train.py).

    The order is LeRobot's: pre-processor (which normalises), ``train()``, forward, backward, clipping at the preset's
    norm, the preset's Adam, ``zero_grad``, and the loss and norm read for its metrics. Two things are left out, which
    favours LeRobot: its learning-rate schedule, and Accelerate's wrappers, which on one CPU process only pass through.

    Args:
        policy: the policy to train.
        example: a batch whose statistics stand for those of the dataset.
        bf16: run the forward pass under bfloat16 autocast (its ``accelerate launch --mixed_precision bf16``).
    """
    preset = policy.config.get_optimizer_preset()
    optimizer = preset.build(policy.get_optim_params())
    preprocess, _ = make_diffusion_pre_post_processors(policy.config, _statistics(example))

    def step(batch: Batch) -> float:
        batch = preprocess(batch)
        policy.train()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=bf16):
            loss, _ = policy.forward(batch)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(policy.parameters(), preset.grad_clip_norm)
        optimizer.step()
        optimizer.zero_grad()
        norm.item()
        return loss.item()

    return step


def _feature(key: str, value: Tensor) -> PolicyFeature:
    """The feature of a tensor (B, T, D) or (B, T, 3, H, W)."""
    if value.ndim == 5:
        return PolicyFeature(FeatureType.VISUAL, tuple(value.shape[2:]))
    return PolicyFeature(FeatureType.ENV if "environment" in key else FeatureType.STATE, tuple(value.shape[2:]))


def _statistics(batch: Batch) -> dict[str, dict[str, Tensor]]:
    """Statistics in the shapes of LeRobot's datasets: (D,) for vectors, (3, 1, 1) for images."""
    statistics = {}
    for key, value in batch.items():
        if value.is_floating_point():
            over = (0, 1, 3, 4) if value.ndim == 5 else (0, 1)
            shape = (3, 1, 1) if value.ndim == 5 else (-1,)
            parts = {"min": value.amin(over), "max": value.amax(over), "mean": value.mean(over), "std": value.std(over)}
            statistics[key] = {name: part.view(shape) for name, part in parts.items()}
    return statistics
