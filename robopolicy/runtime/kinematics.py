"""Forward kinematics: where the tool is at given joint angles."""

from __future__ import annotations

import functools

import numpy as np

from robopolicy.runtime.limits import Kinematics
from robopolicy.runtime.rotation import cross_matrix, from_rpy


def forward(kinematics: Kinematics, joints: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The tool centre point in the base frame.

    Args:
        kinematics: of the arm.
        joints: (..., n) angles [rad] in the order of ``kinematics.joints``.

    Returns:
        Its position (..., 3) [m] and its rotation (..., 3, 3), whose columns are the tool's axes.

    Raises:
        ValueError: the number of angles is not that of the joints.
    """
    fixed, sine, cosine, tool = _transforms(kinematics)
    if joints.shape[-1] != len(fixed):
        raise ValueError(f"joints: found {joints.shape[-1]} angles, the chain has {len(fixed)}.")
    angles = joints[..., None, None]
    frames = fixed + np.sin(angles) * sine + (1.0 - np.cos(angles)) * cosine
    pose = frames[..., 0, :, :]
    for joint in range(1, len(fixed)):
        pose = pose @ frames[..., joint, :, :]
    pose = pose @ tool
    return pose[..., :3, 3], pose[..., :3, :3]


@functools.lru_cache(maxsize=8)
def _transforms(kinematics: Kinematics) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Homogeneous matrices: a joint's frame is ``fixed + sin(q) sine + (1 - cos(q)) cosine`` (Rodrigues' formula)."""
    fixed = np.stack([_homogeneous(joint.xyz, joint.rpy) for joint in kinematics.joints])
    sine, cosine = np.zeros_like(fixed), np.zeros_like(fixed)
    for index, joint in enumerate(kinematics.joints):
        axis = np.asarray(joint.axis, float)
        cross = cross_matrix(axis / np.linalg.norm(axis))
        sine[index, :3, :3] = fixed[index, :3, :3] @ cross
        cosine[index, :3, :3] = fixed[index, :3, :3] @ cross @ cross
    return fixed, sine, cosine, _homogeneous(kinematics.tool_xyz, kinematics.tool_rpy)


def _homogeneous(xyz: tuple[float, float, float], rpy: tuple[float, float, float]) -> np.ndarray:
    matrix = np.eye(4)
    matrix[:3, :3], matrix[:3, 3] = from_rpy(rpy), xyz
    return matrix
