"""The SO-101 driver on a simulated Feetech bus: LeRobot's own bus driver, pyserial and DDS are the real ones."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from robopolicy.errors import UserError
from tests.hardware.feetech_bus import (
    GOAL_POSITION,
    HOMING_OFFSET,
    MAX_LIMIT,
    MIN_LIMIT,
    TORQUE_ENABLE,
    FeetechBus,
    Servo,
    split_packets,
)

LEROBOT = "LeRobot's motor drivers are not installed: pip install 'robopolicy[lerobot]' feetech-servo-sdk"
pytest.importorskip("rclpy", reason="ROS 2 is not installed: pip install 'robopolicy[ros]'")
pytest.importorskip("scservo_sdk", reason=LEROBOT)
pytest.importorskip("lerobot.motors.feetech", reason=LEROBOT)

from builtin_interfaces.msg import Duration  # noqa: E402
from diagnostic_msgs.msg import DiagnosticArray, DiagnosticStatus  # noqa: E402
from rclpy.executors import SingleThreadedExecutor  # noqa: E402
from rclpy.node import Node  # noqa: E402
from rclpy.parameter import Parameter  # noqa: E402
from sensor_msgs.msg import JointState  # noqa: E402
from std_srvs.srv import Trigger  # noqa: E402
from trajectory_msgs.msg import JointTrajectory, JointTrajectoryPoint  # noqa: E402

from robopolicy.runtime.clock import NS  # noqa: E402
from robopolicy.runtime.commanded import CommandedMotion, Points  # noqa: E402
from robopolicy.runtime.robots import read_robot  # noqa: E402
from robopolicy_ros.feetech_arm import FeetechArm  # noqa: E402
from robopolicy_ros.so101_driver_node import ArmSampler, So101Driver, with_braking  # noqa: E402

NAMES = ("shoulder_pan", "shoulder_lift", "elbow_flex", "wrist_flex", "wrist_roll", "gripper")
JOINTS = NAMES[:5]
STEP = 2 * math.pi / 4095
"""Radians of one step, as LeRobot counts."""


@pytest.fixture
def servos() -> list[Servo]:
    """Calibrated servos, away from the middle of their ranges, the torque off."""
    servos = []
    for i in range(6):
        servo = Servo(i + 1, actual=2200.0 + 20 * i)
        servo.put(HOMING_OFFSET, 100 + 10 * i)
        servo.put(MIN_LIMIT, 800 + 10 * i)
        servo.put(MAX_LIMIT, 3300 + 10 * i)
        servos.append(servo)
    return servos


@pytest.fixture(autouse=True)
def patience(monkeypatch: pytest.MonkeyPatch) -> None:
    """LeRobot waits 50 ms for an answer, in which a busy test machine may not come round to the simulated servos."""
    from lerobot.motors.feetech import feetech

    def wait_longer(self: Any, packet_length: int) -> None:
        self.packet_start_time, self.packet_timeout = self.getCurrentTime(), 500.0

    monkeypatch.setattr(feetech, "patch_setPacketTimeout", wait_longer)


@pytest.fixture
def bus(servos: list[Servo]) -> Iterator[FeetechBus]:
    with FeetechBus(servos) as running:
        yield running


@pytest.fixture
def calibration(servos: list[Servo], tmp_path: Path) -> Path:
    values = {
        name: {
            "id": servo.id,
            "drive_mode": 0,
            "homing_offset": servo.get(HOMING_OFFSET),
            "range_min": servo.get(MIN_LIMIT),
            "range_max": servo.get(MAX_LIMIT),
        }
        for name, servo in zip(NAMES, servos, strict=True)
    }
    file = tmp_path / "arm.json"
    file.write_text(json.dumps(values))
    return file


def true_position(servo: Servo) -> float:
    """Of a servo of the arm, in radians from the middle of its range; of the gripper, 0 to 1."""
    low, high = servo.get(MIN_LIMIT), servo.get(MAX_LIMIT)
    if servo.id == 6:
        return (servo.position - low) / (high - low)
    return (servo.position - (low + high) / 2) * STEP


def wait(condition: Callable[[], bool], seconds: float = 10.0) -> bool:
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.01)
    return condition()


def test_packets_are_split_and_damaged_ones_skipped() -> None:
    ping = b"\xff\xff\x01\x02\x01\xfb"
    damaged = b"\xff\xff\x01\x02\x01\x00"
    packets, rest = split_packets(b"\x00" + damaged + ping + ping + ping[:3])
    assert packets == [ping[2:5]] * 2
    assert rest == ping[:3]


def test_arm_is_found_read_and_moved(bus: FeetechBus, servos: list[Servo], calibration: Path) -> None:
    arm = FeetechArm(bus.port, calibration, 0.5)
    arm.connect()
    start = arm.read()
    assert start == pytest.approx([true_position(servo) for servo in servos], abs=1.5 * STEP)
    assert all(servo.torque for servo in servos)
    assert servos[0].registers[21] == 16  # its gain was set
    goal = start + np.array([0.2, -0.2, 0.1, -0.1, 0.3, 0.2])
    assert arm.write(goal) == pytest.approx(goal)
    assert wait(lambda: np.abs(arm.read() - goal).max() < 2 * STEP)
    assert set(arm.temperatures().values()) == {31}
    arm.close(release=False)
    assert all(servo.torque for servo in servos)


def test_goal_is_kept_near_the_measured_position(bus: FeetechBus, calibration: Path) -> None:
    arm = FeetechArm(bus.port, calibration, 0.1)
    arm.connect()
    start = arm.read()
    assert arm.write(start + 1.0) == pytest.approx(start + 0.1)
    arm.close(release=False)


def test_switching_on_does_not_move_the_arm_to_an_old_goal(
    bus: FeetechBus, servos: list[Servo], calibration: Path
) -> None:
    before = [servo.actual for servo in servos]
    for servo in servos:
        servo.put(GOAL_POSITION, 3000)
    arm = FeetechArm(bus.port, calibration, 0.5)
    arm.connect()
    time.sleep(0.2)
    assert [servo.actual for servo in servos] == pytest.approx(before, abs=1)
    arm.close(release=False)


def test_a_second_connection_does_not_let_a_held_arm_fall(
    bus: FeetechBus, servos: list[Servo], calibration: Path
) -> None:
    for _ in range(2):
        arm = FeetechArm(bus.port, calibration, 0.5)
        arm.connect()
        arm.close(release=False)
    assert [servo.torque_losses for servo in servos] == [0] * 6


def test_settings_of_a_held_arm_are_not_changed(bus: FeetechBus, servos: list[Servo], calibration: Path) -> None:
    servos[2].registers[TORQUE_ENABLE] = 1
    with pytest.raises(UserError, match="elbow_flex has other settings"):
        FeetechArm(bus.port, calibration, 0.5).connect()
    assert servos[2].torque_losses == 0


def test_release_switches_the_torque_off(bus: FeetechBus, servos: list[Servo], calibration: Path) -> None:
    arm = FeetechArm(bus.port, calibration, 0.5)
    arm.connect()
    arm.close(release=True)
    assert not any(servo.torque for servo in servos)


def test_other_calibration_is_refused(bus: FeetechBus, servos: list[Servo], calibration: Path) -> None:
    servos[3].put(HOMING_OFFSET, 7)
    with pytest.raises(UserError, match="is not the calibration that the servos hold"):
        FeetechArm(bus.port, calibration, 0.5).connect()
    assert not any(servo.torque for servo in servos)


def test_missing_servo_is_named(bus: FeetechBus, calibration: Path) -> None:
    del bus.servos[4]
    with pytest.raises(UserError, match=r"Missing motor IDs:\s+- 4"):
        FeetechArm(bus.port, calibration, 0.5).connect()


@pytest.mark.parametrize(
    ("text", "message"),
    [("{", "not valid JSON"), ('{"a": {}}', "wanted the motors shoulder_pan"), ("[]", "wanted the motors")],
)
def test_bad_calibration_file(bus: FeetechBus, tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "bad.json"
    file.write_text(text)
    with pytest.raises(UserError, match=message):
        FeetechArm(bus.port, file, 0.5)


def test_missing_calibration_says_how_to_make_one(bus: FeetechBus, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="lerobot-calibrate"):
        FeetechArm(bus.port, tmp_path / "none.json", 0.5)


def test_silent_bus_is_an_error(bus: FeetechBus, servos: list[Servo], calibration: Path) -> None:
    arm = FeetechArm(bus.port, calibration, 0.5)
    arm.connect()
    bus.silent = True
    with pytest.raises(ConnectionError):
        arm.read()
    bus.silent, bus.corrupt = False, True
    with pytest.raises(ConnectionError):
        arm.read()
    bus.corrupt = False
    time.sleep(0.1)  # late answers of before lie in the port now
    assert arm.read() == pytest.approx([true_position(servo) for servo in servos], abs=1.5 * STEP)
    arm.close(release=False)


def unplug(bus: FeetechBus) -> None:
    """Pull the plug: the port is open, and whatever is done with it fails."""
    bus._end.set()
    bus._thread.join(5)
    os.close(bus._master)
    os.close(bus._slave)


def test_pulling_the_plug_is_an_error(servos: list[Servo], calibration: Path) -> None:
    bus = FeetechBus(servos).__enter__()
    arm = FeetechArm(bus.port, calibration, 0.5)
    arm.connect()
    start = arm.read()
    unplug(bus)
    for action in (arm.read, arm.temperatures, lambda: arm.write(start)):
        with pytest.raises(OSError, match="port is gone"):
            action()
    arm.close(release=False)


# What the arm is told between the messages.


@pytest.mark.parametrize("derivatives", [0, 1, 2])
def test_a_trajectory_that_ends_in_motion_is_braked(derivatives: int) -> None:
    times = np.arange(1, 6) * NS // 10
    positions = np.linspace(0.1, 0.5, 5)[:, None] * np.array([[1.0, -0.5]])
    rates = np.repeat(np.array([[1.0, -0.5]]), 5, axis=0)
    points = Points(
        times, positions, rates if derivatives else None, np.zeros_like(rates) if derivatives == 2 else None
    )
    motion = CommandedMotion()
    motion.follow(0, Points(np.array([0]), np.zeros((1, 2)), hold=True))
    motion.follow(0, with_braking(points, np.array([5.0, 5.0])))
    grid = np.arange(0, NS, NS // 1000)
    found = np.stack([motion.at(int(t)).position for t in grid])  # type: ignore[union-attr]
    speed = np.diff(found, axis=0) * 1000
    after = grid[:-1] >= 0.5 * NS
    assert found[-1] == pytest.approx([0.5 + 1.0 / (2 * 5), -0.25 - 0.5 * 1.0 / (2 * 5)], abs=1e-3)
    assert np.abs(np.diff(speed[after], axis=0)).max() < 0.12  # a dead stop would be 1.0
    assert np.abs(speed[-10:]).max() < 1e-6


def test_a_trajectory_that_ends_at_rest_is_left_alone() -> None:
    points = Points(np.array([NS]), np.array([[0.3]]), np.array([[0.0]]))
    assert with_braking(points, np.array([5.0])) is points


def test_set_points_stay_inside_the_limits_and_are_not_fast() -> None:
    robot = read_robot("so101")
    sampler = ArmSampler(robot.contract, robot.limits)
    sampler.hold(0, np.zeros(6))
    sampler.follow(0, "arm", Points(np.array([NS // 50]), np.full((1, 5), 3.0)))
    found = np.stack([sampler.at(t) for t in range(0, 4 * NS, NS // 50)])
    assert found[-1, :5] == pytest.approx(sampler.upper[:5])
    assert (np.abs(np.diff(found, axis=0)).max(0)[:5] <= 1.2 * sampler.velocity[:5] / 50 + 1e-9).all()
    assert sampler.limited > 0
    assert found[:, 5] == pytest.approx(0)  # the gripper was not told to move


# The node, over DDS.


class Robot:
    """The driver and a client, spun together."""

    def __init__(self, context: Any, port: str, calibration: Path, **parameters: Any) -> None:
        given = {"port": port, "calibration": str(calibration)} | parameters
        overrides = [Parameter(name, value=value) for name, value in given.items()]
        self.driver = So101Driver(context=context, parameter_overrides=overrides)
        self.client = Node("client", context=context)
        self.states: list[JointState] = []
        self.diagnostics: list[DiagnosticStatus] = []
        self.client.create_subscription(JointState, "joint_states", self.states.append, 10)
        self.client.create_subscription(
            DiagnosticArray, "/diagnostics", lambda message: self.diagnostics.extend(message.status), 10
        )
        self.arm = self.client.create_publisher(JointTrajectory, "arm_controller/joint_trajectory", 1)
        self.gripper = self.client.create_publisher(JointTrajectory, "gripper_controller/joint_trajectory", 1)
        self.executor = SingleThreadedExecutor(context=context)
        self.executor.add_node(self.driver)
        self.executor.add_node(self.client)

    def spin(self, condition: Callable[[], bool], seconds: float = 20.0) -> bool:
        end = time.monotonic() + seconds
        while not condition() and time.monotonic() < end:
            self.executor.spin_once(timeout_sec=0.05)
        return condition()

    def ready(self) -> bool:
        return bool(self.states) and self.arm.get_subscription_count() and self.gripper.get_subscription_count()

    def position(self) -> dict[str, float]:
        return dict(zip(self.states[-1].name, self.states[-1].position, strict=True))

    def close(self) -> None:
        self.executor.shutdown()
        self.driver.end("The test is over.")
        self.driver.destroy_node()
        self.client.destroy_node()


@pytest.fixture
def robot(bus: FeetechBus, calibration: Path, ros_context: Any) -> Iterator[Robot]:
    running = Robot(ros_context, bus.port, calibration)
    assert running.spin(running.ready)
    yield running
    running.close()


def trajectory(names: tuple[str, ...], positions: list[float], seconds: float) -> JointTrajectory:
    point = JointTrajectoryPoint(positions=positions, velocities=[0.0] * len(positions))
    point.time_from_start = Duration(sec=int(seconds), nanosec=int(seconds % 1 * 1e9))
    return JointTrajectory(joint_names=list(names), points=[point])


def test_node_publishes_radians_by_name_with_stamps(robot: Robot, servos: list[Servo]) -> None:
    assert robot.spin(lambda: len(robot.states) > 10)
    message = robot.states[-1]
    assert tuple(message.name) == NAMES
    assert list(message.position) == pytest.approx([true_position(servo) for servo in servos], abs=2 * STEP)
    stamps = [m.header.stamp.sec + 1e-9 * m.header.stamp.nanosec for m in robot.states]
    assert (np.diff(stamps) > 0).all()
    assert abs(time.time() - stamps[-1]) < 1.0


def test_node_follows_trajectories_of_arm_and_gripper(robot: Robot, servos: list[Servo]) -> None:
    goal = dict(zip(NAMES, (0.4, -0.3, 0.2, 0.1, -0.2, 0.8), strict=True))
    shuffled = ("wrist_roll", "elbow_flex", "shoulder_pan", "wrist_flex", "shoulder_lift")
    robot.arm.publish(trajectory(shuffled, [goal[name] for name in shuffled], 1.0))
    robot.gripper.publish(trajectory(("gripper",), [goal["gripper"]], 0.6))
    assert robot.spin(lambda: all(abs(robot.position()[name] - goal[name]) < 0.01 for name in NAMES))
    assert [true_position(servo) for servo in servos] == pytest.approx(list(goal.values()), abs=0.01)


def test_node_refuses_what_it_cannot_understand(robot: Robot, servos: list[Servo]) -> None:
    before = [true_position(servo) for servo in servos]
    robot.arm.publish(trajectory(("shoulder_pan", "elbow"), [0.5, 0.5], 0.2))
    robot.arm.publish(trajectory(JOINTS, [float("nan")] * 5, 0.2))
    seen = len(robot.states)
    assert robot.spin(lambda: robot.driver._refused == 2 and len(robot.states) > seen + 25)
    assert [true_position(servo) for servo in servos] == pytest.approx(before, abs=2 * STEP)


def test_silent_bus_is_reported_and_stops_the_node(robot: Robot, bus: FeetechBus, servos: list[Servo]) -> None:
    robot.arm.publish(trajectory(JOINTS, [1.0] * 5, 3.0))
    moving = true_position(servos[0]) + 0.05
    assert robot.spin(lambda: true_position(servos[0]) > moving)
    bus.silent = True
    assert robot.spin(lambda: bool(robot.driver.fault))
    seen = len(robot.states)
    assert robot.spin(lambda: any(status.level == DiagnosticStatus.ERROR for status in robot.diagnostics))
    assert "does not answer" in robot.diagnostics[-1].message
    assert len(robot.states) <= seen + 1  # at most what was on its way
    assert all(servo.torque for servo in servos)
    stopped = true_position(servos[0])
    assert stopped < 0.9

    bus.silent = False
    robot.arm.publish(trajectory(JOINTS, [1.0] * 5, 0.5))  # not before a person has reset the fault
    time.sleep(0.2)
    robot.spin(lambda: false_after(1.0))
    assert true_position(servos[0]) == pytest.approx(stopped, abs=0.05)
    client = robot.client.create_client(Trigger, "/so101_driver/reset_fault")
    assert client.wait_for_service(10)
    future = client.call_async(Trigger.Request())
    assert robot.spin(future.done)
    assert future.result().success
    seen = len(robot.states)
    assert robot.spin(lambda: len(robot.states) > seen + 5)
    robot.arm.publish(trajectory(JOINTS, [0.0] * 5, 1.0))
    assert robot.spin(lambda: abs(robot.position()["shoulder_pan"]) < 0.01)


def test_pulling_the_plug_is_a_fault_that_stays(servos: list[Servo], calibration: Path, ros_context: Any) -> None:
    bus = FeetechBus(servos).__enter__()
    running = Robot(ros_context, bus.port, calibration)
    try:
        assert running.spin(running.ready)
        unplug(bus)
        assert running.spin(lambda: bool(running.driver.fault))
        assert running.spin(lambda: any(status.level == DiagnosticStatus.ERROR for status in running.diagnostics))
        assert not running.driver._reset(Trigger.Request(), Trigger.Response()).success
        assert "port is gone" in running.driver.fault
    finally:
        running.close()


def test_after_an_exception_the_arm_stays_where_it_is(
    bus: FeetechBus, servos: list[Servo], calibration: Path, ros_context: Any
) -> None:
    before = [true_position(servo) for servo in servos]
    park = [0.3, -0.3, 0.3, -0.3, 0.3, 0.5]
    running = Robot(ros_context, bus.port, calibration, park=park, park_speed=1.0, release=True)
    assert running.spin(running.ready)
    running.close()  # as `spin.run` ends it, no signal having come
    time.sleep(0.2)
    assert [true_position(servo) for servo in servos] == pytest.approx(before, abs=2 * STEP)
    assert all(servo.torque for servo in servos)


_deadlines: dict[str, float] = {}


def false_after(seconds: float) -> bool:
    """For `Robot.spin`: true when the time is over."""
    return time.monotonic() > _deadlines.setdefault("end", time.monotonic() + seconds)


def test_ended_by_a_signal_the_arm_is_parked_and_stays_on(
    bus: FeetechBus, servos: list[Servo], calibration: Path, ros_domain: None
) -> None:
    park = [0.3, -0.3, 0.3, -0.3, 0.3, 0.5]
    arguments = ["--ros-args", "-p", f"port:={bus.port}", "-p", f"calibration:={calibration}"]
    arguments += ["-p", f"park:={park}", "-p", "park_speed:=1.0"]
    command = [sys.executable, "-m", "robopolicy_ros.so101_driver_node", *arguments]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        assert wait(lambda: all(servo.torque for servo in servos) or process.poll() is not None, 60), process.poll()
        assert wait(lambda: bus.instructions > 300, 30)
        os.kill(process.pid, signal.SIGTERM)
        output, _ = process.communicate(timeout=30)
    finally:
        process.kill()
    assert process.returncode == 0, output
    assert [true_position(servo) for servo in servos] == pytest.approx(park, abs=0.01)
    assert [servo.torque_losses for servo in servos] == [0] * 6


def test_node_without_port_says_what_it_needs(ros_context: Any) -> None:
    with pytest.raises(UserError, match="-p port:="):
        So101Driver(context=ros_context)
