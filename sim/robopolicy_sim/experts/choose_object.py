"""The scripted expert of ChooseObject."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from robopolicy_sim.control import ToolTarget
from robopolicy_sim.experts.grasping import GraspingExpert

if TYPE_CHECKING:
    from robopolicy_sim.envs.choose_object import ChooseObjectEnv


class ChooseObjectExpert(GraspingExpert):
    """Modes: the pair of faces that is grasped. The block to lift is what the environment's instruction names."""

    env: ChooseObjectEnv

    @classmethod
    def modes(cls, env: ChooseObjectEnv) -> tuple[str, ...]:  # type: ignore[override]
        return ("faces_a", "faces_b")

    def script(self) -> Iterator[ToolTarget]:
        while True:
            yield from self.pick(self.env.wanted, quarter_turn=self.mode == "faces_b")
            yield from self.rise(0.14)
