"""Push-T by the published protocol (Chi et al., Diffusion Policy, RSS 2023) on top of the gym-pusht package.

Three things differ from gym-pusht as it comes:

* The start of an episode. gym-pusht draws all five numbers from Gymnasium's PCG64 generator and the block angle
  uniformly; the published evaluation draws them from ``RandomState(seed)``, see `published_start`. Only with the
  latter are seeds comparable with published ones.
* The observations carry our keys, in the dataset's convention: block angle in [0, 2 pi), float32.
* Policies see the picture without the action marker, as in the dataset; the pixels equal those of gym-pusht's
  ``pixels`` observation and take a quarter of the time (the canvas is scaled before its channels are reordered).
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import cv2
import gymnasium
import numpy as np

from robopolicy.errors import require_extra
from robopolicy.spec import KeySpec

IMAGE_SIZE = 96
MAX_STEPS = 300
VIDEO_SIZE = 256

STATE = KeySpec("observation.state", (5,), unit="px", source="state", angles=(4,))
AGENT_POS = KeySpec("observation.agent_pos", (2,), unit="px", source="state", columns=(0, 1))
IMAGE = KeySpec("observation.image.top", (IMAGE_SIZE, IMAGE_SIZE, 3), role="image", source="img")
ACTION = KeySpec("action", (2,), role="action", unit="px")


def published_start(seed: int) -> np.ndarray:
    """Agent x, agent y, block x, block y [px] and block angle [rad] from which episode ``seed`` starts, ``(5,)``.

    The order of the draws matters. The angle is a normal draw scaled by 2 pi, not a uniform one. The simulator then
    sets the block's position before its angle, which turns it about its centre of mass and moves it ("legacy"). The
    206 human demonstrations start at seeds 0 to 205, so evaluations take others.
    """
    draw = np.random.RandomState(seed)
    agent = draw.randint(50, 450), draw.randint(50, 450)
    block = draw.randint(100, 400), draw.randint(100, 400)
    return np.array([*agent, *block, draw.randn() * 2 * np.pi - np.pi])


class PushT(gymnasium.Wrapper):
    """gym-pusht with our keys and the published start; ``info["success"]``: coverage is above 0.95 now.

    Args:
        keys: the observations to build, out of `STATE`, `AGENT_POS` and `IMAGE`.
    """

    def __init__(self, keys: Sequence[KeySpec]) -> None:
        os.environ.setdefault("PYGAME_HIDE_SUPPORT_PROMPT", "1")
        require_extra("gym_pusht", "sim")
        super().__init__(
            gymnasium.make(
                "gym_pusht/PushT-v0",
                max_episode_steps=-1,
                disable_env_checker=True,
                visualization_width=VIDEO_SIZE,
                visualization_height=VIDEO_SIZE,
            )
        )
        self._simulator: Any = self.env.unwrapped
        self._keys = tuple(key.key for key in keys)
        boxes: dict[str, gymnasium.Space] = {
            key.key: gymnasium.spaces.Box(0, 255, key.shape, np.uint8)
            if key.role == "image"
            else gymnasium.spaces.Box(-np.inf, np.inf, key.shape, np.float32)
            for key in keys
        }
        self.observation_space = gymnasium.spaces.Dict(boxes)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[dict, dict]:
        """Start episode ``seed``; without a seed, one is drawn from the environment's generator."""
        start = published_start(int(self.np_random.integers(2**31)) if seed is None else seed)
        state, info = self.env.reset(seed=seed, options={"reset_to_state": start, **(options or {})})
        self._simulator._last_action = None  # gym-pusht would draw the last episode's marker into the first video frame
        return self._observe(state), {**info, "success": False}

    def step(self, action: Any) -> tuple[dict, float, bool, bool, dict]:
        state, reward, terminated, truncated, info = self.env.step(action)
        return self._observe(state), float(reward), bool(terminated), truncated, {**info, "success": info["is_success"]}

    def _observe(self, state: np.ndarray) -> dict[str, np.ndarray]:
        offered = {STATE.key: state.astype(np.float32), AGENT_POS.key: state[:2].astype(np.float32)}
        if IMAGE.key in self._keys:
            offered[IMAGE.key] = self._image()
        return {key: offered[key] for key in self._keys}

    def _image(self) -> np.ndarray:
        """The scene without action marker, (96, 96, 3) uint8 RGB."""
        canvas = self._simulator._draw()
        width, height = canvas.get_size()
        pixels = np.frombuffer(canvas.get_buffer(), np.uint8).reshape(height, width, 4)  # BGRX
        return cv2.resize(pixels, (IMAGE_SIZE, IMAGE_SIZE))[..., 2::-1]
