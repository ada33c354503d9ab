"""How far an array moves from one step to the next, with angles and orientations taken as what they are."""

from __future__ import annotations

import numpy as np

from robopolicy.data.schema import ArraySpec

_FULL_TURN = 2 * np.pi


def step_sizes(values: np.ndarray, spec: ArraySpec) -> np.ndarray:
    """Distance between neighbouring steps.

    Args:
        values: ``(T, *shape)``.

    Returns:
        ``(T - 1, C)`` float64: the angle between orientations (rad, C = 1) where ``spec.rotation`` is ``axis_angle``
        or ``quaternion_*`` and the array holds nothing else; otherwise the absolute difference of each entry, for
        entries that span a full turn the shorter way around.
    """
    flat = np.asarray(values, dtype=np.float64).reshape(len(values), -1)
    if spec.rotation == "axis_angle" and spec.shape == (3,):
        return _rotation_angle(_quaternion(flat))
    if spec.rotation.startswith("quaternion") and spec.shape == (4,):
        return _rotation_angle(flat)
    sizes = np.abs(np.diff(flat, axis=0))
    wraps = _is_full_turn(flat)
    sizes[:, wraps] = np.minimum(sizes[:, wraps], np.abs(_FULL_TURN - sizes[:, wraps]))
    return sizes


def _is_full_turn(flat: np.ndarray) -> np.ndarray:
    """Which columns look like angles that wrap around: they span nearly, but no more than, one turn."""
    if not len(flat):
        return np.zeros(flat.shape[1], dtype=bool)
    spans = np.ptp(flat, axis=0)
    return (spans > 0.85 * _FULL_TURN) & (spans <= _FULL_TURN * (1 + 1e-6))


def _quaternion(rotation_vectors: np.ndarray) -> np.ndarray:
    """Rotation vectors ``(T, 3)`` to unit quaternions ``(T, 4)``, xyzw."""
    angle = np.linalg.norm(rotation_vectors, axis=1, keepdims=True)
    # np.sinc is sin(pi x) / (pi x): finite for the identity.
    return np.concatenate([rotation_vectors * 0.5 * np.sinc(angle / _FULL_TURN), np.cos(angle / 2)], axis=1)


def _rotation_angle(quaternions: np.ndarray) -> np.ndarray:
    """Angle between neighbouring orientations, ``(T - 1, 1)``; q and -q are the same orientation."""
    norms = np.linalg.norm(quaternions, axis=1)
    dots = np.abs((quaternions[1:] * quaternions[:-1]).sum(axis=1)) / np.maximum(norms[1:] * norms[:-1], 1e-12)
    return 2 * np.arccos(np.clip(dots, 0.0, 1.0))[:, None]
