"""Delays are found in signals whose delay is known."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from robopolicy.errors import UserError
from robopolicy.runtime.clock import NS
from robopolicy.runtime.commanded import CommandedMotion, Points
from robopolicy.runtime.latency_calibration import (
    Chirp,
    blink_times,
    measure_delay,
    safe_chirp,
    screen_brightness,
    thumbnail,
)
from robopolicy.runtime.limits import AxisLimits
from robopolicy.runtime.robots import Robot, read_robot


@pytest.mark.parametrize("delay", [0.0, 0.0123, 0.05, 0.18, 0.4])
def test_delay_of_a_chirp_is_found_at_30_hz_with_noise(delay: float) -> None:
    chirp = Chirp(0.1)
    rng = np.random.default_rng(0)
    shown = np.arange(0, 8, 0.005)
    times = np.arange(-0.1, 9.5, 1 / 30) + rng.uniform(-0.002, 0.002, 288)
    measured = 3.0 + 0.8 * chirp.at(times - delay) + rng.normal(0, 0.002, len(times))
    found = measure_delay(shown, chirp.at(shown), times, measured)
    assert found.seconds == pytest.approx(delay, abs=0.002)
    assert found.halves == pytest.approx((delay, delay), abs=0.004)
    assert found.correlation > 0.98


def test_a_servo_of_first_order_is_late_by_its_time_constant() -> None:
    chirp, constant, delay = Chirp(0.1), 0.04, 0.03
    grid = np.arange(0, 9.5, 0.001)
    command, state = chirp.at(grid - delay), np.zeros(len(grid))
    for k in range(1, len(grid)):
        state[k] = state[k - 1] + 0.001 / constant * (command[k] - state[k - 1])
    found = measure_delay(grid[:8000], chirp.at(grid[:8000]), grid, state)
    assert found.seconds == pytest.approx(constant + delay, abs=0.008)


def test_chirp_starts_and_ends_at_rest_inside_its_amplitude() -> None:
    chirp = Chirp(0.2)
    time_ = np.arange(-1, 10, 0.001)
    found = chirp.at(time_)
    velocity = np.gradient(found, 0.001)
    assert np.abs(found).max() <= 0.2
    assert found[time_ < 0] == pytest.approx(0)
    assert found[time_ > 8] == pytest.approx(0, abs=1e-9)
    assert np.abs(velocity[(time_ < 0.02) | (time_ > 7.98)]).max() < 0.01


@pytest.mark.parametrize("name", ["fr3", "ur5e", "so101"])
def test_safe_chirp_keeps_to_half_of_the_limits(name: str) -> None:
    for axis in read_robot(name).limits.axes.values():
        middle = (axis.lower + axis.upper) / 2
        chirp = safe_chirp(axis, middle, 0.3)
        time_ = np.arange(0, chirp.duration, 0.001)
        velocity = np.gradient(chirp.at(time_), 0.001)
        assert np.abs(velocity).max() <= 0.51 * axis.velocity
        assert np.abs(np.gradient(velocity, 0.001)).max() <= 0.51 * axis.acceleration
        assert np.abs(chirp.at(time_)).max() <= axis.upper - axis.margin - middle


def test_chirp_at_the_end_of_the_range_is_refused() -> None:
    with pytest.raises(UserError, match="towards the middle"):
        safe_chirp(AxisLimits(-1, 1, 1, 5, 50, margin=0.1), 0.895, 0.2)


def test_signals_that_are_not_alike_are_refused() -> None:
    grid = np.arange(0, 8, 0.01)
    noise = np.random.default_rng(0).normal(size=len(grid) + 200)
    with pytest.raises(UserError, match="not alike"):
        measure_delay(grid, Chirp(1).at(grid), np.arange(len(noise)) * 0.01, noise)
    with pytest.raises(UserError, match="not alike"):
        measure_delay(grid, Chirp(1).at(grid), np.arange(len(noise)) * 0.01, np.zeros(len(noise)))
    with pytest.raises(UserError, match="Record for longer"):
        measure_delay(grid[:100], Chirp(1).at(grid[:100]), grid, grid)


def test_blinking_screen_in_a_corner_of_the_picture() -> None:
    """Filmed at 30 Hz with an exposure of 10 ms, beside a lamp that flickers otherwise."""
    rng = np.random.default_rng(1)
    flips, delay = blink_times(12.0), 0.073
    light = np.arange(len(flips)) % 2
    frames, times = [], np.arange(0.0, 13.3, 1 / 30)
    for t in times:
        exposure = np.linspace(t - delay - 0.005, t - delay + 0.005, 20)
        index = np.searchsorted(flips, exposure, side="right") - 1
        level = np.where(index < 0, 0, light[np.maximum(index, 0)]).mean()
        image = rng.integers(90, 110, (120, 160, 3))
        image[:60, :80] = 30 + 200 * level
        image[100:, 140:] += rng.integers(0, 60)
        frames.append(thumbnail(image.astype(np.uint8)))
    found = measure_delay(flips, light, times, screen_brightness(np.stack(frames)), steps=True)
    assert found.seconds == pytest.approx(delay, abs=0.004)


def test_small_images_are_refused() -> None:
    with pytest.raises(UserError, match="too small"):
        thumbnail(np.zeros((10, 10, 3), np.uint8))


# The whole measurement over DDS, on an arm and a camera whose delays are known.

pytest.importorskip("rclpy", reason="ROS 2 is not installed: pip install 'robopolicy[ros]'")

from rclpy.executors import SingleThreadedExecutor  # noqa: E402
from rclpy.node import Node  # noqa: E402
from sensor_msgs.msg import Image, JointState  # noqa: E402
from std_msgs.msg import Float64MultiArray  # noqa: E402
from trajectory_msgs.msg import JointTrajectory  # noqa: E402

from robopolicy_ros.calibrate_latency import Screen, calibrate_action, calibrate_camera, main  # noqa: E402
from robopolicy_ros.messages import image_message, joints_message, read_command  # noqa: E402
from robopolicy_ros.stamps import Stamps  # noqa: E402

LATE = 0.3


def template() -> Robot:
    robot = read_robot("template")
    camera = replace(robot.contract.streams["wrist_camera"], size=(48, 64))
    return replace(robot, contract=replace(robot.contract, streams=robot.contract.streams | {"wrist_camera": camera}))


class LateRobot:
    """The template's arm, which does everything `LATE` seconds later; its camera sees `light` as late."""

    def __init__(self, context: Any) -> None:
        self.contract = template().contract
        self.node = Node("late_robot", context=context)
        self.stamps = Stamps.measure()
        self.joints = self.node.create_publisher(JointState, "joint_states", 10)
        self.gripper = self.node.create_publisher(JointState, "gripper/joint_states", 10)
        self.camera = self.node.create_publisher(Image, "wrist_camera/image_raw", 1)
        now = time.monotonic_ns()
        self.motions = {name: CommandedMotion() for name in self.contract.commands}
        self.motions["arm"].follow(now - NS, Points(np.array([now - NS]), np.array([[0.4, 0.2]]), hold=True))
        self.motions["gripper"].follow(now - NS, Points(np.array([now - NS]), np.array([[0.5]]), hold=True))
        self.light = [(now, False)]
        self.node.create_subscription(
            JointTrajectory, "arm_controller/joint_trajectory", lambda m: self.receive("arm", m), 1
        )
        self.node.create_subscription(
            Float64MultiArray, "gripper_controller/commands", lambda m: self.receive("gripper", m), 1
        )
        self.node.create_timer(0.01, self.publish)
        self.node.create_timer(1 / 30, self.film)
        self.executor = SingleThreadedExecutor(context=context)
        self.executor.add_node(self.node)
        self.end = threading.Event()
        self.thread = threading.Thread(target=self.spin, daemon=True)
        self.thread.start()

    def spin(self) -> None:
        while not self.end.is_set():
            self.executor.spin_once(timeout_sec=0.05)

    def receive(self, name: str, message: Any) -> None:
        now = time.monotonic_ns()
        self.motions[name].follow(now, read_command(message, self.contract.commands[name], now, self.stamps))

    def publish(self) -> None:
        now = time.monotonic_ns()
        arm, gripper = (self.motions[name].at(now - round(LATE * NS)) for name in ("arm", "gripper"))
        assert arm is not None and gripper is not None
        stamp = self.stamps.to_stamp(now)
        self.joints.publish(joints_message(("joint_2", "joint_1"), arm.position[::-1], stamp=stamp))
        self.gripper.publish(joints_message(("finger_joint",), gripper.position / 25, stamp=stamp))

    def film(self) -> None:
        now = time.monotonic_ns()
        seen = [light for moment, light in list(self.light) if moment <= now - round(LATE * NS)]
        message = image_message(np.full((48, 64, 3), 200 if seen and seen[-1] else 20, np.uint8))
        message.header.stamp = self.stamps.to_stamp(now)
        self.camera.publish(message)

    def close(self) -> None:
        self.end.set()
        self.thread.join(10)
        self.executor.shutdown()
        self.node.destroy_node()


@pytest.fixture
def late_robot(ros_context: Any) -> Iterator[LateRobot]:
    running = LateRobot(ros_context)
    yield running
    running.close()


@pytest.mark.parametrize("joint", ["joint_2", "opening"])  # a trajectory, and set points
def test_latency_of_a_late_arm_is_measured(late_robot: LateRobot, ros_context: Any, joint: str) -> None:
    told: list[str] = []
    found = calibrate_action(template(), joint, 0.15, lambda text: told.append(text) is None, context=ros_context)
    assert LATE - 0.02 < found.seconds < LATE + 0.15  # on a busy machine messages are late, too
    assert f"{joint} will move by +-" in told[0]


def test_nothing_moves_without_a_yes(late_robot: LateRobot, ros_context: Any) -> None:
    with pytest.raises(UserError, match="nothing was moved"):
        calibrate_action(template(), "joint_1", 0.1, lambda text: False, context=ros_context)
    assert late_robot.motions["arm"].at(time.monotonic_ns()).position == pytest.approx([0.4, 0.2])  # type: ignore[union-attr]


def test_arm_outside_its_limits_is_not_moved(late_robot: LateRobot, ros_context: Any) -> None:
    now = time.monotonic_ns()
    late_robot.motions["arm"].follow(now, Points(np.array([now]), np.array([[0.4, 1.79]]), hold=True))
    time.sleep(2 * LATE)
    with pytest.raises(UserError, match="joint_2 at 1.79"):
        calibrate_action(template(), "joint_1", 0.1, lambda text: True, context=ros_context)


def test_unknown_joint_gets_a_suggestion(ros_context: Any) -> None:
    with pytest.raises(UserError, match="Did you mean 'joint_1'"):
        calibrate_action(template(), "joint_11", 0.1, lambda text: True, context=ros_context)


def test_latency_of_a_late_camera_is_measured(late_robot: LateRobot, ros_context: Any) -> None:
    def show(light: bool) -> None:
        late_robot.light.append((time.monotonic_ns(), light))

    found = calibrate_camera(template(), "wrist_camera", show, 8.0, context=ros_context)
    # A frame shows the light of its moment; between frames the brightness is interpolated.
    assert LATE - 0.02 < found.seconds < LATE + 0.15  # on a busy machine messages are late, too


def test_screen_is_dark_and_light(monkeypatch: pytest.MonkeyPatch) -> None:
    pygame = pytest.importorskip("pygame", reason="pygame is not installed: pip install 'robopolicy[teleop]'")
    monkeypatch.setenv("SDL_VIDEODRIVER", "dummy")
    screen = Screen()
    try:
        for light in (True, False):
            screen.show(light)
            assert pygame.display.get_surface().get_at((5, 5))[:3] == (255 * light,) * 3
    finally:
        screen.close()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["action", "--robot", "ur5", "--joint", "elbow_joint"], "Did you mean 'ur5e'"),
        (["action", "--robot", "ur5e", "--joint", "elbow"], "Did you mean 'elbow_joint'"),
        (["camera", "--robot", "ur5e", "--stream", "joints"], "--stream joints is no camera"),
    ],
)
def test_command_line_names_what_is_wrong(
    ros_domain: None,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    words: list[str],
    message: str,
) -> None:
    monkeypatch.setenv("SDL_VIDEODRIVER", "dummy")
    assert main(words) == 2
    assert message in capsys.readouterr().err
