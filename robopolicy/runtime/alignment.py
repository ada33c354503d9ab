"""Reading a stream between its samples: which samples, how far between them, and what lies there."""

from __future__ import annotations

import math
from typing import Literal

import numpy as np
from PIL import Image

Align = Literal["hold", "nearest", "interpolate"]


def neighbours(moments: np.ndarray, time: int, align: Align) -> tuple[int, int, float]:
    """Which samples are read at a time.

    Args:
        moments: (N,) ns, rising, N at least 1.
        time: ns. Before the first sample that one is read, after the last one the last: nothing is extrapolated.
        align: see `robopolicy.runtime.contract.Part`. Of two samples at one distance ``nearest`` takes the older.

    Returns:
        ``(before, after, share)``: indices, and how far from ``before`` to ``after`` in [0, 1); they are equal and the
        share is 0 but between two samples that are interpolated.
    """
    after = int(moments.searchsorted(time, side="right"))
    before = max(after - 1, 0)
    if align == "hold" or after in (0, len(moments)):
        return before, before, 0.0
    past, ahead = time - int(moments[before]), int(moments[after]) - time
    if align == "nearest":
        chosen = after if ahead < past else before
        return chosen, chosen, 0.0
    return (before, after, past / (past + ahead)) if past else (before, before, 0.0)


def lerp(first: np.ndarray, second: np.ndarray, share: float) -> np.ndarray:
    """``first`` at 0, ``second`` at 1."""
    return first + share * (second - first)


def slerp(first: np.ndarray, second: np.ndarray, share: float) -> np.ndarray:
    """Between two rotations at constant angular speed, the short way (Shoemake, SIGGRAPH 1985).

    Args:
        first, second: (4,) unit quaternions; either sign means the same rotation.
        share: 0 for ``first``, 1 for ``second``.

    Returns:
        (4,) unit quaternion.
    """
    cosine = float(first @ second)
    if cosine < 0:
        first, cosine = -first, -cosine
    angle = math.acos(min(cosine, 1.0))
    if angle < 1e-4:  # the sines vanish, and the chord is the arc
        mixed = lerp(first, second, share)
    else:
        mixed = (math.sin((1 - share) * angle) * first + math.sin(share * angle) * second) / math.sin(angle)
    return mixed / math.sqrt(float(mixed @ mixed))


def rotation_6d(quaternion: np.ndarray) -> np.ndarray:
    """First two columns of the rotation matrix, one after the other (Zhou et al., CVPR 2019).

    Args:
        quaternion: (4,) xyzw, of length 1.

    Returns:
        (6,)
    """
    x, y, z, w = quaternion.tolist()
    return np.array(
        (
            1 - 2 * (y * y + z * z),
            2 * (x * y + w * z),
            2 * (x * z - w * y),
            2 * (x * y - w * z),
            1 - 2 * (x * x + z * z),
            2 * (y * z + w * x),
        )
    )


def resize(image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Resize an image: a pixel is the mean of those whose centres it covers; bilinear where a side grows.

    Args:
        image: (height, width, 3) uint8.
        size: (height, width).

    Returns:
        (*size, 3) uint8; the image itself where it has that size.
    """
    height, width = image.shape[:2]
    if (height, width) == size:
        return image
    picture = Image.fromarray(image)
    if height % size[0] == 0 and width % size[1] == 0:  # the same mean, rounded once and not once for each axis
        return np.asarray(picture.reduce((width // size[1], height // size[0])))
    shrinks = height >= size[0] and width >= size[1]
    how = Image.Resampling.BOX if shrinks else Image.Resampling.BILINEAR
    return np.asarray(picture.resize((size[1], size[0]), how))
