"""Where the real camera is: pose and field of view from points whose place on the bench and in the image is known."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.optimize import least_squares
from scipy.spatial.transform import Rotation

FEWEST_POINTS = 6
FIELDS_OF_VIEW = (35.0, 60.0)  # degrees at which the search starts
DISTANCES = (0.6, 1.2, 2.0)  # m from the points
ELEVATIONS = (0.2, 0.7, 1.3)  # rad above the horizontal plane through the points
AZIMUTHS = np.linspace(0, 2 * np.pi, 12, endpoint=False)
REFINED_STARTS = 12
NEAREST = 0.01  # m in front of the camera


@dataclass(frozen=True)
class CameraFit:
    """A pinhole camera with square pixels and the principal point in the image's middle, as MuJoCo's is.

    Attributes:
        position: (3,) in the frame of the arm's base [m].
        rotation: (3, 3) columns: the image's right, up, and away from the view, in that frame.
        fovy: vertical field of view [degrees].
        error: root mean square distance of given from projected points [pixels].
    """

    position: np.ndarray
    rotation: np.ndarray
    fovy: float
    error: float

    def to_json(self) -> dict[str, Any]:
        """What arm tasks take for one camera in their option ``camera_poses``."""
        return {
            "pos": np.round(self.position, 5).tolist(),
            "xyaxes": np.round(self.rotation[:, :2].T.ravel(), 6).tolist(),
            "fovy": round(self.fovy, 4),
        }


def fit_camera(points: np.ndarray, pixels: np.ndarray, size: tuple[int, int]) -> CameraFit:
    """Least squares on the reprojection error, from several viewpoints around the points.

    Args:
        points: (N, 3) in the frame of the arm's base [m], N >= 6, not all on one line; spread in height helps most.
        pixels: (N, 2) where they appear: to the right and down from the image's top left corner.
        size: (height, width) of the image.

    Raises:
        ValueError: there are too few points, or they do not determine the camera.
    """
    points, pixels = np.asarray(points, dtype=np.float64), np.asarray(pixels, dtype=np.float64)
    if points.ndim != 2 or points.shape[1:] != (3,) or pixels.shape != (len(points), 2) or len(points) < FEWEST_POINTS:
        raise ValueError(
            f"A camera needs at least {FEWEST_POINTS} points (N, 3) with pixels (N, 2), found {points.shape} and "
            f"{pixels.shape}."
        )
    starts = [_start(points.mean(axis=0), *view) for view in _views()]

    def residuals(change: np.ndarray, start: tuple[np.ndarray, np.ndarray, float]) -> np.ndarray:
        position, rotation, fovy = _changed(start, change)
        return (project(points, position, rotation, fovy, size) - pixels).ravel()

    starts.sort(key=lambda start: float(np.square(residuals(np.zeros(7), start)).sum()))
    found = [
        (least_squares(residuals, np.zeros(7), args=(start,), x_scale="jac"), start)
        for start in starts[:REFINED_STARTS]
    ]
    best, start = min(found, key=lambda pair: pair[0].cost)
    singular = np.linalg.svd(best.jac / np.linalg.norm(best.jac, axis=0).clip(1e-9), compute_uv=False)
    if singular[-1] < 1e-6 * singular[0]:
        raise ValueError(
            "The points do not determine the camera; take points that are not on one line, some higher up."
        )
    position, rotation, fovy = _changed(start, best.x)
    return CameraFit(position, rotation, fovy, float(np.sqrt(2 * best.cost / len(points))))


def project(
    points: np.ndarray, position: np.ndarray, rotation: np.ndarray, fovy: float, size: tuple[int, int]
) -> np.ndarray:
    """Where points (N, 3) appear, (N, 2) pixels to the right and down from the image's top left corner.

    Args:
        position, rotation, fovy: see `CameraFit`.
        size: (height, width) of the image.
    """
    height, width = size
    x, y, z = ((points - position) @ rotation).T
    focal = height / 2 / np.tan(np.radians(fovy) / 2)
    depth = np.maximum(-z, NEAREST)
    return np.column_stack([width / 2 + focal * x / depth, height / 2 - focal * y / depth])


def _views() -> list[tuple[float, float, float, float]]:
    return [(a, e, d, f) for a in AZIMUTHS for e in ELEVATIONS for d in DISTANCES for f in FIELDS_OF_VIEW]


def _start(
    target: np.ndarray, azimuth: float, elevation: float, distance: float, fovy: float
) -> tuple[np.ndarray, np.ndarray, float]:
    """A camera that looks at ``target``, the base's z axis upwards in the image."""
    away = np.array([np.cos(elevation) * np.cos(azimuth), np.cos(elevation) * np.sin(azimuth), np.sin(elevation)])
    right = np.cross([0.0, 0.0, 1.0], away)
    right /= np.linalg.norm(right)
    return target + distance * away, np.column_stack([right, np.cross(away, right), away]), fovy


def _changed(start: tuple[np.ndarray, np.ndarray, float], change: np.ndarray) -> tuple[np.ndarray, np.ndarray, float]:
    """Move (3), turn (rotation vector, 3) and zoom (logarithm of the focal length's factor) a camera."""
    position, rotation, fovy = start
    half = np.arctan(np.tan(np.radians(fovy) / 2) * np.exp(-change[6]))
    return position + change[:3], Rotation.from_rotvec(change[3:6]).as_matrix() @ rotation, float(np.degrees(2 * half))
