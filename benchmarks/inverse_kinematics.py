"""One control step's inverse kinematics: our damped least squares against mink's quadratic programme, in one run.

Both follow the same tool paths (random poses about the home posture, 20 Hz, up to 0.3 m/s), start each step from the
last solution, and take steps until the tool is within 0.5 mm and 5 mrad or ten steps are over. Needs mink and a solver:
pip install mink==1.1.1 daqp
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import numpy as np
from results import machine, print_table

import robopolicy_sim  # noqa: F401  selects the OpenGL backend before mujoco is imported
from robopolicy.errors import require_extra
from robopolicy_sim.arms.arm import ARMS, Arm, arm_spec
from robopolicy_sim.kinematics import ArmKinematics, rotation_error, rotation_from_vector

POSITION, ANGLE, STEPS = 5e-4, 5e-3, 10
Pose = tuple[np.ndarray, np.ndarray]
Solve = Callable[[np.ndarray, np.ndarray, np.ndarray], np.ndarray]


def paths(arm: Arm, count: int, seed: int) -> list[Pose]:
    """Tool poses at 20 Hz along straight lines between random poses about the home posture."""
    kinematics, rng = ArmKinematics(arm), np.random.default_rng(seed)
    home, frame = kinematics.forward(np.array(arm.home))
    poses, position, turn = [], home, np.zeros(3)
    while len(poses) < count:
        goal = home + rng.uniform(-1, 1, 3) * np.array([0.15, 0.2, 0.12]) * min(1.0, arm.reach / 0.85)
        goal_turn = np.array([0, 0, rng.uniform(-1, 1)])
        n = max(2, round(float(np.linalg.norm(goal - position)) / 0.015))
        for share in np.linspace(0, 1, n)[1:]:
            now = turn + share * (goal_turn - turn)
            poses.append((position + share * (goal - position), rotation_from_vector(now) @ frame))
        position, turn = goal, goal_turn
    return poses[:count]


def ours(arm: Arm) -> Solve:
    kinematics = ArmKinematics(arm)
    return lambda position, rotation, start: kinematics.inverse(
        position, rotation, start, iterations=STEPS, tolerance=POSITION
    )


def theirs(arm: Arm) -> Solve:
    mink = require_extra("mink", "mink")
    model = arm_spec(arm).compile()
    configuration = mink.Configuration(model)
    joints = np.array([model.joint(name).qposadr[0] for name in arm.joints])
    task = mink.FrameTask(arm.tcp_site, "site", position_cost=1.0, orientation_cost=0.25, lm_damping=1e-3)
    posture = mink.PostureTask(model, cost=1e-3)
    rest = model.qpos0.copy()
    rest[joints] = arm.home
    posture.set_target(rest)
    limits = [mink.ConfigurationLimit(model)]

    def solve(position: np.ndarray, rotation: np.ndarray, start: np.ndarray) -> np.ndarray:
        full = rest.copy()
        full[joints] = start
        configuration.update(full)
        task.set_target(mink.SE3.from_rotation_and_translation(mink.SO3.from_matrix(rotation), position))
        for _ in range(STEPS):
            error = task.compute_error(configuration)
            if np.linalg.norm(error[:3]) < POSITION and np.linalg.norm(error[3:]) < ANGLE:
                break
            velocity = mink.solve_ik(configuration, [task, posture], 1.0, "daqp", limits=limits)
            configuration.integrate_inplace(velocity, 1.0)
        return configuration.q[joints].copy()

    return solve


def follow(arm: Arm, solve: Solve, poses: list[Pose]) -> tuple[float, float, float]:
    """Seconds per pose, and the 95th percentile of the position [m] and rotation [rad] error."""
    kinematics, joints = ArmKinematics(arm), np.array(arm.home)
    solutions = []
    began = time.perf_counter()
    for position, rotation in poses:
        joints = solve(position, rotation, joints)
        solutions.append(joints)
    seconds = (time.perf_counter() - began) / len(poses)
    errors = []
    for (position, rotation), found in zip(poses, solutions, strict=True):
        at, frame = kinematics.forward(found)
        errors.append((np.linalg.norm(position - at), np.linalg.norm(rotation_error(rotation, frame))))
    off, turned = np.quantile(errors, 0.95, axis=0)
    return seconds, float(off), float(turned)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--poses", type=int, default=1000)
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    rows = []
    for name, arm in ARMS.items():
        poses = paths(arm, args.poses, seed=0)
        runs = [(follow(arm, ours(arm), poses), follow(arm, theirs(arm), poses)) for _ in range(args.repeats)]
        (mine, *our_errors), (peer, *their_errors) = (
            [statistics.median(column) for column in zip(*side, strict=True)] for side in zip(*runs, strict=True)
        )
        rows.append(
            [name, f"{1e6 * mine:.0f}", f"{1e6 * peer:.0f}", f"{peer / mine:.1f}"]
            + [f"{1e3 * our_errors[0]:.2f} / {1e3 * our_errors[1]:.1f}"]
            + [f"{1e3 * their_errors[0]:.2f} / {1e3 * their_errors[1]:.1f}"]
        )
    header = ["arm", "ours, us", "mink, us", "ratio", "ours, mm / mrad (p95)", "mink, mm / mrad (p95)"]
    about = machine()
    print_table(
        f"inverse kinematics per control step, {about['processor']}, load {about['load_before']:.1f}", header, rows
    )


if __name__ == "__main__":
    main()
