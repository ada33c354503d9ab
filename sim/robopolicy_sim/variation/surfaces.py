"""What things look like: table top, room, arm, objects."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import mujoco
import numpy as np

from robopolicy_sim.variation.factor import BASE, Factor, Value, task_bodies

if TYPE_CHECKING:
    from robopolicy_sim.envs.arm_task import ArmTaskEnv

# Textures are painted by textures.py. Texture, repeats per metre, specular.
TABLE_TEXTURES: dict[str, tuple[str, float, float]] = {
    "walnut": ("walnut", 1.1, 0.25),
    "laminate": ("laminate", 1.0, 0.30),
    "checker": ("checker", 2.5, 0.15),
    "metal": ("brushed_metal", 1.0, 0.60),
    "granite": ("granite", 3.0, 0.40),
}
# Of the room's floor and walls: texture, repeats per metre.
BACKGROUNDS: dict[str, tuple[tuple[str, float], tuple[str, float]]] = {
    "wood": (("parquet", 1.0), ("wall_panels", 0.6)),
    "concrete": (("screed", 0.4), ("concrete", 0.4)),
    "brick": (("carpet", 0.8), ("bricks", 1.8)),
    "bright": (("terrazzo", 1.5), ("plaster", 0.5)),
    "dark": (("slate", 0.7), ("curtain", 0.5)),
}
ARM_COLOURS = {
    "sand": (0.84, 0.76, 0.62),
    "grey": (0.55, 0.57, 0.60),
    "dark": (0.17, 0.18, 0.20),
    "orange": (0.90, 0.42, 0.12),
    "blue": (0.16, 0.34, 0.60),
}
TABLE_COLOURS = {
    "grey": (0.60, 0.62, 0.65),
    "green": (0.62, 0.85, 0.66),
    "blue": (0.58, 0.74, 0.95),
    "rose": (1.0, 0.78, 0.76),
}
ROOM_HALF, FLOOR, ROOM_HEIGHT = 2.4, -0.75, 3.0  # m


def _add_material(spec: mujoco.MjSpec, name: str, texture: str, repeat: float, **look: float) -> None:
    # Painted in grey here; the renderer fills in the painter's image.
    spec.add_texture(
        name=texture,
        type=mujoco.mjtTexture.mjTEXTURE_2D,
        builtin=mujoco.mjtBuiltin.mjBUILTIN_FLAT,
        rgb1=[0.5, 0.5, 0.5],
        width=512,
        height=512,
    )
    material = spec.add_material(name=name, texuniform=True, texrepeat=[repeat, repeat], **look)
    material.textures[mujoco.mjtTextureRole.mjTEXROLE_RGB] = texture


def _add_table_textures(spec: mujoco.MjSpec, env: ArmTaskEnv, values: Sequence[Value]) -> None:
    for level in sorted({str(value) for value in values} - {BASE}):
        texture, repeat, specular = TABLE_TEXTURES[level]
        _add_material(spec, f"table_{level}", texture, repeat, specular=specular, shininess=0.4)


def _set_table_texture(env: ArmTaskEnv, level: str) -> None:
    model = env.model
    model.geom_matid[model.geom("table_top").id] = model.material(f"table_{level}").id
    model.geom_rgba[model.geom("work_mat").id] = 0  # not drawn


def _set_table_colour(env: ArmTaskEnv, colour: Sequence[float]) -> None:
    model = env.model
    for name in ("table_top", "work_mat"):
        model.mat_rgba[model.geom_matid[model.geom(name).id], :3] *= colour


def _add_room(spec: mujoco.MjSpec, env: ArmTaskEnv, values: Sequence[Value]) -> None:
    """Four walls about the bench, not drawn until a background asks for them."""
    levels = sorted({str(value) for value in values} - {BASE})
    for level in levels:
        floor, walls = BACKGROUNDS[level]
        _add_material(spec, f"floor_{level}", *floor, specular=0.05)
        # Of its own light: the lamps are above the bench.
        _add_material(spec, f"wall_{level}", *walls, specular=0.0, emission=0.35)
    if not levels:
        return
    for side in range(4):
        angle = side * np.pi / 2
        # The plane's z axis points into the room, its x axis along the wall.
        inwards = np.array([-np.cos(angle), -np.sin(angle), 0])
        up = np.array([0.0, 0, 1])
        frame = np.stack([np.cross(up, inwards), up, inwards], axis=1)
        quaternion = np.empty(4)
        mujoco.mju_mat2Quat(quaternion, frame.ravel())
        spec.worldbody.add_geom(
            name=f"wall_{side}",
            type=mujoco.mjtGeom.mjGEOM_PLANE,
            size=[ROOM_HALF, ROOM_HEIGHT, 0.1],
            pos=-ROOM_HALF * inwards + [0, 0, FLOOR],
            quat=quaternion,
            rgba=[1, 1, 1, 0],
            material=f"wall_{levels[0]}",
            contype=0,
            conaffinity=0,
        )


def _set_background(env: ArmTaskEnv, level: str) -> None:
    model = env.model
    model.geom_matid[model.geom("floor").id] = model.material(f"floor_{level}").id
    for side in range(4):
        wall = model.geom(f"wall_{side}").id
        model.geom_matid[wall] = model.material(f"wall_{level}").id
        model.geom_rgba[wall, 3] = 1


def shell(env: ArmTaskEnv) -> np.ndarray:
    """The arm's geoms of its main colour (the one of the most surface), as indices."""
    model = env.model
    geoms = np.flatnonzero(model.body_rootid[model.geom_bodyid] == model.body(env.arm.base).id)
    material = model.geom_matid[geoms]
    colours = np.where(material[:, None] >= 0, model.mat_rgba[material], model.geom_rgba[geoms])
    _, kind = np.unique(colours, axis=0, return_inverse=True)
    kind = kind.ravel()
    return geoms[kind == np.argmax(np.bincount(kind, model.geom_rbound[geoms] ** 2))]


def _set_arm_colour(env: ArmTaskEnv, colour: Sequence[float]) -> None:
    model = env.model
    geoms = shell(env)
    materials = np.unique(model.geom_matid[geoms])
    model.mat_rgba[materials[materials >= 0], :3] = colour
    model.geom_rgba[geoms[model.geom_matid[geoms] < 0], :3] = colour


def _turn_hue(env: ArmTaskEnv, angle: float) -> None:
    """Turn the colours of the task's bodies about the grey axis of RGB (Rodrigues), which keeps them apart."""
    model = env.model
    axis = np.full(3, 1 / np.sqrt(3))
    cross = np.cross(np.eye(3), -axis)
    turn = np.cos(angle) * np.eye(3) + np.sin(angle) * cross + (1 - np.cos(angle)) * np.outer(axis, axis)
    geoms = task_bodies(model, env)[model.geom_bodyid]
    model.geom_rgba[geoms, :3] = np.clip(model.geom_rgba[geoms, :3] @ turn.T, 0, 1)


FACTORS = (
    Factor(
        "table_texture",
        "another table top, without the work mat",
        _set_table_texture,
        levels={level: level for level in TABLE_TEXTURES},
        fields=("geom_matid", "geom_rgba"),
        edit=_add_table_textures,
    ),
    Factor(
        "table_colour",
        "tint of table top and mat, RGB",
        _set_table_colour,
        levels=TABLE_COLOURS,
        bounds=(0.0, 1.0),
        nominal=(1.0, 1.0, 1.0),
        fields=("mat_rgba",),
    ),
    Factor(
        "background",
        "floor and walls of the room",
        _set_background,
        levels={level: level for level in BACKGROUNDS},
        fields=("geom_matid", "geom_rgba"),
        edit=_add_room,
    ),
    Factor(
        "arm_colour",
        "main colour of the arm, RGB",
        _set_arm_colour,
        levels=ARM_COLOURS,
        bounds=(0.0, 1.0),
        nominal=(0.93, 0.94, 0.95),
        fields=("mat_rgba", "geom_rgba"),
    ),
    Factor(
        "object_hue",
        "hue of the task's objects, turned [rad]; instructions that name a colour are not changed",
        _turn_hue,
        levels={"shifted": 0.5},
        bounds=(-np.pi, np.pi),
        nominal=0.0,
        fields=("geom_rgba",),
    ),
)
