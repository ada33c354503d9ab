"""The scripted expert of Buttons: press with closed fingers until the lamp is lit."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np

from robopolicy_sim.control import ToolTarget
from robopolicy_sim.experts.scripted import ScriptedExpert, top_down

if TYPE_CHECKING:
    from robopolicy_sim.envs.buttons import ButtonsEnv

HOVER = 0.06  # m above a button and
BESIDE = 0.05  # m beside it, where the hand comes from
ABOVE = 0.025  # m above a button before it is pressed
MISS = 0.018  # m that a button may be missed across the row
AHEAD = 0.008  # m that the target lies ahead on the way down
DEEPEST = 0.03  # m below a button's top that the hand tries
STUCK = 6  # steps without going down after which a press ends


class ButtonsExpert(ScriptedExpert):
    """Modes: ``left`` and ``right``: the side from which the hand comes to a button.

    Where the order is free, it begins on that side.
    """

    env: ButtonsEnv

    @classmethod
    def modes(cls, env: ButtonsEnv) -> tuple[str, ...]:  # type: ignore[override]
        return ("left", "right")

    def script(self) -> Iterator[ToolTarget]:
        env = self.env
        rotation = top_down(env.yaw("panel"))
        yield from self.grip(0.0, steps=0)
        while True:
            colour = self._next_button()
            if colour is None:
                yield from self.wait(5)
                continue
            across = self.rng.choice([-1.0, 1.0]) * env.rotation("panel")[:, 0]
            spot = self.aim(env.top(colour), tolerance=MISS, direction=across)
            beside = spot + self._side() * BESIDE * env.rotation("panel")[:, 1] + [0, 0, HOVER]
            yield from self.move(beside, rotation, pads=True, tolerance=0.02)
            yield from self.move(spot + [0, 0, ABOVE], rotation, pads=True, tolerance=0.006)
            yield from self.press(colour, rotation)
            yield from self.move(spot + [0, 0, HOVER], rotation, pads=True, tolerance=0.02)

    def press(self, colour: str, rotation: np.ndarray) -> Iterator[ToolTarget]:
        """Go down until the button's lamp is lit or something else stops the hand."""
        env = self.env
        start = env.tool_state().position
        lowest, stuck = np.inf, 0
        while colour not in env.lit and stuck < STUCK:
            position = env.tool_state().position
            stuck = 0 if position[2] < lowest - 5e-4 else stuck + 1
            lowest = min(lowest, float(position[2]))
            if position[2] < env.top(colour)[2] - DEEPEST:
                return
            yield self.toward(np.array([*start[:2], position[2] - AHEAD]), rotation, speed=0.5)

    def _next_button(self) -> str | None:
        """Of the buttons that may be pressed next, the one farthest on the mode's side."""
        names = list(self.env.wanted())
        heights = [self._side() * float(self.env.model.body(f"{name}_button").pos[1]) for name in names]
        return names[int(np.argmax(heights))] if names else None

    def _side(self) -> float:
        return 1.0 if self.mode == "left" else -1.0
