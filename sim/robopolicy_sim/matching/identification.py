"""System identification: the servo gains, friction and latency with which a replay reproduces a recording.

The loss is SIMPLER's (Li et al., CoRL 2024): recorded commands are replayed open loop from the first recorded joint
angles, and the mean distance of the simulated from the measured TCP poses (`replay.step_errors`) is taken over steps,
then over episodes. The search is another one: SIMPLER anneals all gains at once for thousands of steps; here
differential evolution (Storn and Price, 1997) first seeks four numbers that all joints share, then bounded
least squares (trust region, Branch, Coleman and Li, 1999) refine every joint on the pose errors.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from scipy.optimize import differential_evolution, least_squares, minimize_scalar

from robopolicy_sim.arms.arm import Arm
from robopolicy_sim.matching.candidates import Bounds, CandidateEvaluator, SearchSpace
from robopolicy_sim.matching.replay import Motion, Replayer
from robopolicy_sim.matching.robot_parameters import RobotParameters

GLOBAL_SHARE, FREE_SHARE = 0.4, 0.4  # of the evaluations; the rest goes to the last refinement
POPULATION = 20  # candidates of the global stage
PRIOR = 5e-5  # m of pose error that a gain e times its nominal value weighs: what the data do not show stays nominal
MOVING = 0.02  # least change of the measured opening in a step that counts as moving
GRIPPER_EVALUATIONS = 15


@dataclass(frozen=True)
class ReplayError:
    """How far replays stray from the recording: mean over steps, then over episodes.

    Attributes:
        loss: distance plus half the angle, in metres plus radians.
        position: in metres.
        rotation: the whole angle, in radians.
    """

    loss: float
    position: float
    rotation: float


@dataclass(frozen=True)
class Identification:
    """What was found.

    Attributes:
        parameters: of the arm.
        before, after: on the motions that were fitted, with the model's own parameters and with those found.
        held_out_before, held_out_after: on motions that were not; None without any.
        evaluations: replays of all fitted motions that the search took.
        bounds, seed: of the search.
    """

    parameters: RobotParameters
    before: ReplayError
    after: ReplayError
    held_out_before: ReplayError | None
    held_out_after: ReplayError | None
    evaluations: int
    bounds: Bounds
    seed: int


def identify(
    arm: str | Arm,
    motions: Sequence[Motion],
    *,
    held_out: Sequence[Motion] = (),
    control: str = "ee_pose",
    control_hz: float = 20,
    evaluations: int = 400,
    bounds: Bounds | None = None,
    seed: int = 0,
    workers: int = 1,
    progress: Callable[[int, float], None] | None = None,
) -> Identification:
    """Find the parameters with which the simulated arm follows recorded commands as the recorded arm did.

    Args:
        arm: name of an arm, or an `Arm`.
        motions: what to fit; free motions at different speeds tell most. They start at rest.
        held_out: motions to judge the result on.
        control: what the actions mean, see `control`.
        control_hz: actions per second.
        evaluations: replays of all motions that the search takes, about.
        bounds: where to search.
        seed: of the global stage.
        workers: processes that replay; the result does not depend on it.
        progress: called with the evaluations and the least loss so far.

    Raises:
        ValueError: there are no motions, or they do not fit the arm and the control.
    """
    if not motions:
        raise ValueError("There are no motions to identify the arm from.")
    bounds = bounds or Bounds()
    others = Replayer(arm, control, control_hz, held_out)
    with CandidateEvaluator(arm, control, control_hz, motions, workers=workers, progress=progress) as evaluator:
        space = SearchSpace.of(evaluator.replayer, bounds)
        vector = space.spread(_search_shared(evaluator, space, round(GLOBAL_SHARE * evaluations), seed))
        vector = _refine(evaluator, space, vector, round(FREE_SHARE * evaluations))
        vector[-1] = round(vector[-1])  # tasks delay commands by whole time steps
        refined = _refine(evaluator, space, vector, evaluations - evaluator.evaluations, fixed=1)
        # The refinements see squared errors; the loss decides.
        candidates = RobotParameters(), space.parameters(vector), space.parameters(refined)
        losses = [evaluation.loss for evaluation in evaluator(candidates)]
    found = _fit_gripper(evaluator.replayer, candidates[int(np.argmin(losses))], bounds)
    errors = [
        replay_error(replayer, parameters) if replayer.motions else None
        for replayer in (evaluator.replayer, others)
        for parameters in (RobotParameters(), found)
    ]
    before, after, held_out_before, held_out_after = errors
    assert before is not None and after is not None
    return Identification(found, before, after, held_out_before, held_out_after, evaluator.evaluations, bounds, seed)


def replay_error(replayer: Replayer, parameters: RobotParameters) -> ReplayError:
    """Replay all motions with parameters and compare with what was measured."""
    rows = []
    for number, motion in enumerate(replayer.motions):
        replayed = replayer.replay(number, parameters)
        deviation = replayed.deviation(motion)
        rows.append((replayed.errors(motion).mean(), deviation.distance.mean(), deviation.angle.mean()))
    return ReplayError(*np.mean(rows, axis=0).tolist())


def _search_shared(evaluator: CandidateEvaluator, space: SearchSpace, evaluations: int, seed: int) -> np.ndarray:
    """Seek the four numbers of `SearchSpace.shared_limits` that fit best if all joints share them."""

    def losses(_: Any, population: Iterable[np.ndarray]) -> list[float]:
        found = evaluator(space.parameters(space.spread(vector)) for vector in population)
        return [evaluation.loss for evaluation in found]

    low, high = space.shared_limits
    result = differential_evolution(
        lambda vector: 0.0,  # never called: `losses` evaluates a whole generation
        np.column_stack([low, high]),
        popsize=max(1, POPULATION // len(low)),
        maxiter=max(1, evaluations // POPULATION - 1),
        rng=seed,
        polish=False,
        updating="deferred",
        workers=losses,
        tol=0,
    )
    return result.x


def _refine(
    evaluator: CandidateEvaluator, space: SearchSpace, start: np.ndarray, evaluations: int, fixed: int = 0
) -> np.ndarray:
    """Least squares over all parameters but the last ``fixed`` from ``start`` (3 n + 1,); returns the end."""
    free = len(start) - fixed
    low, high = space.limits[:, :free]
    gains = 2 * len(space.torque)

    def residuals(vectors: Iterable[np.ndarray]) -> list[np.ndarray]:
        vectors = [np.append(vector, start[free:]) for vector in vectors]
        found = evaluator(space.parameters(vector) for vector in vectors)
        return [np.append(e.residuals, PRIOR * v[:gains]) for e, v in zip(found, vectors, strict=True)]

    def jacobian(vector: np.ndarray) -> np.ndarray:
        steps = space.steps[:free]
        steps = np.where(vector + steps > high, -steps, steps)
        here, *moved = residuals([vector, *(vector + np.diag(steps))])
        return (np.array(moved) - here).T / steps

    span = high - low
    result = least_squares(
        lambda vector: residuals([vector])[0],
        np.clip(start[:free], low + 1e-3 * span, high - 1e-3 * span),  # strictly inside, as the method wants
        jacobian,
        (low, high),
        x_scale=span,
        max_nfev=max(1, evaluations // (free + 2)),
    )
    return np.append(result.x, start[free:])


def _fit_gripper(replayer: Replayer, parameters: RobotParameters, bounds: Bounds) -> RobotParameters:
    """Add the damping with which the gripper moves as measured, judged where it moves: an object may stop it."""
    moving = [np.abs(np.gradient(motion.opening)) > MOVING for motion in replayer.motions]
    nominal = replayer.nominal.gripper_damping
    numbers = [number for number, steps in enumerate(moving) if steps.any()]
    if not numbers or not nominal:
        return parameters

    def candidate(log_factor: float) -> RobotParameters:
        return replace(parameters, gripper_damping=float(nominal * np.exp(log_factor)))

    def error(log_factor: float) -> float:
        found = candidate(log_factor)
        deviations = [
            replayer.replay(number, found).deviation(replayer.motions[number]).opening[moving[number]]
            for number in numbers
        ]
        return float(np.abs(np.concatenate(deviations)).mean())

    limits = np.log(bounds.gripper_damping)
    best = minimize_scalar(error, bounds=limits, method="bounded", options={"maxiter": GRIPPER_EVALUATIONS})
    return candidate(float(best.x)) if best.fun < error(0.0) else parameters
