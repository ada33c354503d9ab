"""What cannot be seen, or hardly: friction, mass, height of the table."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import mujoco
import numpy as np

from robopolicy_sim.variation.factor import Factor, Value, task_bodies

if TYPE_CHECKING:
    from robopolicy_sim.envs.arm_task import ArmTaskEnv

MAX_HEIGHT = 0.05  # m that the table may be higher or lower


def _scale_friction(env: ArmTaskEnv, scale: float) -> None:
    # Of everything: in a grasp only the pads' friction counts, because they have priority.
    env.model.geom_friction[:] *= scale


def _scale_mass(env: ArmTaskEnv, scale: float) -> None:
    model = env.model
    bodies = task_bodies(model, env)
    model.body_mass[bodies] *= scale
    model.body_inertia[bodies] *= scale
    statistic = model.stat
    view = statistic.center.copy(), statistic.extent, statistic.meansize, statistic.meanmass, statistic.meaninertia
    mujoco.mj_setConst(model, mujoco.MjData(model))  # weights of constraints depend on masses
    # Clipping planes and solver tolerances come from these; a heavier cube shall not change them.
    statistic.center[:], statistic.extent, statistic.meansize, statistic.meanmass, statistic.meaninertia = view


def _raise_table(env: ArmTaskEnv, height: float) -> None:
    env.table_height = height
    env.model.body_pos[env.model.body("bench").id, 2] += height


def _add_socle(spec: mujoco.MjSpec, env: ArmTaskEnv, values: Sequence[Value]) -> None:
    """A block under the arm's foot, inside the table as long as that is not lowered."""
    side = 0.055 + 0.045 * env.scale
    half = np.array([side, side, (MAX_HEIGHT + 0.005) / 2])
    spec.worldbody.add_geom(
        name="socle",
        type=mujoco.mjtGeom.mjGEOM_BOX,
        size=half,
        pos=env.base_position - [0.02 * env.scale, 0, half[2] + 0.0005],
        material="aluminium",
        contype=0,
        conaffinity=0,
    )


# What mj_setConst derives from masses, and what it writes besides.
_DERIVED = (
    "body_subtreemass",
    "body_invweight0",
    "dof_invweight0",
    "dof_M0",
    "tendon_length0",
    "tendon_invweight0",
    "actuator_length0",
    "actuator_acc0",
    "cam_pos0",
    "cam_poscom0",
    "cam_mat0",
    "light_pos0",
    "light_poscom0",
    "light_dir0",
)

FACTORS = (
    Factor(
        "friction",
        "all friction coefficients, of gripper, objects and table, as a factor",
        _scale_friction,
        levels={"slippery": 0.3, "rough": 1.5},
        bounds=(0.05, 3.0),
        nominal=1.0,
        fields=("geom_friction",),
    ),
    Factor(
        "object_mass",
        "mass and inertia of the task's objects, as a factor",
        _scale_mass,
        levels={"light": 0.4, "heavy": 4.0},
        bounds=(0.1, 20.0),
        nominal=1.0,
        fields=("body_mass", "body_inertia", *_DERIVED),
    ),
    Factor(
        "table_height",
        "the table's top above the foot of the arm [m]",
        _raise_table,
        levels={"low": -0.03, "high": 0.03},
        bounds=(-MAX_HEIGHT, MAX_HEIGHT),
        nominal=0.0,
        fields=("body_pos",),
        attributes=("table_height",),
        edit=_add_socle,
    ),
)
