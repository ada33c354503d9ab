"""Procedural textures, painted into the model so that the package ships no image files."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

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


def wood_planks(
    height: int, width: int, *, planks: int = 4, seed: int = 3, colour: Sequence[float] = (0.76, 0.58, 0.40)
) -> np.ndarray:
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
    return _to_uint8(light[..., None] * np.array(colour))


def ruled_mat(height: int, width: int, *, cells: int = 12) -> np.ndarray:
    """A pale work mat with a grid of ``cells`` squares and a darker border. Returns (height, width, 3) uint8."""
    v, u = np.mgrid[0:height, 0:width] / np.array([height, width]).reshape(2, 1, 1)
    offset = np.minimum(*(np.abs(x * cells - np.round(x * cells)) for x in (u, v)))
    border = np.minimum.reduce([u, 1 - u, v, 1 - v]) < 0.008
    colour = np.where((offset < 0.035)[..., None], [0.56, 0.61, 0.62], [0.70, 0.74, 0.74])
    return _to_uint8(np.where(border[..., None], [0.30, 0.40, 0.43], colour))


def cells(
    height: int,
    width: int,
    *,
    across: int,
    down: int,
    colours: Sequence[Sequence[float]],
    joint: Sequence[float],
    joint_width: float = 0.01,
    shift: float = 0.0,
    shade: float = 0.04,
    seed: int = 5,
) -> np.ndarray:
    """Tiles, bricks or panels: a grid of cells with joints, each cell of its own shade.

    Args:
        colours: RGB of the cells, in turn along each row and column.
        joint: RGB of the joints; ``joint_width`` is a share of the image.
        shift: how far each second row is moved, as a share of a cell.
        shade: standard deviation of the cells' brightness.

    Returns:
        (height, width, 3) uint8.
    """
    rng = np.random.default_rng(seed)
    v, u = np.mgrid[0:height, 0:width] / np.array([height, width]).reshape(2, 1, 1)
    row = np.minimum((v * down).astype(int), down - 1)
    x = (u * across + shift * (row % 2)) % across
    column = np.minimum(x.astype(int), across - 1)
    light = 1 + rng.normal(0, shade, (down, across))[row, column] + 0.015 * rng.normal(0, 1, (height, width))
    colour = np.asarray(colours)[(row + column) % len(colours)] * light[..., None]
    edge_x = np.minimum(x - column, column + 1 - x) / across
    edge_y = np.abs(v * down - np.round(v * down)) / down
    in_joint = np.minimum(edge_x, edge_y) < joint_width / 2
    return _to_uint8(np.where(in_joint[..., None], np.asarray(joint), colour))


def mottled(
    height: int,
    width: int,
    *,
    colour: Sequence[float],
    cloud: float = 0.05,
    speckle: float = 0.02,
    grain: float = 0.0,
    stretch: int = 1,
    seed: int = 7,
) -> np.ndarray:
    """Plaster, concrete, stone, cloth or metal: a colour with clouds and speckles, which repeats without a seam.

    Args:
        cloud: standard deviation of the brightness over large spots; ``speckle`` over pixels.
        grain: standard deviation over spots of a few pixels.
        stretch: how many times longer than high grains and speckles are.

    Returns:
        (height, width, 3) uint8.
    """
    rng = np.random.default_rng(seed)
    light = (
        1
        + cloud * _smooth_noise(rng, height, width, width / 14, 1)
        + speckle * _smooth_noise(rng, height, width, 0.5, stretch)
    )
    if grain > 0:
        light += grain * _smooth_noise(rng, height, width, 2.5, stretch)
    return _to_uint8(light[..., None] * np.asarray(colour))


def _smooth_noise(rng: np.random.Generator, height: int, width: int, scale: float, stretch: float) -> np.ndarray:
    """Periodic noise (height, width), standardised, smoothed over ``scale`` pixels, ``stretch`` times that along x."""
    fy, fx = np.meshgrid(np.fft.fftfreq(height), np.fft.rfftfreq(width), indexing="ij")
    low_pass = np.exp(-2 * (np.pi * scale) ** 2 * (fy**2 + (stretch * fx) ** 2))
    noise = np.fft.irfft2(np.fft.rfft2(rng.normal(0, 1, (height, width))) * low_pass, s=(height, width))
    noise -= noise.mean()
    return noise / noise.std()


def _to_uint8(colour: np.ndarray) -> np.ndarray:
    return np.round(np.clip(colour, 0, 1) * 255).astype(np.uint8)


_PAINTERS: dict[str, Callable[[int, int], np.ndarray]] = {
    "wood": wood_planks,
    "mat": ruled_mat,
    # Table tops.
    "walnut": partial(wood_planks, planks=5, seed=11, colour=(0.36, 0.23, 0.15)),
    "laminate": partial(mottled, colour=(0.86, 0.86, 0.84), cloud=0.008, speckle=0.008),
    "checker": partial(
        cells,
        across=8,
        down=8,
        colours=[(0.84, 0.82, 0.76), (0.30, 0.38, 0.44)],
        joint=(0.55, 0.55, 0.53),
        joint_width=0.004,
    ),
    "brushed_metal": partial(mottled, colour=(0.62, 0.64, 0.66), cloud=0.02, speckle=0.05, grain=0.03, stretch=40),
    "granite": partial(mottled, colour=(0.45, 0.44, 0.45), cloud=0.05, speckle=0.12, grain=0.16),
    # Floors.
    "parquet": partial(wood_planks, planks=8, seed=23, colour=(0.58, 0.41, 0.27)),
    "screed": partial(mottled, colour=(0.52, 0.52, 0.51), cloud=0.07, speckle=0.03, grain=0.02),
    "carpet": partial(mottled, colour=(0.30, 0.36, 0.46), cloud=0.03, speckle=0.10, grain=0.05),
    "terrazzo": partial(mottled, colour=(0.80, 0.80, 0.78), cloud=0.02, speckle=0.03, grain=0.06),
    "slate": partial(
        cells, across=4, down=4, colours=[(0.13, 0.14, 0.16)], joint=(0.07, 0.07, 0.08), shade=0.08, joint_width=0.008
    ),
    # Walls.
    "wall_panels": partial(wood_planks, planks=6, seed=31, colour=(0.74, 0.62, 0.47)),
    "concrete": partial(mottled, colour=(0.60, 0.60, 0.59), cloud=0.06, speckle=0.03, grain=0.02, seed=13),
    "bricks": partial(
        cells,
        across=5,
        down=14,
        colours=[(0.58, 0.28, 0.21), (0.52, 0.25, 0.19), (0.62, 0.33, 0.25)],
        joint=(0.68, 0.66, 0.62),
        joint_width=0.010,
        shift=0.5,
        shade=0.07,
    ),
    "plaster": partial(mottled, colour=(0.92, 0.92, 0.90), cloud=0.015, speckle=0.015),
    "curtain": partial(mottled, colour=(0.14, 0.14, 0.17), cloud=0.10, speckle=0.04, grain=0.04),
}
