"""Planning straight pushes of a T with a rod, on a quasi-static model that moves hundreds of blocks at once."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from robopolicy_sim.envs.tee import Tee, cross, left, rotated

COVERAGE_RANGE = 0.7  # units of mean corner distance within which the coverage is computed
LENGTH_PRICE = 0.03  # of the cost, for each unit of length of a push
LONGEST = 5.0  # units
MAX_TILT = 0.65  # rad between a push and the edge's normal
GAP = 0.3  # units between the rod and the edge before a push
CLEARANCE = 0.12  # units between the rod and the block while it travels
FAN = np.linspace(-0.5, 0.5, 15)  # rad about a push's direction, to correct it on the way
HORIZON_STEPS = 24  # steps of the model in which a push is corrected


@dataclass(frozen=True)
class PushModel:
    """How a block on a table follows a rod that moves slowly.

    Forces balance without inertia; an ellipsoid bounds the friction forces and moments of the table (Goyal, Ruina and
    Papadopoulos 1991; Lee and Cutkosky 1991), so the table's friction coefficient and the mass do not matter. The rod
    sticks to the edge or slides along it (Lynch, Maekawa and Tanie, IROS 1992).

    Attributes:
        tee: the block.
        rod_radius: [m].
        friction: coefficient between rod and block.
    """

    tee: Tee
    rod_radius: float
    friction: float

    def roll_out(self, pose: np.ndarray, starts: np.ndarray, directions: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        """Poses (n_lengths, n, 3) of the block after n straight pushes, for each of their lengths.

        Args:
            pose: (3,) of the block at the start.
            starts: (n, 2) of the rod's centre; directions: (n, 2) unit vectors.
            lengths: (n_lengths,) increasing [m]; the model takes one step from one to the next.
        """
        now = np.repeat(pose[None], len(starts), axis=0)
        poses = np.empty((len(lengths), *now.shape))
        for i, step in enumerate(np.diff(lengths, prepend=0.0)):
            now = now + self._motion(now, starts + lengths[i] * directions, step * directions)
            poses[i] = now
        return poses

    def _motion(self, poses: np.ndarray, rods: np.ndarray, travel: np.ndarray) -> np.ndarray:
        """Motion (n, 3) of blocks at ``poses`` whose rods have just moved by ``travel`` to ``rods`` (n, 2)."""
        yaw = poses[:, 2]
        rods = rotated(rods - poses[:, :2], -yaw)
        gap, normal = self.tee.distance(rods)
        depth = np.maximum(self.rod_radius - gap, 0.0)
        contact = rods - gap[:, None] * normal
        push = rotated(travel, -yaw)
        # The part of the travel in contact: it cannot have gone deeper than it moved along the normal.
        approach = np.maximum(-(push * normal).sum(axis=1), 1e-12)
        share = np.minimum(depth / approach, 1.0)
        moved = self._stick(contact, share[:, None] * push)
        # Outside of its friction cone the force lies on the cone's edge and the rod slides.
        tangent = np.stack([-normal[:, 1], normal[:, 0]], axis=1)
        along, into = (moved[:, :2] * tangent).sum(axis=1), -(moved[:, :2] * normal).sum(axis=1)
        slides = np.abs(along) > self.friction * into
        edge = -normal + self.friction * np.sign(along)[:, None] * tangent
        slid = np.column_stack([edge, cross(contact, edge) / self.tee.friction_arm**2])
        follow = -((slid[:, :2] + slid[:, 2:] * left(contact)) * normal).sum(axis=1)
        slid *= (share * approach / np.maximum(follow, 1e-9))[:, None]
        motion = np.where(slides[:, None], slid, moved)
        # What overlap is left (corners, the finite step) is undone by a shift.
        motion[:, :2] -= np.maximum(depth - share * approach, 0.0)[:, None] * normal
        motion[depth <= 0] = 0.0
        return np.column_stack([rotated(motion[:, :2], yaw), motion[:, 2]])

    def _stick(self, contact: np.ndarray, travel: np.ndarray) -> np.ndarray:
        """Motion (n, 3) of blocks whose point ``contact`` moves by ``travel``, both (n, 2) in the block's frame."""
        x, y = contact.T
        u, v = travel.T
        c = self.tee.friction_arm**2
        shift_x, shift_y = ((c + x**2) * u + x * y * v), (x * y * u + (c + y**2) * v)
        return np.stack([shift_x, shift_y, x * shift_y / c - y * shift_x / c], axis=1) / (c + x**2 + y**2)[:, None]


def cost(tee: Tee, poses: np.ndarray, goal: np.ndarray) -> np.ndarray:
    """Cost (...) of poses (..., 3): mean distance of the corners from the goal's [units] plus the share not covered."""
    away = np.linalg.norm(tee.corners(poses) - tee.corners(goal), axis=-1).mean(axis=-1) / tee.unit
    covered = np.zeros_like(away)
    near = away < COVERAGE_RANGE
    covered[near] = tee.coverage(poses[near], goal)
    return away + 1 - covered


@dataclass(frozen=True)
class Push:
    """A straight push: the rod's centre moves from ``start`` (2,) along ``direction`` (2,) by ``length`` metres.

    Attributes:
        cost: of what is expected after it.
    """

    start: np.ndarray
    direction: np.ndarray
    length: float
    cost: float


class PushPlanner:
    """Looks one push ahead: tries many pushes in the model and ranks them by the cost after the best length of each.

    Args:
        model: of the block and the rod.
        region: lowest and highest x and y of the rod (2, 2).
    """

    def __init__(self, model: PushModel, region: np.ndarray) -> None:
        self.model, self.tee, self._region = model, model.tee, region

    def pushes(self, pose: np.ndarray, goal: np.ndarray, rng: np.random.Generator, count: int = 500) -> list[Push]:
        """Pushes from random points of the outline, best first; those out of the rod's reach are left out."""
        starts, directions = self._candidates(rng, count)
        starts, directions = pose[:2] + rotated(starts, pose[2]), rotated(directions, pose[2])
        inside = self.reachable(starts)
        lengths = self.tee.unit * np.arange(GAP, LONGEST, 0.06)
        return self._ranked(pose, goal, starts[inside], directions[inside], lengths)

    def corrected(self, push: Push, pose: np.ndarray, goal: np.ndarray, rod: np.ndarray) -> Push:
        """The best way to go on with a push, which may turn a little, now that block and rod are here."""
        horizon = max(1.3 * push.length, 0.3 * self.tee.unit)
        starts = np.repeat(rod[None], len(FAN), axis=0)
        return self._ranked(pose, goal, starts, rotated(push.direction, FAN), np.linspace(0, horizon, HORIZON_STEPS))[0]

    def reachable(self, points: np.ndarray) -> np.ndarray:
        """Whether the rod can be at points (..., 2)."""
        return ((points >= self._region[0]) & (points <= self._region[1])).all(axis=-1)

    def gap(self, points: np.ndarray, pose: np.ndarray) -> np.ndarray:
        """Distance (...) between the block and a rod at points (..., 2); negative where they overlap."""
        return self.tee.distance(rotated(points - pose[:2], -pose[2]))[0] - self.model.rod_radius

    def clear(self, points: np.ndarray, pose: np.ndarray) -> np.ndarray:
        """Whether a rod at points (..., 2) keeps clear of the block."""
        return self.gap(points, pose) > CLEARANCE * self.tee.unit

    def _candidates(self, rng: np.random.Generator, count: int) -> tuple[np.ndarray, np.ndarray]:
        """Starts and directions, each (n, 2), in the block's frame."""
        corners = self.tee.outline
        edges = np.roll(corners, -1, axis=0) - corners
        sides = np.linalg.norm(edges, axis=1)
        side = rng.choice(len(sides), count, p=sides / sides.sum())
        points = corners[side] + rng.uniform(0, 1, (count, 1)) * edges[side]
        inward = left(edges[side]) / sides[side, None]
        directions = rotated(inward, rng.uniform(-MAX_TILT, MAX_TILT, count))
        starts = points - self.model.rod_radius * inward - GAP * self.tee.unit * directions
        # The rod comes from outside, straight.
        way = starts - np.linspace(0, 2.5, 12)[:, None, None] * self.tee.unit * directions
        free = self.clear(way, np.zeros(3)).all(axis=0)
        return starts[free], directions[free]

    def _ranked(
        self, pose: np.ndarray, goal: np.ndarray, starts: np.ndarray, directions: np.ndarray, lengths: np.ndarray
    ) -> list[Push]:
        poses = self.model.roll_out(pose, starts, directions, lengths)
        costs = cost(self.tee, poses, goal) + LENGTH_PRICE / self.tee.unit * lengths[:, None]
        rods = starts + lengths[:, None, None] * directions
        costs[(lengths > 0)[:, None] & ~self.reachable(rods)] = np.inf
        best = costs.argmin(axis=0)
        found = costs[best, np.arange(len(starts))]
        order = [i for i in np.argsort(found) if found[i] < np.inf]
        return [Push(starts[i], directions[i], float(lengths[best[i]]), float(found[i])) for i in order]
