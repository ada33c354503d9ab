"""A process of its own that checks every command on its way to the robot and counts what breaks the limits."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import rclpy
from geometry_msgs.msg import PoseStamped, TwistStamped
from rcl_interfaces.msg import ParameterDescriptor
from rclpy.executors import ExternalShutdownException, SingleThreadedExecutor
from rclpy.node import Node
from rclpy.qos import QoSProfile, ReliabilityPolicy
from sensor_msgs.msg import JointState
from std_msgs.msg import Float64MultiArray
from std_srvs.srv import Trigger
from trajectory_msgs.msg import JointTrajectory

from robopolicy.runtime.contract import CommandTopic, Contract, read_contract
from robopolicy.runtime.limits import Limits, read_limits
from robopolicy.runtime.robots import robot_folder
from robopolicy_ros.motion_check import Bounds, RotationCheck, SetPointCheck, TrajectoryCheck

_PAUSE = 0.3  # seconds without set points after which the next one begins a motion

MESSAGES = {
    "trajectory_msgs/msg/JointTrajectory": JointTrajectory,
    "std_msgs/msg/Float64MultiArray": Float64MultiArray,
    "sensor_msgs/msg/JointState": JointState,
    "geometry_msgs/msg/PoseStamped": PoseStamped,
    "geometry_msgs/msg/TwistStamped": TwistStamped,
}


class CommandMonitor:
    """Judges the messages of one command topic.

    Args:
        contract, limits: of the robot.
        command: the topic.

    Attributes:
        messages: judged so far.
        missed: messages that did not reach the monitor, by their numbers.
        check: its violations.
    """

    def __init__(self, contract: Contract, limits: Limits, command: CommandTopic) -> None:
        self.command = command
        self.messages = self.missed = 0
        entries = command.entries[:3] if command.type == "geometry_msgs/msg/PoseStamped" else command.entries
        bounds = Bounds.of(limits, [contract.action.names[entry] for entry in entries])
        if command.type == "trajectory_msgs/msg/JointTrajectory":
            self.check: SetPointCheck | TrajectoryCheck = TrajectoryCheck(bounds, limits.max_start_jump)
        else:
            self.check = SetPointCheck(bounds, 1 / contract.command_rate, limits.max_start_jump)
        self._rotation: RotationCheck | None = None
        if command.type == "geometry_msgs/msg/PoseStamped" and limits.rotation is not None:
            self._rotation = RotationCheck(limits.rotation, 1 / contract.command_rate, self.check.violations)
        self._measured: np.ndarray | None = None
        self._last = 0.0
        self._sender, self._number = b"", 0

    def see(self, state: JointState) -> None:
        """Take the robot's joint positions."""
        found = dict(zip(state.name, state.position, strict=False))
        if self.command.names and all(name in found for name in self.command.names):
            self._measured = self._action(np.array([found[name] for name in self.command.names]))

    def receive(self, message: Any, sent: float, sender: bytes = b"", number: int | None = None) -> None:
        """Judge a command.

        Args:
            message: of the topic's type.
            sent: when [s].
            sender: its publisher.
            number: of the message, counted by the publisher from 1 on; None: not known.
        """
        self.messages += 1
        self._count(sender, number)
        if isinstance(self.check, TrajectoryCheck):
            self._receive_trajectory(self.check, message, sent)
            return
        values = self._values(message)
        if values is None:
            return
        if sent - self._last > _PAUSE:
            self._restart()
        self._last = sent
        self.check.check(sent, values, self._measured)
        if self._rotation is not None:
            turned = message.pose.orientation
            self._rotation.check(sent, np.array([turned.x, turned.y, turned.z, turned.w]))

    def report(self) -> dict[str, Any]:
        found = self.check.violations
        counts = {"messages": self.messages, "missed": self.missed}
        return counts | {"violations": dict(found.counts), "examples": found.examples}

    def _count(self, sender: bytes, number: int | None) -> None:
        """After a message that did not come nobody here knows what the robot follows."""
        if number is None:
            return
        before, self._number = (self._number if sender == self._sender else 0), number
        self._sender = sender
        if number != before + 1:
            self.missed += number - before - 1
            self._restart()

    def _restart(self) -> None:
        self.check.restart()
        if self._rotation is not None:
            self._rotation.restart()

    def _action(self, values: np.ndarray) -> np.ndarray:
        return np.asarray(self.command.scale) * values + np.asarray(self.command.offset)

    def _values(self, message: Any) -> np.ndarray | None:
        if isinstance(message, PoseStamped):
            return np.array([message.pose.position.x, message.pose.position.y, message.pose.position.z])
        if isinstance(message, TwistStamped):
            linear, angular = message.twist.linear, message.twist.angular
            return self._action(np.array([linear.x, linear.y, linear.z, angular.x, angular.y, angular.z]))
        if isinstance(message, JointState):
            if sorted(message.name) != sorted(self.command.names) or len(message.position) != len(message.name):
                self.check.violations.add("names", str(list(message.name)))
                return None
            found = dict(zip(message.name, message.position, strict=True))
            return self._action(np.array([found[name] for name in self.command.names]))
        if len(message.data) != len(self.command.names):
            self.check.violations.add("names", f"{len(message.data)} numbers")
            return None
        return self._action(np.array(message.data))

    def _receive_trajectory(self, check: TrajectoryCheck, message: JointTrajectory, sent: float) -> None:
        wanted = self.command.names
        points = message.points
        whole = all(len(p.positions) == len(p.velocities) == len(wanted) for p in points)
        if sorted(message.joint_names) != sorted(wanted) or not points or not whole:
            check.violations.add("names", f"{list(message.joint_names)}, {len(points)} points")
            return
        order = [list(message.joint_names).index(name) for name in wanted]
        times = np.array([p.time_from_start.sec + 1e-9 * p.time_from_start.nanosec for p in points])
        positions = np.array([self._action(np.array(p.positions)[order]) for p in points])
        velocities = np.array([np.asarray(self.command.scale) * np.array(p.velocities)[order] for p in points])
        check.check(sent, times, positions, velocities, self._measured)


class MonitorNode(Node):
    """Subscribes to every command of a contract; ``~/report`` answers with counts as JSON."""

    def __init__(self) -> None:
        super().__init__("monitor")
        about = ParameterDescriptor(description="name of an arm or folder of its contract", read_only=True)
        robot = self.declare_parameter("robot", "", about).get_parameter_value().string_value
        folder: Path = robot_folder(robot)
        contract = read_contract(folder)
        limits = read_limits(folder, contract)
        self.monitors = {n: CommandMonitor(contract, limits, command) for n, command in contract.commands.items()}
        reliable = QoSProfile(depth=200, reliability=ReliabilityPolicy.RELIABLE)
        for monitor in self.monitors.values():
            kind = MESSAGES[monitor.command.type]
            self.create_subscription(kind, monitor.command.topic, self._judged(monitor), reliable)
        states = QoSProfile(depth=10, reliability=ReliabilityPolicy.BEST_EFFORT)
        self.create_subscription(JointState, contract.streams[contract.measured].topic, self._see, states)
        self.create_service(Trigger, "~/report", self._report)

    def report(self) -> dict[str, Any]:
        """What was found, by command."""
        return {name: monitor.report() for name, monitor in self.monitors.items()}

    def _judged(self, monitor: CommandMonitor) -> Callable[[Any, Any], None]:
        def receive(message: Any, info: Any) -> None:
            known = set(monitor.check.violations.counts)
            sender, number = info["publisher_gid"]["data"], info["publication_sequence_number"]
            monitor.receive(message, info["source_timestamp"] / 1e9, sender, number)
            for kind in set(monitor.check.violations.counts) - known:
                topic, example = monitor.command.topic, monitor.check.violations.examples[kind]
                self.get_logger().error(f"{topic}: violation of '{kind}': {example}")

        return receive

    def _see(self, state: JointState) -> None:
        for monitor in self.monitors.values():
            monitor.see(state)

    def _report(self, request: Trigger.Request, response: Trigger.Response) -> Trigger.Response:
        response.success = not any(monitor.check.violations.counts for monitor in self.monitors.values())
        response.message = json.dumps(self.report())
        return response


def main(args: list[str] | None = None) -> None:
    """Run until interrupted, then print the report."""
    rclpy.init(args=args)
    node = MonitorNode()
    executor = SingleThreadedExecutor()
    executor.add_node(node)
    with contextlib.suppress(KeyboardInterrupt, ExternalShutdownException):
        executor.spin()
    print(json.dumps(node.report()))


if __name__ == "__main__":
    main()
