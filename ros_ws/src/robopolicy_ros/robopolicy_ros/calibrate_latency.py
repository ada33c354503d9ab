"""Measures the latencies of a contract: how late an arm follows its commands, how late a camera sees.

ros2 run robopolicy_ros calibrate_latency action --robot ur5e --joint wrist_3_joint
ros2 run robopolicy_ros calibrate_latency camera --robot ur5e --stream wrist_camera
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import rclpy
from rclpy.context import Context
from rclpy.executors import SingleThreadedExecutor
from rclpy.node import Node

from robopolicy.errors import UserError, did_you_mean, require_extra
from robopolicy.runtime.check import failed
from robopolicy.runtime.clock import NS
from robopolicy.runtime.contract import CommandTopic, Part
from robopolicy.runtime.exchange import Command, Trajectory
from robopolicy.runtime.graph_check import HeardCommand, check_command, check_posture
from robopolicy.runtime.latency_calibration import (
    Delay,
    blink_times,
    measure_delay,
    safe_chirp,
    screen_brightness,
    thumbnail,
)
from robopolicy.runtime.robots import Robot, read_robot
from robopolicy.runtime.samples import Joints
from robopolicy_ros.messages import MESSAGE_TYPES, command_message, read_sample, trajectory_message
from robopolicy_ros.qos import COMMAND, subscription
from robopolicy_ros.stamps import Stamps, stamp_ns

POINTS = 25
"""Points of a test trajectory per second."""
WAIT = 10.0
"""Seconds for topics to appear."""


class Calibration:
    """A node that listens to one stream of a robot.

    Args:
        robot: whose contract names the topics.
        stream: name of the stream.
        namespace: of the topics.
        context: of rclpy.
    """

    def __init__(self, robot: Robot, stream: str, namespace: str, context: Context) -> None:
        self.robot = robot
        self.stream = robot.contract.streams[stream]
        self.node = Node("calibrate_latency", namespace=namespace, context=context)
        self.executor = SingleThreadedExecutor(context=context)
        self.executor.add_node(self.node)
        self.stamps = Stamps.measure()
        self.times: list[int] = []
        self.values: list[Any] = []
        self.keep: Callable[[Any], Any] = lambda value: value
        self.node.create_subscription(
            MESSAGE_TYPES[self.stream.type], self.stream.topic, self._receive, subscription(self.stream)
        )

    def _receive(self, message: Any) -> None:
        stamped = self.stream.stamp == "header" and stamp_ns(message.header.stamp)
        measured = self.stamps.to_monotonic(message.header.stamp) if stamped else time.monotonic_ns()
        if not self.times or measured > self.times[-1]:
            self.times.append(measured)
            self.values.append(self.keep(read_sample(message, self.stream.type)))

    def spin(self, condition: Callable[[], bool], seconds: float) -> bool:
        """Handle messages until a condition holds; whether it does."""
        end = time.monotonic() + seconds
        while not (done := condition()) and (left := end - time.monotonic()) > 0:
            self.executor.spin_once(timeout_sec=min(left, 0.01))
        return done

    def wait_for_stream(self) -> None:
        """Wait for the first message.

        Raises:
            UserError: there is none.
        """
        if not self.spin(lambda: bool(self.values), WAIT):
            raise UserError(f"{self.stream.topic} is silent. Look at: robopolicy hardware check … --live")

    def close(self) -> None:
        self.executor.shutdown()
        self.node.destroy_node()


def calibrate_action(
    robot: Robot,
    joint: str,
    amplitude: float,
    confirm: Callable[[str], bool],
    namespace: str = "",
    context: Context | None = None,
) -> Delay:
    """Move one entry of the action to and fro, and see how late it follows.

    Args:
        robot: to be moved.
        joint: entry of the action.
        amplitude: largest distance from where it is, in its unit; limits make it smaller.
        confirm: is told what will happen, and says whether it may.
        namespace: of the topics.
        context: of rclpy.

    Raises:
        UserError: the robot is not ready, is outside its limits, or did not follow.
    """
    name, command = _command_of(robot, joint)
    stream, column = _measurement_of(robot, command, joint)
    session = Calibration(robot, stream, namespace, context or rclpy.get_default_context())
    try:
        session.wait_for_stream()
        _check_ready(session, name, command)
        publisher: Any = session.node.create_publisher(MESSAGE_TYPES[command.type], command.topic, COMMAND)
        entries = _entries(robot, command)
        parts = [_measurement_of(robot, command, entry)[1] for entry in entries]
        rest = np.array([_value(session.values[-1], *part) for part in parts])
        index = entries.index(joint)
        chirp = safe_chirp(robot.limits.axes[joint], float(rest[index]), amplitude)
        if not confirm(
            f"{joint} will move by +-{chirp.amplitude:.3f} about {rest[index]:.3f} for {chirp.duration:g} s, up to "
            f"{chirp.high:g} Hz. Hand on the stop button, nobody in reach?"
        ):
            raise UserError("Not confirmed; nothing was moved.")
        if not session.spin(lambda: publisher.get_subscription_count() > 0, WAIT):
            raise UserError(f"Nobody listens to {command.topic}. Is the controller active?")
        session.times.clear()
        session.values.clear()
        begin = _move(session, publisher, command, rest, index, chirp)
        session.spin(lambda: False, 1.2)
        shown = np.arange(0, chirp.duration, 0.005)
        measured = np.array([_value(value, *column) for value in session.values])
        times = (np.array(session.times) - begin) / NS
        return measure_delay(shown, chirp.at(shown), times, measured)
    finally:
        session.close()


def _move(session: Calibration, publisher: Any, command: CommandTopic, rest: np.ndarray, index: int, chirp: Any) -> int:
    """Send the motion; returns when it begins [ns]. A trajectory goes out at once and ends at rest by itself."""
    size = len(session.robot.contract.action.names)
    grid = np.arange(1, round(chirp.duration * POINTS) + 1) / POINTS
    rows = np.tile(rest, (len(grid), 1))
    rows[:, index] += chirp.at(grid)
    positions = np.zeros((len(grid), size))
    positions[:, list(command.entries)] = rows
    if command.type == "trajectory_msgs/msg/JointTrajectory":
        velocities = np.gradient(positions, 1 / POINTS, axis=0)
        velocities[-1] = 0.0
        accelerations = np.gradient(velocities, 1 / POINTS, axis=0)
        accelerations[-1] = 0.0
        # The latency that the contract has now must not shift what is measured.
        times = (grid * NS).astype(np.int64) + round(command.latency * NS)
        message = trajectory_message(Trajectory(times, positions, velocities, accelerations), command, 0)
        begin = time.monotonic_ns()
        publisher.publish(message)
        session.spin(lambda: False, chirp.duration)
        return begin
    begin = time.monotonic_ns()
    rate = session.robot.contract.command_rate
    zero = np.zeros(size)
    for k in range(round(chirp.duration * rate) + 1):
        due = begin + round(k / rate * NS)
        session.spin(lambda due=due: time.monotonic_ns() >= due, 1.0)  # type: ignore[misc]
        position = np.zeros(size)
        position[list(command.entries)] = rest
        position[command.entries[index]] += float(chirp.at(np.array([(time.monotonic_ns() - begin) / NS]))[0])
        stamp = session.stamps.to_stamp(time.monotonic_ns())
        publisher.publish(command_message(Command(due, position, zero, zero), command, stamp))
    return begin


def _check_ready(session: Calibration, name: str, command: CommandTopic) -> None:
    robot = session.robot
    if robot.contract.streams[robot.contract.measured] == session.stream:
        problems = [f for f in check_posture(robot.contract, robot.limits, session.values[-1]) if f.level == "FAIL"]
        if problems:
            raise UserError(f"{problems[0].message}. {problems[0].advice}")
    session.spin(lambda: False, 1.0)
    topic = session.node.resolve_topic_name(command.topic)
    heard = HeardCommand(
        tuple({info.topic_type for info in session.node.get_subscriptions_info_by_topic(topic)}),
        tuple(info.node_name for info in session.node.get_publishers_info_by_topic(topic)),
        tuple(info.node_name for info in session.node.get_subscriptions_info_by_topic(topic)),
    )
    finding = check_command(name, command, heard)
    if failed([finding]):
        raise UserError(f"{finding.message}. {finding.advice}")


def _command_of(robot: Robot, joint: str) -> tuple[str, CommandTopic]:
    names = robot.contract.action.names
    if joint not in names or robot.contract.action.kind != "joint_position":
        raise UserError(f"--joint {joint} is no joint of the action.{did_you_mean(joint, names)}")
    return next((n, c) for n, c in robot.contract.commands.items() if names.index(joint) in c.entries)


def _entries(robot: Robot, command: CommandTopic) -> list[str]:
    return [robot.contract.action.names[entry] for entry in command.entries]


def _measurement_of(robot: Robot, command: CommandTopic, joint: str) -> tuple[str, tuple[Part, int]]:
    """The stream, and in it the part and entry, that tell where an entry of the action is."""
    name = command.names[_entries(robot, command).index(joint)]
    for observation in robot.contract.observations.values():
        for part in observation.parts:
            if name in part.names and part.field == "position":
                return part.stream, (part, part.names.index(name))
    raise UserError(f"No observation of the contract holds the position of {name}.")


def _value(sample: Joints, part: Part, index: int) -> float:
    scale, offset = (np.broadcast_to(values, len(part.names))[index] for values in (part.scale, part.offset))
    if sample.position is None or part.names[index] not in sample.names:
        raise UserError(f"A message does not hold the position of {part.names[index]}.")
    return float(scale * sample.position[sample.names.index(part.names[index])] + offset)


def calibrate_camera(
    robot: Robot,
    stream: str,
    show: Callable[[bool], None],
    duration: float = 12.0,
    namespace: str = "",
    context: Context | None = None,
) -> Delay:
    """Let a screen blink before a camera, and see how late it is filmed.

    Args:
        robot: with the camera.
        stream: of the camera.
        show: makes the screen light or dark and returns when it is.
        duration: seconds.
        namespace: of the topics.
        context: of rclpy.

    Raises:
        UserError: the camera is silent, or does not see the screen.
    """
    cameras = [name for name, found in robot.contract.streams.items() if found.image]
    if stream not in cameras:
        raise UserError(f"--stream {stream} is no camera.{did_you_mean(stream, cameras)}")
    session = Calibration(robot, stream, namespace, context or rclpy.get_default_context())
    session.keep = thumbnail
    try:
        show(False)
        session.wait_for_stream()
        shown: list[tuple[int, bool]] = []
        begin = time.monotonic_ns()
        for k, due in enumerate(blink_times(duration)):
            session.spin(lambda due=due: time.monotonic_ns() - begin >= due * NS, 2.0)  # type: ignore[misc]
            show(k % 2 == 1)
            shown.append((time.monotonic_ns(), k % 2 == 1))
        session.spin(lambda: False, 1.2)
        times, light = (np.array(column) for column in zip(*shown, strict=True))
        filmed = screen_brightness(np.stack(session.values))
        return measure_delay(
            (times - begin) / NS, light.astype(float), (np.array(session.times) - begin) / NS, filmed, steps=True
        )
    finally:
        session.close()


class Screen:
    """A window over the whole screen that is light or dark."""

    def __init__(self) -> None:
        self._pygame = require_extra("pygame", "teleop")
        self._pygame.init()
        self._window = self._pygame.display.set_mode((0, 0), self._pygame.FULLSCREEN, vsync=1)
        self._pygame.mouse.set_visible(False)

    def show(self, light: bool) -> None:
        """Draw; returns after the buffers were swapped."""
        self._pygame.event.pump()
        self._window.fill((255, 255, 255) if light else (0, 0, 0))
        self._pygame.display.flip()

    def close(self) -> None:
        self._pygame.quit()


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, and say which line of the contract to change; 2 after an error."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_subparsers(dest="what", required=True)
    for name, help_text in (("action", "arm or gripper"), ("camera", "camera, with this machine's screen")):
        one = what.add_parser(name, help=help_text)
        one.add_argument("--robot", required=True, help="name, or folder with contract.yaml")
        one.add_argument("--namespace", default="", help="of its topics")
    what.choices["action"].add_argument("--joint", required=True, help="entry of the action that moves")
    what.choices["action"].add_argument("--amplitude", type=float, default=0.15, help="in its unit (default: 0.15)")
    what.choices["action"].add_argument("--yes", action="store_true", help="do not ask before it moves")
    what.choices["camera"].add_argument("--stream", required=True, help="of the camera, as the contract names it")
    what.choices["camera"].add_argument(
        "--screen-latency", type=float, default=0.02, help="of the screen itself [s] (default: 0.02), taken off"
    )
    args = parser.parse_args(arguments)
    context = rclpy.get_default_context()
    rclpy.init(args=[])
    try:
        robot = read_robot(args.robot)
        if args.what == "action":
            delay = calibrate_action(robot, args.joint, args.amplitude, _asker(args.yes), args.namespace, context)
            seconds, entry = delay.seconds, f"commands.{_command_of(robot, args.joint)[0]}.latency"
        else:
            screen = Screen()
            try:
                delay = calibrate_camera(robot, args.stream, screen.show, namespace=args.namespace, context=context)
            finally:
                screen.close()
            seconds, entry = max(delay.seconds - args.screen_latency, 0.0), f"streams.{args.stream}.latency"
        print(
            f"{seconds:.3f} s (correlation {delay.correlation:.3f}; first half {delay.halves[0]:.3f}, second half "
            f"{delay.halves[1]:.3f} s)\nwrite into {robot.folder / 'contract.yaml'}: {entry}: {seconds:.3f}"
        )
        return 0
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    finally:
        rclpy.try_shutdown()


def _asker(yes: bool) -> Callable[[str], bool]:
    def ask(question: str) -> bool:
        print(question)
        return yes or input("Type yes to start: ").strip().lower() == "yes"

    return ask


if __name__ == "__main__":
    sys.exit(main())
