"""Where the fixed cameras stand, where they look and how wide; the camera on the hand stays as it is."""

from __future__ import annotations

from typing import TYPE_CHECKING

import mujoco
import numpy as np

from robopolicy_sim.variation.factor import Factor

if TYPE_CHECKING:
    from robopolicy_sim.envs.arm_task import ArmTaskEnv

CENTRE = np.array([0.0, 0.0, 0.1])  # m, about the middle of the workspace


def _fixed(model: mujoco.MjModel) -> np.ndarray:
    return np.flatnonzero(model.cam_bodyid == 0)


def _orbit(env: ArmTaskEnv, angle: float) -> None:
    turn = np.array([np.cos(angle / 2), 0.0, 0.0, np.sin(angle / 2)])
    model = env.model
    for camera in _fixed(model):
        position, rotation = np.empty(3), np.empty(4)
        mujoco.mju_rotVecQuat(position, model.cam_pos[camera], turn)
        mujoco.mju_mulQuat(rotation, turn, model.cam_quat[camera])
        model.cam_pos[camera], model.cam_quat[camera] = position, rotation


def _tilt(env: ArmTaskEnv, angle: float) -> None:
    # A camera looks along -z; about its own x axis it would turn upwards.
    turn = np.array([np.cos(angle / 2), -np.sin(angle / 2), 0.0, 0.0])
    for camera in _fixed(env.model):
        rotation = np.empty(4)
        mujoco.mju_mulQuat(rotation, env.model.cam_quat[camera], turn)
        env.model.cam_quat[camera] = rotation


def _approach(env: ArmTaskEnv, scale: float) -> None:
    fixed = _fixed(env.model)
    env.model.cam_pos[fixed] = CENTRE + scale * (env.model.cam_pos[fixed] - CENTRE)


def _zoom(env: ArmTaskEnv, scale: float) -> None:
    env.model.cam_fovy[_fixed(env.model)] *= scale


FACTORS = (
    Factor(
        "camera_yaw",
        "fixed cameras moved on a circle about the middle of the workspace, looking at it as before [rad]",
        _orbit,
        levels={"left": -0.15, "right": 0.15},
        bounds=(-1.0, 1.0),
        nominal=0.0,
        fields=("cam_pos", "cam_quat"),
    ),
    Factor(
        "camera_pitch",
        "fixed cameras tilted in place, positive downwards [rad]",
        _tilt,
        levels={"up": -0.12, "down": 0.15},
        bounds=(-0.3, 0.3),
        nominal=0.0,
        fields=("cam_quat",),
    ),
    Factor(
        "camera_distance",
        "distance of fixed cameras from the middle of the workspace, as a factor",
        _approach,
        levels={"near": 0.85, "far": 1.2},
        bounds=(0.7, 1.5),
        nominal=1.0,
        fields=("cam_pos",),
    ),
    Factor(
        "camera_fov",
        "vertical field of view of fixed cameras, as a factor",
        _zoom,
        levels={"narrow": 0.85, "wide": 1.2},
        bounds=(0.7, 1.4),
        nominal=1.0,
        fields=("cam_fovy",),
    ),
)
