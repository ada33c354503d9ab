"""PushPuckRings: four rings around the puck; any of them will do, or one that is asked for. Posts may be in the way."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import mujoco
import numpy as np

from robopolicy_sim.envs.base import SCENES, MujocoTaskEnv
from robopolicy_sim.envs.push_puck import PushPuckEnv
from robopolicy_sim.experts.push_puck_rings import PushPuckRingsExpert

DISTANCE = 0.12  # m from the bench's middle to each ring's centre
RINGS = {
    "left": np.array([-DISTANCE, 0.0]),
    "right": np.array([DISTANCE, 0.0]),
    "front": np.array([0.0, -DISTANCE]),
    "back": np.array([0.0, DISTANCE]),
}
ASKED = ("any", "drawn", *RINGS)
PUCK_RANGE = 0.03  # m, half side of the square in which the puck starts
POST_HEIGHT = 0.06  # m
RING_COLOURS = {
    "left": (0.03, 0.34, 0.66, 1),
    "right": (0.55, 0.24, 0.62, 1),
    "front": (0.10, 0.52, 0.30, 1),
    "back": (0.80, 0.55, 0.05, 1),
}


class PushPuckRingsEnv(PushPuckEnv):
    """Push the puck into one of four rings, left, right, in front and at the back of the bench's middle.

    ``observation.state``: pusher xy, puck xy in metres. ``observation.asked``: centre of the ring that is asked for, in
    metres; zero where any will do. Success: as for PushPuck, in the ring that is asked for; once the puck has come to
    rest in another one, the episode can no longer succeed. Stages: the rings in which it rested, and ``collided``: the
    pusher touched a post.

    Args:
        asked: ``any``, the name of a ring, or ``drawn``: a ring is drawn at each reset.
        posts: (x, y, radius) in metres of upright posts that stop pusher and puck; the observation does not tell them.
        arguments: see `PushPuckEnv`.

    Raises:
        ValueError: ``asked`` is unknown, or a post is no three numbers.
    """

    instruction = "push the puck into a ring"
    metadata = MujocoTaskEnv.metadata | {
        "units": {"observation.state": "m", "observation.asked": "m", "action": "m"},
        "names": {
            "observation.state": ("pusher_x", "pusher_y", "puck_x", "puck_y"),
            "observation.asked": ("ring_x", "ring_y"),
            "action": ("pusher_x", "pusher_y"),
        },
    }

    def __init__(self, *, asked: str = "any", posts: Sequence[Sequence[float]] = (), **arguments: Any) -> None:
        if asked not in ASKED:
            raise ValueError(f"asked='{asked}' is unknown; choose one of {', '.join(ASKED)}.")
        if any(len(post) != 3 for post in posts):
            raise ValueError(f"posts={posts}: a post is x, y and radius in metres.")
        self._asked_option = asked
        self.posts = np.array(posts, dtype=np.float64).reshape(-1, 3)
        self.asked = "any"
        super().__init__(**arguments)
        self._pusher_geom = self.model.geom("pusher").id
        self._post_geoms = {self.model.geom(f"post_{i}").id for i in range(len(self.posts))}

    def _load_model(self) -> mujoco.MjModel:
        spec = mujoco.MjSpec.from_file(str(SCENES / self.scene))
        goal = spec.body("goal")
        looks = [
            (float(geom.size[0]), float(geom.size[1]), float(geom.pos[2]), geom.name == "goal_zone")
            for geom in goal.geoms
        ]
        for name, centre in RINGS.items():
            for radius, half_height, z, is_zone in looks:
                spec.worldbody.add_geom(
                    type=mujoco.mjtGeom.mjGEOM_CYLINDER,
                    size=[radius, half_height, 0],
                    pos=[*centre, z],
                    rgba=[0.90, 0.91, 0.92, 1] if is_zone else RING_COLOURS[name],
                    contype=0,
                    conaffinity=0,
                )
        for geom in goal.geoms:  # the single ring of the scene
            geom.rgba = [0, 0, 0, 0]
            geom.material = ""
        for i, (x, y, radius) in enumerate(self.posts):
            spec.worldbody.add_geom(
                name=f"post_{i}",
                type=mujoco.mjtGeom.mjGEOM_CYLINDER,
                size=[radius, POST_HEIGHT / 2, 0],
                pos=[x, y, POST_HEIGHT / 2],
                rgba=[0.75, 0.12, 0.10, 1],
                contype=0,
                conaffinity=0,
            )
            for other in ("pusher", "puck"):
                spec.add_pair(name=f"{other}_on_post_{i}", geomname1=f"post_{i}", geomname2=other, condim=3)
        return spec.compile()

    def make_expert(self, seed: int, quality: str = "good", mode: str | None = None) -> PushPuckRingsExpert:
        """Return the scripted expert; its mode is a ring, by default the one that is asked for or a drawn one."""
        if mode is None and self.asked != "any":
            mode = self.asked
        return PushPuckRingsExpert(self.geometry, RINGS, seed=seed, quality=quality, mode=mode)

    @property
    def _goal(self) -> np.ndarray:
        """Centre of the ring that is asked for, or of the nearest one."""
        if self.asked != "any":
            return RINGS[self.asked]
        return min(RINGS.values(), key=lambda centre: float(np.linalg.norm(centre - self._puck)))

    def _place(self, rng: np.random.Generator) -> None:
        drawn = str(rng.choice(list(RINGS)))
        self.asked = drawn if self._asked_option == "drawn" else self._asked_option
        self._rested_in: set[str] = set()
        self._elsewhere: dict[str, int] = {}  # control steps in a row in each ring that is not asked for
        self._collided = False
        super()._place(rng)

    def _random_start(self, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        gap = self.config.min_clearance
        touching, pusher_radius = self.geometry.contact_distance + gap, self.geometry.pusher_radius
        while True:
            pusher = rng.uniform(-self.config.pusher_range, self.config.pusher_range, 2)
            puck = rng.uniform(-PUCK_RANGE, PUCK_RANGE, 2)
            from_posts = np.linalg.norm(self.posts[:, :2] - pusher, axis=1) - self.posts[:, 2] - pusher_radius
            if np.linalg.norm(pusher - puck) >= touching and (from_posts >= gap).all():
                return pusher, puck, np.zeros(2)

    def _given_start(self) -> np.ndarray:
        state = np.asarray(self._start_state, dtype=np.float64)
        if state.shape != (4,):
            raise ValueError(f"options['state'] is pusher xy and puck xy in metres, found {state}.")
        self._start_state = np.concatenate([state, np.zeros(2)])
        return super()._given_start()

    def _vectors(self) -> dict[str, np.ndarray]:
        return {
            "observation.state": np.concatenate([self._pusher, self._puck]),
            "observation.asked": np.zeros(2) if self.asked == "any" else RINGS[self.asked],
        }

    def _track(self) -> None:
        super()._track()
        for name, centre in RINGS.items():
            if self.asked in ("any", name):
                continue
            inside = np.linalg.norm(self._puck - centre) <= self.geometry.tolerance
            self._elsewhere[name] = self._elsewhere.get(name, 0) + 1 if inside else 0
            if self._elsewhere[name] >= round(self.config.dwell_steps * self.control_hz / 10):
                self._rested_in.add(name)
        if super()._succeeded():
            self._rested_in.add(self._nearest())
        pairs = self.data.contact.geom[: self.data.ncon]
        self._collided |= any(
            self._pusher_geom in pair and not self._post_geoms.isdisjoint(pair.tolist()) for pair in pairs
        )

    def _nearest(self) -> str:
        return min(RINGS, key=lambda name: float(np.linalg.norm(RINGS[name] - self._puck)))

    def _succeeded(self) -> bool:
        return super()._succeeded() and self._rested_in <= {self._nearest()}

    def _stages(self) -> dict[str, bool]:
        return {**{name: name in self._rested_in for name in RINGS}, "collided": self._collided}

    def _progress(self) -> float:
        """How much of the way to the ring the puck has come; 0 once it rested in a ring that is not asked for."""
        wrong = self._rested_in - {self.asked} if self.asked != "any" else set()
        return 0.0 if wrong else super()._progress()
