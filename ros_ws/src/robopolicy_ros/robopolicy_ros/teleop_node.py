"""A person drives the robot with keyboard, gamepad or SpaceMouse.

With ``target: commands`` it publishes on the contract's command topics, as a policy would: for recording
demonstrations. The limits of safety.yaml hold, and the robot is brought to rest when the person lets go. With
``target: intervention`` it takes over from a policy on the contract's ``intervention`` topic, and lets go again; the
policy's node keeps the limits then. Enter (Start) takes and gives back control; nothing is published before.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
from rcl_interfaces.msg import ParameterDescriptor
from rclpy.clock import Clock
from rclpy.clock_type import ClockType
from rclpy.node import Node
from sensor_msgs.msg import JointState

from robopolicy.errors import UserError, require_extra
from robopolicy.runtime.clock import MonotonicClock
from robopolicy.runtime.observation_buffer import ObservationBuffer
from robopolicy.runtime.robots import read_robot
from robopolicy.runtime.safety import SafetyFilter, SetPoint
from robopolicy.teleoperation.command import Command, Device, SessionKey
from robopolicy_ros import qos, spin
from robopolicy_ros.messages import MESSAGE_TYPES, joints_message, read_joints, target_message
from robopolicy_ros.stamps import Stamps
from robopolicy_ros.teleoperation import Operator

PARAMETERS: tuple[tuple[str, Any, str], ...] = (
    ("robot", "", "Name of a shipped arm, or folder with its contract.yaml and safety.yaml."),
    ("arm", "ur5e", "Arm of robopolicy_sim whose kinematics are used for joint commands: panda, ur5e, so101."),
    ("device", "keyboard", "keyboard, gamepad or spacemouse."),
    ("target", "commands", "commands: drive the robot; intervention: take over from a policy."),
    ("rate", 20.0, "Set points per second."),
)

_LOOKAHEAD = 0.1  # s in which a target is reached, at least
_PERIODS_AHEAD = 4  # and at least so many periods: a smooth way needs them
_LONGEST_STOP = 10.0  # s for a controlled stop; it takes less within any sensible limits


class TeleopNode(Node):
    """See the module.

    Args:
        device: what the person holds; None opens the one that the parameter names.
        events: the window's events since the last call; None opens a window.
        arguments: for rclpy, e.g. parameter overrides.
    """

    def __init__(
        self,
        interrupted: spin.Interrupted | None = None,
        *,
        device: Device | None = None,
        events: Callable[[], list[Any]] | None = None,
        **arguments: Any,
    ) -> None:
        super().__init__("teleop", **arguments)
        values = {}
        for name, default, description in PARAMETERS:
            values[name] = self.declare_parameter(name, default, ParameterDescriptor(description=description)).value
        robot = read_robot(values["robot"])
        self.contract = robot.contract
        self._intervenes = values["target"] == "intervention"
        if values["target"] not in ("commands", "intervention"):
            raise UserError(f"target='{values['target']}' is unknown; choose commands or intervention.")
        if self._intervenes and not self.contract.intervention:
            raise UserError("The contract has no topic for interventions; add one, e.g. 'intervention: intervention'.")
        self._period = 1 / values["rate"]
        self._operator = Operator(self.contract, values["arm"], self._period)
        require_extra("pygame", "teleop")
        from robopolicy.teleoperation.devices.keyboard import session_keys

        self._session_keys = session_keys
        self._events, self._window = events, None
        if events is None:
            self._window, self._events = _open_window()
        self.device = device or _open_device(values["device"])
        self._stamps, self._monotonic = Stamps.measure(), MonotonicClock()
        self._buffer = ObservationBuffer(self.contract, keys=())
        self.driving = self._braking = False
        for name, stream in self.contract.streams.items():
            if stream.type == "sensor_msgs/msg/JointState":
                measure = partial(self._measure, name)
                self.create_subscription(JointState, stream.topic, measure, qos.subscription(stream))
        if self._intervenes:
            self._takeover = self.create_publisher(JointState, self.contract.intervention, qos.COMMAND)
        else:
            self._filter = SafetyFilter(self.contract, robot.limits, self._period)
            self._outputs: dict[str, Any] = {
                name: self.create_publisher(MESSAGE_TYPES[command.type], command.topic, qos.COMMAND)
                for name, command in self.contract.commands.items()
            }
        self.create_timer(self._period, self._cycle, clock=Clock(clock_type=ClockType.STEADY_TIME))

    def begin(self) -> bool:
        self.get_logger().info("Enter (gamepad: Start) takes control and gives it back; Escape ends.")
        return True

    def end(self, reason: str) -> None:
        """Let go, and bring the robot to rest."""
        self._let_go(reason)
        give_up = time.monotonic() + _LONGEST_STOP
        while self._braking and time.monotonic() < give_up:
            self._brake()
            time.sleep(self._period)
        self.device.close()
        if self._window is not None:
            self._window.close()

    def _measure(self, name: str, message: JointState) -> None:
        now = self._monotonic.now()
        receive = self.contract.streams[name].stamp == "receive"
        stamp = now if receive else self._stamps.to_monotonic(message.header.stamp)
        self._buffer.add(name, stamp, now, read_joints(message))

    def _cycle(self) -> None:
        command = self._asked()
        if command is not None:
            self._drive(command)
        elif self._braking:
            self._brake()

    def _asked(self) -> Command | None:
        """What the person wants; None while they do not drive."""
        assert self._events is not None
        events = self._events()
        try:
            command = self.device.read(events)
        except UserError as error:
            self._let_go(str(error))
            return None
        keys = command.keys | self._session_keys(events)
        if SessionKey.QUIT in keys:
            raise SystemExit(0)
        if SessionKey.TOGGLE in keys:
            if self.driving:
                self._let_go("control is given back")
            else:
                self._take(command)
        if self.driving and self._buffer.age(self.contract.measured, self._monotonic.now()) > self._stale_after:
            self._let_go(f"streams.{self.contract.measured} is silent")
        return command if self.driving else None

    def _drive(self, command: Command) -> None:
        measured = self._buffer.measured()
        action = self._operator.action(command, None if measured is None else measured[1])
        if self._intervenes:
            stamp = self._stamps.to_stamp(self._monotonic.now())
            self._takeover.publish(joints_message(self.contract.action.names, action, stamp=stamp))
            return
        ahead = max(_LOOKAHEAD, _PERIODS_AHEAD * self._period)
        self._publish(self._filter.step(action, np.zeros_like(action), ahead))

    @property
    def _stale_after(self) -> float:
        stream = self.contract.streams[self.contract.measured]
        return stream.stale_after + stream.latency

    def _take(self, command: Command) -> None:
        if self._buffer.age(self.contract.measured, self._monotonic.now()) > self._stale_after:
            self.get_logger().warning(f"streams.{self.contract.measured} is silent; nothing can be driven.")
            return
        if not self._intervenes and not self._braking:
            self._filter.start(self._here(command))
        self._operator.reset()
        self.device.reset()
        self.driving, self._braking = True, False
        self.get_logger().info("You drive.")

    def _let_go(self, reason: str) -> None:
        if self.driving and self._intervenes:
            self._takeover.publish(JointState())  # no names: the policy's node takes over again
        if self.driving:
            self.get_logger().info(f"Let go: {reason}.")
            self._braking = not self._intervenes
        self.driving = False

    def _here(self, command: Command) -> np.ndarray:
        """The action (A,) that keeps the robot where it is."""
        action, measured = self._buffer.measured_action(), self._buffer.measured()
        assert measured is not None
        return self._operator.rest(command, measured[1]) if action is None else action

    def _brake(self) -> None:
        """One set point of the controlled stop; the last one is at rest, which is zero for a twist."""
        self._publish(self._filter.brake())
        self._braking = not self._filter.at_rest

    def _publish(self, point: SetPoint) -> None:
        stamp = self._stamps.to_stamp(self._monotonic.now())
        for name, command in self.contract.commands.items():
            self._outputs[name].publish(target_message(point.position, command, self._period, stamp))


def _open_window() -> tuple[Any, Callable[[], list[Any]]]:
    from robopolicy.teleoperation.window import Window

    window = Window("robopolicy teleop")
    return window, window.events


def _open_device(name: str) -> Device:
    from robopolicy.teleoperation.devices import gamepad, keyboard, spacemouse

    if name == "gamepad":
        return gamepad.Gamepad()
    if name == "spacemouse":
        return spacemouse.SpaceMouse.open()
    if name == "keyboard":
        return keyboard.Keyboard()
    raise UserError(f"device='{name}' is unknown; choose keyboard, gamepad or spacemouse.")


def main(args: list[str] | None = None) -> int:
    """Run the node."""
    try:
        return spin.run(TeleopNode, args)
    except UserError as error:
        raise SystemExit(f"teleop_node: {error}") from error


if __name__ == "__main__":
    raise SystemExit(main())
