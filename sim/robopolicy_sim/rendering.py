"""Images of a scene: the quality setting and a small cache of renderers."""

from __future__ import annotations

import atexit
import weakref
from dataclasses import dataclass
from functools import cache

import mujoco
import numpy as np

from robopolicy_sim.gl import DEBIAN_PACKAGES
from robopolicy_sim.textures import paint_textures


class RenderingError(RuntimeError):
    """OpenGL cannot start; the message says what to install or set."""


@dataclass(frozen=True)
class RenderQuality:
    """What an image may cost. On a CPU shadows cost about 6x and 4 samples another 2x at small sizes.

    Attributes:
        shadow_size: side of the shadow map in pixels; 0 draws no shadows.
        samples: samples for each pixel (anti-aliasing); 0 switches it off.
    """

    shadow_size: int = 0
    samples: int = 0


RENDER_QUALITIES = {
    "fast": RenderQuality(),
    "shadows": RenderQuality(shadow_size=1024),
    "full": RenderQuality(shadow_size=4096, samples=4),
}


def find_quality(quality: str | RenderQuality) -> RenderQuality:
    """Look up a quality by name; a ``RenderQuality`` is returned as it is.

    Raises:
        ValueError: the name is unknown.
    """
    if isinstance(quality, RenderQuality):
        return quality
    if quality not in RENDER_QUALITIES:
        raise ValueError(f"render_quality='{quality}' is unknown; choose one of {', '.join(RENDER_QUALITIES)}.")
    return RENDER_QUALITIES[quality]


class CameraRenderer:
    """Renders named cameras of one model; keeps one OpenGL context for each image size, because creation is slow."""

    def __init__(self, model: mujoco.MjModel, quality: RenderQuality) -> None:
        paint_textures(model)
        # A context copies these fields when it is created.
        model.vis.quality.shadowsize = quality.shadow_size
        model.vis.quality.offsamples = quality.samples
        self._model = model
        self._shadows = quality.shadow_size > 0
        self._renderers: dict[tuple[int, int], mujoco.Renderer] = {}
        _open_renderers.add(self)

    def render(self, data: mujoco.MjData, camera: str, size: tuple[int, int]) -> np.ndarray:
        """Return the camera's image, (height, width, 3) uint8 RGB, for ``size = (height, width)``.

        Raises:
            RenderingError: OpenGL cannot start on this machine.
        """
        renderer = self._renderers.get(size)
        if renderer is None:
            renderer = self._renderers[size] = self._create(*size)
        renderer.update_scene(data, camera)
        return renderer.render()

    def close(self) -> None:
        """Free the OpenGL contexts; safe to call twice."""
        while self._renderers:
            self._renderers.popitem()[1].close()

    def _create(self, height: int, width: int) -> mujoco.Renderer:
        buffer = self._model.vis.global_
        buffer.offheight, buffer.offwidth = max(buffer.offheight, height), max(buffer.offwidth, width)
        try:
            renderer = mujoco.Renderer(self._model, height, width)
        except Exception as error:  # each backend raises its own kinds
            raise RenderingError(
                f"Rendering cannot start ({type(error).__name__}: {error}). On Debian or Ubuntu install "
                f"{DEBIAN_PACKAGES}; where mujoco is imported before robopolicy_sim on a machine without a display, "
                "set MUJOCO_GL=egl before Python starts."
            ) from error
        _close_at_exit()
        renderer.scene.flags[mujoco.mjtRndFlag.mjRND_SHADOW] = self._shadows
        return renderer


_open_renderers: weakref.WeakSet[CameraRenderer] = weakref.WeakSet()


@cache
def _close_at_exit() -> None:
    """Close what is left open at exit; registered after OpenGL's own hook, and so run before it."""
    atexit.register(_close_all)


def _close_all() -> None:
    for renderer in list(_open_renderers):
        renderer.close()
