"""The scripted expert of PushPuck: go around the puck without touching it, then push and correct the drift."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class PushPuckGeometry:
    """Sizes in metres: radii, how far the puck may lie from the goal's centre, and the pusher's largest |x| and |y|."""

    puck_radius: float
    pusher_radius: float
    tolerance: float
    reach: float

    @property
    def contact_distance(self) -> float:
        """Distance of the two centres when pusher and puck touch."""
        return self.puck_radius + self.pusher_radius


@dataclass(frozen=True)
class PushPuckStyle:
    """How the expert moves.

    Attributes:
        clearance: gap to the puck while going around it [m].
        travel_speed, push_speed: speeds [m/s].
        lateral_gain: pull of the pusher to the line through puck and goal while it pushes [1/s].
        brake_gain: slows the push near the goal's centre [1/s].
        push_angle, orbit_angle: the pusher pushes when its bearing is this close to the line, and goes around beyond
            the second; in between it does a blend of both [rad].
        rest_share: within this share of the tolerance the puck is left where it is.
        tie_angle: this close to the far side of the puck both ways around are as good, and the seed decides [rad].
        lookahead: the target lies this far ahead in time: one control period plus the servo's lag [s].
    """

    clearance: float = 0.04
    travel_speed: float = 0.25
    push_speed: float = 0.08
    lateral_gain: float = 3.5
    brake_gain: float = 4.0
    push_angle: float = np.deg2rad(25)
    orbit_angle: float = np.deg2rad(50)
    rest_share: float = 0.3
    tie_angle: float = np.deg2rad(8)
    lookahead: float = 0.15


class PushPuckExpert:
    """Closed loop on the newest observation alone, so it recovers from any state that the pusher can reach."""

    def __init__(self, geometry: PushPuckGeometry, *, seed: int, style: PushPuckStyle | None = None) -> None:
        self._geometry = geometry
        self._style = style or PushPuckStyle()
        self._orbit_radius = geometry.contact_distance + self._style.clearance
        self._favourite_side = float(np.random.default_rng((seed, 2)).choice([-1, 1]))

    def act(self, observation: Mapping[str, np.ndarray]) -> np.ndarray:
        """Return the pusher's target (2,) float32 in metres for ``observation.state`` (pusher, puck, goal; 6,)."""
        pusher, puck, goal = np.asarray(observation["observation.state"], dtype=np.float64).reshape(3, 2)
        if np.linalg.norm(goal - puck) < self._style.rest_share * self._geometry.tolerance:
            return pusher.astype(np.float32)
        forward = _unit(goal - puck)
        offset = pusher - puck
        # 0: the pusher is right behind the puck; +-pi: it stands between puck and goal.
        bearing = _signed_angle(-forward, offset)
        share = np.clip(
            (self._style.orbit_angle - abs(bearing)) / (self._style.orbit_angle - self._style.push_angle), 0, 1
        )
        if np.linalg.norm(offset) > self._orbit_radius + 0.5 * self._style.clearance:
            share = 0.0
        velocity = share * self._push(offset, goal - puck) + (1 - share) * self._approach(offset, forward, bearing)
        target = pusher + velocity * self._style.lookahead
        return np.clip(target, -self._geometry.reach, self._geometry.reach).astype(np.float32)

    def _push(self, offset: np.ndarray, travel: np.ndarray) -> np.ndarray:
        """Velocity (2,) that moves the puck by ``travel`` to the goal and the pusher back onto the line behind it."""
        forward = _unit(travel)
        sideways = _turn(forward, np.pi / 2)
        speed = min(self._style.push_speed, self._style.brake_gain * float(np.linalg.norm(travel)))
        return speed * forward - self._style.lateral_gain * (offset @ sideways) * sideways

    def _approach(self, offset: np.ndarray, forward: np.ndarray, bearing: float) -> np.ndarray:
        """Velocity (2,) along the shortest way around the puck to the point behind it."""
        distance = float(np.linalg.norm(offset))
        to_start = -self._orbit_radius * forward - offset
        # Length of what is left along the circle bounds the speed, so that the pusher arrives at pushing speed.
        left = max(float(np.linalg.norm(to_start)), abs(bearing) * self._orbit_radius)
        speed = min(self._style.travel_speed, self._style.push_speed + 3.0 * left)
        if distance > self._orbit_radius and abs(bearing) <= np.arccos(self._orbit_radius / distance):
            return speed * _unit(to_start)
        side = self._favourite_side if abs(bearing) > np.pi - self._style.tie_angle else np.sign(bearing)
        inside = max(0.0, 1 - (distance - self._geometry.contact_distance) / self._style.clearance)
        tangent = np.arcsin(min(1.0, self._orbit_radius / distance)) + 0.9 * min(inside, 1.5)
        return speed * _turn(-offset / distance, side * tangent)


def _unit(vector: np.ndarray) -> np.ndarray:
    return vector / max(float(np.linalg.norm(vector)), 1e-9)


def _turn(vector: np.ndarray, angle: float) -> np.ndarray:
    """Rotate (2,) counter-clockwise by ``angle`` radians."""
    cos, sin = np.cos(angle), np.sin(angle)
    return np.array([cos * vector[0] - sin * vector[1], sin * vector[0] + cos * vector[1]])


def _signed_angle(start: np.ndarray, end: np.ndarray) -> float:
    """Angle in (-pi, pi] that turns ``start`` (2,) into the direction of ``end`` (2,)."""
    return float(np.arctan2(start[0] * end[1] - start[1] * end[0], start @ end))
