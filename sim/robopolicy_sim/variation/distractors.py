"""Things on the bench that have nothing to do with the task."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import mujoco
import numpy as np

from robopolicy_sim.variation.factor import BASE, DISTRACTOR, Factor, Value, task_bodies

if TYPE_CHECKING:
    from robopolicy_sim.envs.arm_task import ArmTaskEnv

MAX_COUNT = 6
REGION_LOW, REGION_HIGH = (-0.28, -0.38), (0.30, 0.38)  # m, corners of where they may lie
HIGHEST = 0.065  # m of a thing
GAP = 0.01  # m between two of them, or to the arm
FINGER_ROOM = 0.05  # m that stays free about the task's objects
CORRIDOR = 0.06  # m, half width of what stays free between two of the task's bodies
TRIES = 400
PARKED = -3.0  # m, under the floor


@dataclass(frozen=True)
class Part:
    """One geom of a thing; its first part is what touches, the others are only seen.

    Attributes:
        shape: ``box``, ``cylinder``, ``sphere``, ``capsule``, ``ellipsoid``.
        size: as MuJoCo has it [m].
        pos: in the thing's frame, whose origin lies on the table [m].
        colour: RGB.
        turn: quaternion, wxyz.
    """

    shape: str
    size: tuple[float, ...]
    pos: tuple[float, float, float]
    colour: tuple[float, float, float]
    turn: tuple[float, float, float, float] = (1, 0, 0, 0)


# Lower than `HIGHEST`, so that the hand passes above them.
THINGS: dict[str, tuple[Part, ...]] = {
    "can": (
        Part("cylinder", (0.030, 0.029), (0, 0, 0.029), (0.20, 0.42, 0.66)),
        Part("cylinder", (0.0303, 0.012), (0, 0, 0.030), (0.93, 0.90, 0.80)),
        Part("cylinder", (0.027, 0.001), (0, 0, 0.058), (0.72, 0.73, 0.75)),
    ),
    "mug": (
        Part("cylinder", (0.030, 0.028), (0, 0, 0.028), (0.88, 0.87, 0.83)),
        Part("cylinder", (0.026, 0.001), (0, 0, 0.0555), (0.20, 0.11, 0.06)),
        Part("box", (0.008, 0.004, 0.016), (0.036, 0, 0.028), (0.88, 0.87, 0.83)),
    ),
    "carton": (
        Part("box", (0.042, 0.028, 0.016), (0, 0, 0.016), (0.86, 0.66, 0.16)),
        Part("box", (0.030, 0.020, 0.0005), (0, 0, 0.0322), (0.96, 0.95, 0.90)),
    ),
    "sponge": (
        Part("box", (0.045, 0.030, 0.014), (0, 0, 0.014), (0.94, 0.84, 0.30)),
        Part("box", (0.0452, 0.0302, 0.004), (0, 0, 0.0244), (0.18, 0.46, 0.32)),
    ),
    "orange": (
        Part("sphere", (0.029,), (0, 0, 0.029), (0.95, 0.52, 0.10)),
        Part("cylinder", (0.004, 0.002), (0, 0, 0.057), (0.30, 0.36, 0.14)),
    ),
    "marker": (
        Part("box", (0.060, 0.008, 0.008), (0, 0, 0.008), (0.22, 0.24, 0.54)),
        Part("box", (0.020, 0.009, 0.0085), (0.042, 0, 0.0088), (0.10, 0.10, 0.12)),
    ),
    "tape": (
        Part("cylinder", (0.040, 0.012), (0, 0, 0.012), (0.76, 0.70, 0.52)),
        Part("cylinder", (0.024, 0.0005), (0, 0, 0.0242), (0.34, 0.27, 0.18)),
    ),
    "notebook": (
        Part("box", (0.052, 0.038, 0.007), (0, 0, 0.007), (0.95, 0.94, 0.91)),
        Part("box", (0.053, 0.039, 0.001), (0, 0, 0.0145), (0.46, 0.20, 0.46)),
    ),
}


def _add_things(spec: mujoco.MjSpec, env: ArmTaskEnv, values: Sequence[Value]) -> None:
    if all(value in (0, BASE) for value in values):
        return
    for i, (kind, parts) in enumerate(THINGS.items()):
        body = spec.worldbody.add_body(name=DISTRACTOR + kind, pos=[0.2 * i, 0, PARKED], gravcomp=1)
        body.add_freejoint(name=DISTRACTOR + kind)
        for j, part in enumerate(parts):
            body.add_geom(
                type=getattr(mujoco.mjtGeom, f"mjGEOM_{part.shape.upper()}"),
                size=[*part.size, *[0.0] * (3 - len(part.size))],
                pos=part.pos,
                quat=part.turn,
                rgba=[*part.colour, 1],
                mass=0.0 if j else 0.08,
                contype=int(j == 0),
                conaffinity=int(j == 0),
                condim=6,
                friction=[0.8, 0.01, 0.002],
                group=0 if j == 0 else 2,
            )


def _place_things(env: ArmTaskEnv, count: int, rng: np.random.Generator) -> None:
    """Put ``count`` of them on the table, off the task's things; gives up the gaps where there is no room."""
    model, data = env.model, env.data
    things = _things(model)
    if len(things) == 0:
        return
    mujoco.mj_kinematics(model, data)
    starts, ends, radii = _kept_free(env)
    for body in rng.permutation(things)[:count]:
        radius = _radius(model, body)
        points = rng.uniform(REGION_LOW, REGION_HIGH, (TRIES, 2))
        clearance = (_distances(points, starts, ends) - radii).min(axis=1) - radius - GAP
        free = np.flatnonzero(clearance >= 0)
        point = points[free[0] if len(free) else np.argmax(clearance)]
        env.place(model.body(body).name, [*point, 0.0005], rng.uniform(-np.pi, np.pi))
        model.body_gravcomp[body] = 0
        starts, ends, radii = np.vstack([starts, point]), np.vstack([ends, point]), np.append(radii, radius)


def _things(model: mujoco.MjModel) -> np.ndarray:
    return np.array([i for i in range(model.nbody) if model.body(i).name.startswith(DISTRACTOR)], dtype=int)


def _radius(model: mujoco.MjModel, body: int) -> float:
    """Of the circle about the body's origin that holds its outline."""
    geoms = np.flatnonzero(model.geom_bodyid == body)
    boxes = model.geom_type[geoms] == mujoco.mjtGeom.mjGEOM_BOX
    sizes = model.geom_size[geoms]
    reach = np.where(boxes, np.linalg.norm(sizes[:, :2], axis=1), sizes[:, 0])
    return float((np.linalg.norm(model.geom_pos[geoms, :2], axis=1) + reach).max())


def _kept_free(env: ArmTaskEnv) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Start (n, 2), end (n, 2) and radius (n,) of the stadiums where nothing may lie.

    They are: the task's geoms, along the whole way of the slide joints that carry them; the ways between the task's
    bodies; the foot of the arm, and its hand where that is low.
    """
    model, data = env.model, env.data
    mine = task_bodies(model, env)
    geoms = np.flatnonzero(mine[model.geom_bodyid])
    starts = [*data.geom_xpos[geoms, :2]]
    ends = [*data.geom_xpos[geoms, :2]]
    radii = [*(model.geom_rbound[geoms] + FINGER_ROOM)]
    for joint in np.flatnonzero((model.jnt_type == int(mujoco.mjtJoint.mjJNT_SLIDE)) & mine[model.jnt_bodyid]):
        travel = model.jnt_range[joint] - data.qpos[model.jnt_qposadr[joint]]
        shifts = travel[:, None] * data.xaxis[joint, :2]
        carried = np.flatnonzero(model.geom_bodyid == model.jnt_bodyid[joint])
        starts += [*(data.geom_xpos[carried, :2] + shifts[0])]
        ends += [*(data.geom_xpos[carried, :2] + shifts[1])]
        radii += [*(model.geom_rbound[carried] + FINGER_ROOM)]
    roots = np.unique(model.body_rootid[mine])
    for i, body in enumerate(roots):
        for other in roots[i + 1 :]:
            starts.append(data.xpos[body, :2])
            ends.append(data.xpos[other, :2])
            radii.append(CORRIDOR)
    arm = model.body_rootid[model.geom_bodyid] == model.body(env.arm.base).id
    low = np.flatnonzero(arm & (data.geom_xpos[:, 2] - model.geom_rbound < env.table_height + HIGHEST))
    starts += [*data.geom_xpos[low, :2]]
    ends += [*data.geom_xpos[low, :2]]
    radii += [*model.geom_rbound[low]]
    return np.array(starts), np.array(ends), np.array(radii)


def _distances(points: np.ndarray, starts: np.ndarray, ends: np.ndarray) -> np.ndarray:
    """Distance (n_points, n_segments) from points to segments, in the plane."""
    ways = ends - starts
    lengths = np.maximum((ways**2).sum(axis=1), 1e-12)
    from_start = points[:, None] - starts
    share = np.clip((from_start * ways).sum(axis=2) / lengths, 0, 1)
    return np.linalg.norm(from_start - share[..., None] * ways, axis=2)


FACTORS = (
    Factor(
        "distractors",
        f"how many of {len(THINGS)} small things lie about; which ones and where, off the task's objects, is drawn",
        bounds=(0, MAX_COUNT),
        nominal=0,
        fields=("body_gravcomp",),
        edit=_add_things,
        place=_place_things,
        integer=True,
    ),
)
