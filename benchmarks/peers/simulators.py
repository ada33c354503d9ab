"""Environments of other projects as their own documentation uses them, images included, for comparison."""

from __future__ import annotations

import logging
from typing import Any

import gymnasium
import numpy as np

CAMERAS = {"metaworld": "corner4", "robosuite": "agentview"}


class RawMetaworld(gymnasium.Env):
    """Meta-World's reach-v3 through its own classes; with ``image_size`` every step renders an image."""

    def __init__(self, image_size: int | None) -> None:
        from metaworld.env_dict import ALL_V3_ENVIRONMENTS_GOAL_OBSERVABLE

        self._task: Any = ALL_V3_ENVIRONMENTS_GOAL_OBSERVABLE["reach-v3-goal-observable"](seed=0)
        self._image_size = image_size
        if image_size is not None:
            renderer = self._task.mujoco_renderer
            self._task.render_mode = "rgb_array"
            renderer.width = renderer.height = image_size
            renderer.camera_name, renderer.camera_id = CAMERAS["metaworld"], None
        self.action_space, self.observation_space = self._task.action_space, self._task.observation_space

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[np.ndarray, dict]:
        return self._task.reset()

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict]:
        result = self._task.step(action)
        if self._image_size is not None:
            self._task.render()
        return result


class RawRobosuite(gymnasium.Env):
    """robosuite's Lift with its default controller; with ``image_size`` its observation holds an image."""

    def __init__(self, image_size: int | None) -> None:
        logging.getLogger("robosuite_logs").addFilter(lambda record: record.levelno >= logging.ERROR)
        import robosuite

        images = image_size is not None
        self._suite: Any = robosuite.make(
            "Lift",
            robots="Panda",
            has_renderer=False,
            has_offscreen_renderer=images,
            use_camera_obs=images,
            camera_names=CAMERAS["robosuite"],
            camera_heights=image_size or 96,
            camera_widths=image_size or 96,
            reward_shaping=True,
            control_freq=20,
            ignore_done=True,
            hard_reset=False,
            seed=0,
        )
        low, high = self._suite.action_spec
        self.action_space = gymnasium.spaces.Box(low.astype(np.float32), high.astype(np.float32))

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[dict, dict]:
        return self._suite.reset(), {}

    def step(self, action: np.ndarray) -> tuple[dict, float, bool, bool, dict]:
        observation, reward, done, info = self._suite.step(action)
        return observation, float(reward), bool(done), False, info


RAW = {"metaworld_reach": RawMetaworld, "robosuite_lift": RawRobosuite}
