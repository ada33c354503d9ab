"""Procedural textures, painted into the model so that the package ships no image files."""

from __future__ import annotations

from collections.abc import Callable

import mujoco
import numpy as np


def paint_textures(model: mujoco.MjModel) -> None:
    """Fill the model's textures that have a painter here; must run before the first renderer is created."""
    for name, painter in _PAINTERS.items():
        texture = mujoco.mj_name2id(model, mujoco.mjtObj.mjOBJ_TEXTURE, name)
        if texture < 0:
            continue
        height, width = model.tex_height[texture], model.tex_width[texture]
        start = model.tex_adr[texture]
        model.tex_data[start : start + height * width * 3] = painter(height, width).ravel()


def wood_planks(height: int, width: int, *, planks: int = 4, seed: int = 3) -> np.ndarray:
    """Boards along the image's rows with grain. Returns (height, width, 3) uint8."""
    rng = np.random.default_rng(seed)
    v, u = np.mgrid[0:height, 0:width] / np.array([height, width]).reshape(2, 1, 1)
    board = np.minimum((v * planks).astype(int), planks - 1)
    shade = rng.uniform(-0.05, 0.05, planks)[board]
    phase = rng.uniform(0, 2 * np.pi, (planks, 4))[board]
    waviness = 0.035 * np.sin(2 * np.pi * u + phase[..., 0]) + 0.012 * np.sin(6 * np.pi * u + phase[..., 1])
    rings = np.sin(2 * np.pi * (v + waviness) * 26 + phase[..., 2]) + 0.5 * np.sin(
        2 * np.pi * (v + waviness) * 71 + phase[..., 3]
    )
    fibre = np.repeat(rng.normal(0, 1, (height, width // 16)), 16, axis=1)
    joint = np.abs(v * planks - np.round(v * planks)) < 0.006
    light = 1.0 + shade + 0.035 * rings + 0.02 * fibre - 0.25 * joint
    return _to_uint8(light[..., None] * np.array([0.76, 0.58, 0.40]))


def ruled_mat(height: int, width: int, *, cells: int = 12) -> np.ndarray:
    """A pale work mat with a grid of ``cells`` squares and a darker border. Returns (height, width, 3) uint8."""
    v, u = np.mgrid[0:height, 0:width] / np.array([height, width]).reshape(2, 1, 1)
    offset = np.minimum(*(np.abs(x * cells - np.round(x * cells)) for x in (u, v)))
    border = np.minimum.reduce([u, 1 - u, v, 1 - v]) < 0.008
    colour = np.where((offset < 0.035)[..., None], [0.56, 0.61, 0.62], [0.70, 0.74, 0.74])
    return _to_uint8(np.where(border[..., None], [0.30, 0.40, 0.43], colour))


def _to_uint8(colour: np.ndarray) -> np.ndarray:
    return np.round(np.clip(colour, 0, 1) * 255).astype(np.uint8)


_PAINTERS: dict[str, Callable[[int, int], np.ndarray]] = {"wood": wood_planks, "mat": ruled_mat}
