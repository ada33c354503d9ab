"""PegInsert: put a square peg into a square hole."""

from __future__ import annotations

import mujoco
import numpy as np

from robopolicy_sim.envs.arm_task import ArmTaskEnv
from robopolicy_sim.envs.objects import add_block, add_visual
from robopolicy_sim.experts.peg_insert import PegInsertExpert

HALF_WIDTH = 0.012  # m of the peg
CLEARANCE = 0.002  # m between peg and hole on each side
# Sizes for an arm of full scale; smaller for a small arm.
HALF_LENGTH = 0.045  # m of the peg
DEPTH = 0.035  # m of the hole
WALL = 0.018  # m around the hole
SIDE = (0.08, 0.16)  # m from the middle to the peg on one side and to the hole on the other, times the arm's scale
DISTANCE = 0.08  # m nearer or farther than the middle, times the arm's scale
TURN = 0.2  # rad, largest yaw of the block with the hole
INSERTED = 0.8  # share of the hole's depth
UPRIGHT = np.cos(0.1)  # of the angle between the peg and the hole
HOLD_STEPS = 5  # control steps that it must stay inserted


class PegInsertEnv(ArmTaskEnv):
    """Put the yellow peg, which stands on the table, into the block's hole; it fits four ways round, 2 mm on each side.

    Success: it has been upright and in by 80 % of the hole's depth for five steps.
    """

    instruction = "put the peg into the hole"
    objects = ("peg", "socket")
    expert_class = PegInsertExpert
    half_width = HALF_WIDTH

    def _furnish(self, spec: mujoco.MjSpec) -> None:
        self.size = max(self.scale, 0.65)
        self.half_length, self.depth = HALF_LENGTH * self.size, DEPTH * self.size
        add_block(spec, "peg", [HALF_WIDTH, HALF_WIDTH, self.half_length], [0.93, 0.70, 0.13, 1], mass=0.06 * self.size)
        add_socket(spec, "socket", HALF_WIDTH + CLEARANCE, self.depth, WALL * self.size)

    def _place_objects(self, rng: np.random.Generator) -> None:
        side = rng.choice([-1.0, 1.0])
        ys = rng.uniform(*SIDE, 2) * [side, -side] * self.scale
        xs = rng.uniform(-DISTANCE, DISTANCE, 2) * self.scale
        self.place("peg", [xs[0], ys[0], self.half_length], rng.uniform(-np.pi, np.pi))
        self.place("socket", [xs[1], ys[1], 0], rng.uniform(-TURN, TURN))

    def _begin(self) -> None:
        self._start_distance = max(float(np.linalg.norm(self.tip()[:2])), 1e-6)
        self._steps_inserted = 0
        self._was_grasped = self._was_above = False

    def tip(self) -> np.ndarray:
        """Middle of the peg's lower end (3,) in the frame of the hole's mouth, z up."""
        tip = self.position("peg") - self.half_length * self.rotation("peg")[:, 2]
        return self.rotation("socket").T @ (tip - self.position("socket")) - [0, 0, self.depth]

    def peg_above(self, height: float) -> np.ndarray:
        """Position (3,) of the peg when it stands upright over the hole, its lower end ``height`` above the mouth."""
        return self.position("socket") + [0, 0, self.depth + self.half_length + height]

    def _inserted(self) -> float:
        """Share of the hole's depth."""
        tip = self.tip()
        inside = np.abs(tip[:2]).max() < self.half_width
        return float(np.clip(-tip[2] / self.depth, 0, 1)) if inside else 0.0

    def _track(self) -> None:
        tip = self.tip()
        grasped = self.grasped("peg")
        self._was_grasped |= grasped
        self._was_above |= bool(grasped and np.abs(tip[:2]).max() < self.half_width and tip[2] > 0)
        upright = self.rotation("peg")[2, 2] > UPRIGHT
        done = upright and self._inserted() >= INSERTED
        self._steps_inserted = self._steps_inserted + 1 if done else 0

    def _succeeded(self) -> bool:
        return self._steps_inserted >= HOLD_STEPS

    def _stages(self) -> dict[str, bool]:
        return {"grasped": self._was_grasped, "above": self._was_above, "inserted": self._steps_inserted > 0}

    def _progress(self) -> float:
        """A quarter each for reaching the peg, the grasp, the way to the hole and the depth in it."""
        inserted = self._inserted()
        if inserted > 0:
            return 0.75 + 0.24 * inserted
        grasped = float(self.grasped("peg"))
        way = np.clip(1 - np.linalg.norm(self.tip()[:2]) / self._start_distance, 0, 1)
        return float(self.nearness("peg") + grasped + way * grasped) / 4


def add_socket(spec: mujoco.MjSpec, name: str, half_hole: float, depth: float, wall: float) -> None:
    """A block with a square hole, moved as a mocap body; its origin lies on the table, under the hole."""
    body = spec.worldbody.add_body(name=name, mocap=True)
    middle, outside = half_hole + wall / 2, half_hole + wall
    for turn in (1.0, -1.0):
        for size, pos in (
            ([wall / 2, outside, depth / 2], [turn * middle, 0, depth / 2]),
            ([half_hole, wall / 2, depth / 2], [0, turn * middle, depth / 2]),
        ):
            body.add_geom(
                type=mujoco.mjtGeom.mjGEOM_BOX,
                size=size,
                pos=pos,
                rgba=[0.22, 0.38, 0.58, 1],
                friction=[0.4, 0.01, 0.001],
            )
    add_visual(body, "box", [half_hole, half_hole, 0.0008], [0.06, 0.07, 0.08, 1], pos=[0, 0, 0.0008])
