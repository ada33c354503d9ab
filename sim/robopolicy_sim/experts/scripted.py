"""Scripted experts of arm tasks: a script of tool motions, closed over the measured state, in several qualities."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from robopolicy_sim.control import ToolTarget
from robopolicy_sim.kinematics import rotation_error, rotation_from_vector

if TYPE_CHECKING:
    from robopolicy_sim.envs.arm_task import ArmTaskEnv

QUALITIES = ("good", "sloppy", "recovering", "failing")


@dataclass(frozen=True)
class Style:
    """How an expert moves.

    Attributes:
        speed: of the tool [m/s]; turn_speed: [rad/s].
        lookahead: the target lies this far ahead in time: one control period and the servos' lag [s].
        tremor: standard deviation of the tool's wandering about its path [m], with a time constant of 0.3 s.
        pause: chance of a hesitation of up to half a second after a motion.
    """

    speed: float = 0.30
    turn_speed: float = 1.8
    lookahead: float = 0.15
    tremor: float = 0.0
    pause: float = 0.0


STYLES = {
    "good": Style(),
    "sloppy": Style(speed=0.2, turn_speed=1.2, tremor=0.004, pause=0.4),
    "recovering": Style(),
    "failing": Style(),
}
TREMOR_TIME = 0.3  # s


class ScriptedExpert(ABC):
    """Plays the task's script: a generator of tool targets in the world frame that reads the environment's state.

    Qualities: ``good`` does everything right; ``sloppy`` is slow, trembles, hesitates and aims loosely; ``recovering``
    first makes a mistake at a critical point (`aim`), notices it and goes on to succeed; ``failing`` makes that mistake
    every time.

    Args:
        env: the environment, whose state may be read, never written.
        seed: settles the free choices.
        quality: one of `QUALITIES`.
        mode: the way to do the task; None lets the seed choose one of ``modes(env)``.

    Attributes:
        mode: the way that was chosen.

    Raises:
        ValueError: the quality or the mode is unknown.
    """

    def __init__(self, env: ArmTaskEnv, *, seed: int, quality: str = "good", mode: str | None = None) -> None:
        if quality not in QUALITIES:
            raise ValueError(f"quality='{quality}' is unknown; choose one of {', '.join(QUALITIES)}.")
        known = self.modes(env)
        if mode is not None and mode not in known:
            raise ValueError(f"mode='{mode}' is unknown to this task; choose one of {', '.join(known)}.")
        self.env, self.quality = env, quality
        self.rng = np.random.default_rng((seed, 2))
        choice = str(self.rng.choice(known))
        self.mode = mode or choice
        self.style = STYLES[quality]
        self.opening = 1.0  # share that is asked for
        self._wander = np.zeros(3)
        self._mistakes = 0
        self._script: Iterator[ToolTarget] | None = None

    @classmethod
    @abstractmethod
    def modes(cls, env: ArmTaskEnv) -> tuple[str, ...]:
        """The different ways to do the task in this environment."""

    @abstractmethod
    def script(self) -> Iterator[ToolTarget]:
        """Yield one tool target for each control step; when it ends, the tool stays where it is."""

    def act(self, observation: Any) -> np.ndarray:
        """Return the action for the environment's present state, which ``observation`` shows in part."""
        if self._script is None:
            self._script = self.script()
        target = next(self._script, None)
        if target is None:
            state = self.env.tool_state()
            target = ToolTarget(state.position, state.rotation, self.opening)
        return self.env.encode(self._trembling(target))

    # What scripts are made of.

    def move(
        self,
        position: np.ndarray,
        rotation: np.ndarray,
        *,
        speed: float = 1.0,
        tolerance: float = 0.004,
        angle_tolerance: float = 0.06,
        max_steps: int = 120,
        pads: bool = False,
    ) -> Iterator[ToolTarget]:
        """Move the tool in a straight line until it is there, or ``max_steps`` have passed.

        Args:
            speed: share of the style's speed.
            tolerance: [m]; angle_tolerance: [rad].
            pads: bring the middle between the finger pads to ``position``, not the TCP, also while they open or close.
        """
        for _ in range(max_steps):
            state = self.env.tool_state()
            goal = self.pads_at(position, rotation) if pads else position
            travel, turn = goal - state.position, rotation_error(rotation, state.rotation)
            if np.linalg.norm(travel) < tolerance and np.linalg.norm(turn) < angle_tolerance:
                break
            yield self.toward(goal, rotation, speed=speed)
        if self.rng.random() < self.style.pause:
            yield from self.wait(int(self.rng.integers(1, 10)))

    def toward(self, position: np.ndarray, rotation: np.ndarray, *, speed: float = 1.0) -> ToolTarget:
        """The target of one control step straight to a pose, for scripts that correct their aim at every step."""
        state = self.env.tool_state()
        travel, turn = position - state.position, rotation_error(rotation, state.rotation)
        ahead = self.style.lookahead * speed
        return ToolTarget(
            state.position + _shortened(travel, self.style.speed * ahead),
            rotation_from_vector(_shortened(turn, self.style.turn_speed * ahead)) @ state.rotation,
            self.opening,
        )

    def wait(self, steps: int) -> Iterator[ToolTarget]:
        """Keep the tool where it is."""
        state = self.env.tool_state()
        for _ in range(steps):
            yield ToolTarget(state.position, state.rotation, self.opening)

    def grip(self, opening: float, *, steps: int = 8) -> Iterator[ToolTarget]:
        """Open or close the gripper while the tool stays where it is."""
        self.opening = opening
        yield from self.wait(steps)

    def pads_at(self, point: np.ndarray, rotation: np.ndarray) -> np.ndarray:
        """Tool position (3,) that brings the middle between the pads, as far open as they are now, to a point."""
        state = self.env.tool_state()
        shift = state.rotation[:, 1] @ (self.env.pads_middle() - state.position)
        return point - shift * rotation[:, 1]

    def aim(self, position: np.ndarray, *, tolerance: float, direction: np.ndarray | None = None) -> np.ndarray:
        """The position (3,) that this expert takes a critical target for: some miss it, in the plane.

        Args:
            tolerance: how far the target may be missed without consequence [m]. A mistake is 2 to 2.6 times as far.
            direction: unit vector (3,) in which it is missed; None draws one.
        """
        angle = self.rng.uniform(-np.pi, np.pi)
        if direction is None:
            direction = np.array([np.cos(angle), np.sin(angle), 0.0])
        if self.quality == "failing" or (self.quality == "recovering" and self._mistakes == 0):
            self._mistakes += 1
            return position + self.rng.uniform(2.0, 2.6) * tolerance * direction
        if self.quality == "sloppy":
            return position + self.rng.uniform(0, 0.5) * tolerance * direction
        return position

    def _trembling(self, target: ToolTarget) -> ToolTarget:
        if self.style.tremor == 0:
            return target
        keep = np.exp(-1 / (self.env.control_hz * TREMOR_TIME))
        self._wander = keep * self._wander + np.sqrt(1 - keep**2) * self.style.tremor * self.rng.standard_normal(3)
        return ToolTarget(target.position + self._wander, target.rotation, target.opening)


def top_down(yaw: float) -> np.ndarray:
    """Rotation (3, 3) of a tool that points straight down, its fingers closing along ``yaw`` + 90 degrees."""
    cos, sin = np.cos(yaw), np.sin(yaw)
    return np.array([[cos, sin, 0.0], [sin, -cos, 0.0], [0.0, 0.0, -1.0]])


def nearest_turn(yaw: float, period: float, reference: float = 0.0) -> float:
    """The angle equal to ``yaw`` up to multiples of ``period`` that is nearest to ``reference``, in radians."""
    return yaw - period * np.round((yaw - reference) / period)


def _shortened(vector: np.ndarray, length: float) -> np.ndarray:
    return vector * min(1.0, length / max(float(np.linalg.norm(vector)), 1e-9))
