"""An SO-101 arm as a ROS 2 robot: joint states in radians, trajectories as a joint trajectory controller takes them.

ros2 run robopolicy_ros so101_driver_node --ros-args -p port:=/dev/ttyACM0 -p calibration:=/path/of/arm.json
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from diagnostic_msgs.msg import DiagnosticArray, DiagnosticStatus, KeyValue
from rcl_interfaces.msg import ParameterDescriptor
from rclpy.clock import Clock
from rclpy.clock_type import ClockType
from rclpy.node import Node
from sensor_msgs.msg import JointState
from std_srvs.srv import Trigger

from robopolicy.errors import UserError
from robopolicy.runtime.clock import NS, nanoseconds
from robopolicy.runtime.commanded import CommandedMotion, Points
from robopolicy.runtime.contract import CommandTopic, Contract
from robopolicy.runtime.limits import Limits
from robopolicy.runtime.robots import read_robot
from robopolicy_ros import spin
from robopolicy_ros.feetech_arm import FeetechArm
from robopolicy_ros.messages import MESSAGE_TYPES, joints_message, read_command
from robopolicy_ros.qos import COMMAND_SUBSCRIPTION
from robopolicy_ros.stamps import Stamps

PARAMETERS: dict[str, tuple[Any, str]] = {
    "port": ("", "serial port of the arm, e.g. /dev/ttyACM0; better the name under /dev/serial/by-id"),
    "calibration": ("", "file that lerobot-calibrate wrote"),
    "robot": ("so101", "name or folder of the robot: its contract and limits"),
    "rate": (50.0, "bus cycles per second; a cycle takes 3 to 6 ms"),
    "max_relative_target": (0.5, "largest distance of a goal from the measured position [rad, share of the opening]"),
    "park": ([0.0], "posture to go to when a signal ends the node, in the order of the contract's action; [0.0]: stay"),
    "park_speed": (0.4, "largest speed on the way there [rad/s]"),
    "release": (False, "switch the torque off at the end; an arm that does not lie falls"),
}
FAILURES = 3
"""Bus cycles in a row without an answer that are a fault."""
HOT = 60
"""Degrees Celsius at which a servo is about to protect itself (70)."""
_TAIL = 10


class ArmSampler:
    """What the arm is to do at each moment, from trajectories for some of its joints.

    Args:
        contract, limits: of the robot.
    """

    def __init__(self, contract: Contract, limits: Limits) -> None:
        axes = [limits.axes[name] for name in contract.action.names]
        self.lower, self.upper = (np.array([getattr(axis, side) for axis in axes]) for side in ("lower", "upper"))
        self.velocity, self.deceleration = (
            np.array([getattr(axis, name) for axis in axes]) for name in ("velocity", "acceleration")
        )
        self._entries = {name: list(command.entries) for name, command in contract.commands.items()}
        self._motions = {name: CommandedMotion() for name in contract.commands}
        self._position: np.ndarray = np.full(len(axes), np.nan)
        self._time = 0
        self.limited = 0

    def hold(self, now: int, position: np.ndarray) -> None:
        """Forget all commands; stay at a posture (A,)."""
        self._position, self._time = position, now
        for name, motion in self._motions.items():
            motion.clear()
            motion.follow(now, Points(np.array([now]), position[self._entries[name]][None], hold=True))

    def follow(self, now: int, command: str, points: Points) -> None:
        """Take a message of one of the contract's commands; it ends at rest, if need be by a braking ramp."""
        motion = self._motions[command]
        motion.follow(now, with_braking(points, self.deceleration[self._entries[command]]))
        motion.forget(now)

    def at(self, now: int) -> np.ndarray:
        """The set point (A,): inside the limits, and not faster than 1.2 times the largest velocity."""
        target = self._position.copy()
        for name, motion in self._motions.items():
            setpoint = motion.at(now)
            if setpoint is not None:
                target[self._entries[name]] = setpoint.position
        step = 1.2 * self.velocity * (now - self._time) / NS
        allowed = np.clip(np.clip(target, self.lower, self.upper), self._position - step, self._position + step)
        self.limited += bool(np.abs(allowed - target).max() > 1e-6)
        self._position, self._time = allowed, now
        return allowed


def with_braking(points: Points, deceleration: np.ndarray) -> Points:
    """Let a trajectory that ends in motion slow down instead of stopping dead.

    Args:
        points: of one message.
        deceleration: (n,) of each entry.
    """
    if points.hold or (points.velocities is None and len(points.times) < 2):
        return points
    last = points.positions[-1]
    if points.velocities is None:
        span = float(points.times[-1] - points.times[-2]) / NS
        velocity = (last - points.positions[-2]) / span
    else:
        velocity = points.velocities[-1]
    duration = float((np.abs(velocity) / deceleration).max())
    if duration < 1e-3:
        return points
    share = np.linspace(0, 1, _TAIL + 1)[1:, None]
    ramp = last + velocity * duration * (share - share**2 / 2)
    speeds = None if points.velocities is None else np.concatenate([points.velocities, velocity * (1 - share)])
    accelerations = None
    if points.accelerations is not None:
        braking = np.repeat(-velocity[None] / duration, _TAIL, axis=0)
        accelerations = np.concatenate([points.accelerations, braking])
    times = points.times[-1] + (share[:, 0] * duration * NS).astype(np.int64)
    return Points(
        np.concatenate([points.times, times]), np.concatenate([points.positions, ramp]), speeds, accelerations
    )


class So101Driver(Node):
    """Publishes where the arm is and moves it.

    The bus is read and written in one timer: it takes a quarter of the period, and nothing else here is in a hurry.
    After `FAILURES` cycles without an answer the node is in fault: it commands nothing (the servos hold their last
    goal by themselves) and publishes no joint states until the bus answers and ``~/reset_fault`` is called.

    Args:
        interrupted: the arm is parked at the end only if a signal has set it, not after an exception.
    """

    def __init__(self, interrupted: spin.Interrupted | None = None, **node_options: Any) -> None:
        super().__init__("so101_driver", **node_options)
        self._interrupted = interrupted
        for name, (value, text) in PARAMETERS.items():
            self.declare_parameter(name, value, ParameterDescriptor(description=text, read_only=True))
        values = {name: self.get_parameter(name).value for name in PARAMETERS}
        if not values["port"] or not values["calibration"]:
            raise UserError("so101_driver_node needs -p port:=… and -p calibration:=…; see hardware/so101/README.md.")
        if not 10 <= values["rate"] <= 200:
            raise UserError(f"rate={values['rate']} must lie in 10 to 200.")
        robot = read_robot(values["robot"])
        self.contract, names = robot.contract, robot.contract.action.names
        if missing := [name for name in names if name not in FeetechArm.names]:
            raise UserError(f"{robot.folder}: {', '.join(missing)} of action.names are no servos of an SO-101.")
        self.arm = FeetechArm(values["port"], Path(values["calibration"]).expanduser(), values["max_relative_target"])
        self._order = [self.arm.names.index(name) for name in names]
        self._park = _park_posture(values["park"], len(names))
        self._park_speed, self._release = values["park_speed"], values["release"]
        self.fault = ""
        self._failures = self._cycles = self._refused = 0
        self._stamps = Stamps.measure()
        self.sampler = ArmSampler(robot.contract, robot.limits)

        self.arm.connect()
        self.sampler.hold(time.monotonic_ns(), self.arm.read()[self._order])
        measured = robot.contract.streams[robot.contract.measured]
        self._joint_states = self.create_publisher(JointState, measured.topic, 10)
        self._diagnostics = self.create_publisher(DiagnosticArray, "/diagnostics", 1)
        for name, command in robot.contract.commands.items():
            receive = partial(self._receive, name, command)
            self.create_subscription(MESSAGE_TYPES[command.type], command.topic, receive, COMMAND_SUBSCRIPTION)
        self.create_service(Trigger, "~/reset_fault", self._reset)
        steady = Clock(clock_type=ClockType.STEADY_TIME)
        self.create_timer(1 / values["rate"], self.cycle, clock=steady)
        self.create_timer(1.0, self._diagnose, clock=steady)
        self.get_logger().info(f"{robot.contract.robot} on {values['port']}: {len(names)} servos, torque on, holding")

    def cycle(self) -> None:
        """One bus cycle: read, publish, command."""
        before = time.monotonic_ns()
        try:
            position = self.arm.read()[self._order]
            now = time.monotonic_ns()
            if not self.fault:
                goal = np.empty(len(self._order))
                goal[self._order] = self.sampler.at(now)
                self.arm.write(goal)
        except (ConnectionError, OSError) as error:
            self._failures += 1
            if self._failures >= FAILURES and not self.fault:
                self.fault = f"the bus does not answer: {error}"
                self.get_logger().error(f"{self.fault}. The arm holds its last goal. Check cable and power.")
            return
        self._failures = 0
        self._cycles += 1
        if not self.fault:
            stamp = self._stamps.to_stamp((before + now) // 2)
            self._joint_states.publish(joints_message(self.contract.action.names, position, stamp=stamp))

    def _receive(self, name: str, command: CommandTopic, message: Any) -> None:
        if self.fault:
            return
        now = time.monotonic_ns()
        try:
            self.sampler.follow(now, name, read_command(message, command, now, self._stamps))
        except UserError as error:
            self._refused += 1
            self.get_logger().warning(str(error), throttle_duration_sec=1.0)

    def _reset(self, request: Trigger.Request, response: Trigger.Response) -> Trigger.Response:
        try:
            self.sampler.hold(time.monotonic_ns(), self.arm.read()[self._order])
        except (ConnectionError, OSError) as error:
            response.success, response.message = False, f"The bus still does not answer: {error}"
            return response
        self.fault, self._failures = "", 0
        response.success, response.message = True, "holding where the arm is"
        return response

    def _diagnose(self) -> None:
        status = DiagnosticStatus(name=f"{self.get_name()}: bus", hardware_id=self.contract.robot)
        temperatures: dict[str, int] = {}
        try:
            temperatures = self.arm.temperatures() if not self.fault else {}
        except (ConnectionError, OSError):
            self._failures += 1
        hot = [name for name, degrees in temperatures.items() if degrees >= HOT]
        if self.fault:
            status.level, status.message = DiagnosticStatus.ERROR, self.fault
        elif hot:
            status.level, status.message = DiagnosticStatus.WARN, f"{', '.join(hot)} hot: let the arm rest"
        else:
            status.level, status.message = DiagnosticStatus.OK, "running"
        counters = {
            "cycles": self._cycles,
            "failures in a row": self._failures,
            "refused commands": self._refused,
            "limited set points": self.sampler.limited,
        } | {f"temperature {name}": degrees for name, degrees in temperatures.items()}
        status.values = [KeyValue(key=key, value=str(value)) for key, value in counters.items()]
        message = DiagnosticArray(status=[status])
        message.header.stamp = self.get_clock().now().to_msg()
        self._diagnostics.publish(message)

    def begin(self) -> bool:
        """The arm is connected and holds since the node was made."""
        return True

    def end(self, reason: str) -> None:
        """Go to the posture for parking, keep the torque on unless it is to be released, close the port.

        After anything but a signal the arm stays where it is, with its torque on.
        """
        self.get_logger().info(reason)
        release = False
        try:
            if self._interrupted is not None and self._interrupted.is_set() and not self.fault:
                self._go_to_park()
                release = self._release
        except (ConnectionError, OSError) as error:
            self.get_logger().error(f"The arm could not be parked: {error}. It holds its last goal.")
        try:
            self.arm.close(release)
        except (ConnectionError, OSError) as error:
            self.get_logger().error(f"The port could not be closed in order: {error}")

    def _go_to_park(self) -> None:
        start = self.arm.read()[self._order]
        goal = start if self._park is None else self._park
        # A cubic from rest to rest is 1.5 times as fast in its middle as on average.
        duration = max(1.5 * float(np.abs(goal - start).max()) / self._park_speed, 0.1)
        begin = time.monotonic_ns()
        self.sampler.hold(begin, start)
        entries = {name: list(command.entries) for name, command in self.contract.commands.items()}
        for name, columns in entries.items():
            rows = np.stack([goal[columns]])
            points = Points(np.array([begin + nanoseconds(duration)]), rows, np.zeros_like(rows))
            self.sampler.follow(begin, name, points)
        while (now := time.monotonic_ns()) < begin + nanoseconds(duration + 0.3):
            self.arm.read()
            sent = np.empty(len(self._order))
            sent[self._order] = self.sampler.at(now)
            self.arm.write(sent)
            time.sleep(0.01)


def _park_posture(values: Sequence[float], size: int) -> np.ndarray | None:
    if list(values) == [0.0]:
        return None
    if len(values) != size:
        raise UserError(f"park={list(values)}: wanted {size} numbers, in the order of the contract's action.")
    return np.array(values, dtype=np.float64)


def main(args: list[str] | None = None) -> int:
    """Run the node until SIGINT or SIGTERM, then park the arm."""
    return spin.run(So101Driver, args)


if __name__ == "__main__":
    sys.exit(main())
