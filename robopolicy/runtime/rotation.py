"""Rotations of a tool: matrices, rotation vectors, and the six numbers (two columns) that policies put out."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

SHORTEST_COLUMN = 1e-3
"""Six numbers whose columns are shorter than this, or span less than this, tell no rotation."""


def cross_matrix(vector: np.ndarray) -> np.ndarray:
    """The (3, 3) matrix K with ``K @ u == cross(vector, u)``."""
    x, y, z = vector
    return np.array([[0.0, -z, y], [z, 0.0, -x], [-y, x, 0.0]])


def from_rpy(rpy: Sequence[float]) -> np.ndarray:
    """(3, 3) of roll, pitch and yaw [rad] about fixed axes, ``Rz(yaw) Ry(pitch) Rx(roll)``, as in URDF."""
    roll, pitch, yaw = rpy
    turns = (np.array([0.0, 0.0, yaw]), np.array([0.0, pitch, 0.0]), np.array([roll, 0.0, 0.0]))
    about_z, about_y, about_x = (from_vector(turn) for turn in turns)
    return about_z @ about_y @ about_x


def from_vector(vector: np.ndarray) -> np.ndarray:
    """(3, 3) of a rotation vector (3,) [rad], by Rodrigues' formula."""
    angle = math.sqrt(float(vector @ vector))
    cross = cross_matrix(vector)
    if angle < 1e-8:
        return np.eye(3) + cross + cross @ cross / 2
    return np.eye(3) + math.sin(angle) / angle * cross + (1 - math.cos(angle)) / angle**2 * (cross @ cross)


def to_vector(rotation: np.ndarray) -> np.ndarray:
    """The shortest rotation vector (3,) [rad] of a rotation (3, 3)."""
    twice_sine = np.array(
        [rotation[2, 1] - rotation[1, 2], rotation[0, 2] - rotation[2, 0], rotation[1, 0] - rotation[0, 1]]
    )
    sine, cosine = 0.5 * math.sqrt(float(twice_sine @ twice_sine)), 0.5 * (float(np.trace(rotation)) - 1.0)
    angle = math.atan2(sine, cosine)
    if sine > 1e-6:
        return twice_sine * (angle / (2 * sine))
    if cosine > 0:
        return twice_sine / 2
    # Half a turn: the axis is the column of R + I that is longest.
    columns = rotation + np.eye(3)
    axis = columns[:, int(np.argmax(np.diagonal(columns)))]
    return axis * (angle / math.sqrt(float(axis @ axis)))


def from_columns(six: np.ndarray) -> np.ndarray | None:
    """(3, 3) whose first two columns are nearest to six numbers, by Gram-Schmidt (Zhou et al. 2019, equation 15).

    Args:
        six: (6,) first column, second column.

    Returns:
        None when they tell no rotation: too short, parallel, or not finite.
    """
    first, second = six[:3], six[3:]
    length = math.sqrt(float(first @ first))
    if not SHORTEST_COLUMN < length < math.inf:
        return None
    first = first / length
    second = second - (first @ second) * first
    length = math.sqrt(float(second @ second))
    if not SHORTEST_COLUMN < length < math.inf:
        return None
    second = second / length
    return np.stack([first, second, np.cross(first, second)], axis=1)


def to_columns(rotation: np.ndarray) -> np.ndarray:
    """The six numbers (6,) of a rotation (3, 3): its first and second column."""
    return np.concatenate([rotation[:, 0], rotation[:, 1]])


def turning(rotation: np.ndarray, rates: np.ndarray) -> np.ndarray:
    """The angular velocity (3,) [rad/s], in the base frame, of a rotation (3, 3) whose six numbers change at rates."""
    first, second = rates[:3], rates[3:]
    third = np.cross(first, rotation[:, 1]) + np.cross(rotation[:, 0], second)
    return np.cross(rotation.T, np.stack([first, second, third])).sum(axis=0) / 2


def column_motion(rotation: np.ndarray, velocity: np.ndarray, acceleration: np.ndarray) -> np.ndarray:
    """The six numbers, their first and their second derivative, (3, 6).

    Args:
        rotation: (3, 3).
        velocity, acceleration: (3,) angular, in the base frame [rad/s, rad/s^2].
    """
    turn = cross_matrix(velocity)
    faster = cross_matrix(acceleration) + turn @ turn
    return np.stack([to_columns(matrix) for matrix in (rotation, turn @ rotation, faster @ rotation)])
