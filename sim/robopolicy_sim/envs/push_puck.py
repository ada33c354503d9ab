"""PushPuck: a rod on a gantry pushes a puck into a ring on the bench."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from robopolicy_sim.envs.base import Expert, Observation
from robopolicy_sim.envs.gantry import GantryEnv
from robopolicy_sim.experts.push_puck import PushPuckExpert, PushPuckGeometry


@dataclass(frozen=True)
class PushPuckConfig:
    """Start ranges and limits in metres, metres per second, steps; sizes and masses are in the scene file.

    Attributes:
        pusher_range: the pusher starts in a square of this half side about the bench's centre.
        puck_range, goal_range: the same for the puck and the goal.
        min_travel: smallest distance from the puck's start to the goal.
        min_clearance: smallest gap between the pusher's and the puck's surfaces at the start.
        max_speed: speed limit of the commanded pusher position.
        dwell_steps: steps of 0.1 s in a row that the puck must spend inside the ring.
    """

    pusher_range: float = 0.26
    puck_range: float = 0.15
    goal_range: float = 0.05
    min_travel: float = 0.12
    min_clearance: float = 0.03
    max_speed: float = 0.30
    dwell_steps: int = 4


class PushPuckEnv(GantryEnv):
    """Push the puck until it lies inside the ring.

    Action: see `GantryEnv`. State: pusher xy, puck xy, goal xy in metres. Success: the whole puck has been inside
    the ring (its centre within 3 cm of the ring's centre) for ``dwell_steps`` steps, so shooting it through does not
    count.

    Args:
        config: ranges and limits.
        control_hz: control steps per second.
        rendering: see `MujocoTaskEnv`.
    """

    scene = "push_puck.xml"
    instruction = "push the puck into the ring"
    metadata = GantryEnv.metadata | {
        "units": {"observation.state": "m", "action": "m"},
        "names": {
            "observation.state": ("pusher_x", "pusher_y", "puck_x", "puck_y", "goal_x", "goal_y"),
            "action": ("pusher_x", "pusher_y"),
        },
    }

    def __init__(self, *, config: PushPuckConfig | None = None, control_hz: float = 10, **rendering: Any) -> None:
        self.config = config or PushPuckConfig()
        self.control_hz = control_hz
        super().__init__(max_speed=self.config.max_speed, **rendering)
        puck, pusher = self.model.geom("puck"), self.model.geom("pusher")
        self.geometry = PushPuckGeometry(
            puck_radius=float(puck.size[0]),
            pusher_radius=float(pusher.size[0]),
            tolerance=float(self.model.geom("goal_zone").size[0] - puck.size[0]),
            reach=float(self.model.actuator("carriage_x").ctrlrange[1]),
        )
        self._rest_height = float(puck.size[1])
        self._start_state: np.ndarray | None = None
        self._start_distance = 1.0
        self._steps_inside = 0

    def make_expert(self, seed: int) -> Expert:
        return PushPuckExpert(self.geometry, seed=seed)

    @property
    def _puck(self) -> np.ndarray:
        return self.data.joint("puck").qpos[:2]

    @property
    def _goal(self) -> np.ndarray:
        return self.data.mocap_pos[0, :2]

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Observation, dict[str, Any]]:
        """Start an episode.

        Args:
            options: ``{"state": vector}`` starts at rest from an observed state (6,); the seed settles the puck's yaw.

        Raises:
            ValueError: the state is out of the pusher's reach, or pusher and puck overlap.
        """
        self._start_state = (options or {}).get("state")
        return super().reset(seed=seed, options=options)

    def _place(self, rng: np.random.Generator) -> None:
        pusher, puck, goal = self._random_start(rng) if self._start_state is None else self._given_start()
        yaw = rng.uniform(-np.pi, np.pi)
        self._place_pusher(pusher)
        self.data.joint("puck").qpos[:] = [*puck, self._rest_height, np.cos(yaw / 2), 0, 0, np.sin(yaw / 2)]
        self.data.mocap_pos[0, :2] = goal
        self._start_distance = max(float(np.linalg.norm(goal - puck)), 1e-6)
        self._steps_inside = 0

    def _random_start(self, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        config = self.config
        touching = self.geometry.contact_distance + config.min_clearance
        while True:
            pusher = rng.uniform(-config.pusher_range, config.pusher_range, 2)
            puck = rng.uniform(-config.puck_range, config.puck_range, 2)
            goal = rng.uniform(-config.goal_range, config.goal_range, 2)
            if np.linalg.norm(goal - puck) >= config.min_travel and np.linalg.norm(pusher - puck) >= touching:
                return pusher, puck, goal

    def _given_start(self) -> np.ndarray:
        state = np.asarray(self._start_state, dtype=np.float64)
        reach = self.geometry.reach
        if state.shape != (6,) or not (np.abs(state) <= reach).all():
            raise ValueError(f"options['state'] is six positions within +-{reach} m, found {state}.")
        pusher, puck, goal = state.reshape(3, 2)
        if np.linalg.norm(pusher - puck) < self.geometry.contact_distance:
            raise ValueError(f"options['state']: the pusher at {pusher} overlaps the puck at {puck}.")
        return np.stack([pusher, puck, goal])

    def _vectors(self) -> dict[str, np.ndarray]:
        return {"observation.state": np.concatenate([self._pusher, self._puck, self._goal])}

    def _distance(self) -> float:
        return float(np.linalg.norm(self._goal - self._puck))

    def _track(self) -> None:
        self._steps_inside = self._steps_inside + 1 if self._distance() <= self.geometry.tolerance else 0

    def _succeeded(self) -> bool:
        return self._steps_inside >= round(self.config.dwell_steps * self.control_hz / 10)

    def _progress(self) -> float:
        return float(np.clip(1 - self._distance() / self._start_distance, 0, 1))
