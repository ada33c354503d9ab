"""Cameras and colours of the real set-up, written into a scene's model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import mujoco
import numpy as np

from robopolicy_sim.matching.background import geoms_of

CAMERA_KEYS = ("pos", "xyaxes", "fovy")


def place_cameras(model: mujoco.MjModel, cameras: Mapping[str, Mapping[str, Any]], base_position: np.ndarray) -> None:
    """Put fixed cameras where the real ones are.

    Args:
        cameras: by name ``{"pos": [x, y, z], "xyaxes": [right (3), up (3)], "fovy": degrees}``: position in the
            frame of the arm's base in metres, the image's right and up axes in that frame, vertical field of view.
            What is left out stays.
        base_position: (3,) of the arm's base in the world, whose axes it shares.

    Raises:
        ValueError: a camera or key is unknown, or a value is impossible.
    """
    names = [model.camera(i).name for i in range(model.ncam)]
    for name, pose in cameras.items():
        if name not in names:
            raise ValueError(f"camera_poses: there is no camera '{name}'; the scene has {', '.join(names)}.")
        if model.cam_bodyid[names.index(name)] != 0:
            raise ValueError(
                f"camera_poses: camera '{name}' is not fixed to the world; only fixed cameras can be placed."
            )
        unknown = [key for key in pose if key not in CAMERA_KEYS]
        if unknown:
            raise ValueError(
                f"camera_poses: '{name}' has the unknown key '{unknown[0]}'; it has {', '.join(CAMERA_KEYS)}."
            )
        camera = model.camera(name)
        if "pos" in pose:
            camera.pos[:] = _numbers(f"camera_poses: pos of '{name}'", pose["pos"], 3) + base_position
        if "xyaxes" in pose:
            camera.quat[:] = _quaternion(name, _numbers(f"camera_poses: xyaxes of '{name}'", pose["xyaxes"], 6))
        if "fovy" in pose:
            fovy = float(pose["fovy"])
            if not 0 < fovy < 180:
                raise ValueError(f"camera_poses: fovy of '{name}' is {fovy}, wanted degrees between 0 and 180.")
            camera.fovy[:] = fovy


def paint(model: mujoco.MjModel, colours: Mapping[str, Sequence[float]]) -> None:
    """Give bodies (with all that is mounted on them) or geoms a plain colour, e.g. one measured in a photograph.

    Args:
        colours: ``[red, green, blue]`` in 0 .. 1 by name. Transparency stays; a texture is taken off.

    Raises:
        ValueError: a name is unknown, or a colour is none.
    """
    for name, colour in colours.items():
        rgb = _numbers(f"colours: '{name}'", colour, 3)
        if rgb.min() < 0 or rgb.max() > 1:
            raise ValueError(f"colours: '{name}' is {list(colour)}, wanted red, green, blue in 0 .. 1.")
        for geom in np.flatnonzero(geoms_of(model, [name])):
            _paint_geom(model, geom, rgb)


def _paint_geom(model: mujoco.MjModel, geom: int, rgb: np.ndarray) -> None:
    material = model.geom_matid[geom]
    if material >= 0:
        # A geom's own colour, unless it is MuJoCo's default grey, goes before its material's.
        model.geom_rgba[geom, 3] = model.mat_rgba[material, 3]
        if (model.mat_texid[material] >= 0).any():
            model.geom_matid[geom] = -1
    model.geom_rgba[geom, :3] = rgb


def _numbers(what: str, values: Any, count: int) -> np.ndarray:
    try:
        numbers = np.asarray(values, dtype=np.float64)
    except (TypeError, ValueError):
        numbers = np.empty(0)
    if numbers.shape != (count,) or not np.isfinite(numbers).all():
        raise ValueError(f"{what} is {values!r}, wanted {count} finite numbers.")
    return numbers


def _quaternion(name: str, xyaxes: np.ndarray) -> np.ndarray:
    """MuJoCo's quaternion (w, x, y, z) of a camera from its right and up axes, made orthonormal."""
    right, up = xyaxes[:3], xyaxes[3:]
    back = np.cross(right, up)
    if np.linalg.norm(back) < 1e-6:
        raise ValueError(f"camera_poses: xyaxes of '{name}' are zero or parallel.")
    right, back = right / np.linalg.norm(right), back / np.linalg.norm(back)
    quaternion = np.empty(4)
    mujoco.mju_mat2Quat(quaternion, np.column_stack([right, np.cross(back, right), back]).ravel())
    return quaternion
