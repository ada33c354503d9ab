"""A 3Dconnexion SpaceMouse, read and decoded by pyspacemouse (HID reports 1 to 3 of thirteen models)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from robopolicy.errors import UserError, require_extra
from robopolicy.teleoperation.command import AxisMap, Command, SessionKey

# The cap pushes and turns a little on all axes at once, hence the wide dead zone.
AXES = AxisMap(dead_zone=0.15, expo=0.6)
_ADVICE = (
    "Plug it in; on Linux install libhidapi-hidraw0 (sudo apt install libhidapi-hidraw0) and let users read it: write "
    'KERNEL=="hidraw*", ATTRS{idVendor}=="256f", MODE="0666" (older models: 046d) into '
    "/etc/udev/rules.d/99-spacemouse.rules, then plug it in again."
)


class SpaceMouse:
    """Push and turn the cap; the left button closes and opens the gripper, the right one starts and stops."""

    name = "spacemouse"
    hints: tuple[tuple[str, str], ...] = (
        ("Push the cap", "move"),
        ("Turn the cap", "rotate"),
        ("Left button", "gripper"),
        ("Right button", "start / stop"),
    )

    def __init__(self, mouse: Any, axes: AxisMap = AXES) -> None:
        """Wrap an opened ``pyspacemouse.SpaceMouseDevice`` of the ROS axis convention (x forward, y left, z up)."""
        self._mouse = mouse
        self._axes = axes
        self._opening = 1.0
        self._held: list[int] = []
        self._tapped: set[int] = set()
        mouse.configure(button_callback=self._note_buttons)

    @classmethod
    def open(cls, axes: AxisMap = AXES) -> SpaceMouse:
        """Open the first SpaceMouse.

        Raises:
            UserError: there is none, or it cannot be read.
        """
        pyspacemouse = require_extra("pyspacemouse", "teleop")
        try:
            return cls(pyspacemouse.open(axis_convention=pyspacemouse.AxisConvention.ROS), axes)
        except (RuntimeError, OSError) as error:
            raise UserError(f"The SpaceMouse cannot be opened: {error}. {_ADVICE}") from error

    def read(self, events: Sequence[Any]) -> Command:
        state = self._read_newest()
        deflections = np.array([state.x, state.y, state.z, state.roll, state.pitch, state.yaw])
        tapped, self._tapped = self._tapped, set()
        if 0 in tapped:
            self._opening = 1.0 - self._opening
        keys = frozenset({SessionKey.TOGGLE} if 1 in tapped else ())
        return Command(self._axes.twist(deflections), self._opening, keys)

    def reset(self) -> None:
        self._opening = 1.0

    def close(self) -> None:
        self._mouse.close()

    def _read_newest(self) -> Any:
        """Decode every waiting report; a mouse sends many in a control period, translation and rotation apart."""
        import easyhid  # comes with pyspacemouse

        try:
            state = self._mouse.read()
            decoded = None
            while decoded != state.t:
                decoded = state.t
                state = self._mouse.read()
        except easyhid.HIDException as error:
            raise UserError(
                "The SpaceMouse was disconnected. Stored episodes are safe; connect it, and go on with --append."
            ) from error
        return state

    def _note_buttons(self, _state: Any, buttons: Sequence[int]) -> None:
        held = [number for number, down in enumerate(buttons) if down]
        self._tapped.update(set(held) - set(self._held))
        self._held = held
