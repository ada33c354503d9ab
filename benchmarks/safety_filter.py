"""The safety filter at the command rate: what it costs, how closely it follows, and what it does to seams of chunks.

Four ways to turn a plan into commands: plain NumPy (position clamped, step limited by velocity), Ruckig aimed at the
plan's position of now, Ruckig aimed ahead with the time of arrival as its shortest duration, and our filter. The chunks
are pieces of a smooth motion at 20 Hz; each new chunk is off the one before by a random offset, as a policy's are.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import numpy as np
from results import machine, print_table, save_json
from scipy.interpolate import BPoly, CubicHermiteSpline

from robopolicy.errors import require_extra
from robopolicy.runtime.contract import Action, CommandTopic, Contract, Stream
from robopolicy.runtime.limits import AxisLimits, JointFrame, Kinematics, Limits, Workspace
from robopolicy.runtime.safety import SafetyFilter

PERIOD, LOOKAHEAD, RATE, HORIZON = 0.01, 0.1, 20.0, 8
AXIS = AxisLimits(-2.8, 2.8, velocity=1.5, acceleration=5.0, jerk=100.0, margin=0.05)
JOINTS = 7
Step = Callable[["Chunks", float], np.ndarray]


class Chunks:
    """A plan made of chunks: cubic splines through points at the policy's rate, with a jump at every new chunk.

    Args:
        seconds: of motion.
        offset: standard deviation of a chunk's offset [rad].
        seed: of the motion.
    """

    def __init__(self, seconds: float, offset: float, seed: int) -> None:
        rng = np.random.default_rng(seed)
        self.end = round(seconds * 1e9)
        self._rates, self._phases = rng.uniform(0.5, 2.0, (3, JOINTS)), rng.uniform(0, 6, (3, JOINTS))
        self._length = HORIZON / RATE
        count = int(seconds / self._length) + 2
        self._pieces = []
        for index in range(count):
            times = index * self._length + np.arange(HORIZON + 1) / RATE
            off = offset * rng.normal(size=JOINTS)
            self._pieces.append(CubicHermiteSpline(times, self._motion(times) + off, self._speed(times)))

    def at(self, time: int) -> tuple[np.ndarray, np.ndarray]:
        seconds = time / 1e9
        piece = self._pieces[int(seconds / self._length)]
        return piece(seconds), piece(seconds, 1)

    def _motion(self, times: np.ndarray) -> np.ndarray:
        return 0.25 * np.sum(np.sin(self._rates * times[:, None, None] + self._phases), axis=1)

    def _speed(self, times: np.ndarray) -> np.ndarray:
        return 0.25 * np.sum(self._rates * np.cos(self._rates * times[:, None, None] + self._phases), axis=1)


def contract(boxed: bool) -> tuple[Contract, Limits]:
    """An arm of seven joints, alternately about z and y, with a box or without."""
    names = tuple(f"joint{index}" for index in range(JOINTS))
    robot = Contract(
        robot="bench",
        policy_rate=RATE,
        command_rate=1 / PERIOD,
        joints=names,
        measured="joints",
        streams={"joints": Stream("joint_states", "sensor_msgs/msg/JointState", 100.0, 0.1)},
        observations={},
        action=Action(names),
        commands={"arm": CommandTopic("arm", "trajectory_msgs/msg/JointTrajectory", tuple(range(JOINTS)), names)},
    )
    frames = tuple(
        JointFrame((0.0, 0.0, 0.15), (0.0, 0.0, 0.0), (0.0, 0.0, 1.0) if index % 2 == 0 else (0.0, 1.0, 0.0))
        for index in range(JOINTS)
    )
    box = Workspace((-0.9, 0.9), (-0.9, 0.9), (0.2, 1.3)) if boxed else None
    chain = Kinematics(frames, (0.0, 0.0, 0.15)) if boxed else None
    return robot, Limits("bench", {name: AXIS for name in names}, workspace=box, kinematics=chain)


def clamped(start: np.ndarray) -> Step:
    position = start.copy()

    def step(plan: Chunks, now: float) -> np.ndarray:
        nonlocal position
        target = np.clip(plan.at(round(1e9 * (now + PERIOD)))[0], AXIS.lower + AXIS.margin, AXIS.upper - AXIS.margin)
        position = position + np.clip(target - position, -PERIOD * AXIS.velocity, PERIOD * AXIS.velocity)
        return position

    return step


def with_ruckig(start: np.ndarray, lookahead: float) -> Step:
    """Aimed at the position ``lookahead`` ahead, with its velocity; 0: at the position of now, to rest there."""
    ruckig = require_extra("ruckig", "runtime")
    planner, path, wanted = ruckig.Ruckig(JOINTS), ruckig.Trajectory(JOINTS), ruckig.InputParameter(JOINTS)
    wanted.max_velocity, wanted.max_acceleration = [AXIS.velocity] * JOINTS, [AXIS.acceleration] * JOINTS
    wanted.max_jerk, wanted.current_position = [AXIS.jerk] * JOINTS, start.tolist()

    def step(plan: Chunks, now: float) -> np.ndarray:
        position, velocity = plan.at(round(1e9 * (now + (lookahead or PERIOD))))
        wanted.target_position = position.tolist()
        if lookahead:
            wanted.target_velocity, wanted.minimum_duration = np.clip(velocity, -1.5, 1.5).tolist(), lookahead
        planner.calculate(wanted, path)
        wanted.current_position, wanted.current_velocity, wanted.current_acceleration = path.at_time(PERIOD)
        return np.array(wanted.current_position)

    return step


def ours(start: np.ndarray, boxed: bool = False) -> Step:
    guard = SafetyFilter(*contract(boxed), PERIOD)
    guard.start(start)
    return lambda plan, now: guard.step(*plan.at(round(1e9 * (now + LOOKAHEAD))), LOOKAHEAD).position


def follow(plan: Chunks, step: Step, seconds: float) -> tuple[np.ndarray, float]:
    """Commands (T, n), and processor seconds per command without the plan's own."""
    began = time.process_time()
    commands = np.array([step(plan, index * PERIOD) for index in range(round(seconds / PERIOD))])
    spent = time.process_time() - began
    began = time.process_time()
    for index in range(len(commands)):
        plan.at(round(1e9 * index * PERIOD))
    return commands, (spent - (time.process_time() - began)) / len(commands)


def measure(plan: Chunks, commands: np.ndarray) -> dict[str, float]:
    """Error against the plan after the first second, and the derivatives by finite differences."""
    wanted = np.array([plan.at(round(1e9 * (index + 1) * PERIOD))[0] for index in range(len(commands))])
    error = np.abs(commands - wanted)[round(1 / PERIOD) :]
    velocity, acceleration, jerk = (np.diff(commands, order, axis=0) / PERIOD**order for order in (1, 2, 3))
    return {
        "error_p50": float(np.median(error)),
        "error_max": float(error.max()),
        "velocity_max": float(np.abs(velocity).max()),
        "acceleration_max": float(np.abs(acceleration).max()),
        "acceleration_rms": float(np.sqrt(np.mean(acceleration**2))),
        "jerk_max": float(np.abs(jerk).max()),
        "jerk_rms": float(np.sqrt(np.mean(jerk**2))),
    }


def spline_excess(plan: Chunks, spacing: float, orders: int) -> tuple[float, float]:
    """Largest velocity and acceleration of a controller's spline through previews, as shares of the limits.

    Args:
        spacing: seconds between points.
        orders: 2 for cubic splines (positions and velocities), 3 for quintic ones.
    """
    guard, worst = SafetyFilter(*contract(False), PERIOD), np.zeros(2)
    guard.start(plan.at(0)[0])
    for index in range(200):
        now = round(1e9 * index * PERIOD)
        guard.step(*plan.at(now + round(1e9 * LOOKAHEAD)), LOOKAHEAD)
        if index % 10 == 0:
            first = guard.state
            seen = guard.preview(plan, now + round(1e9 * PERIOD), 0.5, spacing, LOOKAHEAD)
            rows = [(first.position, seen.positions), (first.velocity, seen.velocities)]
            rows = [*rows, (first.acceleration, seen.accelerations)][:orders]
            times = np.concatenate([[0.0], (seen.times - now) / 1e9 - PERIOD])
            spline = BPoly.from_derivatives(times, np.stack([np.vstack(row) for row in rows], axis=1))
            fine = np.linspace(0, times[-1], 20 * len(times))
            found = [np.abs(spline.derivative(order)(fine)).max() for order in (1, 2)]
            worst = np.maximum(worst, np.array(found) / [AXIS.velocity, AXIS.acceleration])
    return float(worst[0]), float(worst[1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=10.0, help="of motion")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", help="save the numbers to this file")
    args = parser.parse_args()
    about, results = machine(), {}
    ways: dict[str, Callable[[np.ndarray], Step]] = {
        "clamped by NumPy": clamped,
        "Ruckig, target of now": lambda start: with_ruckig(start, 0.0),
        "Ruckig, looking ahead": lambda start: with_ruckig(start, LOOKAHEAD),
        "filter": ours,
        "filter with a workspace": lambda start: ours(start, boxed=True),
    }
    rows = []
    for offset in (0.0, 0.02):
        for name, way in ways.items():
            runs, costs = {}, []
            for seed in range(args.repeats):
                plan = Chunks(args.seconds + 1, offset, seed)
                commands, cost = follow(plan, way(plan.at(0)[0]), args.seconds)
                costs.append(cost)
                runs[seed] = measure(plan, commands)
            found = {key: statistics.median(run[key] for run in runs.values()) for key in runs[0]}
            found["seconds_per_step"] = statistics.median(costs)
            results[f"{name}, {offset} rad"] = found
            rows.append(
                [f"{name}, seams of {1e3 * offset:.0f} mrad", f"{1e6 * found['seconds_per_step']:.0f}"]
                + [f"{1e3 * found[key]:.2f}" for key in ("error_p50", "error_max")]
                + [f"{found[key]:.1f}" for key in ("velocity_max", "acceleration_max", "acceleration_rms")]
                + [f"{found[key]:.0f}" for key in ("jerk_max", "jerk_rms")]
            )
    header = ["7 joints at 100 Hz", "us", "error p50, mrad", "max", "v max", "a max", "a rms", "j max", "j rms"]
    print_table(f"following chunks, {about['processor']}, load {about['load_before']:.1f}", header, rows)

    plan, rows = Chunks(5.0, 0.02, 0), []
    for spacing in (0.02, 0.05, 0.1):
        for orders, kind in ((2, "cubic"), (3, "quintic")):
            velocity, acceleration = spline_excess(plan, spacing, orders)
            results[f"preview every {spacing} s, {kind}"] = {"velocity": velocity, "acceleration": acceleration}
            rows.append([f"{kind}, every {1e3 * spacing:.0f} ms", f"{velocity:.3f}", f"{acceleration:.3f}"])
    print_table("previews as a controller interpolates them", ["", "velocity / limit", "acceleration / limit"], rows)

    guard, costs = SafetyFilter(*contract(False), PERIOD), []
    guard.start(plan.at(0)[0])
    for index in range(100):
        now = round(1e9 * index * PERIOD)
        guard.step(*plan.at(now + round(1e9 * LOOKAHEAD)), LOOKAHEAD)
        began = time.process_time()
        guard.preview(plan, now + round(1e9 * PERIOD), 0.5, 0.02, LOOKAHEAD)
        costs.append(time.process_time() - began)
    results["preview of 0.5 s"] = {"p50": statistics.median(costs), "max": max(costs)}
    print(f"preview of 0.5 s, every 20 ms: {1e3 * statistics.median(costs):.1f} ms, at most {1e3 * max(costs):.1f} ms")
    save_json(args.json, results, about)


if __name__ == "__main__":
    main()
