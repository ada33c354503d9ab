"""Critic bundles, see `robopolicy.bundle`; loading builds only the architectures that are registered here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from robopolicy.bundle import load_weights, write_bundle
from robopolicy.configuration import dataclass_from
from robopolicy.data.normalize import AffineNormalizer, Normalizer
from robopolicy.errors import UserError, did_you_mean
from robopolicy.manifest import read_manifest
from robopolicy.spec import PolicySpec
from robopolicy.values.model import Critic, CriticConfig, ValueMeaning

ARCHITECTURES: dict[str, tuple[type[Critic], type[CriticConfig]]] = {"chunk_critic": (Critic, CriticConfig)}
"""Known critics and their configurations by name."""


def save_critic(
    critic: Critic, path: Path, *, task: Mapping[str, Any] | None = None, provenance: Mapping[str, Any] | None = None
) -> Path:
    """Write a critic, see `robopolicy.bundle.write_bundle`."""
    name = next(name for name, (kind, _) in ARCHITECTURES.items() if kind is type(critic))
    architecture = {"name": name, "config": asdict(critic.config), "meaning": asdict(critic.meaning)}
    return write_bundle(
        critic, path, "critic", architecture=architecture, spec=critic.spec.to_dict(), task=task, provenance=provenance
    )


def load_critic(path: Path, device: str | torch.device = "cpu") -> tuple[Critic, dict[str, Any]]:
    """Load a critic, in evaluation mode and without gradients of its weights, and its manifest.

    Raises:
        UserError: see `read_manifest` and `load_weights`; also an unknown architecture.
    """
    path = Path(path)
    manifest = read_manifest(path, "critic")
    where = f"{path / 'bundle.yaml'}: architecture"
    spec = PolicySpec.from_dict(manifest["spec"], f"{path / 'bundle.yaml'}: spec")
    architecture = manifest["architecture"]
    name = str(architecture.get("name", ""))
    if name not in ARCHITECTURES:
        raise UserError(f"{where}: unknown critic '{name}'.{did_you_mean(name, ARCHITECTURES)}")
    kind, config = ARCHITECTURES[name]
    parts = {key.key: AffineNormalizer(key.dim, spec.domains) for key in (*spec.states, spec.action)}
    critic = kind(
        dataclass_from(config, architecture.get("config", {}), f"{where}.config"),
        spec,
        Normalizer.from_parts(parts),
        dataclass_from(ValueMeaning, architecture.get("meaning", {}), f"{where}.meaning"),
    )
    load_weights(critic, path)
    return critic.requires_grad_(False).to(device).eval(), manifest
