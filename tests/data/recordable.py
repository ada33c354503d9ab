"""A tiny environment with a scripted expert: walk to zero. Odd seeds cannot be solved."""

from __future__ import annotations

import gymnasium
import numpy as np
from gymnasium.spaces import Box, Dict

ENV_ID = "recordable/Walk-v0"


class WalkExpert:
    def act(self, observation):
        return np.clip(-observation["observation.state"], -0.5, 0.5)


class Walk(gymnasium.Env):
    metadata = {"render_modes": [], "render_fps": 10, "units": {"observation.state": "m"}, "names": {"action": ("v",)}}
    observation_space = Dict({"observation.state": Box(-10, 10, (1,), np.float32)})
    action_space = Box(-1, 1, (1,), np.float32)
    instruction = "walk to zero"

    def make_expert(self, seed):
        return WalkExpert()

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.solvable = seed % 2 == 0
        self.position = self.np_random.uniform(2, 3, 1).astype(np.float32)
        return {"observation.state": self.position.copy()}, {}

    def step(self, action):
        self.position = self.position + action
        success = bool(self.solvable and abs(self.position[0]) < 0.1)
        return {"observation.state": self.position.copy()}, float(success), success, False, {"success": success}


class NoExpert(Walk):
    make_expert = property()


for env_id, kind in ((ENV_ID, Walk), ("recordable/NoExpert-v0", NoExpert)):
    if env_id not in gymnasium.registry:
        gymnasium.register(env_id, entry_point=kind, max_episode_steps=20)
