"""The T-shaped block of push-T: its outline, its distance to points, its overlap with the goal, its body."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import mujoco
import numpy as np

from robopolicy_sim.envs.objects import add_visual

HALF_HEIGHT = 0.014  # m, of the T without its feet
MASS = 0.12  # kg
# The T glides on three felt feet (units): statics settles what each one carries, and so the friction is well defined.
FEET = np.array([[-1.3, 6 / 7], [1.3, 6 / 7], [0.0, -1.7]])
FOOT_RADIUS = 0.002  # m
FOOT_FRICTION = 0.4
GROWTH = 1e-9  # m that the goal is grown by, so that no edge of the block lies exactly on one of its edges


@dataclass(frozen=True)
class Tee:
    """A T with a bar of 4 by 1 units and a stem of 1 by 3 units, as in gym-pusht; the centroid is its frame's origin.

    Poses are (x, y, yaw) in metres and radians.

    Attributes:
        unit: thickness of the bar and of the stem [m].
    """

    unit: float

    @cached_property
    def centres(self) -> np.ndarray:
        """Centres of the bar and of the stem (2, 2)."""
        return self.unit * np.array([[0.0, 6 / 7], [0.0, -8 / 7]])

    @cached_property
    def half_sizes(self) -> np.ndarray:
        """Half sides of the bar and of the stem (2, 2)."""
        return self.unit * np.array([[2.0, 0.5], [0.5, 1.5]])

    @cached_property
    def outline(self) -> np.ndarray:
        """The eight corners, counter-clockwise (8, 2)."""
        top, shoulder, foot = 19 / 14, 5 / 14, -37 / 14
        bar = [[2.0, shoulder], [2.0, top], [-2.0, top], [-2.0, shoulder]]
        stem = [[-0.5, shoulder], [-0.5, foot], [0.5, foot], [0.5, shoulder]]
        return self.unit * np.array(bar + stem)

    @cached_property
    def radius(self) -> float:
        """Distance from the centroid to the farthest corner [m]."""
        return float(np.linalg.norm(self.outline, axis=1).max())

    @cached_property
    def friction_arm(self) -> float:
        """Largest moment over largest force of the table's friction, for the ellipsoid that bounds both [m].

        About the centroid it is the mean distance of the feet, by load; 0.9 of it fits other motions better.
        """
        feet = self.unit * FEET
        loads = np.linalg.solve(np.vstack([feet.T, np.ones(3)]), [0.0, 0.0, 1.0])
        return 0.9 * float(loads @ np.linalg.norm(feet, axis=1))

    def corners(self, poses: np.ndarray) -> np.ndarray:
        """The outline's corners (..., 8, 2) at poses (..., 3)."""
        return poses[..., None, :2] + rotated(self.outline, poses[..., None, 2])

    def distance(self, points: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Signed distance (...) of points (..., 2), block's frame, from its edge, and the outward normal (..., 2)."""
        offset = points[..., None, :] - self.centres
        beyond = np.abs(offset) - self.half_sizes
        deepest = beyond.max(axis=-1, keepdims=True)
        outside = np.maximum(beyond, 0.0)
        gap = np.linalg.norm(outside, axis=-1)
        distances = gap + np.minimum(deepest[..., 0], 0.0)
        normals = np.where(deepest > 0, outside, beyond == deepest) * np.where(offset < 0, -1.0, 1.0)
        normals /= np.linalg.norm(normals, axis=-1, keepdims=True)
        at_stem = distances[..., 1] < distances[..., 0]
        return distances.min(axis=-1), np.where(at_stem[..., None], normals[..., 1, :], normals[..., 0, :])

    def coverage(self, poses: np.ndarray, goal: np.ndarray) -> np.ndarray:
        """Share (...) of the goal's area that blocks at ``poses`` (..., 3) cover; the goal is a pose (3,).

        Exact: by Green's theorem the overlap of two convex pieces is half the integral of x dy - y dx along the parts
        of each one's edges that lie inside the other.
        """
        position = rotated(poses[..., :2] - goal[:2], -goal[2])[..., None, None, :]  # in the goal's frame
        yaw = (poses[..., 2] - goal[2])[..., None, None]
        grown = self.half_sizes + GROWTH
        starts, steps = _edges(self.centres, self.half_sizes)
        starts, steps = position + rotated(starts, yaw), rotated(steps, yaw)
        twice = (_share_inside(starts, steps, self.centres, grown) * cross(starts, steps)).sum(axis=(-2, -1))
        starts, steps = _edges(self.centres, grown)
        share = _share_inside(rotated(starts - position, -yaw), rotated(steps, -yaw), self.centres, self.half_sizes)
        twice = twice + (share * cross(starts, steps)).sum(axis=(-2, -1))
        return np.minimum(twice / (14 * self.unit**2), 1.0)


def rotated(vectors: np.ndarray, angle: np.ndarray | float) -> np.ndarray:
    """Turn vectors (..., 2) by angles (...) in radians."""
    cos, sin = np.cos(angle), np.sin(angle)
    x, y = vectors[..., 0], vectors[..., 1]
    return np.stack([cos * x - sin * y, sin * x + cos * y], axis=-1)


def left(vectors: np.ndarray) -> np.ndarray:
    """Turn vectors (..., 2) by 90 degrees."""
    return np.stack([-vectors[..., 1], vectors[..., 0]], axis=-1)


def cross(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """The z component (...) of the cross product of vectors (..., 2)."""
    return a[..., 0] * b[..., 1] - a[..., 1] * b[..., 0]


def add_tee(spec: mujoco.MjSpec, name: str, tee: Tee, rgba: Sequence[float], *, ground: str) -> None:
    """A free T called ``name`` that touches the body ``ground`` with its feet only."""
    body = spec.worldbody.add_body(name=name, pos=[0, 0, rest_height()])
    body.add_freejoint(name=name)
    for part, centre, half_size in zip(("bar", "stem"), tee.centres, tee.half_sizes, strict=True):
        body.add_geom(
            name=f"{name}_{part}",
            type=mujoco.mjtGeom.mjGEOM_BOX,
            pos=[*centre, 0],
            size=[*half_size, HALF_HEIGHT],
            rgba=list(rgba),
            mass=MASS * half_size.prod() / tee.half_sizes.prod(axis=1).sum(),
            solref=[0.01, 1],
        )
    feet = body.add_body(name=f"{name}_feet")
    for i, foot in enumerate(tee.unit * FEET):
        feet.add_geom(
            name=f"{name}_foot_{i}",
            type=mujoco.mjtGeom.mjGEOM_SPHERE,
            pos=[*foot, -HALF_HEIGHT],
            size=[FOOT_RADIUS, 0, 0],
            rgba=[0.1, 0.1, 0.1, 1],
            mass=0,
            friction=[FOOT_FRICTION, 0.001, 0.0001],
            priority=1,
            solref=[0.01, 1],
        )
    spec.add_exclude(bodyname1=name, bodyname2=ground)


def add_tee_mark(spec: mujoco.MjSpec, name: str, tee: Tee, rgba: Sequence[float]) -> None:
    """A T painted on the table, moved as a mocap body called ``name``."""
    body = spec.worldbody.add_body(name=name, mocap=True)
    for centre, half_size in zip(tee.centres, tee.half_sizes, strict=True):
        add_visual(body, "box", [*half_size, 0.0005], rgba, pos=[*centre, 0.001])


def rest_height() -> float:
    """Height of the T's frame above the table in metres when it stands on its feet."""
    return HALF_HEIGHT + FOOT_RADIUS


def _edges(centres: np.ndarray, half_sizes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """First corners and directions, each (n, 4, 2), of the edges of n boxes, counter-clockwise."""
    half = half_sizes[:, None]
    return centres[:, None] + half * [[1, -1], [1, 1], [-1, 1], [-1, -1]], 2 * half * [[0, 1], [-1, 0], [0, -1], [1, 0]]


def _share_inside(starts: np.ndarray, steps: np.ndarray, centres: np.ndarray, half_sizes: np.ndarray) -> np.ndarray:
    """Share of segments (..., 2) that lies inside boxes (m, 2), summed over the boxes (the slab test)."""
    offset = centres - starts[..., None, :]
    with np.errstate(divide="ignore", invalid="ignore"):
        inverse = 1 / steps[..., None, :]
        one, other = (offset - half_sizes) * inverse, (offset + half_sizes) * inverse
    low, high = np.minimum(one, other), np.maximum(one, other)
    enter = np.maximum(np.maximum(low[..., 0], low[..., 1]), 0.0)
    leave = np.minimum(np.minimum(high[..., 0], high[..., 1]), 1.0)
    return np.maximum(leave - enter, 0.0).sum(axis=-1)
