"""The monitor's judgement: it objects to every kind of violation, and to nothing else.

The motions are known in closed form; no node and no message is needed but where messages themselves are judged.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from scipy.spatial.transform import Rotation

from robopolicy.runtime.limits import RotationLimits
from robopolicy_ros.motion_check import Bounds, RotationCheck, SetPointCheck, TrajectoryCheck, Violations

PERIOD = 0.01
BOUNDS = Bounds(np.full(2, -1.0), np.full(2, 1.0), np.array([1.0, 2.0]), np.array([5.0, 8.0]))
MAX_STEP = 0.2


def swing(times: np.ndarray, amplitude: float = 0.1, rate: float = 3.0) -> tuple[np.ndarray, np.ndarray]:
    """Positions and velocities (T, 2) of a motion from rest, of velocities up to amplitude * rate."""
    wave = amplitude * (1 - np.cos(rate * times)), amplitude * rate * np.sin(rate * times)
    return np.stack([wave[0], -wave[0]], axis=1), np.stack([wave[1], -wave[1]], axis=1)


# Set points.


def set_points(positions: np.ndarray, times: np.ndarray | None = None, measured: np.ndarray | None = None) -> set[str]:
    """Kinds of violations of set points (T, 2)."""
    check = SetPointCheck(BOUNDS, PERIOD, MAX_STEP)
    times = 1e9 + PERIOD * np.arange(len(positions)) if times is None else times
    for time, position in zip(times, positions, strict=True):
        check.check(time, position, measured)
    return set(check.violations.counts)


def smooth(count: int = 300, **motion: float) -> np.ndarray:
    return swing(PERIOD * np.arange(count), **motion)[0]


def test_set_points_within_the_limits() -> None:
    assert not set_points(smooth())
    assert not set_points(smooth(amplitude=0.3, rate=3.2))  # 0.96 of 1 rad/s
    assert not set_points(smooth(), measured=np.full(2, 0.1))


def test_set_points_of_a_sender_that_was_late() -> None:
    """It makes up for the time with one larger step; the next ones come on time."""
    times = PERIOD * np.arange(300)
    missing = np.setdiff1d(np.arange(300), np.arange(100, 104))
    assert not set_points(smooth()[missing], times[missing])
    jump = smooth()
    jump[104:] += 0.1
    assert "velocity" in set_points(jump[missing], times[missing])


def test_set_points_of_a_sender_that_was_held_up_between_the_clock_and_the_sending() -> None:
    """One comes late although it is of its time; the next one, on time, makes up for all that was missed."""
    made = np.array([*range(246), *range(250, 300)])  # periods for which they were made, where the motion is fast
    times = PERIOD * made.astype(float)
    times[245] = PERIOD * 249.9
    assert not set_points(smooth(amplitude=0.3, rate=3.2)[made], times)
    jump = smooth(amplitude=0.3, rate=3.2)
    jump[250:] += 0.1
    assert "velocity" in set_points(jump[made], times)


def changed(change: Callable[[np.ndarray], object]) -> np.ndarray:
    positions = smooth()
    change(positions)
    return positions


@pytest.mark.parametrize(
    ("positions", "kinds"),
    [
        (smooth(amplitude=0.6, rate=1.0), {"position"}),
        (smooth(amplitude=0.3, rate=3.6), {"velocity"}),
        (smooth(amplitude=0.02, rate=17.0), {"acceleration"}),
        (changed(lambda p: p.__setitem__((150, 1), np.nan)), {"not finite"}),
        (changed(lambda p: p.__setitem__((150, 0), np.inf)), {"not finite"}),
        (changed(lambda p: np.add(p[150:], [0.05, 0], out=p[150:])), {"velocity", "acceleration"}),
        (np.repeat(smooth(), 2, axis=0)[:300], {"acceleration"}),
    ],
    ids=["position", "velocity", "acceleration", "nan", "infinite", "jump", "repeated set points"],
)
def test_set_points_that_break_a_limit(positions: np.ndarray, kinds: set[str]) -> None:
    assert set_points(positions) == kinds


def test_the_first_set_point_is_where_the_robot_is() -> None:
    assert set_points(smooth(), measured=np.array([0.0, 0.3])) == {"first set point"}
    check = SetPointCheck(BOUNDS, PERIOD, MAX_STEP)
    check.check(0.0, np.zeros(2))
    check.restart()
    check.check(PERIOD, np.full(2, 0.5), np.full(2, 0.5))  # after a pause another motion may begin elsewhere
    assert not check.violations.counts


# Trajectories.

STOP = 0.3  # s of braking at the end of the trajectories below


def trajectory(begin: float, length: float = 1.0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Times from ``begin`` on, positions and velocities (T, 2): the swing, then braking to rest."""
    times = np.arange(0.02, length, 0.02)
    positions, velocities = swing(begin + times, amplitude=0.3)
    after = np.arange(0.02, STOP + 1e-9, 0.02)
    share = velocities[-1] / STOP
    braked = positions[-1] + np.outer(after, velocities[-1]) - np.outer(after**2, share) / 2
    slowing = velocities[-1] - np.outer(after, share)
    slowing[-1] = 0
    return (
        np.concatenate([times, times[-1] + after]),
        np.concatenate([positions, braked]),
        np.concatenate([velocities, slowing]),
    )


def trajectories(
    *sent: tuple[float, tuple[np.ndarray, np.ndarray, np.ndarray]], measured: np.ndarray | None = None
) -> set[str]:
    """Kinds of violations of trajectories, each with its time of sending."""
    check = TrajectoryCheck(BOUNDS, MAX_STEP)
    for time, (times, positions, velocities) in sent:
        check.check(time, times, positions, velocities, measured)
    return set(check.violations.counts)


def test_trajectories_within_the_limits() -> None:
    chain = [(0.4 * k, trajectory(0.4 * k)) for k in range(10)]
    assert not trajectories(*chain, measured=np.full(2, 0.1))
    times, positions, velocities = trajectory(0.0)
    rest = chain[-1][1][1][-1]
    assert not trajectories(*chain, (20.0, (times, positions + rest, velocities)))
    assert trajectories(*chain, (20.0, (times, positions, velocities))) == {"seam position"}


def altered(**change: Callable[[np.ndarray], np.ndarray]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The trajectory with its times, positions or velocities replaced."""
    parts = dict(zip(("times", "positions", "velocities"), trajectory(0.0), strict=True))
    parts |= {name: make(parts[name]) for name, make in change.items()}
    return parts["times"], parts["positions"], parts["velocities"]


def with_row(row: int, value: float | list[float]) -> Callable[[np.ndarray], np.ndarray]:
    def change(rows: np.ndarray) -> np.ndarray:
        rows[row] = value
        return rows

    return change


@pytest.mark.parametrize(
    ("given", "kind"),
    [
        (altered(positions=lambda p: p + [0.95, 0]), "position"),
        (altered(times=lambda t: t / 4, velocities=lambda v: 4 * v), "velocity"),
        (altered(times=lambda t: t / 3, velocities=lambda v: 3 * v), "acceleration"),
        (altered(positions=with_row(9, np.nan)), "not finite"),
        (altered(velocities=with_row(9, np.inf)), "not finite"),
        (altered(velocities=with_row(-1, [0.0, 1e-3])), "last velocity"),
        (altered(velocities=lambda v: np.zeros_like(v)), "velocities of other positions"),
        (altered(times=with_row(0, 0.0)), "times"),
        (altered(times=with_row(5, 0.1)), "times"),
        (altered(times=lambda t: t[:0], positions=lambda p: p[:0], velocities=lambda v: v[:0]), "times"),
    ],
    ids=[
        "position",
        "velocity",
        "acceleration",
        "nan",
        "infinite",
        "nonzero last velocity",
        "velocities of another motion",
        "first time zero",
        "a time twice",
        "no points",
    ],
)
def test_trajectories_that_break_a_rule(given: tuple[np.ndarray, np.ndarray, np.ndarray], kind: str) -> None:
    assert kind in trajectories((0.0, given))
    assert not trajectories((0.0, trajectory(0.0)))


def test_between_the_points_the_limits_hold_as_well() -> None:
    """Two points inside of the limits, and a cubic between them that is not."""
    high = np.array([[0.95, 0.0], [0.95, 0.0]]), np.array([[0.9, 0.0], [0.0, 0.0]])
    assert "position" in trajectories((0.0, (np.array([0.1, 1.1]), *high)))


def test_seams() -> None:
    """A trajectory goes on where, and as fast as, the robot is on the one before."""
    first = (0.0, trajectory(0.0))
    times, positions, velocities = trajectory(0.5)
    assert not trajectories(first, (0.5, (times, positions, velocities)))
    assert "seam position" in trajectories(first, (0.5, (times, positions + [0.1, 0], velocities)))
    at_rest = trajectory(0.0)
    assert "seam velocity" in trajectories(first, (0.5, (at_rest[0], at_rest[1] + positions[0], at_rest[2])))
    assert "seam position" in trajectories(first, (0.8, (times, positions, velocities)))  # sent 0.3 s too late


@pytest.mark.parametrize(("place", "allowed"), [(0.0, True), (0.3, True), (0.15, False)])
def test_a_robot_that_rests_elsewhere_goes_on_from_there(place: float, allowed: bool) -> None:
    """It was moved, or a trajectory never reached it: any motion begins where it is or should be."""

    def hold(position: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        return np.array([0.1]), np.array([[position, 0.0]]), np.zeros((1, 2))

    found = TrajectoryCheck(BOUNDS, MAX_STEP)
    found.check(0.0, *hold(0.0))
    found.check(1.0, *hold(place), np.array([0.3, 0.0]))
    assert set(found.violations.counts) == (set() if allowed else {"seam position"})


def test_the_first_trajectory_begins_where_the_robot_is() -> None:
    assert trajectories((0.0, trajectory(0.0)), measured=np.array([0.25, 0.0])) == {"first point"}
    check = TrajectoryCheck(BOUNDS, MAX_STEP)
    check.check(0.0, *trajectory(0.0))
    check.restart()
    check.check(0.5, *altered(positions=lambda p: p + [0.25, 0]), np.array([0.25, 0.0]))
    assert not check.violations.counts


# Rotations.


def rotations(turns: np.ndarray, times: np.ndarray | None = None) -> set[str]:
    """Kinds of violations of rotation vectors (T, 3) in the frame of a tilted tool."""
    violations = Violations()
    check = RotationCheck(RotationLimits(1.0, 4.0), PERIOD, violations)
    tilted = Rotation.from_rotvec([0.5, -1.0, 2.0])
    times = 1e9 + PERIOD * np.arange(len(turns)) if times is None else times
    for i, (time, turn) in enumerate(zip(times, turns, strict=True)):
        quaternion = (Rotation.from_rotvec(turn) * tilted).as_quat()
        check.check(time, quaternion if i % 2 else -quaternion)  # both mean the same rotation
    return set(violations.counts)


def turning(amplitude: float, rate: float) -> np.ndarray:
    angle = amplitude * (1 - np.cos(rate * PERIOD * np.arange(300)))
    return np.outer(angle, [0.6, 0.0, -0.8])


def test_rotations() -> None:
    assert not rotations(turning(0.3, 3.0))
    assert rotations(turning(0.3, 4.0)) == {"angular velocity"}
    assert rotations(turning(0.02, 20.0)) == {"angular acceleration"}
    late = np.setdiff1d(np.arange(300), np.arange(100, 104))
    assert not rotations(turning(0.3, 3.0)[late], PERIOD * late)
    violations = Violations()
    check = RotationCheck(RotationLimits(1.0, 4.0), PERIOD, violations)
    for quaternion in ([0.0, 0.0, 0.0, 0.0], [0.0, 0.0, 0.0, 2.0], [np.nan, 0.0, 0.0, 1.0]):
        check.check(0.0, np.array(quaternion))
    assert violations.counts == {"no rotation": 3}


# Messages.


def test_messages_that_do_not_name_the_commanded_joints() -> None:
    pytest.importorskip("rclpy", reason="rclpy is not installed: pip install 'robopolicy[ros]'")
    from builtin_interfaces.msg import Duration
    from std_msgs.msg import Float64MultiArray
    from trajectory_msgs.msg import JointTrajectory, JointTrajectoryPoint

    from robopolicy.runtime.robots import read_robot
    from robopolicy_ros.monitor_node import CommandMonitor

    robot = read_robot(str(Path(__file__).parent / "bench_robot"))
    names = robot.contract.commands["arm"].names

    def arm(joints: tuple[str, ...], numbers: int = 3) -> dict[str, int]:
        monitor = CommandMonitor(robot.contract, robot.limits, robot.contract.commands["arm"])
        point = JointTrajectoryPoint(positions=[0.1] * numbers, velocities=[0.0] * numbers)
        point.time_from_start = Duration(sec=1)
        monitor.receive(JointTrajectory(joint_names=list(joints), points=[point]), 1.0)
        return monitor.report()["violations"]

    assert not arm(names) and not arm(names[::-1])
    for wrong in (names[:2], ("base_joint", "elbow_joint", "other_joint"), ()):
        assert arm(wrong) == {"names": 1}
    assert arm(names, numbers=2) == {"names": 1}
    gripper = CommandMonitor(robot.contract, robot.limits, robot.contract.commands["gripper"])
    gripper.receive(Float64MultiArray(data=[0.1, 0.2]), 1.0)
    gripper.receive(Float64MultiArray(data=[0.1]), 1.0)
    assert gripper.report()["violations"] == {"names": 1}


def test_messages_that_the_monitor_missed_are_counted_and_no_seam_is_judged_over_them() -> None:
    pytest.importorskip("rclpy", reason="rclpy is not installed: pip install 'robopolicy[ros]'")
    from builtin_interfaces.msg import Duration
    from trajectory_msgs.msg import JointTrajectory, JointTrajectoryPoint

    from robopolicy.runtime.robots import read_robot
    from robopolicy_ros.monitor_node import CommandMonitor

    robot = read_robot(str(Path(__file__).parent / "bench_robot"))
    names = robot.contract.commands["arm"].names
    monitor = CommandMonitor(robot.contract, robot.limits, robot.contract.commands["arm"])

    def send(place: float, sender: bytes, number: int) -> int:
        point = JointTrajectoryPoint(positions=[place] * 3, velocities=[0.0] * 3)
        point.time_from_start = Duration(nanosec=10**8)
        monitor.receive(JointTrajectory(joint_names=list(names), points=[point]), 1.0 + 10 * number, sender, number)
        return monitor.missed

    assert send(0.0, b"first", 1) == 0 and send(0.5, b"first", 4) == 2
    assert not monitor.check.violations.counts
    assert send(0.5, b"second", 1) == 2
    assert send(-0.5, b"second", 2) == 2 and set(monitor.check.violations.counts) == {"seam position"}
