"""Reach: bring the tool to a target behind a post, which can be passed on the left or on the right."""

from __future__ import annotations

import mujoco
import numpy as np

from robopolicy_sim.envs.arm_task import ArmTaskEnv
from robopolicy_sim.envs.objects import add_visual
from robopolicy_sim.experts.reach import ReachExpert

TOLERANCE = 0.02  # m
HOLD_STEPS = 4  # control steps that the tool must stay there
HEIGHT = 0.12  # m of the target above the table, times the arm's scale
POST_RADIUS = 0.02  # m
SIDE = 0.14  # m from the middle to the start and to the target, times the arm's scale


class ReachEnv(ArmTaskEnv):
    """Bring the tool centre point to the green ball on the other side of the post.

    The tool starts on one side of the post. Success: it has been within 2 cm of the ball for four steps. Once the post
    was touched, the episode has failed.
    """

    instruction = "reach the green ball without touching the post"
    objects = ()
    goal_names = ("goal_x", "goal_y", "goal_z", "post_x", "post_y")
    goal_unit = "m"
    expert_class = ReachExpert

    def _furnish(self, spec: mujoco.MjSpec) -> None:
        post = spec.worldbody.add_body(name="post", mocap=True)
        height = HEIGHT * self.scale
        post.add_geom(
            name="post",
            type=mujoco.mjtGeom.mjGEOM_CYLINDER,
            size=[POST_RADIUS * self.scale, height, 0],
            pos=[0, 0, height],
            rgba=[0.92, 0.55, 0.10, 1],
        )
        add_visual(post, "cylinder", [1.8 * POST_RADIUS * self.scale, 0.004], [0.20, 0.21, 0.23, 1], pos=[0, 0, 0.004])
        goal = spec.worldbody.add_body(name="goal", mocap=True)
        add_visual(goal, "sphere", [0.018], [0.12, 0.62, 0.28, 1])

    def _place_objects(self, rng: np.random.Generator) -> None:
        shift = rng.uniform(-1, 1, (2, 2)) * 0.03 * self.scale
        height = HEIGHT * self.scale
        self.place("post", [*shift[0], 0.0])
        self.place("goal", [SIDE * self.scale + shift[1, 0], shift[1, 1], height])
        start = np.array([-SIDE * self.scale, rng.uniform(-1, 1) * 0.02, height + self.table_height])
        self.start_tool(start)

    def _begin(self) -> None:
        self._start_distance = max(self._distance(), 1e-6)
        self._steps_inside = 0
        self._touched = False

    def _goal(self) -> np.ndarray:
        return np.concatenate(
            [self.position("goal") - self.base_position, (self.position("post") - self.base_position)[:2]]
        )

    def _place_from_state(self, state: np.ndarray) -> None:
        super()._place_from_state(state)
        self.data.mocap_pos[self._mocap("goal")] = state[:3] + self.base_position
        self.data.mocap_pos[self._mocap("post")][:2] = state[3:] + self.base_position[:2]

    def _distance(self) -> float:
        return float(np.linalg.norm(self.tool_state().position - self.position("goal")))

    def _track(self) -> None:
        self._touched |= bool((self.data.contact.geom == self.model.geom("post").id).any())
        inside = self._distance() <= TOLERANCE and not self._touched
        self._steps_inside = self._steps_inside + 1 if inside else 0

    def _succeeded(self) -> bool:
        return self._steps_inside >= HOLD_STEPS

    def _stages(self) -> dict[str, bool]:
        return {"touched_post": self._touched, "inside": self._steps_inside > 0}

    def _progress(self) -> float:
        return 0.0 if self._touched else float(np.clip(1 - self._distance() / self._start_distance, 0, 0.99))
