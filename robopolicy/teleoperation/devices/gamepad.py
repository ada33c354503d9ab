"""A gamepad with two sticks, through SDL's game controller interface: one layout for every known make."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pygame
from pygame._sdl2 import controller

from robopolicy.errors import UserError
from robopolicy.teleoperation.command import AxisMap, Command, SessionKey

_FULL = 32767  # deflection of a stick or trigger, 16 bit signed
_STICKS = (
    pygame.CONTROLLER_AXIS_LEFTX,
    pygame.CONTROLLER_AXIS_LEFTY,
    pygame.CONTROLLER_AXIS_RIGHTX,
    pygame.CONTROLLER_AXIS_RIGHTY,
)
# Pairs of buttons that act like an axis.
_BUTTON_AXES = (
    (pygame.CONTROLLER_BUTTON_RIGHTSHOULDER, pygame.CONTROLLER_BUTTON_LEFTSHOULDER),
    (pygame.CONTROLLER_BUTTON_DPAD_UP, pygame.CONTROLLER_BUTTON_DPAD_DOWN),
)
_KEYS = {
    pygame.CONTROLLER_BUTTON_START: SessionKey.TOGGLE,
    pygame.CONTROLLER_BUTTON_A: SessionKey.SUCCESS,
    pygame.CONTROLLER_BUTTON_B: SessionKey.FAILURE,
    pygame.CONTROLLER_BUTTON_BACK: SessionKey.UNDO,
}
# Sticks grow to the right and down. Axes: left x, left y, right x, right y, shoulders, cross.
AXES = AxisMap(axes=((1, -1), (0, -1), (3, -1), (4, 1), (5, 1), (2, -1)), dead_zone=0.12, expo=0.5)


class Gamepad:
    """Left stick: away, near, left, right; right stick: up, down, turn; the right trigger closes the gripper."""

    name = "gamepad"
    hints: tuple[tuple[str, str], ...] = (
        ("Left stick", "away, near, left, right"),
        ("Right stick", "up, down, turn"),
        ("Cross", "tilt"),
        ("Shoulders", "roll"),
        ("Right trigger", "close the gripper"),
        ("Start", "start / stop"),
        ("A  B", "success / failure"),
        ("Back", "undo"),
    )

    def __init__(self, axes: AxisMap = AXES) -> None:
        """Open the first gamepad.

        Raises:
            UserError: there is none.
        """
        pygame.joystick.init()
        controller.init()
        found = [number for number in range(pygame.joystick.get_count()) if controller.is_controller(number)]
        if not found:
            raise UserError(
                "There is no gamepad that SDL knows. Plug one in (or pair it) and start again; "
                "or use --device keyboard."
            )
        # pygame 2.6 fails while it reads this event, for a gamepad that it has not seen connect (pygame issue 3634).
        pygame.event.set_blocked(pygame.JOYDEVICEREMOVED)
        self._axes = axes
        self._controller = controller.Controller(found[0])

    def read(self, events: Sequence[pygame.event.Event]) -> Command:
        if not self._controller.attached():
            raise UserError(
                "The gamepad was disconnected. Stored episodes are safe; connect it, and go on with --append."
            )
        sticks = [self._controller.get_axis(axis) / _FULL for axis in _STICKS]
        pressed = self._controller.get_button
        buttons = [float(pressed(forth)) - float(pressed(back)) for forth, back in _BUTTON_AXES]
        closed = self._controller.get_axis(pygame.CONTROLLER_AXIS_TRIGGERRIGHT) / _FULL
        tapped = {event.button for event in events if event.type == pygame.CONTROLLERBUTTONDOWN}
        keys = frozenset(_KEYS[button] for button in tapped & _KEYS.keys())
        return Command(self._axes.twist(np.array(sticks + buttons)), float(np.clip(1 - closed, 0, 1)), keys)

    def reset(self) -> None:
        """Nothing to do: the trigger tells the opening at any time."""

    def close(self) -> None:
        self._controller.quit()
