"""ChooseObject: of two blocks, lift the one that the instruction names."""

from __future__ import annotations

import mujoco
import numpy as np

from robopolicy_sim.envs.arm_task import ArmTaskEnv
from robopolicy_sim.envs.objects import add_block, random_turn, separated_points
from robopolicy_sim.experts.choose_object import ChooseObjectExpert

HALF_SIZE = 0.02  # m
COLOURS = {"red": (0.80, 0.16, 0.14, 1), "green": (0.15, 0.52, 0.25, 1)}
EXTENT = (0.10, 0.16)  # m, half sides of the region where the blocks start
GAP = 0.12  # m between their centres at the start
LIFTED = 0.08  # m that the named block must rise
HOLD_STEPS = 5  # control steps that it must stay there
WRONG = 0.04  # m that the other block may rise before the episode has failed


class ChooseObjectEnv(ArmTaskEnv):
    """Lift the block of the colour that the instruction names, drawn at each reset; the state tells it as one-hot.

    Success: that block has been 8 cm above its start, in the gripper, for five steps. Once the other one was lifted,
    the episode has failed.
    """

    objects = ("red", "green")
    goal_names = ("wanted_red", "wanted_green")
    goal_unit = "one-hot"
    expert_class = ChooseObjectExpert

    def _furnish(self, spec: mujoco.MjSpec) -> None:
        for colour, rgba in COLOURS.items():
            add_block(spec, colour, [HALF_SIZE] * 3, rgba)

    def _place_objects(self, rng: np.random.Generator) -> None:
        extent = np.array(EXTENT) * max(self.scale, 0.6)
        for colour, point in zip(COLOURS, separated_points(rng, 2, extent, GAP), strict=True):
            self.place(colour, [*point, HALF_SIZE], random_turn(rng))
        self._choose(str(rng.choice(list(COLOURS))))

    def _place_from_state(self, state: np.ndarray) -> None:
        super()._place_from_state(state)
        self._choose(list(COLOURS)[int(np.argmax(state[-2:]))])

    def _choose(self, colour: str) -> None:
        self.wanted = colour
        self.instruction = f"lift the {colour} block"

    def _begin(self) -> None:
        self._steps_lifted = 0
        self._was_grasped = self._mistaken = False

    def _goal(self) -> np.ndarray:
        return np.array([colour == self.wanted for colour in COLOURS], dtype=np.float64)

    def _rise(self, colour: str) -> float:
        return float(self.position(colour)[2]) - HALF_SIZE - self.table_height

    def _track(self) -> None:
        other = next(colour for colour in COLOURS if colour != self.wanted)
        self._mistaken |= self._rise(other) > WRONG
        grasped = self.grasped(self.wanted)
        self._was_grasped |= grasped
        lifted = grasped and self._rise(self.wanted) > LIFTED and not self._mistaken
        self._steps_lifted = self._steps_lifted + 1 if lifted else 0

    def _succeeded(self) -> bool:
        return self._steps_lifted >= HOLD_STEPS

    def _stages(self) -> dict[str, bool]:
        return {"grasped": self._was_grasped, "lifted": self._steps_lifted > 0, "lifted_the_other": self._mistaken}

    def _progress(self) -> float:
        """A third for reaching the named block, a third for the grasp, a third for the rise; 0 after a mistake."""
        if self._mistaken:
            return 0.0
        rise = np.clip(self._rise(self.wanted) / LIFTED, 0, 1)
        return float((self.nearness(self.wanted) + self.grasped(self.wanted) + rise) / 3)
