"""The last thing a command passes: no limit of the robot is exceeded, whatever the policy or its plan asks for.

Limits hold at every moment, also between two commands, and after every command the robot can still be braked to rest
between its limits. This is software on an ordinary computer: it replaces neither the robot's own limits nor an
emergency stop.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from robopolicy.errors import UserError
from robopolicy.runtime import rotation
from robopolicy.runtime.axis import Axis
from robopolicy.runtime.braking import Motion, duration
from robopolicy.runtime.clock import NS, nanoseconds
from robopolicy.runtime.contract import Contract
from robopolicy.runtime.exchange import Trajectory
from robopolicy.runtime.limits import Limits
from robopolicy.runtime.plan import Plan
from robopolicy.runtime.workspace import ToolBox

ROTATION = slice(3, 9)
"""Where a tool pose has its six rotation numbers."""
ROTATION_RISE = 0.1
"""Seconds in which the angular acceleration of a tool pose builds up to its limit."""

CLAMPED_POSITION = "target position clamped"
CLAMPED_VELOCITY = "target velocity clamped"
KEPT_ROTATION = "target rotation unusable"
BRAKED_LIMIT = "braked before a limit"
BRAKED_WORKSPACE = "braked before the border of the workspace"


@dataclass(frozen=True, eq=False)
class SetPoint:
    """Where the commanded robot is.

    Attributes:
        position: (A,) in units of the action.
        velocity, acceleration: (A,) its derivatives.
    """

    position: np.ndarray
    velocity: np.ndarray
    acceleration: np.ndarray


@dataclass(frozen=True, eq=False)
class _State:
    """A motion for each axis. The last three axes of a tool pose are a rotation vector from ``turned``."""

    motions: tuple[Motion, ...]
    turned: np.ndarray | None = None


Path = tuple[list[_State], int, int]
"""States a period apart, the time of the first [ns], and which of them is commanded."""


class SafetyFilter:
    """Turns wanted positions into commands that the robot can follow and be stopped from.

    The filter holds the commanded state. `step` moves it on by one period of the command loop, `brake` slows it down,
    `preview` tells where it will go. Every axis is limited by itself, so that a slow gripper does not slow the arm.
    The rotation of a tool is limited along the three entries of its rotation vector, each to the root of a third of
    the limits. The limits of a twist bound the twist, its rate, and two more derivatives; its stop is a twist of zero.

    Args:
        contract: of the robot.
        limits: of the robot.
        period: seconds of one step.
        n_obs_steps: observations that the policy sees at once: entry ``n_obs_steps - 1`` of a chunk is the first one
            after its observation.

    Attributes:
        counts: how often a target was changed or a step was braked, by kind.

    Raises:
        UserError: the limits do not fit the contract.
    """

    def __init__(self, contract: Contract, limits: Limits, period: float, n_obs_steps: int = 1) -> None:
        self.contract, self.limits, self.period, self.n_obs_steps = contract, limits, period, n_obs_steps
        self.counts: Counter[str] = Counter()
        names, kind = contract.action.names, contract.action.kind
        self._posed = kind == "tool_pose"
        self._rates = 6 if kind == "tool_twist" else 0
        if limits.workspace and self._rates:
            raise UserError("workspace: a twist does not tell where the tool is; let the robot keep its box.")
        self._entries = [i for i in range(len(names)) if not (self._posed and ROTATION.start <= i < ROTATION.stop)]
        self._grippers = {i for command in contract.commands.values() if command.gripper for i in command.entries}
        self._bounds: list[tuple[float, float, float]] = []
        self._axes: list[Axis] = []
        for entry in self._entries:
            axis = limits.axes[names[entry]]
            lower, upper = axis.lower, axis.upper
            if self._posed and limits.workspace and entry < 3:
                side = (limits.workspace.x, limits.workspace.y, limits.workspace.z)[entry]
                lower, upper = max(lower, side[0]), min(upper, side[1])
            bounds = (max(lower, axis.lower + axis.margin), min(upper, axis.upper - axis.margin), axis.velocity)
            if bounds[0] > bounds[1]:
                raise UserError(f"axes.{names[entry]}: its limits and the workspace leave no room.")
            self._bounds.append(bounds)
            self._axes.append(Axis(lower, upper, axis.velocity, axis.acceleration, axis.jerk, period))
        if self._posed:
            if limits.rotation is None:
                raise UserError("rotation: poses need limits of the rotation.")
            velocity, acceleration = (
                value / math.sqrt(3) for value in (limits.rotation.velocity, limits.rotation.acceleration)
            )
            for _ in range(3):
                self._bounds.append((-math.inf, math.inf, velocity))
                self._axes.append(
                    Axis(-math.inf, math.inf, velocity, acceleration, acceleration / ROTATION_RISE, period)
                )
        self._box = ToolBox(contract, limits) if kind == "joint_position" and limits.workspace else None
        self._state: _State | None = None
        self._path: list[_State] = []
        self._path_began = self._path_step = 0

    def start(self, position: np.ndarray) -> None:
        """Set the commanded state: at rest.

        Args:
            position: (A,), the measured one. It may lie outside of the limits: then only motion back is allowed.

        Raises:
            ValueError: wrong shape, not finite, or six numbers that are no rotation.
        """
        position = self._vector(position, "position")
        self._path, self._path_step = [], 0
        turned = None
        if self._posed:
            turned = rotation.from_columns(position[ROTATION])
            if turned is None:
                raise ValueError(f"position: {position[ROTATION]} is no rotation.")
        rest = [Motion(float(position[entry]), 0.0, 0.0) for entry in self._entries]
        self._state = _State(tuple(rest + 3 * [Motion(0.0, 0.0, 0.0)] * self._posed), turned)

    @property
    def state(self) -> SetPoint:
        """The commanded state."""
        return self._set_point(self._started())

    @property
    def at_rest(self) -> bool:
        """Whether velocity and acceleration are zero, and the twist of a twist."""
        return self._rests(self._started())

    def step(self, position: np.ndarray, velocity: np.ndarray, ahead: float) -> SetPoint:
        """One period towards a target.

        Args:
            position: (A,) where to be.
            velocity: (A,) how fast to move there.
            ahead: seconds from the commanded state until then; some periods, so that a plan that the robot can follow
                is followed smoothly.

        Returns:
            The new commanded state.

        Raises:
            ValueError: wrong shape, not finite, or ``ahead`` not positive. The commanded state stays.
        """
        if not 0 < ahead < math.inf:
            raise ValueError(f"ahead={ahead} must be positive.")
        self._state = self._step(self._started(), position, velocity, ahead, self.counts)
        return self._set_point(self._state)

    def follow(self, time: int) -> SetPoint:
        """Go where the path that `preview` made last is at a time [ns], as the controller that was sent it.

        Successive calls take successive states of the path, up to two periods beside the time, so that set points do
        not make up at once for a call that was a little late.
        """
        wanted = (time - self._path_began) / NS / self.period
        following = self._path_step + 1
        self._path_step = following if abs(wanted - following) < 2 else max(0, round(wanted))
        self._state = self._path[min(self._path_step, len(self._path) - 1)]
        return self._set_point(self._state)

    def stay_on_path(self, path: Path | None, time: int) -> None:
        """Go back to a path of before (see `path`), because the newer one never reached the controller.

        Args:
            path: None where there was none: the robot rests where it is commanded to be.
            time: of the commanded state [ns].
        """
        self._path, self._path_began, self._path_step = path or ([self._started()], time, 0)

    @property
    def path(self) -> Path | None:
        """The path that `follow` goes along."""
        return (self._path, self._path_began, self._path_step) if self._path else None

    def brake(self) -> SetPoint:
        """One period of the fastest way to rest; exactly at rest at its end."""
        self._state = self._braked(self._started())
        return self._set_point(self._state)

    def braking_time(self) -> float:
        """Seconds that the fastest way to rest takes from here."""
        return max(
            duration(axis.way_to_zero(motion) if index < self._rates else axis.stop(motion))
            for index, (axis, motion) in enumerate(zip(self._axes, self._started().motions, strict=True))
        )

    def preview(
        self, plan: Plan, now: int, duration: float, spacing: float, lookahead: float, lead: float = 0.0
    ) -> Trajectory:
        """Where `step` and then `brake` will lead, from the commanded state on.

        Args:
            plan: that is followed, until its end at the latest.
            now: time of the commanded state [ns].
            duration: seconds of following before braking.
            spacing: seconds between points, rounded up to whole periods.
            lookahead: of every step [s].
            lead: seconds for which the path that is followed now is kept; a controller that gets the new one within
                that time finds no seam.

        Returns:
            Points from ``now + spacing`` on, until after the robot is at rest; where a path is kept, so are its times,
            and the first may be earlier. Velocity and acceleration of the last one are exactly zero. The commanded
            state and `counts` stay.

        Raises:
            ValueError: the plan is not finite, or ``lookahead`` not positive.
        """
        every = max(1, math.ceil(spacing / self.period - 1e-9))
        kept, began, commanded = [self._started()], now, 0
        if lead > 0:
            path, first, step = kept, 0, 0  # before the first path the robot is at rest
            if self._path:  # kept by the time, as the controller follows it; set points may be beside it
                path, step = self._path, max(0, round((now - self._path_began) / NS / self.period))
                first = min(self._path_step, step)
                began, commanded = self._path_began + nanoseconds(first * self.period), self._path_step - first
            ahead = range(first, step + math.ceil(lead / self.period - 1e-9) + 1)
            kept = [path[min(i, len(path) - 1)] for i in ahead]
        state, ignored = kept[0], Counter[str]()
        following = min(duration, (plan.end - began) / NS)
        times: list[int] = []
        points: list[SetPoint] = []
        steps = 0
        self._path, self._path_began, self._path_step = [state], began, commanded
        while not points or not self._rests(state) or steps * self.period < following or steps + 1 < len(kept):
            for _ in range(every):
                if steps + 1 < len(kept):
                    state = kept[steps + 1]
                elif steps * self.period < following:
                    target = plan.at(began + nanoseconds(steps * self.period + lookahead))
                    state = self._step(state, *target, lookahead, ignored)
                else:
                    state = self._braked(state)
                steps += 1
                self._path.append(state)
            times.append(began + nanoseconds(steps * self.period))
            points.append(self._set_point(state))
        return Trajectory(
            np.array(times),
            np.stack([point.position for point in points]),
            np.stack([point.velocity for point in points]),
            np.stack([point.acceleration for point in points]),
        )

    def check_chunk(self, actions: np.ndarray, observed_at: int, now: int, start: np.ndarray | None) -> str:
        """Why a chunk must be thrown away.

        A chunk that is only a little out of range is used: `step` clamps it. Grippers may start anywhere.

        Args:
            actions: (H, A) as the policy gave them.
            observed_at, now: time of its observation, and this moment [ns].
            start: (A,) where the robot is, measured or commanded; None where that is not known.

        Returns:
            For a person: which entry, what was found, what was wanted; empty when the chunk may be used.
        """
        names = self.contract.action.names
        if actions.ndim != 2 or actions.shape[1] != len(names) or not len(actions):
            return f"The chunk has shape {actions.shape}, wanted (H, {len(names)})."
        wrong = np.argwhere(~np.isfinite(actions))
        if len(wrong):
            row, entry = wrong[0]
            return f"{names[entry]} of action {row} is {actions[row, entry]}, wanted a finite number."
        age = (now - observed_at) / NS
        if not -self.limits.max_stamp_ahead <= age <= self.limits.max_chunk_age:
            return f"The chunk's observation is {age:.3f} s old, wanted at most {self.limits.max_chunk_age} s."
        if problem := self._range_problem(actions):
            return problem
        times = (np.arange(len(actions)) - self.n_obs_steps + 2) / self.contract.policy_rate - age
        usable = int(np.argmax(times > 0))
        if times[usable] <= 0:
            return f"The chunk ended {-times[-1]:.3f} s ago: the policy is too slow for its {len(actions)} actions."
        return "" if start is None else self._jump_problem(actions[usable], start, float(times[usable]), usable)

    def tracking_problem(self, measured: np.ndarray) -> str:
        """Which axis is too far from its command.

        Grippers hold things and are not checked, nor are twists.

        Args:
            measured: (A,) where the robot is.

        Returns:
            For a person; empty when all is well.
        """
        commanded = self.state.position
        for name, gap in self._gaps(self._vector(measured, "measured", finite=False), commanded):
            if not gap <= self.limits.max_tracking_error:
                return (
                    f"{name} is {gap:.3f} from its command, wanted at most {self.limits.max_tracking_error}: "
                    "the robot does not follow."
                )
        return ""

    def distance_problem(self, target: np.ndarray) -> str:
        """Which axis of a target (A,) is farther than ``max_start_jump`` from the commanded state; grippers may be."""
        for name, gap in self._gaps(self._vector(target, "target"), self.state.position):
            if not gap <= self.limits.max_start_jump:
                return f"{name} is {gap:.3f} from where the robot is, wanted at most {self.limits.max_start_jump}."
        return ""

    def _step(
        self, state: _State, position: np.ndarray, velocity: np.ndarray, ahead: float, counts: Counter[str]
    ) -> _State:
        position, velocity = self._vector(position, "position"), self._vector(velocity, "velocity")
        wanted, speeds = position[self._entries].tolist(), velocity[self._entries].tolist()
        if self._posed:
            turn, turning = self._turn(state, position[ROTATION], velocity[ROTATION], counts)
            wanted, speeds = wanted + turn, speeds + turning
        motions = []
        clamped = slowed = braked = False
        for axis, motion, target, speed, bounds in zip(
            self._axes, state.motions, wanted, speeds, self._bounds, strict=True
        ):
            lower, upper, fastest = bounds
            if not lower <= target <= upper:
                target, speed, clamped = min(max(target, lower), upper), 0.0, True
            if abs(speed) > fastest:
                speed, slowed = math.copysign(fastest, speed), True
            after, stopped = axis.step(motion, target, speed, ahead)
            braked |= stopped
            motions.append(after)
        counts.update(
            kind
            for kind, happened in ((CLAMPED_POSITION, clamped), (CLAMPED_VELOCITY, slowed), (BRAKED_LIMIT, braked))
            if happened
        )
        box = self._box
        if box and not box.stays(box.arm(state.motions), box.arm(motions), self.period):
            counts[BRAKED_WORKSPACE] += 1
            return self._braked(state)
        return self._next(state, motions)

    def _braked(self, state: _State) -> _State:
        return self._next(
            state,
            [
                axis.go_to_zero(motion) if index < self._rates else axis.brake(motion)
                for index, (axis, motion) in enumerate(zip(self._axes, state.motions, strict=True))
            ],
        )

    def _next(self, state: _State, motions: list[Motion]) -> _State:
        """The state after a period; the rotation vector of a tool starts again at zero."""
        if state.turned is None:
            return _State(tuple(motions))
        turn = np.array([motion.position for motion in motions[-3:]])
        turned = rotation.from_vector(turn) @ state.turned
        return _State((*motions[:-3], *(motion._replace(position=0.0) for motion in motions[-3:])), turned)

    def _turn(
        self, state: _State, six: np.ndarray, rates: np.ndarray, counts: Counter[str]
    ) -> tuple[list[float], list[float]]:
        """The rotation vector from here to six numbers, and its rate, both in the base frame."""
        wanted = rotation.from_columns(six)
        if wanted is None or state.turned is None:
            counts[KEPT_ROTATION] += 1
            return [0.0] * 3, [0.0] * 3
        return rotation.to_vector(wanted @ state.turned.T).tolist(), rotation.turning(wanted, rates).tolist()

    def _rests(self, state: _State) -> bool:
        return all(motion.velocity == 0 == motion.acceleration for motion in state.motions) and all(
            motion.position == 0 for motion in state.motions[: self._rates]
        )

    def _set_point(self, state: _State) -> SetPoint:
        entries = len(self._entries)
        values = np.empty((3, len(self.contract.action.names)))
        values[:, self._entries] = np.array(state.motions[:entries]).T
        if state.turned is not None:
            _, velocity, acceleration = np.array(state.motions[entries:]).T
            values[:, ROTATION] = rotation.column_motion(state.turned, velocity, acceleration)
        return SetPoint(*values)

    def _range_problem(self, actions: np.ndarray) -> str:
        far = self.limits.max_start_jump
        for entry in self._entries:
            name = self.contract.action.names[entry]
            axis = self.limits.axes[name]
            outside = np.maximum(axis.lower - actions[:, entry], actions[:, entry] - axis.upper)
            row = int(np.argmax(outside))
            if outside[row] > far:
                return (
                    f"{name} of action {row} is {actions[row, entry]:.3f}, wanted {axis.lower} to {axis.upper} "
                    f"(up to {far} outside is clamped): does the policy belong to this robot?"
                )
        if self._posed:
            for row, action in enumerate(actions):
                if rotation.from_columns(action[ROTATION]) is None:
                    return f"The six numbers of action {row}, {action[ROTATION]}, are no rotation."
        return ""

    def _jump_problem(self, action: np.ndarray, start: np.ndarray, seconds: float, row: int) -> str:
        start = self._vector(start, "start", finite=False)
        for name, gap in self._gaps(start, action, twists=True):
            fastest = (
                self.limits.rotation.velocity
                if name == "rotation" and self.limits.rotation
                else self.limits.axes[name].velocity
            )
            allowed = self.limits.max_start_jump + fastest * seconds
            if not gap <= allowed:
                return (
                    f"{name} of action {row} is {gap:.3f} from where the robot is, wanted at most {allowed:.3f} "
                    f"(max_start_jump {self.limits.max_start_jump}, and {seconds:.3f} s at {fastest})."
                )
        return ""

    def _gaps(self, one: np.ndarray, other: np.ndarray, twists: bool = False) -> Iterator[tuple[str, float]]:
        """Name and distance of each axis but grippers; a tool's rotation is one, in radians."""
        for entry in self._entries:
            if entry not in self._grippers and (twists or entry >= self._rates):
                yield self.contract.action.names[entry], abs(float(one[entry] - other[entry]))
        if self._posed:
            matrices = [rotation.from_columns(vector[ROTATION]) for vector in (one, other)]
            if matrices[0] is None or matrices[1] is None:
                yield "rotation", math.nan
            else:
                yield "rotation", float(np.linalg.norm(rotation.to_vector(matrices[0] @ matrices[1].T)))

    def _vector(self, values: np.ndarray, name: str, finite: bool = True) -> np.ndarray:
        values = np.asarray(values, float)
        if values.shape != (len(self.contract.action.names),):
            raise ValueError(f"{name}: found shape {values.shape}, wanted ({len(self.contract.action.names)},).")
        if finite and not np.isfinite(values).all():
            raise ValueError(f"{name}: {values} is not finite.")
        return values

    def _started(self) -> _State:
        if self._state is None:
            raise ValueError("No commanded state: call start() with the measured position first.")
        return self._state
