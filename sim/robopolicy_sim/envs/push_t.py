"""PushT: push a T-shaped block onto its mark with a rod, as in push-T (Chi et al., RSS 2023), with an arm."""

from __future__ import annotations

from dataclasses import replace

import mujoco
import numpy as np

from robopolicy_sim.control import JointTarget
from robopolicy_sim.envs.arm_task import ArmTaskEnv
from robopolicy_sim.envs.tee import Tee, add_tee, add_tee_mark, rest_height
from robopolicy_sim.experts.push_t import PushTExpert

UNIT = 0.03  # m, thickness of the T's bar and stem, times the task's scale
SMALLEST = 0.6  # of the scale: a smaller T asks for more precision than a small arm has
COVERAGE = 0.90  # share of the mark that the block must cover
HOLD_STEPS = 3  # control steps that it must be covered
TOOL_HEIGHT = 0.055  # m of the TCP above the table
TIP_HEIGHT = 0.004  # m of the rod's lower end above the table
ROD_RADIUS = 0.010  # m, times the task's scale
ROD_FRICTION = 0.25
HANDLE = 0.044  # m, what the gripper holds the rod by
ROD_REGION = ((-0.165, -0.32), (0.24, 0.32))  # m, corners of what the rod can reach, times the arm's scale
BLOCK_REGION = ((-0.05, -0.18), (0.12, 0.18))  # m, corners of where the block's centroid starts, times the arm's scale
GOAL = np.array([0.03, 0.0, np.pi / 4])  # m, times the arm's scale, and rad
GOAL_SPREAD = np.array([0.02, 0.02, 0.2])  # uniform, to both sides
FAR_ENOUGH = 0.05  # coverage at the start, at most


class PushTEnv(ArmTaskEnv):
    """Push the T onto the mark with the rod in the gripper, which stays closed around the rod's handle.

    Success: the block has covered more than 90 % of the mark for three steps (gym-pusht asks for 95 % in one).
    Progress is the share covered.
    """

    instruction = "push the T-shaped block onto the mark"
    objects = ("tee",)
    goal_names = ("goal_x", "goal_y", "goal_cos_yaw", "goal_sin_yaw")
    goal_unit = "m; cosine, sine"
    expert_class = PushTExpert

    def _load_model(self) -> mujoco.MjModel:
        size = max(self.scale, SMALLEST)
        self.tee = Tee(UNIT * size)
        self._rod_radius = ROD_RADIUS * size
        self._opening = min(1.0, HANDLE / self.arm.gripper.stroke)
        self.rod_region = np.array(ROD_REGION) * self.scale
        return super()._load_model()

    def _furnish(self, spec: mujoco.MjSpec) -> None:
        add_tee_mark(spec, "goal", self.tee, [0.55, 0.80, 0.58, 1])
        add_tee(spec, "tee", self.tee, [0.36, 0.46, 0.60, 1], ground="bench")
        tcp = spec.site(self.arm.tcp_site)
        hand, length = tcp.parent, TOOL_HEIGHT - TIP_HEIGHT
        frame = hand.add_frame(pos=tcp.pos, quat=tcp.quat)
        rod = hand.add_geom(
            name="rod",
            type=mujoco.mjtGeom.mjGEOM_CYLINDER,
            size=[self._rod_radius, length / 2, 0],
            pos=[0, 0, length / 2],
            rgba=[0.85, 0.48, 0.12, 1],
            mass=0.02,
            friction=[ROD_FRICTION, 0.005, 0.0001],
            priority=2,
            solref=[0.01, 1],
        )
        handle = hand.add_geom(
            name="handle",
            type=mujoco.mjtGeom.mjGEOM_BOX,
            size=[0.009, HANDLE / 2, 0.008],
            rgba=[0.2, 0.21, 0.23, 1],
            mass=0.01,
            contype=0,
            conaffinity=0,
        )
        rod.set_frame(frame)
        handle.set_frame(frame)

    def pose(self, body: str) -> np.ndarray:
        """Place of the block or of the mark (3,): x, y in metres, yaw in radians."""
        return np.array([*self.position(body)[:2], self.yaw(body)])

    @property
    def tool_height(self) -> float:
        """Height of the TCP at which the rod pushes."""
        return TOOL_HEIGHT + self.table_height

    @property
    def tool_rotation(self) -> np.ndarray:
        """Rotation (3, 3) of the tool in which it pushes."""
        return self._home_rotation

    def _hold(self, joints: np.ndarray, opening: float = 1.0) -> None:
        super()._hold(joints, self._opening)

    def _servo_command(self, target: JointTarget) -> np.ndarray:
        return super()._servo_command(replace(target, opening=self._opening))

    def _place_objects(self, rng: np.random.Generator) -> None:
        low, high = np.array(BLOCK_REGION) * self.scale
        goal = (GOAL + rng.uniform(-1, 1, 3) * GOAL_SPREAD) * [self.scale, self.scale, 1]
        block = np.array([*rng.uniform(low, high), rng.uniform(-np.pi, np.pi)])
        while self.tee.coverage(block, goal) > FAR_ENOUGH:
            block = np.array([*rng.uniform(low, high), rng.uniform(-np.pi, np.pi)])
        self.place("goal", [*goal[:2], 0.0], goal[2])
        self.place("tee", [*block[:2], rest_height()], block[2])
        self._place_rod(rng, block[:2])

    def _place_rod(self, rng: np.random.Generator, block: np.ndarray) -> None:
        low, high = self.rod_region
        rod = rng.uniform(low, high)
        while np.linalg.norm(rod - block) < self.tee.radius + 2 * self._rod_radius:
            rod = rng.uniform(low, high)
        self.start_tool(np.array([*rod, self.tool_height]))

    def _place_from_state(self, state: np.ndarray) -> None:
        super()._place_from_state(state)
        x, y, cos, sin = state[-4:]
        self.place("goal", [x + self.base_position[0], y + self.base_position[1], 0.0], float(np.arctan2(sin, cos)))
        self._place_rod(np.random.default_rng(0), (state[:3] + self.base_position)[:2])

    def _begin(self) -> None:
        self._coverage = self._measure()
        self._steps_covered = 0
        self._touched = False

    def _goal(self) -> np.ndarray:
        x, y, yaw = self.pose("goal")
        return np.array([x - self.base_position[0], y - self.base_position[1], np.cos(yaw), np.sin(yaw)])

    def _measure(self) -> float:
        return float(self.tee.coverage(self.pose("tee"), self.pose("goal")))

    def _track(self) -> None:
        self._coverage = self._measure()
        self._touched = self._touched or self.speed("tee") > 0.01
        self._steps_covered = self._steps_covered + 1 if self._coverage > COVERAGE else 0

    def _succeeded(self) -> bool:
        return self._steps_covered >= HOLD_STEPS

    def _stages(self) -> dict[str, bool]:
        return {"pushed": self._touched, "half_covered": self._coverage > 0.5}

    def _progress(self) -> float:
        return min(self._coverage, 0.99)
