"""The scripted expert of push-T: plan one push, go around the block to its start, push and correct on the way."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from robopolicy_sim.control import ToolTarget
from robopolicy_sim.experts.pushing import Push, PushModel, PushPlanner
from robopolicy_sim.experts.scripted import ScriptedExpert

if TYPE_CHECKING:
    from robopolicy_sim.envs.push_t import PushTEnv

PUSH_SPEED = 0.4  # share of the style's speed
CORRECTION_STEPS = 2  # control steps between two looks at how a push goes
AROUND = 0.5  # units between the rod and the circle about the block on its way around
UNIT_AT_FULL_SPEED = 0.03  # m; it goes around smaller blocks more slowly
SPACING = 0.006  # m between the points of a path
LONG_WAY = np.deg2rad(230)  # beyond this, the other way around the block is taken
TEMPERATURE = 0.15  # of the choice among pushes by a sloppy expert, in units of their cost
MISJUDGED = 1.0  # units; those that make mistakes take the goal to be 2 to 2.6 times as far from where it is


class PushTExpert(ScriptedExpert):
    """Modes: between pushes it goes around the block with it on its ``left`` or on its ``right``.

    Mistakes are about where the goal is.
    """

    env: PushTEnv

    @classmethod
    def modes(cls, env: PushTEnv) -> tuple[str, ...]:  # type: ignore[override]
        return ("left", "right")

    def script(self) -> Iterator[ToolTarget]:
        env = self.env
        self.opening = env.opening()
        rod = env.model.geom("rod")
        model = PushModel(env.tee, float(rod.size[0]), float(rod.friction[0]))
        self._planner = PushPlanner(model, env.rod_region)
        while True:
            goal = self._goal()
            choice = self._choose(goal)
            if choice is None:  # the block is out of reach
                return
            push, path = choice
            yield from self._follow(path)
            yield from self._push(push, goal)

    def _goal(self) -> np.ndarray:
        """Where this expert takes the goal to be (3,)."""
        x, y, yaw = self.env.pose("goal")
        if self.quality == "sloppy":
            return np.array([x, y, yaw])
        seen = self.aim(np.array([x, y, 0.0]), tolerance=MISJUDGED * self.env.tee.unit)
        return np.array([seen[0], seen[1], yaw])

    def _rod(self) -> np.ndarray:
        return self.env.tool_state().position[:2]

    def _to(self, point: np.ndarray, speed: float = 1.0) -> ToolTarget:
        position = np.array([*point, self.env.tool_height])
        return self.toward(position, self.env.tool_rotation, speed=speed)

    def _choose(self, goal: np.ndarray) -> tuple[Push, np.ndarray] | None:
        """The best push that can be begun, and the way to its start."""
        pose = self.env.pose("tee")
        pushes = self._planner.pushes(pose, goal, self.rng)
        if self.quality == "sloppy":
            # With Gumbel noise the best one is a draw from the softmax of the costs.
            costs = np.array([push.cost for push in pushes])
            noise = TEMPERATURE * self.rng.gumbel(size=len(costs))
            pushes = [pushes[i] for i in np.argsort(costs - noise)]
        for push in pushes:
            path = self._path(push, pose)
            if path is not None:
                return push, path
        return None

    def _path(self, push: Push, pose: np.ndarray) -> np.ndarray | None:
        """Points (n, 2) from the rod to a push's start; None where there is no room."""
        rod = self._rod()
        straight = _between(rod, push.start)
        if self._planner.clear(straight, pose).all():
            return straight
        centre, radius = pose[:2], self.env.tee.radius + self._planner.model.rod_radius + AROUND * self.env.tee.unit
        begin = self._way_out(rod, pose, radius)
        way_in = _between(_to_circle(push.start, -push.direction, centre, radius), push.start)
        side = 1.0 if self.mode == "left" else -1.0
        turn = (side * (_angle(way_in[0] - centre) - _angle(begin - centre))) % (2 * np.pi)
        preferred, other = side * turn, side * (turn - 2 * np.pi)
        for angle in (other, preferred) if turn > LONG_WAY else (preferred, other):
            arc = np.clip(_arc(begin, angle, centre, radius), *self.env.rod_region)
            if self._planner.clear(arc[1:], pose).all() and self._planner.reachable(way_in).all():
                return np.concatenate([_between(rod, begin), arc, way_in])
        return None

    def _way_out(self, rod: np.ndarray, pose: np.ndarray, radius: float) -> np.ndarray:
        """Where on the circle about the block the rod, which may touch the block, gets to straight and soonest."""
        if np.linalg.norm(rod - pose[:2]) >= radius:
            return rod
        angles = np.linspace(-np.pi, np.pi, 48, endpoint=False)
        directions = np.stack([np.cos(angles), np.sin(angles)], axis=1)
        ends = np.stack([_to_circle(rod, direction, pose[:2], radius) for direction in directions])
        rays = rod + np.linspace(0.15, 1, 10)[:, None, None] * (ends - rod)
        gaps = self._planner.gap(rays, pose).min(axis=0)
        free = (gaps > 0.001) & self._planner.reachable(ends)
        return ends[np.argmin(np.where(free, np.linalg.norm(ends - rod, axis=1), 10 - gaps))]

    def _follow(self, path: np.ndarray) -> Iterator[ToolTarget]:
        speed = min(1.0, self.env.tee.unit / UNIT_AT_FULL_SPEED)
        ahead = int(speed * self.style.speed * self.style.lookahead / SPACING) + 1
        reached = 0
        for _ in range(150):
            rod = self._rod()
            window = path[reached : reached + 2 * ahead]
            reached += int(np.linalg.norm(window - rod, axis=1).argmin())
            if np.linalg.norm(path[-1] - rod) < 0.006 and reached >= len(path) - ahead:
                return
            yield self._to(path[min(reached + ahead, len(path) - 1)], speed=speed)

    def _push(self, push: Push, goal: np.ndarray) -> Iterator[ToolTarget]:
        for step in range(60):
            rod = self._rod()
            if step % CORRECTION_STEPS == 0:
                turned = self._planner.corrected(push, self.env.pose("tee"), goal, rod)
                push = replace(turned, direction=push.direction)
                end = rod + turned.length * turned.direction
                if turned.length < 0.0015:
                    return
            yield self._to(end, speed=PUSH_SPEED)


def _angle(vector: np.ndarray) -> float:
    return float(np.arctan2(vector[1], vector[0]))


def _arc(begin: np.ndarray, angle: float, centre: np.ndarray, radius: float) -> np.ndarray:
    """Points (n, 2) that turn about ``centre`` by ``angle`` from ``begin``; they end ``radius`` away from it."""
    distance = np.linalg.norm(begin - centre)
    n = max(2, int(abs(angle) * distance / SPACING))
    angles = _angle(begin - centre) + np.linspace(0, angle, n)
    return centre + np.linspace(distance, radius, n)[:, None] * np.stack([np.cos(angles), np.sin(angles)], axis=1)


def _between(start: np.ndarray, end: np.ndarray) -> np.ndarray:
    """Points (n, 2) on a straight line."""
    n = max(2, int(np.linalg.norm(end - start) / SPACING) + 1)
    return start + np.linspace(0, 1, n)[:, None] * (end - start)


def _to_circle(point: np.ndarray, direction: np.ndarray, centre: np.ndarray, radius: float) -> np.ndarray:
    """Where a ray from inside a circle leaves it; the point itself when it is outside."""
    offset = point - centre
    if offset @ offset >= radius**2:
        return point
    along = offset @ direction
    return point + (np.sqrt(along**2 + radius**2 - offset @ offset) - along) * direction
