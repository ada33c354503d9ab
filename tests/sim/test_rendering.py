"""Images: shapes, content, and that simulation alone needs no OpenGL."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env

from robopolicy_sim.envs.push_puck import PushPuckEnv
from robopolicy_sim.gl import select_gl_backend
from robopolicy_sim.rendering import RenderQuality, find_quality
from robopolicy_sim.textures import ruled_mat, wood_planks

SOURCES = Path(__file__).resolve().parents[2] / "sim"


@pytest.fixture
def env():
    env = PushPuckEnv(cameras=("scene", "top"), image_size=64, render_mode="rgb_array", render_size=(90, 120))
    yield env
    env.close()


def run_python(code: str, **variables: str) -> subprocess.CompletedProcess:
    environ = {k: v for k, v in os.environ.items() if k not in ("DISPLAY", "MUJOCO_GL", "PYOPENGL_PLATFORM")}
    path = os.pathsep.join([str(SOURCES), os.environ.get("PYTHONPATH", "")])
    return subprocess.run(
        [sys.executable, "-c", code], env=environ | {"PYTHONPATH": path} | variables, capture_output=True, text=True
    )


def test_images_have_the_shapes_that_were_asked_for(env):
    observation, _ = env.reset(seed=0)
    assert env.observation_space.contains(observation)
    assert observation["observation.image.scene"].shape == (64, 64, 3)
    assert env.render().shape == (90, 120, 3)


def test_gymnasium_accepts_the_environment_with_images(env):
    check_env(env)


def test_top_camera_shows_where_the_puck_is(env):
    env.reset(seed=0)
    env.data.qpos[[1, 0]] = env._setpoint = np.array([0.25, 0.25])
    columns = []
    for x in (-0.15, 0.15):
        env.data.joint("puck").qpos[:2] = [x, -0.1]
        image = env.step(np.array([0.25, 0.25]))[0]["observation.image.top"].astype(int)
        orange = (image[..., 0] > 150) & (image[..., 2] < 90) & (image[..., 0] - image[..., 1] > 70)
        columns.append(np.argwhere(orange)[:, 1].mean())
    # The camera sees 0.69 m of the table's width.
    assert columns[1] - columns[0] == pytest.approx(0.3 / 0.69 * 64, abs=2)


def test_shadows_are_a_setting():
    images = {}
    for quality in ("fast", RenderQuality(shadow_size=512)):
        env = PushPuckEnv(cameras=("top",), image_size=64, render_quality=quality)
        images[quality] = env.reset(seed=0)[0]["observation.image.top"].astype(int)
        env.close()
    fast, shadows = images.values()
    brightness = shadows.sum(axis=-1) / fast.sum(axis=-1)
    assert (brightness < 0.85 * np.median(brightness)).mean() > 0.01


def test_unknown_settings_are_refused():
    with pytest.raises(ValueError, match="fast, shadows, full"):
        find_quality("best")
    with pytest.raises(ValueError, match="scene, top"):
        PushPuckEnv(cameras=("wrist",))
    with pytest.raises(ValueError, match="rgb_array"):
        PushPuckEnv(render_mode="human")


def test_simulation_needs_no_opengl_and_rendering_says_what_is_missing():
    code = """
import ctypes
load = ctypes.CDLL.__init__
def without_gl(self, name, *args, **kwargs):
    if name and any(part in str(name) for part in ("libEGL", "libGL", "libOpenGL", "OSMesa", "libglfw")):
        raise OSError(f"{name}: cannot open shared object file")
    load(self, name, *args, **kwargs)
ctypes.CDLL.__init__ = without_gl
import gymnasium, robopolicy_sim
env = gymnasium.make("robopolicy_sim/PushPuck-v0")
env.reset(seed=0)
print("steps", env.step(env.action_space.sample())[1] >= 0)
gymnasium.make("robopolicy_sim/PushPuck-v0", cameras=("top",)).reset(seed=0)
"""
    done = run_python(code)
    assert "steps True" in done.stdout
    assert done.returncode != 0
    assert "libegl1 libopengl0 libgl1-mesa-dri" in done.stderr.splitlines()[-1]


def test_exit_is_quiet_when_nobody_closes_the_environment():
    code = """
import gymnasium, robopolicy_sim
env = gymnasium.make("robopolicy_sim/PushPuck-v0", cameras=("top",), image_size=16)
env.reset(seed=0)
"""
    done = run_python(code)
    assert done.returncode == 0
    assert done.stderr == ""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the backend is chosen on Linux only")
def test_backend_is_chosen_only_where_needed():
    chosen = {"MUJOCO_GL": "osmesa", "PYOPENGL_PLATFORM": "egl"}
    select_gl_backend(chosen)
    assert chosen == {"MUJOCO_GL": "osmesa", "PYOPENGL_PLATFORM": "osmesa"}
    with_display = {"DISPLAY": ":0"}
    select_gl_backend(with_display)
    assert with_display == {"DISPLAY": ":0"}


@pytest.mark.parametrize("painter", [wood_planks, ruled_mat])
def test_textures_are_images_with_structure(painter):
    image = painter(128, 64)
    assert image.shape == (128, 64, 3) and image.dtype == np.uint8
    assert image.std() > 5
    np.testing.assert_array_equal(image, painter(128, 64))
