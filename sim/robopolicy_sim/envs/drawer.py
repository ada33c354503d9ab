"""DrawerOpen and DrawerClose: a cabinet with two drawers, one of which the instruction names."""

from __future__ import annotations

from abc import abstractmethod

import mujoco
import numpy as np

from robopolicy_sim.envs.arm_task import ArmTaskEnv
from robopolicy_sim.envs.objects import add_visual
from robopolicy_sim.experts.drawer import DrawerCloseExpert, DrawerOpenExpert

SIDES = ("left", "right")  # as one sees them in front of the cabinet
# Sizes of the cabinet for an arm of full scale; smaller for a small arm.
WIDTH = 0.13  # m of a drawer
DEPTH = 0.20  # m
HEIGHT = 0.10  # m
FRONT = 0.01  # m, thickness
BAR_HEIGHT = 0.078  # m of the handle above the table
BAR_HALF_LENGTH = 0.036  # m
# The rest of the handle suits fingers, which are as thick on a small arm.
BAR_RADIUS = 0.005  # m
STAND_OFF = 0.045  # m from the front to the middle of the handle
TRAVEL = 0.16  # m that a drawer can be pulled out, times the arm's scale
OPENED = 0.12  # m, times the arm's scale
CLOSED = 0.01  # m
OPEN_AT_START = (0.10, 0.15)  # m, times the arm's scale
LEFT_ALONE = 0.03  # m that the other drawer may move, times the arm's scale
PLACE_X, PLACE_Y = (0.0, 0.08), (0.11, 0.15)  # m, of the middle of the cabinet's front, times the arm's scale
YAW = (np.pi / 2 - 0.3, np.pi / 2 + 0.3)  # rad: the front faces the camera of the scene
REACHED = 0.035  # m between the handle and the middle of the pads
HOLD_STEPS = 3  # control steps that the drawer must be there
FRONT_COLOURS = {"left": (0.24, 0.45, 0.62, 1), "right": (0.85, 0.47, 0.20, 1)}


class DrawerEnv(ArmTaskEnv):
    """A cabinet on the table, whose drawers open across the arm's workspace.

    Its frame: x into the cabinet, origin on the table, under the middle of the front.
    """

    objects = ("cabinet",)
    goal_names = ("left_out", "right_out", "wanted_left", "wanted_right")
    goal_unit = "m; one-hot"
    verb: str

    def _furnish(self, spec: mujoco.MjSpec) -> None:
        self.size = max(self.scale, 0.65)
        add_cabinet(spec, self.size, TRAVEL * self.scale)

    def _place_objects(self, rng: np.random.Generator) -> None:
        x, y = rng.uniform(*PLACE_X) * self.scale, rng.uniform(*PLACE_Y) * self.scale
        self.place("cabinet", [x, y, 0], rng.uniform(*YAW))
        self._set_drawers(self._start_positions(rng), str(rng.choice(SIDES)))

    def _start_positions(self, rng: np.random.Generator) -> np.ndarray:
        """How far the left and the right drawer are out at the start, (2,) m."""
        return np.zeros(2)

    def _place_from_state(self, state: np.ndarray) -> None:
        super()._place_from_state(state)
        self._set_drawers(state[-4:-2], SIDES[int(np.argmax(state[-2:]))])

    def _set_drawers(self, out: np.ndarray, wanted: str) -> None:
        for side, position in zip(SIDES, out, strict=True):
            self.data.joint(f"{side}_drawer").qpos[0] = position
        self.wanted = wanted
        self.other = next(side for side in SIDES if side != wanted)
        self.instruction = f"{self.verb} the {wanted} drawer"

    def _begin(self) -> None:
        self._start = {side: self.pulled_out(side) for side in SIDES}
        self._start_reach = max(self._reach(), 1e-6)
        self._steps_done = 0
        self._reached = self._moved = self._mistaken = False

    def _goal(self) -> np.ndarray:
        return np.array(
            [self.pulled_out(side) for side in SIDES] + [side == self.wanted for side in SIDES], dtype=np.float64
        )

    def pulled_out(self, side: str) -> float:
        """How far a drawer is out, in metres."""
        return float(self.data.joint(f"{side}_drawer").qpos[0])

    def handle(self, side: str) -> np.ndarray:
        """Middle of a drawer's handle, (3,)."""
        return self.data.geom(f"{side}_bar").xpos.copy()

    def outwards(self) -> np.ndarray:
        """Unit vector (3,) along which the drawers open."""
        return -self.rotation("cabinet")[:, 0]

    def _reach(self) -> float:
        return float(np.linalg.norm(self.pads_middle() - self.handle(self.wanted)))

    def _change(self, side: str) -> float:
        return abs(self.pulled_out(side) - self._start[side])

    @abstractmethod
    def _done(self) -> bool:
        """Whether the drawer that is named is where the instruction wants it."""

    def _track(self) -> None:
        self._reached |= self._reach() < REACHED
        self._moved |= self._change(self.wanted) > LEFT_ALONE * self.scale
        self._mistaken |= self._change(self.other) > LEFT_ALONE * self.scale
        self._steps_done = self._steps_done + 1 if self._done() and not self._mistaken else 0

    def _succeeded(self) -> bool:
        return self._steps_done >= HOLD_STEPS

    def _stages(self) -> dict[str, bool]:
        return {
            "reached": self._reached,
            "moved": self._moved,
            "done": self._steps_done > 0,
            "moved_the_other": self._mistaken,
        }

    @abstractmethod
    def _way(self) -> float:
        """Share of the drawer's way that is done."""

    def _progress(self) -> float:
        """A quarter for reaching the handle, the rest for the drawer's way; 0 after the other drawer was moved."""
        if self._mistaken:
            return 0.0
        reached = 1.0 if self._moved else np.clip(1 - self._reach() / self._start_reach, 0, 1)
        return float(0.25 * reached + 0.74 * np.clip(self._way(), 0, 1))


class DrawerOpenEnv(DrawerEnv):
    """Open the drawer that the instruction names, drawn at each reset; the state tells it as one-hot.

    Success: it has been out by 12 cm, times the arm's scale, for three steps. Moving the other one by 3 cm, times the
    scale, fails the episode.
    """

    verb = "open"
    expert_class = DrawerOpenExpert

    @property
    def opened(self) -> float:
        """How far the drawer must come out, in metres."""
        return OPENED * self.scale

    def _way(self) -> float:
        return self.pulled_out(self.wanted) / self.opened

    def _done(self) -> bool:
        return self.pulled_out(self.wanted) >= self.opened


class DrawerCloseEnv(DrawerEnv):
    """Close the drawer that the instruction names, drawn at each reset; the state tells it as one-hot. Both start open.

    Success: it has been out by less than 1 cm for three steps. Moving the other one by 3 cm, times the arm's scale,
    fails the episode.
    """

    verb = "close"
    expert_class = DrawerCloseExpert

    def _start_positions(self, rng: np.random.Generator) -> np.ndarray:
        return rng.uniform(*OPEN_AT_START, 2) * self.scale

    def _way(self) -> float:
        return 1 - (self.pulled_out(self.wanted) - CLOSED) / max(self._start[self.wanted] - CLOSED, 1e-6)

    def _done(self) -> bool:
        return self.pulled_out(self.wanted) < CLOSED


def add_cabinet(spec: mujoco.MjSpec, size: float, travel: float) -> None:
    """A mocap body ``cabinet`` with two drawers side by side, on slide joints of their names."""
    cabinet = spec.worldbody.add_body(name="cabinet", mocap=True)
    half = [DEPTH * size / 2, WIDTH * size + 0.006, HEIGHT * size / 2]
    # Solid: nothing but the drawers, which do not touch it, goes in.
    cabinet.add_geom(
        type=mujoco.mjtGeom.mjGEOM_BOX, size=half, pos=[half[0] + 0.002, 0, half[2]], rgba=[0.80, 0.81, 0.80, 1]
    )
    for side, sign in zip(SIDES, (1, -1), strict=True):
        _add_drawer(cabinet, side, sign * WIDTH * size / 2, size, travel)
        spec.add_exclude(bodyname1="cabinet", bodyname2=f"{side}_drawer")
    spec.add_exclude(bodyname1="left_drawer", bodyname2="right_drawer")


def _add_drawer(cabinet: mujoco.MjsBody, side: str, y: float, size: float, travel: float) -> None:
    drawer = cabinet.add_body(name=f"{side}_drawer", pos=[0, y, 0], gravcomp=1)
    drawer.add_joint(
        name=f"{side}_drawer",
        type=mujoco.mjtJoint.mjJNT_SLIDE,
        axis=[-1, 0, 0],
        range=[0, travel],
        damping=4,
        frictionloss=1,
        armature=0.1,
    )
    half_width, half_height = WIDTH * size / 2 - 0.003, HEIGHT * size / 2 - 0.006
    drawer.add_geom(
        name=f"{side}_front",
        type=mujoco.mjtGeom.mjGEOM_BOX,
        size=[FRONT / 2, half_width, half_height],
        pos=[-FRONT / 2, 0, HEIGHT * size / 2],
        rgba=FRONT_COLOURS[side],
        mass=0.3,
    )
    _add_handle(drawer, side, size)
    _add_tray(drawer, DEPTH * size, half_width - 0.004, HEIGHT * size)
    opening = [0.0005, half_width - 0.004, half_height - 0.004]
    add_visual(cabinet, "box", opening, [0.10, 0.10, 0.11, 1], pos=[0.002, y, HEIGHT * size / 2])


def _add_handle(drawer: mujoco.MjsBody, side: str, size: float) -> None:
    half, bar_height = BAR_HALF_LENGTH * size, BAR_HEIGHT * size
    steel = [0.62, 0.64, 0.67, 1]
    drawer.add_geom(
        name=f"{side}_bar",
        type=mujoco.mjtGeom.mjGEOM_CAPSULE,
        fromto=[-STAND_OFF - FRONT, -half, bar_height, -STAND_OFF - FRONT, half, bar_height],
        size=[BAR_RADIUS, 0, 0],
        rgba=steel,
        mass=0.1,
        condim=4,
        friction=[1.0, 0.02, 0.001],
    )
    for end in (-half, half):
        post = [STAND_OFF / 2, 0.004, 0.004]
        add_visual(drawer, "box", post, steel, pos=[-STAND_OFF / 2 - FRONT, end, bar_height])


def _add_tray(drawer: mujoco.MjsBody, depth: float, half_width: float, height: float) -> None:
    """Floor, sides and back behind the front."""
    half_depth, wall, sides = 0.46 * depth, 0.002, 0.3 * height
    for size, pos in (
        ([half_depth, half_width, wall], [half_depth, 0, 0.012]),
        ([half_depth, wall, sides], [half_depth, half_width, 0.012 + sides]),
        ([half_depth, wall, sides], [half_depth, -half_width, 0.012 + sides]),
        ([wall, half_width, sides], [2 * half_depth, 0, 0.012 + sides]),
    ):
        drawer.add_geom(type=mujoco.mjtGeom.mjGEOM_BOX, size=size, pos=pos, rgba=[0.55, 0.43, 0.30, 1], mass=0.02)
