"""TrackTarget: a rod on a gantry keeps up with a ring that circles on the bench and waits for nobody."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from robopolicy_sim.envs.base import Expert, Observation
from robopolicy_sim.envs.gantry import GantryEnv
from robopolicy_sim.experts.track_target import CircularCourse, TrackTargetExpert


@dataclass(frozen=True)
class TrackTargetConfig:
    """Start ranges and limits in metres, metres or radians per second and seconds; sizes are in the scene file.

    Attributes:
        pusher_range: the pusher starts in a square of this half side about the bench's centre.
        centre_range: the same for the centre of the ring's course.
        radius: smallest and largest radius of the course.
        rate: smallest and largest angular speed of the ring, in either direction.
        min_distance: smallest distance from the pusher's start to the ring's.
        max_speed: speed limit of the commanded pusher position.
        dwell: time without a break that the pusher must spend inside the ring.
    """

    pusher_range: float = 0.26
    centre_range: float = 0.08
    radius: tuple[float, float] = (0.14, 0.17)
    rate: tuple[float, float] = (1.7, 2.0)
    min_distance: float = 0.10
    max_speed: float = 0.50
    dwell: float = 1.5


class TrackTargetEnv(GantryEnv):
    """Keep the pusher inside a ring that circles about a hub at a constant speed.

    Time passes whether or not a new action has been decided, so acting late, or pausing between chunks of actions,
    loses the ring. Its future follows from one observation.

    Action: see `GantryEnv`. State: pusher xy, target xy in metres, the target's velocity xy in metres per second, and
    the hub's xy in metres. Success: the pusher's whole disc has been inside the ring (centres within 3 cm) for
    ``dwell`` seconds without a break, looked at after each control step. Success does not end the episode: no
    observation tells the moment, so demonstrations that stopped there would teach to stop anywhere.

    Args:
        config: ranges and limits.
        control_hz: control steps per second; no duration of the task depends on it.
        rendering: see `MujocoTaskEnv`.

    Raises:
        ValueError: ``control_hz`` is no rate.
    """

    scene = "track_target.xml"
    instruction = "keep the rod inside the moving ring"
    metadata = GantryEnv.metadata | {
        "units": {"observation.state": "m; m/s", "action": "m"},
        "names": {
            "observation.state": (
                *("pusher_x", "pusher_y", "target_x", "target_y"),
                *("target_velocity_x", "target_velocity_y", "centre_x", "centre_y"),
            ),
            "action": ("pusher_x", "pusher_y"),
        },
    }

    def __init__(self, *, config: TrackTargetConfig | None = None, control_hz: float = 10, **rendering: Any) -> None:
        if not isinstance(control_hz, (int, float)) or not 0 < control_hz < math.inf:
            raise ValueError(f"control_hz={control_hz!r} is no rate; give control steps per second, e.g. 10.")
        self.config = config or TrackTargetConfig()
        self.control_hz = control_hz
        super().__init__(max_speed=self.config.max_speed, **rendering)
        self.tolerance = float(self.model.geom("target_zone").size[0] - self.model.geom("pusher").size[0])
        self.course = CircularCourse(np.zeros(2), np.zeros(2), 0.0)
        self._dwell_steps = math.ceil(self.config.dwell * control_hz - 1e-9)
        self._steps_inside = self._longest = 0
        self._hub, self._ring = (int(self.model.body(name).mocapid[0]) for name in ("hub", "target"))

    def make_expert(self, seed: int) -> Expert:
        return TrackTargetExpert(period=1 / self.control_hz, reach=float(self.action_space.high.min()))

    @property
    def _target(self) -> np.ndarray:
        return self.data.mocap_pos[self._ring, :2]

    def _place(self, rng: np.random.Generator) -> None:
        config = self.config
        centre = rng.uniform(-config.centre_range, config.centre_range, 2)
        radius, rate = rng.uniform(*config.radius), rng.uniform(*config.rate)
        phase = rng.uniform(-np.pi, np.pi)
        start = centre + radius * np.array([np.cos(phase), np.sin(phase)])
        self.course = CircularCourse(centre, start, float(rng.choice([-1, 1])) * rate)
        pusher = start
        while np.linalg.norm(pusher - start) < config.min_distance:
            pusher = rng.uniform(-config.pusher_range, config.pusher_range, 2)
        self._place_pusher(pusher)
        self.data.mocap_pos[self._hub, :2] = centre
        self.data.mocap_pos[self._ring, :2] = start
        self._steps_inside = self._longest = 0

    def step(self, action: np.ndarray) -> tuple[Observation, float, bool, bool, dict[str, Any]]:
        observation, reward, _, truncated, info = super().step(action)
        return observation, reward, False, truncated, info

    def _play(self, action: np.ndarray) -> None:
        self.data.mocap_pos[self._ring, :2] = self.course.position(self.data.time + 1 / self.control_hz)
        super()._play(action)

    def _vectors(self) -> dict[str, np.ndarray]:
        velocity = self.course.velocity(self.data.time)
        return {"observation.state": np.concatenate([self._pusher, self._target, velocity, self.course.centre])}

    def _track(self) -> None:
        inside = float(np.linalg.norm(self._target - self._pusher)) <= self.tolerance
        self._steps_inside = self._steps_inside + 1 if inside else 0
        self._longest = max(self._longest, self._steps_inside)

    def _succeeded(self) -> bool:
        return self._longest >= self._dwell_steps

    def _progress(self) -> float:
        """Share of the dwell that the longest stay inside the ring has lasted."""
        return self._longest / self._dwell_steps
