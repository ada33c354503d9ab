"""The search space of a system identification and the evaluation of its candidates."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass

import mujoco
import numpy as np

from robopolicy_sim.arms.arm import Arm
from robopolicy_sim.matching.replay import Motion, Replayer
from robopolicy_sim.matching.robot_parameters import RobotParameters

LARGEST_ERROR = 10.0  # m or rad that an unstable candidate counts at most


@dataclass(frozen=True)
class Bounds:
    """Where parameters are sought.

    Attributes:
        stiffness, damping: as factors of the model's own values.
        friction: as a share of each joint's torque limit.
        action_latency: seconds.
        gripper_damping: as a factor of the model's own value.
    """

    stiffness: tuple[float, float] = (0.3, 3.0)
    damping: tuple[float, float] = (0.3, 3.0)
    friction: tuple[float, float] = (0.0, 0.15)
    action_latency: tuple[float, float] = (0.0, 0.2)
    gripper_damping: tuple[float, float] = (0.25, 2.0)


@dataclass(frozen=True)
class SearchSpace:
    """Vectors of log gain factors (n stiffnesses, n dampings), n frictions as shares of torque limits, latency steps.

    Attributes:
        nominal: the model's own parameters.
        torque: (n,) torque limit of each joint [N m].
        timestep: unit of the latency [s].
        bounds: of the search.
    """

    nominal: RobotParameters
    torque: np.ndarray
    timestep: float
    bounds: Bounds

    @classmethod
    def of(cls, replayer: Replayer, bounds: Bounds) -> SearchSpace:
        return cls(replayer.nominal, torque_limits(replayer.bench.model, replayer.arm), replayer.timestep, bounds)

    @property
    def shared_limits(self) -> np.ndarray:
        """(2, 4) ends of log stiffness factor, log damping factor, friction share, latency steps."""
        latency = np.array(self.bounds.action_latency) / self.timestep
        gains = np.log(self.bounds.stiffness), np.log(self.bounds.damping)
        return np.column_stack([*gains, self.bounds.friction, latency])

    @property
    def limits(self) -> np.ndarray:
        """(2, 3 n + 1) ends of every entry."""
        return np.stack([self.spread(end) for end in self.shared_limits])

    @property
    def steps(self) -> np.ndarray:
        """(3 n + 1,) steps of numerical derivatives."""
        return self.spread(np.array([0.05, 0.05, 0.005, 1.0]))

    def spread(self, shared: np.ndarray) -> np.ndarray:
        """The vector (3 n + 1,) in which all joints have the same four numbers."""
        return np.append(np.repeat(shared[:3], len(self.torque)), shared[3])

    def parameters(self, vector: np.ndarray) -> RobotParameters:
        """The parameters that a vector (3 n + 1,) stands for."""
        stiffness, damping, friction = vector[:-1].reshape(3, -1)
        return RobotParameters(
            stiffness=tuple((np.exp(stiffness) * self.nominal.stiffness).tolist()),
            damping=tuple((np.exp(damping) * self.nominal.damping).tolist()),
            friction=tuple((friction * self.torque).tolist()),
            action_latency=float(vector[-1]) * self.timestep,
        )


def torque_limits(model: mujoco.MjModel, arm: Arm) -> np.ndarray:
    """Torque limit of each joint (n,) in N m: the joint's, else the servo's, else what 0.05 rad of error calls for."""
    limits = []
    for joint, actuator in zip(arm.joints, arm.actuators, strict=True):
        j, a = model.joint(joint).id, model.actuator(actuator).id
        if model.jnt_actfrclimited[j]:
            limits.append(model.jnt_actfrcrange[j, 1])
        elif model.actuator_forcelimited[a]:
            limits.append(model.actuator_forcerange[a, 1])
        else:
            limits.append(0.05 * model.actuator_gainprm[a, 0])
    return np.array(limits)


@dataclass(frozen=True)
class Evaluation:
    """How a candidate fares.

    Attributes:
        loss: SIMPLER's, mean over steps, then over motions.
        residuals: weighted position errors and half rotation vectors of all steps; the sum of squares is the mean over
            steps, then over motions, of squared distance plus squared half angle.
    """

    loss: float
    residuals: np.ndarray


def evaluate(replayer: Replayer, parameters: RobotParameters) -> Evaluation:
    """Replay all motions with a candidate."""
    losses, residuals = [], []
    for number, motion in enumerate(replayer.motions):
        replayed = replayer.replay(number, parameters)
        losses.append(replayed.errors(motion).mean())
        deviation = replayed.deviation(motion)
        poses = np.concatenate([deviation.position, deviation.turn / 2])
        residuals.append(poses.ravel() / np.sqrt(len(motion.actions) * len(replayer.motions)))
    bounded = np.nan_to_num(np.concatenate(residuals), nan=LARGEST_ERROR, posinf=LARGEST_ERROR, neginf=-LARGEST_ERROR)
    return Evaluation(float(np.nan_to_num(np.mean(losses), nan=LARGEST_ERROR)), bounded)


class CandidateEvaluator:
    """Evaluates candidates, in processes if there are several workers, and counts them in ``evaluations``."""

    def __init__(
        self,
        arm: str | Arm,
        control: str,
        control_hz: float,
        motions: Sequence[Motion],
        *,
        workers: int = 1,
        progress: Callable[[int, float], None] | None = None,
    ) -> None:
        self.evaluations, self._least = 0, np.inf
        self.replayer = Replayer(arm, control, control_hz, motions)
        self._progress = progress
        self._pool: ProcessPoolExecutor | None = None
        if workers > 1:
            spawn = multiprocessing.get_context("spawn")
            setup = (arm, control, control_hz, tuple(motions))
            self._pool = ProcessPoolExecutor(workers, spawn, _start_worker, setup)

    def __enter__(self) -> CandidateEvaluator:
        return self

    def __exit__(self, *error: object) -> None:
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)

    def __call__(self, candidates: Iterable[RobotParameters]) -> list[Evaluation]:
        """Replay all motions with each of the candidates."""
        candidates = list(candidates)
        if self._pool is None:
            results: Iterable[Evaluation] = (evaluate(self.replayer, candidate) for candidate in candidates)
        else:
            results = self._pool.map(_evaluate_in_worker, candidates)
        return [self._counted(result) for result in results]

    def _counted(self, result: Evaluation) -> Evaluation:
        self.evaluations += 1
        self._least = min(self._least, result.loss)
        if self._progress is not None:
            self._progress(self.evaluations, self._least)
        return result


_worker_replayer: Replayer  # of a worker process


def _start_worker(arm: str | Arm, control: str, control_hz: float, motions: Sequence[Motion]) -> None:
    global _worker_replayer
    _worker_replayer = Replayer(arm, control, control_hz, motions)


def _evaluate_in_worker(candidate: RobotParameters) -> Evaluation:
    return evaluate(_worker_replayer, candidate)
