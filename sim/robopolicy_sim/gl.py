"""Choice of the OpenGL backend; MuJoCo reads it once, when it is first imported."""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import MutableMapping

DEBIAN_PACKAGES = "libegl1 libopengl0 libgl1-mesa-dri"


def select_gl_backend(environ: MutableMapping[str, str] = os.environ) -> None:
    """Point MuJoCo at EGL on Linux without a display, unless the user chose a backend.

    Without the EGL libraries MuJoCo would fail while it is imported, so there the backend is disabled instead:
    simulation then works, and only rendering raises an error.
    """
    if not sys.platform.startswith("linux") or environ.get("DISPLAY"):
        return
    if not environ.get("MUJOCO_GL"):
        environ["MUJOCO_GL"] = "egl" if _egl_libraries_load() else "disabled"
    if environ["MUJOCO_GL"].lower() in ("egl", "osmesa"):
        environ["PYOPENGL_PLATFORM"] = environ["MUJOCO_GL"].lower()


def _egl_libraries_load() -> bool:
    return _loads("libEGL.so.1") and (_loads("libOpenGL.so.0") or _loads("libGL.so.1"))


def _loads(library: str) -> bool:
    try:
        ctypes.CDLL(library)
    except OSError:
        return False
    return True
