"""Buttons: press the buttons of a panel that the instruction names, in its order where it gives one."""

from __future__ import annotations

from dataclasses import dataclass

import mujoco
import numpy as np

from robopolicy_sim.envs.arm_task import ArmTaskEnv
from robopolicy_sim.envs.objects import add_visual
from robopolicy_sim.experts.buttons import ButtonsExpert

COLOURS = {"red": (0.82, 0.14, 0.12, 1), "green": (0.12, 0.58, 0.24, 1), "blue": (0.12, 0.34, 0.76, 1)}
LAMP_OFF = (0.30, 0.30, 0.31, 1)
LAMP_ON = (1.0, 0.93, 0.35, 1)
# Sizes for an arm of full scale; smaller for a small arm.
SPACING = 0.07  # m between the buttons
RADIUS = 0.016  # m of a button
PANEL = (0.055, 0.115, 0.012)  # m, half sides; the buttons stand in a row along y
TRAVEL = 0.008  # m that a button gives way
RAISED = 0.012  # m of a button's top above the panel
STIFFNESS = 500.0  # N/m, and
PRELOAD = 0.002  # m of its spring: 5 N at the end of the travel
PRESSED, RELEASED = 0.8, 0.4  # shares of the travel
PLACE = (0.06, 0.08)  # m, half sides of the region of the panel's middle, times the arm's scale
YAW = 0.4  # rad


@dataclass(frozen=True)
class Wish:
    """What the instruction asks for: one or two colours, and whether their order counts."""

    colours: tuple[str, ...]
    ordered: bool

    @property
    def instruction(self) -> str:
        if len(self.colours) == 1:
            return f"press the {self.colours[0]} button"
        first, second = self.colours
        if self.ordered:
            return f"press the {first} button, then the {second} one"
        return f"press the {first} and the {second} button"

    def next(self, lit: tuple[str, ...]) -> tuple[str, ...]:
        """The buttons that may be pressed after ``lit``."""
        left = tuple(colour for colour in self.colours if colour not in lit)
        return left[:1] if self.ordered else left


class ButtonsEnv(ArmTaskEnv):
    """Press one button, or two in a given or in any order, as the instruction says, drawn at each reset.

    A button counts at 80 % of its travel, springs back, and its lamp stays lit. Success: the lamps of the named buttons
    are lit. Pressing another one, or in the wrong order, fails the episode. The state tells the wish: the first and the
    second colour as one-hot and whether their order counts, then the lamps, which are dark at every start.
    """

    objects = ("panel",)
    goal_names = (
        *(f"first_{colour}" for colour in COLOURS),
        *(f"second_{colour}" for colour in COLOURS),
        "ordered",
        *(f"lit_{colour}" for colour in COLOURS),
    )
    goal_unit = "one-hot"
    expert_class = ButtonsExpert

    def _furnish(self, spec: mujoco.MjSpec) -> None:
        add_panel(spec, max(self.scale, 0.65))

    def _place_objects(self, rng: np.random.Generator) -> None:
        x, y = rng.uniform(-1, 1, 2) * PLACE * np.array(self.scale)
        self.place("panel", [x, y, 0], rng.uniform(-YAW, YAW))
        count, ordered = ((1, False), (2, False), (2, True))[rng.integers(3)]
        colours = rng.choice(list(COLOURS), count, replace=False)
        self._wish(Wish(tuple(str(colour) for colour in colours), ordered))

    def _place_from_state(self, state: np.ndarray) -> None:
        super()._place_from_state(state)
        names = list(COLOURS)
        first, second, ordered = state[-10:-7], state[-7:-4], state[-4]
        colours = [names[int(np.argmax(choice))] for choice in (first, second) if choice.any()]
        self._wish(Wish(tuple(colours), bool(ordered)))

    def _wish(self, wish: Wish) -> None:
        self.wish = wish
        self.instruction = wish.instruction

    def _begin(self) -> None:
        self.lit: tuple[str, ...] = ()
        self._down = dict.fromkeys(COLOURS, False)
        self._mistaken = False
        self._show_lamps()
        self._start_distance = max(min(self._distance(colour) for colour in self.wanted()), 1e-6)

    def _goal(self) -> np.ndarray:
        choices = [*self.wish.colours, "", ""][:2]
        chosen = [name == choice for choice in choices for name in COLOURS]
        return np.array([*chosen, self.wish.ordered, *(name in self.lit for name in COLOURS)], dtype=np.float64)

    def wanted(self) -> tuple[str, ...]:
        """The buttons of which any may be pressed next."""
        return self.wish.next(self.lit)

    def top(self, colour: str) -> np.ndarray:
        """Middle of a button's top (3,), where it is when nobody presses it."""
        body = self.data.body(f"{colour}_button")
        return body.xpos + [0, 0, self._travel(colour)]

    def pressed(self, colour: str) -> float:
        """Share of the travel that a button is pressed, in [0, 1]."""
        return float(np.clip(self._travel(colour) / TRAVEL, 0, 1))

    def _travel(self, colour: str) -> float:
        return float(self.data.joint(f"{colour}_button").qpos[0])

    def _distance(self, colour: str) -> float:
        return float(np.linalg.norm(self.pads_middle() - self.top(colour)))

    def _track(self) -> None:
        for colour in COLOURS:
            share = self.pressed(colour)
            if share > PRESSED and not self._down[colour]:
                self._press(colour)
            self._down[colour] = share > (RELEASED if self._down[colour] else PRESSED)

    def _press(self, colour: str) -> None:
        if colour not in self.lit:
            self._mistaken |= colour not in self.wanted()
            self.lit = (*self.lit, colour)
            self._show_lamps()

    def _show_lamps(self) -> None:
        for colour in COLOURS:
            self.model.geom(f"{colour}_lamp").rgba[:] = LAMP_ON if colour in self.lit else LAMP_OFF

    def _succeeded(self) -> bool:
        return not self._mistaken and not self.wanted()

    def _stages(self) -> dict[str, bool]:
        right = [colour for colour in self.lit if colour in self.wish.colours]
        return {"first": len(right) > 0, "second": len(right) > 1, "pressed_another": self._mistaken}

    def _progress(self) -> float:
        """Equal shares for the presses, half of each for the way to the button; 0 after a wrong press."""
        if self._mistaken:
            return 0.0
        distance = min(self._distance(colour) for colour in self.wanted())
        way = np.clip(1 - distance / self._start_distance, 0, 1)
        return float((len(self.lit) + 0.5 * way) / len(self.wish.colours))


def add_panel(spec: mujoco.MjSpec, size: float) -> None:
    """A mocap body ``panel`` with three push-buttons on springs, each with a lamp beside it."""
    panel = spec.worldbody.add_body(name="panel", mocap=True)
    half = np.array(PANEL) * size
    top = 2 * half[2]
    panel.add_geom(
        name="panel", type=mujoco.mjtGeom.mjGEOM_BOX, size=half, pos=[0, 0, half[2]], rgba=[0.80, 0.81, 0.82, 1]
    )
    radius = RADIUS * size
    for index, (colour, rgba) in enumerate(COLOURS.items()):
        y = (1 - index) * SPACING * size
        add_visual(panel, "cylinder", [1.25 * radius, 0.001], [0.13, 0.14, 0.15, 1], pos=[0, y, top + 0.001])
        add_lamp(panel, colour, [half[0] - 1.2 * radius, y, top], 0.6 * radius)
        button = panel.add_body(name=f"{colour}_button", pos=[0, y, top + RAISED], gravcomp=1)
        button.add_joint(
            name=f"{colour}_button",
            type=mujoco.mjtJoint.mjJNT_SLIDE,
            axis=[0, 0, -1],
            range=[0, TRAVEL],
            stiffness=STIFFNESS,
            springref=-PRELOAD,
            damping=6,
            armature=0.05,
        )
        button.add_geom(
            type=mujoco.mjtGeom.mjGEOM_CYLINDER,
            size=[radius, RAISED / 2, 0],
            pos=[0, 0, -RAISED / 2],
            rgba=rgba,
            mass=0.02,
        )
        spec.add_exclude(bodyname1="panel", bodyname2=f"{colour}_button")


def add_lamp(panel: mujoco.MjsBody, colour: str, position: list[float], radius: float) -> None:
    panel.add_geom(
        name=f"{colour}_lamp",
        type=mujoco.mjtGeom.mjGEOM_ELLIPSOID,
        size=[radius, radius, 0.7 * radius],
        pos=position,
        rgba=LAMP_OFF,
        contype=0,
        conaffinity=0,
        group=2,
        mass=0,
    )
