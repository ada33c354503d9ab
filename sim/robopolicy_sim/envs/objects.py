"""Things that lie on the bench, added to a scene before it is compiled."""

from __future__ import annotations

from collections.abc import Sequence

import mujoco
import numpy as np

GRIP_FRICTION = (1.2, 0.02, 0.001)  # sliding, torsional, rolling


def add_block(
    spec: mujoco.MjSpec,
    name: str,
    half_size: Sequence[float],
    rgba: Sequence[float],
    *,
    mass: float = 0.08,
    friction: Sequence[float] = GRIP_FRICTION,
) -> mujoco.MjsBody:
    """A free box called ``name``; half sizes in metres, mass in kilograms."""
    body = spec.worldbody.add_body(name=name, pos=[0, 0, half_size[2]])
    body.add_freejoint(name=name)
    body.add_geom(
        name=name,
        type=mujoco.mjtGeom.mjGEOM_BOX,
        size=list(half_size),
        rgba=list(rgba),
        mass=mass,
        friction=list(friction),
        condim=4,
        solref=[0.01, 1],
    )
    return body


def add_visual(
    body: mujoco.MjsBody, shape: str, size: Sequence[float], rgba: Sequence[float], *, pos: Sequence[float] = (0, 0, 0)
) -> None:
    """A geom without mass that nothing touches: a mark, a lid; ``shape`` e.g. ``box``, ``cylinder``."""
    body.add_geom(
        type=getattr(mujoco.mjtGeom, f"mjGEOM_{shape.upper()}"),
        size=[*size, *[0.0] * (3 - len(size))],
        pos=list(pos),
        rgba=list(rgba),
        mass=0,
        contype=0,
        conaffinity=0,
        group=2,
    )


def random_turn(rng: np.random.Generator) -> float:
    """Random yaw in radians of a block that looks the same after a quarter turn.

    Uniform over the quarter turn about 20 degrees, where a hand that closes on its faces need not turn far.
    """
    return float(np.radians(20) + rng.uniform(-np.pi / 4, np.pi / 4))


def separated_points(
    rng: np.random.Generator,
    count: int,
    half_extent: Sequence[float] | np.ndarray,
    min_distance: float,
    tries: int = 1000,
) -> np.ndarray:
    """Random points (count, 2) in the rectangle of these half sides about the origin, at least so far apart, in metres.

    Raises:
        ValueError: so many do not fit.
    """
    extent = np.asarray(half_extent)
    for _ in range(tries):
        points = rng.uniform(-extent, extent, (count, 2))
        gaps = np.linalg.norm(points[:, None] - points[None], axis=-1)[np.triu_indices(count, 1)]
        if (gaps >= min_distance).all():
            return points
    raise ValueError(f"{count} points {min_distance} m apart do not fit into half sides of {tuple(extent)} m.")


def add_bin(spec: mujoco.MjSpec, name: str, half_size: float, height: float, rgba: Sequence[float]) -> mujoco.MjsBody:
    """A square bin without lid that is moved as a mocap body; ``half_size`` inside and ``height`` in metres."""
    body = spec.worldbody.add_body(name=name, mocap=True)
    thickness = 0.004
    outside = half_size + thickness
    walls = [
        ([outside, outside, 0.001], [0, 0, 0.001]),
        ([thickness / 2, outside, height / 2], [half_size + thickness / 2, 0, height / 2]),
        ([thickness / 2, outside, height / 2], [-half_size - thickness / 2, 0, height / 2]),
        ([outside, thickness / 2, height / 2], [0, half_size + thickness / 2, height / 2]),
        ([outside, thickness / 2, height / 2], [0, -half_size - thickness / 2, height / 2]),
    ]
    for size, pos in walls:
        body.add_geom(type=mujoco.mjtGeom.mjGEOM_BOX, size=size, pos=pos, rgba=list(rgba))
    return body
