"""The keyboard of the window: moves the tool, and speaks to the session whatever device moves the tool."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pygame

from robopolicy.teleoperation.command import AxisMap, Command, SessionKey

AXES = AxisMap()
SLOW = 0.25  # share of the speed while a shift key is held
# The keys that push each axis of the operator's frame forth and back.
MOVES = (
    (pygame.K_w, pygame.K_s),
    (pygame.K_a, pygame.K_d),
    (pygame.K_r, pygame.K_f),
    (pygame.K_o, pygame.K_u),
    (pygame.K_i, pygame.K_k),
    (pygame.K_j, pygame.K_l),
)
SESSION_KEYS = {
    pygame.K_RETURN: SessionKey.TOGGLE,
    pygame.K_y: SessionKey.SUCCESS,
    pygame.K_n: SessionKey.FAILURE,
    pygame.K_BACKSPACE: SessionKey.UNDO,
    pygame.K_ESCAPE: SessionKey.QUIT,
}
SESSION_HINTS = (
    ("Enter", "start / stop"),
    ("Y", "success"),
    ("N", "failure"),
    ("Backspace", "undo"),
    ("Esc", "quit"),
)


class Keyboard:
    """Keys that are held move the tool at full speed, with shift at a quarter of it; space closes and opens."""

    name = "keyboard"
    hints: tuple[tuple[str, str], ...] = (
        ("W S", "away / near"),
        ("A D", "left / right"),
        ("R F", "up / down"),
        ("I K", "tilt forward / back"),
        ("U O", "roll left / right"),
        ("J L", "turn left / right"),
        ("Space", "gripper"),
        ("Shift", "slow"),
    )

    def __init__(self, axes: AxisMap = AXES) -> None:
        self._axes = axes
        self._held: set[int] = set()
        self._opening = 1.0

    def read(self, events: Sequence[pygame.event.Event]) -> Command:
        tapped = set()
        for event in events:
            if event.type == pygame.KEYDOWN:
                self._held.add(event.key)
                tapped.add(event.key)
                if event.key == pygame.K_SPACE:
                    self._opening = 1.0 - self._opening
            elif event.type == pygame.KEYUP:
                self._held.discard(event.key)
        # A key that was pressed and released between two periods still moves the tool for one of them.
        active = self._held | tapped
        deflections = np.array([(forth in active) - (back in active) for forth, back in MOVES], dtype=np.float64)
        speed = SLOW if active & {pygame.K_LSHIFT, pygame.K_RSHIFT} else 1.0
        return Command(speed * self._axes.twist(deflections), self._opening)

    def reset(self) -> None:
        self._opening = 1.0

    def close(self) -> None:
        """Nothing to give back."""


def session_keys(events: Sequence[pygame.event.Event]) -> frozenset[SessionKey]:
    """What the window's keys and its close button tell the session."""
    keys = {SESSION_KEYS[e.key] for e in events if e.type == pygame.KEYDOWN and e.key in SESSION_KEYS}
    if any(e.type == pygame.QUIT for e in events):
        keys.add(SessionKey.QUIT)
    return frozenset(keys)
