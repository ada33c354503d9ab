"""A simulated task whose outcome is known: a cart must reach the middle of its rail before the time is over."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import gymnasium
import mujoco
import numpy as np
import torch

from robopolicy.spec import KeySpec, PolicySpec

STATE = KeySpec("observation.state", (1,), unit="m")
ENVIRONMENT_STATE = KeySpec("observation.environment_state", (1,), unit="m")
ACTION = KeySpec("action", (1,), role="action", unit="m")
STEP, TOLERANCE, LIMIT = 0.1, 0.02, 8
KNOWN_LEVELS = ("darker", "brighter")


def solvable(seed: int, friction: float = 0.0) -> bool:
    """Whether the cart can reach the middle in time."""
    return abs(start(seed)) <= LIMIT * STEP * (1 - friction) + TOLERANCE


def start(seed: int) -> float:
    rng = np.random.default_rng(seed)
    return float(rng.choice([-1, 1]) * rng.uniform(0.1, 1))


class SlideEnv(gymnasium.Env):
    """``friction`` shortens each step; ``lighting`` darker hides the cart, so that the policy cannot know where it is.

    The constructor and the attributes are those of the simulator's tasks.
    """

    metadata = {
        "render_modes": ["rgb_array"],
        "units": dict.fromkeys((k.key for k in (STATE, ENVIRONMENT_STATE, ACTION)), "m"),
    }

    def __init__(
        self,
        cameras=(),
        image_size=96,
        render_size=(48, 64),
        render_mode=None,
        control_hz=10,
        variation=None,
        background=None,
    ) -> None:
        self.model = mujoco.MjModel.from_xml_string("<mujoco><worldbody><camera name='scene'/></worldbody></mujoco>")
        self.metadata = self.metadata | {"render_fps": control_hz}
        self.render_mode, self.render_size = render_mode, render_size
        self.variation, self.background = variation or {}, background
        for factor, level in self.variation.items():
            if factor not in ("friction", "lighting", "camera_yaw"):
                raise ValueError(f"There is no factor '{factor}'.")
            if factor == "lighting" and level not in KNOWN_LEVELS:
                raise ValueError(f"lighting has no level '{level}'.")
        box = gymnasium.spaces.Box(-np.inf, np.inf, (1,), np.float32)
        self.observation_space = gymnasium.spaces.Dict({STATE.key: box, ENVIRONMENT_STATE.key: box})
        self.action_space = gymnasium.spaces.Box(-STEP, STEP, (1,), np.float32)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.x = start(seed)
        self.halfway = abs(self.x) < 0.5
        self.instruction = "go left" if self.x > 0 else "go right"
        return self._observation(), {"variation": {name: np.array(level)[()] for name, level in self.variation.items()}}

    def step(self, action):
        reach = STEP * (1 - self.variation.get("friction", 0))
        self.x += float(np.clip(action[0], -reach, reach))
        self.halfway |= abs(self.x) < 0.5
        success = abs(self.x) <= TOLERANCE
        info = {"success": success, "stages": {"halfway": np.bool_(self.halfway), "at_the_middle": success}}
        return self._observation(), 1.0 if success else max(0.0, 1 - abs(self.x)), success, False, info

    def render(self):
        frame = np.full((*self.render_size, 3), 60 if self.variation.get("lighting") == "darker" else 235, np.uint8)
        height, width = self.render_size
        column = int(np.clip((self.x + 1) / 2, 0, 0.94) * width)
        frame[height // 2 :, width // 2] = (40, 160, 90)
        frame[height // 3 : 2 * height // 3, column : column + width // 16] = (200, 60, 60)
        return frame

    def _observation(self):
        seen = 0.0 if self.variation.get("lighting") == "darker" else self.x
        return {STATE.key: np.array([seen], np.float32), ENVIRONMENT_STATE.key: np.zeros(1, np.float32)}


@dataclass
class Slider:
    """Drives to the middle by at most a share ``speed`` of the allowed step; one action per chunk."""

    speed: float = 1.0
    spec: PolicySpec = PolicySpec((STATE, ENVIRONMENT_STATE), ACTION, fps=10, n_action_steps=1)

    def act(self, observations: Mapping[str, np.ndarray], generators: Sequence[torch.Generator]) -> np.ndarray:
        return np.clip(-observations[STATE.key][:, -1:], -STEP * self.speed, STEP * self.speed)


@contextmanager
def registered() -> Iterator[None]:
    """The task is known as ``slide`` inside."""
    gymnasium.register("robopolicy_sim/Slide-v0", SlideEnv, max_episode_steps=LIMIT)
    try:
        yield
    finally:
        del gymnasium.registry["robopolicy_sim/Slide-v0"]
