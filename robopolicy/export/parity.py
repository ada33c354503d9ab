"""How far an engine's chunks are from the policy's own."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from robopolicy.errors import UserError
from robopolicy.inference.engine import Parity
from robopolicy.policies.base import Policy

TOLERANCE = {"fp32": 1e-3, "fp16": 3e-2, "bf16": 1e-1, "int8": 1e-1}
"""Largest error of a chunk as a share of the action's range, by precision."""


def action_range(policy: Policy, batch: Mapping[str, Tensor]) -> np.ndarray:
    """(B, 1, A) range of each entry of the action in the training data of a row; of a constant one, its unit.

    Args:
        policy: whose normaliser knows the ranges.
        batch: B observations; where datasets were normalised apart, their tasks say which range is theirs.
    """
    part = policy.normalizer[policy.spec.action.key]
    spread, unit = part.high - part.low, 1 / part.scale
    found = torch.where(spread.isfinite() & (spread > 1e-6 * unit), spread, unit).view(-1, 1, policy.spec.action.dim)
    rows = len(next(iter(batch.values())))
    domain = policy.domain(batch)
    return (found.expand(rows, -1, -1) if domain is None else found[domain]).cpu().numpy().astype(np.float32)


def compare(found: np.ndarray, wanted: np.ndarray, scale: np.ndarray, source: str, tolerance: float) -> Parity:
    """Compare chunks (B, H, A) in physical units; ``scale`` (B, 1, A) from `action_range`."""
    error = np.abs(found.astype(np.float64) - wanted)
    error = np.where(np.isfinite(error), error, np.inf)
    share = error / scale
    return Parity(
        len(found),
        source,
        tuple(error.max((0, 1)).tolist()),
        tuple(error.mean((0, 1)).tolist()),
        float(share.max()),
        float(share.mean()),
        tolerance,
        int(share.max((0, 1)).argmax()),
    )


def check_parity(parity: Parity, policy: Policy, what: str) -> None:
    """Raise a `UserError` where an engine is further off than it may be."""
    if parity.max_share <= parity.tolerance:
        return
    entry = parity.worst
    unit = policy.spec.action.unit
    raise UserError(
        f"{what} is refused: entry {entry} of '{policy.spec.action.key}' is up to {parity.max_error[entry]:.4g} {unit} "
        f"off, {100 * parity.max_share:.3g} % of its range; allowed are {100 * parity.tolerance:.3g} % "
        f"({parity.observations} observations, {parity.source}; mean {100 * parity.mean_share:.2g} %). Nothing was "
        "written. Choose a higher precision, or allow more with tolerance=…"
    )
