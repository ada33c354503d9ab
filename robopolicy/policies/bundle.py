"""Policy bundles: what evaluation, steering, export and a robot need; see `robopolicy.bundle`.

Loading builds only architectures of `robopolicy.policies.registry`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from robopolicy.bundle import load_weights, write_bundle
from robopolicy.data.normalize import AffineNormalizer, Normalizer
from robopolicy.manifest import read_manifest
from robopolicy.policies.base import Policy
from robopolicy.policies.registry import build_policy, policy_name
from robopolicy.spec import PolicySpec


def save_bundle(
    policy: Policy, path: Path, *, task: Mapping[str, Any] | None = None, provenance: Mapping[str, Any] | None = None
) -> Path:
    """Write a policy, see `robopolicy.bundle.write_bundle`."""
    architecture = {"name": policy_name(policy), "config": asdict(policy.config)}
    return write_bundle(
        policy,
        path,
        "policy",
        architecture=architecture,
        spec=policy.spec.to_dict(),
        task=task,
        provenance=provenance,
    )


def load_bundle(path: Path, device: str | torch.device = "cpu") -> tuple[Policy, dict[str, Any]]:
    """Load a policy, in evaluation mode, and its manifest.

    Raises:
        UserError: see `read_manifest` and `load_weights`; also an unknown architecture.
    """
    path = Path(path)
    manifest = read_manifest(path)
    spec = PolicySpec.from_dict(manifest["spec"], f"{path / 'bundle.yaml'}: spec")
    parts = {k.key: AffineNormalizer(k.dim, spec.domains) for k in (*spec.states, spec.action)}
    architecture = manifest["architecture"]
    policy = build_policy(
        architecture.get("name", ""),
        architecture.get("config", {}),
        spec,
        Normalizer.from_parts(parts),
        where=f"{path / 'bundle.yaml'}: architecture",
        fresh=False,
    )
    load_weights(policy, path)
    return policy.to(device).eval(), manifest
