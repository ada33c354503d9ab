"""The scripted experts of DrawerOpen and DrawerClose."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np

from robopolicy_sim.control import ToolTarget
from robopolicy_sim.experts.scripted import ScriptedExpert, top_down

if TYPE_CHECKING:
    from robopolicy_sim.envs.drawer import DrawerCloseEnv, DrawerEnv, DrawerOpenEnv

HOVER = 0.07  # m above the handle
GAP = 0.032  # m between the fingers that go around the handle; wider ones would hit the front
BEHIND = 0.022  # m from the handle to the middle of a finger that hooks it
BEFORE = 0.055  # m from the handle to the hand before it pushes
MISS = 0.024  # m that the handle may be missed outwards
SHORT = 0.018  # m that a push may end too early, times the arm's scale
PUSH_AT = 0.6  # of the handle's half length from its middle
AHEAD = 0.04  # m that the target lies ahead along the drawer's way
SLIPPED = 0.06  # m that the hand may move farther than the drawer
MOST_STEPS = 80  # of one pull or push


class DrawerExpert(ScriptedExpert):
    """What pulling and pushing have in common."""

    env: DrawerEnv

    def out(self) -> float:
        """How far the named drawer is out, in metres."""
        return self.env.pulled_out(self.env.wanted)

    def handle(self) -> np.ndarray:
        return self.env.handle(self.env.wanted)

    def drag(self, direction: np.ndarray, rotation: np.ndarray, *, speed: float) -> Iterator[ToolTarget]:
        """Move the tool along a line until the hand leaves the drawer behind, or `MOST_STEPS` have passed."""
        start, out = self.env.tool_state().position, self.out()
        for _ in range(MOST_STEPS):
            travel = float((self.env.tool_state().position - start) @ direction)
            if travel - abs(self.out() - out) > SLIPPED:
                return
            yield self.toward(start + (travel + AHEAD) * direction, rotation, speed=speed)

    def leave(self) -> Iterator[ToolTarget]:
        state = self.env.tool_state()
        yield from self.move(state.position + [0, 0, HOVER], state.rotation, tolerance=0.02, max_steps=40)


class DrawerOpenExpert(DrawerExpert):
    """Modes: ``top`` closes the fingers around the handle from above, ``hook`` pulls with closed fingers behind it."""

    env: DrawerOpenEnv

    @classmethod
    def modes(cls, env: DrawerOpenEnv) -> tuple[str, ...]:  # type: ignore[override]
        return ("top", "hook")

    def script(self) -> Iterator[ToolTarget]:
        env = self.env
        hook = self.mode == "hook"
        rotation = top_down(env.yaw("cabinet") - (0.0 if hook else np.pi / 2))
        while True:
            yield from self.grip(0.0 if hook else GAP / env.arm.gripper.stroke, steps=6)
            inwards = BEHIND if hook else 0.0
            missed = self.aim(np.zeros(3), tolerance=MISS, direction=env.outwards()) - inwards * env.outwards()
            above = self.handle() + missed + [0, 0, HOVER]
            yield from self.move(above, rotation, pads=True, tolerance=0.008)
            yield from self.move(self.handle() + missed, rotation, pads=True, speed=0.6, max_steps=30)
            yield from self.grip(0.0, steps=0 if hook else 8)
            for target in self.drag(env.outwards(), rotation, speed=0.6):
                yield target
                if self.out() > env.opened + 0.01:
                    break
            yield from self.leave()


class DrawerCloseExpert(DrawerExpert):
    """Modes: ``left`` and ``right``, the end of the handle at which the closed fingers push."""

    env: DrawerCloseEnv

    @classmethod
    def modes(cls, env: DrawerCloseEnv) -> tuple[str, ...]:  # type: ignore[override]
        return ("left", "right")

    def script(self) -> Iterator[ToolTarget]:
        env = self.env
        rotation = top_down(env.yaw("cabinet"))
        half_length = float(env.model.geom(f"{env.wanted}_bar").size[1])
        sideways = (1 if self.mode == "left" else -1) * PUSH_AT * half_length * env.rotation("cabinet")[:, 1]
        yield from self.grip(0.0, steps=0)
        while True:
            short = self.aim(np.zeros(3), tolerance=SHORT * env.scale, direction=env.outwards())
            before = self.handle() + sideways + BEFORE * env.outwards()
            yield from self.move(before + [0, 0, HOVER], rotation, pads=True, tolerance=0.015)
            yield from self.move(before, rotation, pads=True, speed=0.6, tolerance=0.008)
            for target in self.drag(-env.outwards(), rotation, speed=0.5):
                yield target
                if self.out() < 0.003 + np.linalg.norm(short):
                    break
            yield from self.leave()
