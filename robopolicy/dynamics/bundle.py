"""Dynamics bundles: what steering needs of a dynamics model; see `robopolicy.bundle`.

Loading builds only architectures of `DYNAMICS`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from robopolicy.bundle import load_weights, write_bundle
from robopolicy.configuration import dataclass_from
from robopolicy.data.normalize import AffineNormalizer, Normalizer
from robopolicy.dynamics.model import OutcomeConfig, OutcomeModel
from robopolicy.errors import UserError, did_you_mean
from robopolicy.manifest import read_manifest
from robopolicy.spec import PolicySpec

DYNAMICS: dict[str, tuple[type[OutcomeConfig], type[OutcomeModel]]] = {"outcome": (OutcomeConfig, OutcomeModel)}
"""The known architectures: a name, its configuration dataclass, its class."""


def build_dynamics(
    name: str, config: Any, spec: PolicySpec, normalizer: Normalizer, where: str = "dynamics", *, fresh: bool = True
) -> OutcomeModel:
    """Build a dynamics model.

    Args:
        name: a key of `DYNAMICS`.
        config: plain values of its configuration.
        spec: keys and horizons; its goals are the outcome's keys.
        normalizer: fitted normalisers.
        where: names the source of ``config`` in errors.
        fresh: False where saved weights follow.

    Raises:
        UserError: unknown architecture, or unknown or ill-typed configuration entries.
    """
    if name not in DYNAMICS:
        raise UserError(f"{where}: unknown architecture '{name}'.{did_you_mean(str(name), DYNAMICS)}")
    config_class, model_class = DYNAMICS[name]
    return model_class(dataclass_from(config_class, config, where), spec, normalizer, fresh)


def save_dynamics(
    model: OutcomeModel,
    path: Path,
    *,
    task: Mapping[str, Any] | None = None,
    provenance: Mapping[str, Any] | None = None,
) -> Path:
    """Write a dynamics model, see `robopolicy.bundle.write_bundle`."""
    name = next(name for name, (_, kind) in DYNAMICS.items() if type(model) is kind)
    return write_bundle(
        model,
        path,
        "dynamics",
        architecture={"name": name, "config": asdict(model.config)},
        spec=model.spec.to_dict(),
        task=task,
        provenance=provenance,
    )


def load_dynamics(path: Path, device: str | torch.device = "cpu") -> tuple[OutcomeModel, dict[str, Any]]:
    """Load a dynamics model, in evaluation mode and without gradients of its weights, and its manifest.

    Raises:
        UserError: see `read_manifest` and `load_weights`; also an unknown architecture.
    """
    path = Path(path)
    manifest = read_manifest(path, "dynamics")
    where = str(path / "bundle.yaml")
    spec = PolicySpec.from_dict(manifest["spec"], f"{where}: spec")
    parts = {key.key: AffineNormalizer(key.dim) for key in (*spec.states, spec.action)}
    architecture = manifest["architecture"]
    model = build_dynamics(
        architecture.get("name", ""),
        architecture.get("config", {}),
        spec,
        Normalizer.from_parts(parts),
        f"{where}: architecture",
        fresh=False,
    )
    load_weights(model, path)
    return model.to(device).eval().requires_grad_(False), manifest
