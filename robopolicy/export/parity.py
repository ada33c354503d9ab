"""How far an engine's chunks are from the policy's own."""

from __future__ import annotations

import numpy as np

from robopolicy.errors import UserError
from robopolicy.inference.engine import Parity
from robopolicy.policies.base import Policy

TOLERANCE = {"fp32": 1e-3, "fp16": 3e-2, "bf16": 1e-1, "int8": 1e-1}
"""Largest error of a chunk as a share of the action's range, by precision."""


def action_range(policy: Policy) -> np.ndarray:
    """(A,) range of each entry of the action in the training data; of a constant one, its normalised unit."""
    part = policy.normalizer[policy.spec.action.key]
    spread = (part.high - part.low).reshape(-1, policy.spec.action.dim).amax(0)
    unit = 1 / part.scale.reshape(-1, policy.spec.action.dim).amin(0)
    usable = spread.isfinite() & (spread > 1e-6 * unit)
    return np.where(usable.cpu().numpy(), spread.cpu().numpy(), unit.cpu().numpy()).astype(np.float32)


def compare(found: np.ndarray, wanted: np.ndarray, scale: np.ndarray, source: str, tolerance: float) -> Parity:
    """Compare chunks (B, H, A) in physical units; ``scale`` (A,) from `action_range`."""
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
    )


def check_parity(parity: Parity, policy: Policy, what: str) -> None:
    """Raise a `UserError` where an engine is further off than it may be."""
    if parity.max_share <= parity.tolerance:
        return
    scale = action_range(policy)
    entry = int(np.argmax(np.array(parity.max_error) / scale))
    unit = policy.spec.action.unit
    raise UserError(
        f"{what} is refused: entry {entry} of '{policy.spec.action.key}' is up to {parity.max_error[entry]:.4g} {unit} "
        f"off, {100 * parity.max_share:.3g} % of its range; allowed are {100 * parity.tolerance:.3g} % "
        f"({parity.observations} observations, {parity.source}; mean {100 * parity.mean_share:.2g} %). Nothing was "
        "written. Choose a higher precision, or allow more with tolerance=…"
    )
