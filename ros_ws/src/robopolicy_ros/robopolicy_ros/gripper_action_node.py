"""Between a gripper's set points and a driver that takes goals: the newest set point becomes the next goal.

``franka_gripper`` and ros2_control's ``GripperActionController`` take goals of ``control_msgs/action/GripperCommand``
only; the contract's gripper command is a stream of set points. One goal runs at a time, since a driver is busy with one
for 0.2 to 1 s; what the set points did meanwhile is made up for by the next one. Nothing moves before the first set
point, nor for one that came while there was no driver.

ros2 run robopolicy_ros gripper_action_node --ros-args -p robot:=fr3
"""

from __future__ import annotations

import importlib
import math
import sys
from collections import Counter
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from action_msgs.msg import GoalStatus
from rcl_interfaces.msg import ParameterDescriptor
from rclpy.action import ActionClient
from rclpy.clock import Clock
from rclpy.clock_type import ClockType
from rclpy.node import Node
from rclpy.task import Future
from std_msgs.msg import Float64MultiArray

from robopolicy.errors import UserError
from robopolicy.runtime.clock import MonotonicClock, nanoseconds
from robopolicy.runtime.contract import CommandTopic, read_contract
from robopolicy.runtime.robots import robot_folder
from robopolicy_ros import qos, spin
from robopolicy_ros.messages import read_command
from robopolicy_ros.stamps import Stamps

PARAMETERS: dict[str, tuple[Any, str]] = {
    "robot": ("", "name of an arm or folder of its contract, which has one command with gripper: true"),
    "action": ("franka_gripper/gripper_action", "the driver's action, a control_msgs/action/GripperCommand"),
    "max_effort": (20.0, "of every goal [N]"),
    "deadband": (0.002, "a set point farther than this from the last goal makes a new one [the command's unit]"),
    "timeout": (5.0, "seconds without a result after which a goal is cancelled"),
}
_SET_POINTS = "std_msgs/msg/Float64MultiArray"
_WATCH_PERIOD = 0.05  # s between looks at the time
_THROTTLE = 2.0  # s between warnings of a kind
_ENDINGS = {
    GoalStatus.STATUS_SUCCEEDED: "",
    GoalStatus.STATUS_ABORTED: "aborted",
    GoalStatus.STATUS_CANCELED: "cancelled",
}
"""What to complain about, by how a goal ended."""


STOPPING = nanoseconds(0.5)
"""How long [ns] the end of a cancelled goal is waited for: ``franka_gripper`` would stop the next one with it."""


@dataclass(frozen=True)
class Goal:
    """A goal for the gripper.

    Attributes:
        number: counted from 1 on.
        position: in the command's unit.
    """

    number: int
    position: float


class GoalChoice:
    """Which goals a stream of set points makes: one at a time, each for the set point that is newest then.

    It does not matter how a goal ended: the next one goes when the set point is not near it any more.

    Args:
        deadband: largest distance [the command's unit] of a set point from the last goal that makes no new one.
        timeout: seconds without a result after which a goal is to be cancelled.

    Attributes:
        running: the goal that has no result yet.
        overdue: it is to be cancelled; the next one waits for its end, but at most `STOPPING`.
    """

    def __init__(self, deadband: float, timeout: float) -> None:
        self.running: Goal | None = None
        self.overdue = False
        self._deadband, self._timeout = deadband, nanoseconds(timeout)
        self._newest: float | None = None
        self._last = Goal(0, math.inf)  # far from every set point
        self._since = 0

    @property
    def due(self) -> bool:
        """Whether a goal is to be sent now."""
        if self.running is not None or self._newest is None:
            return False
        return abs(self._newest - self._last.position) > self._deadband

    def take(self, position: float) -> None:
        """Take a set point, which is finite."""
        self._newest = position

    def forget(self) -> None:
        """Forget the set point: nothing is due until the next one."""
        self._newest = None

    def send(self, now: int) -> Goal | None:
        """The goal that is to be sent now [ns], if one is; it runs from here on."""
        if not self.due:
            return None
        assert self._newest is not None
        self._last = self.running = Goal(self._last.number + 1, self._newest)
        self.overdue, self._since = False, now
        return self.running

    def end(self, goal: Goal) -> bool:
        """Tell that a goal has ended; False if it was not waited for any more."""
        if goal != self.running:
            return False
        self.running = None
        return True

    def watch(self, now: int) -> bool:
        """Look at the time [ns]; whether the running goal is overdue since just now."""
        passed = now - self._since
        if self.running is None or passed < (STOPPING if self.overdue else self._timeout):
            return False
        if self.overdue:
            self.running = None
            return False
        self.overdue, self._since = True, now
        return True


class GripperActionNode(Node):
    """See the module.

    Attributes:
        choice: of the goals.
        counts: goals sent, and what went wrong, by kind.
    """

    def __init__(self, interrupted: spin.Interrupted | None = None, **node_options: Any) -> None:
        super().__init__("gripper_action", **node_options)
        for name, (value, text) in PARAMETERS.items():
            self.declare_parameter(name, value, ParameterDescriptor(description=text, read_only=True))
        values = {name: self.get_parameter(name).value for name in PARAMETERS}
        if not values["robot"]:
            raise UserError("gripper_action_node needs -p robot:=…, the name of an arm or the folder of its contract.")
        for name in ("max_effort", "deadband", "timeout"):
            if not (0 < values[name] < math.inf or values[name] == 0 and name == "deadband"):
                raise UserError(f"{name}={values[name]} must be a positive number.")
        self._command = gripper_command(robot_folder(values["robot"]))
        self._action, self._max_effort = values["action"], values["max_effort"]
        self.choice = GoalChoice(values["deadband"], values["timeout"])
        self.counts: Counter[str] = Counter()
        self._handle: Any = None  # of the running goal, once the driver has accepted it
        self._monotonic, self._stamps = MonotonicClock(), Stamps()
        self._goal_type, self._client = _open_client(self, self._action)
        topic = self._command.topic
        self._set_points = self.create_subscription(Float64MultiArray, topic, self._take, qos.NEWEST_COMMAND)
        self.create_timer(_WATCH_PERIOD, self._watch, clock=Clock(clock_type=ClockType.STEADY_TIME))

    def begin(self) -> bool:
        self.get_logger().info(f"Set points on {self._command.topic} become goals of {self._action}.")
        return True

    def end(self, reason: str) -> None:
        """Let the gripper stop where it is; what holds an object has no goal any more and goes on holding it."""
        self.destroy_subscription(self._set_points)
        self.choice.forget()
        self._stop()
        self._client.destroy()
        self.get_logger().info(f"{reason} {dict(self.counts)}")

    def _stop(self) -> None:
        """Cancel the running goal and wait for the answer; without waiting, requests were lost with the client."""
        executor, last = self.executor, self._monotonic.now() + STOPPING
        answer: Any = None
        while executor is not None and self.choice.running is not None and self._monotonic.now() < last:
            if answer is None and self._handle is not None:
                answer = self._handle.cancel_goal_async()
            if answer is not None and answer.done():
                return
            executor.spin_once(timeout_sec=_WATCH_PERIOD)

    def _take(self, message: Float64MultiArray) -> None:
        try:
            read_command(message, self._command, self._monotonic.now(), self._stamps)
        except UserError as error:
            self.counts["refused set points"] += 1
            self.get_logger().warning(str(error), throttle_duration_sec=_THROTTLE)
            return
        self.choice.take(message.data[0])  # the driver's unit, not the action's
        self._send()

    def _send(self) -> None:
        if not self.choice.due:
            return
        if not self._client.server_is_ready():
            self.choice.forget()  # a driver that comes later must not move for an old set point
            self.counts["set points without a driver"] += 1
            self.get_logger().warning(
                f"Nobody offers the action {self._action}; the gripper does not move. Start its driver, or set the "
                "parameter 'action' (ros2 action list).",
                throttle_duration_sec=_THROTTLE,
            )
            return
        goal = self.choice.send(self._monotonic.now())
        assert goal is not None
        self.counts["goals"] += 1
        self._handle = None
        message = self._goal_type()
        message.command.position, message.command.max_effort = goal.position, self._max_effort
        self._client.send_goal_async(message).add_done_callback(partial(self._answered, goal))

    def _answered(self, goal: Goal, future: Future) -> None:
        handle: Any = future.result()
        if not handle.accepted:
            self._ended(goal, "rejected")
            return
        if goal != self.choice.running or self.choice.overdue:  # the answer came too late
            handle.cancel_goal_async()
        if goal == self.choice.running:
            self._handle = handle
            handle.get_result_async().add_done_callback(partial(self._finished, goal))

    def _finished(self, goal: Goal, future: Future) -> None:
        answer: Any = future.result()
        self._ended(goal, _ENDINGS.get(answer.status, f"ended with the status {answer.status}"))

    def _ended(self, goal: Goal, problem: str) -> None:
        if not self.choice.end(goal):
            return
        self._handle = None
        if problem and not self.choice.overdue:  # of that one it was said before
            self.counts[problem] += 1
            self.get_logger().warning(
                f"The goal {goal.position:.4g} for {self._action} was {problem}. It is not repeated until the set "
                "point changes; the driver's log says why.",
                throttle_duration_sec=_THROTTLE,
            )
        self._send()

    def _watch(self) -> None:
        if self.choice.watch(self._monotonic.now()):
            self.counts["timed out"] += 1
            self.get_logger().warning(
                f"A goal for {self._action} had no result within 'timeout' and is cancelled "
                f"({self.counts['timed out']} so far).",
                throttle_duration_sec=_THROTTLE,
            )
            if self._handle is not None:
                self._handle.cancel_goal_async()
        self._send()


def gripper_command(folder: Path) -> CommandTopic:
    """The command of a contract that goes to its gripper.

    Args:
        folder: of the robot.

    Raises:
        UserError: there is none, there are several, or it is no stream of single set points.
    """
    contract = read_contract(folder)
    grippers = {name: command for name, command in contract.commands.items() if command.gripper}
    if len(grippers) != 1:
        raise UserError(
            f"{folder}: {', '.join(grippers) or 'none'} of the commands {', '.join(contract.commands)} says "
            "'gripper: true', wanted exactly one. Mark the gripper's in a copy of the contract."
        )
    ((name, command),) = grippers.items()
    if command.type != _SET_POINTS or len(command.names) != 1:
        raise UserError(
            f"{folder}: commands.{name} is a {command.type} with {len(command.names)} names, wanted a {_SET_POINTS} "
            "with one, the position that the driver is to reach. Change it in a copy of the contract."
        )
    return command


def _open_client(node: Node, action: str) -> tuple[Any, ActionClient]:
    """The type of a goal, and the client.

    Raises:
        UserError: ``control_msgs`` is not there; the wheels of ROS 2 on PyPI have none.
    """
    try:
        kind = importlib.import_module("control_msgs.action").GripperCommand
    except ImportError as error:
        raise UserError(
            f"gripper_action_node needs the ROS package 'control_msgs', which is not usable here ({error}). Install it "
            "with: sudo apt install ros-$ROS_DISTRO-control-msgs"
        ) from error
    return kind.Goal, ActionClient(node, kind, action)


def main(args: list[str] | None = None) -> int:
    """Run the node until SIGINT or SIGTERM."""
    return spin.run(GripperActionNode, args)


if __name__ == "__main__":
    sys.exit(main())
