"""Open-loop replay: recorded commands given to the simulated arm, and how far it strays from what was measured."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import mujoco
import numpy as np
from scipy.spatial.transform import Rotation

from robopolicy_sim.arms.arm import Arm
from robopolicy_sim.envs.arm_task import ArmTaskEnv
from robopolicy_sim.experts.scripted import ScriptedExpert
from robopolicy_sim.kinematics import from_rotation_6d
from robopolicy_sim.matching.robot_parameters import RobotParameters

INDEPENDENT_OF_STATE = ("ee_pose", "joint_position")  # controls whose set points follow from the commands alone


@dataclass(frozen=True)
class Motion:
    """One recorded episode: what was commanded and what was measured before each command took effect.

    Attributes:
        actions: (T, n_action) commands, in the dataset's control.
        joints: (T, n) joint angles [rad].
        opening: (T,) opening of the gripper, 0 closed to 1 open.
        position: (T, 3) TCP in the frame of the arm's base [m].
        rotation: (T, 3, 3) of the TCP.
    """

    actions: np.ndarray
    joints: np.ndarray
    opening: np.ndarray
    position: np.ndarray
    rotation: np.ndarray

    @classmethod
    def from_arrays(cls, actions: np.ndarray, state: np.ndarray, joints: int) -> Motion:
        """Read the arrays of a dataset.

        Args:
            actions: (T, n_action).
            state: (T, joints + 10): joint angles, opening, TCP position (3), TCP rotation as two columns (6).
            joints: number of the arm's joints.

        Raises:
            ValueError: shapes do not fit, or values are not finite.
        """
        actions, state = np.asarray(actions, dtype=np.float64), np.asarray(state, dtype=np.float64)
        if state.ndim != 2 or state.shape[1] != joints + 10:
            raise ValueError(
                f"The state has shape {state.shape}, wanted (T, {joints + 10}): {joints} joint angles, gripper "
                "opening, TCP position (3) and TCP rotation (6)."
            )
        if actions.ndim != 2 or len(actions) != len(state):
            raise ValueError(f"The actions have shape {actions.shape}, but there are {len(state)} states.")
        if not (np.isfinite(actions).all() and np.isfinite(state).all()):
            raise ValueError("Actions or states hold values that are not finite.")
        rotation = np.stack([from_rotation_6d(columns) for columns in state[:, joints + 4 :]])
        return cls(actions, state[:, :joints], state[:, joints], state[:, joints + 1 : joints + 4], rotation)


@dataclass(frozen=True)
class Deviation:
    """What separates a replay from the recording, for each step.

    Attributes:
        position: (T, 3) simulated minus measured TCP position, base frame [m].
        turn: (T, 3) rotation vector from the measured to the simulated rotation [rad].
        opening: (T,) simulated minus measured opening.
    """

    position: np.ndarray
    turn: np.ndarray
    opening: np.ndarray

    @property
    def distance(self) -> np.ndarray:
        """(T,) in metres."""
        return np.linalg.norm(self.position, axis=1)

    @property
    def angle(self) -> np.ndarray:
        """(T,) angle of the turn, in radians."""
        return np.linalg.norm(self.turn, axis=1)


def step_errors(
    position: np.ndarray, rotation: np.ndarray, other_position: np.ndarray, other: np.ndarray
) -> np.ndarray:
    """SIMPLER's distance of two poses (Li et al., CoRL 2024, appendix on system identification).

    e = ||p - p'|| + arcsin(min(1, ||R - R'||_F / (2 sqrt 2))); the second part is half the angle between R and R'.

    Args:
        position, other_position: (T, 3) metres; rotation, other: (T, 3, 3).

    Returns:
        (T,) metres plus radians.
    """
    distance = np.linalg.norm(position - other_position, axis=-1)
    frobenius = np.linalg.norm(rotation - other, axis=(-2, -1))
    return distance + np.arcsin(np.minimum(1.0, frobenius / (2 * np.sqrt(2))))


@dataclass(frozen=True)
class ReplayedMotion:
    """What the simulated arm did: as `Motion`, with (T,) openings, (T, 3) positions, (T, 3, 3) rotations."""

    opening: np.ndarray
    position: np.ndarray
    rotation: np.ndarray

    def errors(self, measured: Motion) -> np.ndarray:
        """(T,), see `step_errors`."""
        return step_errors(self.position, self.rotation, measured.position, measured.rotation)

    def deviation(self, measured: Motion) -> Deviation:
        turn = Rotation.from_matrix(self.rotation @ np.swapaxes(measured.rotation, 1, 2)).as_rotvec()
        return Deviation(self.position - measured.position, turn, self.opening - measured.opening)


class EmptyBench(ArmTaskEnv):
    """The arm at the bench without objects, so that a replay is about the arm alone."""

    expert_class = ScriptedExpert
    instruction = ""

    def start(self, joints: np.ndarray, opening: float, latency: float = 0.0) -> None:
        """Begin at rest at joint angles (n,) and an opening share; commands come later by ``latency`` seconds.

        The latency need not be a whole number of time steps as in a task: a search wants to change it smoothly.
        """
        steps = round(latency / self.model.opt.timestep, 6)
        self.action_latency, self._fraction = int(steps) * self.model.opt.timestep, steps % 1
        mujoco.mj_resetData(self.model, self.data)
        self._hold(joints, opening)
        self._last = self.data.ctrl.copy()
        mujoco.mj_kinematics(self.model, self.data)

    def commands(self, action: np.ndarray) -> np.ndarray:
        """Servo set points (substeps, n_actuators) for one control period, as late as `start` said."""
        rows = self._setpoints(action)
        before = np.vstack([self._last, rows[:-1]])
        self._last = rows[-1]
        return rows + self._fraction * (before - rows)

    def pose(self) -> tuple[np.ndarray, np.ndarray]:
        """TCP position (3,) and rotation (3, 3) in the frame of the arm's base."""
        state = self._in_base_frame(self.tool_state())
        return state.position, state.rotation

    def _furnish(self, spec: mujoco.MjSpec) -> None: ...

    def _place_objects(self, rng: np.random.Generator) -> None: ...

    def _track(self) -> None: ...

    def _succeeded(self) -> bool:
        return False

    def _progress(self) -> float:
        return 0.0


class Replayer:
    """Replays motions of one arm under one control.

    Args:
        arm: name of an arm, or an `Arm`.
        control: what the actions mean, see `control`.
        control_hz: actions per second.
        motions: what to replay.

    Raises:
        ValueError: an argument is unknown, or the actions do not fit the control.
    """

    def __init__(self, arm: str | Arm, control: str, control_hz: float, motions: Sequence[Motion]) -> None:
        self.bench = EmptyBench(arm=arm, control=control, control_hz=control_hz)
        self.arm = self.bench.arm
        self.motions = tuple(motions)
        self.nominal = RobotParameters.of_model(self.bench.model, self.arm)
        wanted = self.bench.action_space.shape
        for number, motion in enumerate(self.motions):
            if motion.actions.shape[1:] != wanted:
                raise ValueError(
                    f"The actions of motion {number} have {motion.actions.shape[1]} entries, control='{control}' of "
                    f"'{self.arm.name}' takes {wanted[0]}: {', '.join(self.bench.controller.names)}."
                )
        # Inverse kinematics costs more than the physics; here it need not be repeated for other parameters.
        cached = control in INDEPENDENT_OF_STATE
        self._commands = [self._set_points(motion) for motion in self.motions] if cached else None

    @property
    def timestep(self) -> float:
        """Of the physics, in seconds; latencies are whole multiples of it."""
        return float(self.bench.model.opt.timestep)

    def replay(self, number: int, parameters: RobotParameters) -> ReplayedMotion:
        """Give a motion's commands to the simulated arm, from the motion's first joint angles, at rest.

        Args:
            number: index of the motion.
            parameters: of the arm; what is None stays the model's own. The latency may end between time steps.
        """
        bench, data, motion = self.bench, self.bench.data, self.motions[number]
        self.nominal.apply(bench.model, self.arm)
        parameters.apply(bench.model, self.arm)
        latency = parameters.action_latency or 0.0
        bench.start(motion.joints[0], float(motion.opening[0]), latency)
        commands = None if self._commands is None else self._delayed(self._commands[number], latency)
        states = []
        for step, action in enumerate(motion.actions):
            states.append((bench.opening(), *bench.pose()))
            for set_point in bench.commands(action) if commands is None else commands[step]:
                data.ctrl[:] = set_point
                mujoco.mj_step(bench.model, data)
            mujoco.mj_kinematics(bench.model, data)
        opening, position, rotation = (np.array(part) for part in zip(*states, strict=True))
        return ReplayedMotion(opening, position, rotation)

    def _set_points(self, motion: Motion) -> np.ndarray:
        """Servo set points (T, substeps, n_actuators) without latency."""
        self.bench.start(motion.joints[0], float(motion.opening[0]))
        return np.stack([self.bench.commands(action) for action in motion.actions])

    def _delayed(self, commands: np.ndarray, latency: float) -> np.ndarray:
        """Set points, as many as given, that come later by ``latency`` seconds; before, the servos hold the start."""
        flat = np.concatenate([self.bench.data.ctrl[None], commands.reshape(-1, commands.shape[-1])])
        steps = np.arange(1, len(flat)) - round(latency / self.timestep, 6)
        earlier = np.floor(steps).astype(int)
        share = (steps - earlier)[:, None]
        first, second = (flat[np.clip(index, 0, len(flat) - 1)] for index in (earlier, earlier + 1))
        return (first + share * (second - first)).reshape(commands.shape)
