"""A simulated arm behind the topics of its contract, so that no other node can tell it from a robot.

Its streams come at the contract's rates with the moment of measurement as stamp. Its controllers take what those of
ros2_control take: trajectories replace each other and are followed along splines, set points are followed at once.

Beside the contract there are services to begin an episode (``~/reset``), to let the task's scripted expert play it like
a teleoperator (``~/demonstrate``) and to press the emergency stop (``~/press_estop``), and ``~/episode``, which tells
what became of it.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import numpy as np
from rcl_interfaces.msg import ParameterDescriptor
from rclpy.clock import Clock
from rclpy.clock_type import ClockType
from rclpy.node import Node
from std_msgs.msg import Bool, String
from std_srvs.srv import SetBool, Trigger

from robopolicy.errors import UserError
from robopolicy.runtime.clock import NS, MonotonicClock, nanoseconds
from robopolicy.runtime.contract import CommandTopic, Stream
from robopolicy.runtime.robots import read_robot
from robopolicy.runtime.samples import Joints, Pose
from robopolicy_ros import qos, spin
from robopolicy_ros.messages import (
    MESSAGE_TYPES,
    compressed_message,
    image_message,
    joints_message,
    pose_message,
    read_command,
    target_message,
)
from robopolicy_ros.simulated_robot import SimulatedRobot
from robopolicy_ros.stamps import Stamps

_FALLEN_BEHIND = nanoseconds(0.1)  # the simulation does not make up for more lost time: stamps would be old
_DISCOVERY = nanoseconds(0.1)  # until a new publisher is known to all
_ESTOP_PERIOD = 0.05  # s
_TELL_AGAIN = nanoseconds(0.5)
_COMPRESSED = "sensor_msgs/msg/CompressedImage"

PARAMETERS: tuple[tuple[str, Any, str], ...] = (
    ("robot", "", "Folder with contract.yaml and safety.yaml of a simulated robot, or name of a shipped one."),
    ("task", "drawer_close", "Short name of a simulated task, or a Gymnasium id."),
    ("options", '{"arm": "ur5e"}', "Options of the task as JSON, e.g. its arm."),
    ("seed", 0, "Start of the next episode; counts up. It may be set while the node runs."),
    ("time_limit", 0.0, "Seconds of an episode; 0: the task's own limit."),
    ("disturbance", 0.0, "Standard deviation of pushes while the expert plays, share of half the set points' range."),
    ("render_quality", "fast", "Of the cameras: fast, shadows, full; none: a moving test pattern."),
)


class SimRobotNode(Node):
    """See the module."""

    def __init__(self, interrupted: spin.Interrupted | None = None) -> None:
        super().__init__("sim_robot")
        values = {}
        for name, default, description in PARAMETERS:
            values[name] = self.declare_parameter(name, default, ParameterDescriptor(description=description)).value
        self._stamps, self._monotonic = Stamps.measure(), MonotonicClock()
        self.contract = read_robot(values["robot"]).contract
        self.robot = SimulatedRobot(
            self.contract,
            values["task"],
            _options(values["options"]),
            start=self._monotonic.now(),
            seed=values["seed"],
            time_limit=values["time_limit"] or None,
            disturbance=values["disturbance"],
            render_quality=values["render_quality"],
        )
        self._next_seed = values["seed"] + 1
        self.add_post_set_parameters_callback(self._take_parameters)
        self._due = {name: self.robot.time for name in self.contract.streams}
        self._told: dict[str, Any] = {}
        self._told_at = 0
        self.skipped = 0
        self._streams: dict[str, Any] = {
            name: self.create_publisher(MESSAGE_TYPES[stream.type], stream.topic, qos.publisher(stream))
            for name, stream in self.contract.streams.items()
        }
        # The expert's publishers exist while it plays only: a policy node refuses to drive beside another publisher.
        self._hand: dict[str, Any] = {}
        self._hand_since = 0
        for name, command in self.contract.commands.items():
            kind, callback = MESSAGE_TYPES[command.type], self._listener(name, command)
            self.create_subscription(kind, command.topic, callback, qos.COMMAND_SUBSCRIPTION)
        self._success = self.create_publisher(Bool, "~/success", qos.LATCHED)
        self._episode = self.create_publisher(String, "~/episode", qos.LATCHED)
        self.create_service(Trigger, "~/reset", self._reset)
        self.create_service(Trigger, "~/demonstrate", self._demonstrate)
        steady = Clock(clock_type=ClockType.STEADY_TIME)
        if self.contract.signals.estop is not None:
            estop = self.contract.signals.estop
            self._estop = self.create_publisher(Bool, estop.topic, qos.SIGNAL)
            self.create_subscription(Bool, estop.topic, self._hear_estop, qos.SIGNAL)
            self.create_service(SetBool, "~/press_estop", self._press_estop)
            self.create_timer(_ESTOP_PERIOD, lambda: self._estop.publish(Bool(data=self.robot.frozen)), clock=steady)
        self.create_timer(1 / self.contract.command_rate, self._cycle, clock=steady)
        self._tell()

    def begin(self) -> bool:
        limit = f"{self.robot.time_limit:g} s at most"
        self.get_logger().info(f"{self.contract.robot}, seed {self.robot.seed}: {self.robot.instruction} ({limit})")
        self.robot.time = self._monotonic.now()
        return True

    def end(self, reason: str) -> None:
        self.robot.close()

    # One cycle.

    def _cycle(self) -> None:
        """Catch up with the clock, then tell what the sensors see."""
        now, period = self._monotonic.now(), round(NS / self.contract.command_rate)
        if now - self.robot.time > _FALLEN_BEHIND:
            self.skipped += 1
            self.robot.time = now - period
            self.get_logger().warning(
                "The simulation is slower than real time; time was skipped.", throttle_duration_sec=5.0
            )
        self._let_expert_play(now)
        while self.robot.time + period <= now:
            action = self.robot.expert_action()
            if action is not None:
                self._play(action)
            self.robot.step()
            for name, stream in self.contract.streams.items():
                if not stream.image:
                    self._sense(name, stream)
        for name, stream in self.contract.streams.items():
            if stream.image:
                self._sense(name, stream)
        self._tell()

    def _sense(self, name: str, stream: Stream) -> None:
        period = round(NS / stream.rate)
        if self.robot.time < self._due[name]:
            return
        self._due[name] = max(self._due[name] + period, self.robot.time - period)
        value, stamp = self.robot.sample(name), self._stamps.to_stamp(self.robot.time)
        message: Any
        if isinstance(value, Joints):
            assert value.position is not None
            message = joints_message(value.names, value.position, value.velocity)
        elif isinstance(value, Pose):
            message = pose_message(value.position, value.quaternion)
            message.header.frame_id = "base"
        else:
            assert isinstance(value, np.ndarray)
            message = compressed_message(value) if stream.type == _COMPRESSED else image_message(value)
            message.header.frame_id = name
        message.header.stamp = stamp
        self._streams[name].publish(message)

    def _let_expert_play(self, now: int) -> None:
        """Begin a demonstration when everyone who listens hears it; give the topics back when it is over."""
        if self.robot.demonstrating or not self._hand:
            return
        if self._hand_since:
            heard = all(
                0 < publisher.get_subscription_count() >= self.count_subscribers(publisher.topic_name)
                for publisher in self._hand.values()
            )
            if heard and now - self._hand_since > _DISCOVERY:
                self._hand_since = 0
                self.robot.demonstrate()
            return
        for publisher in self._hand.values():
            self.destroy_publisher(publisher)
        self._hand = {}

    def _play(self, action: np.ndarray) -> None:
        """Publish what the expert wants to reach in one control step of the policy."""
        ahead, stamp = 1 / self.contract.policy_rate, self._stamps.to_stamp(self.robot.time)
        for name, command in self.contract.commands.items():
            self._hand[name].publish(target_message(action, command, ahead, stamp))

    def _tell(self) -> None:
        """Publish what became of the episode: when it changes, and now and then for those who missed it."""
        robot = self.robot
        told = {
            "episode": robot.episode,
            "seed": robot.seed,
            "task": robot.instruction,
            "success": robot.success,
            "over": robot.over,
            "demonstrating": robot.demonstrating,
            "estop": robot.frozen,
        }
        now = self._monotonic.now()
        if told == self._told and now - self._told_at < _TELL_AGAIN:
            return
        self._told, self._told_at = told, now
        self._success.publish(Bool(data=robot.success))
        text = {**told, "seconds": round(robot.elapsed, 3), "refused": robot.refusals, "skipped": self.skipped}
        self._episode.publish(String(data=json.dumps(text)))

    # What others ask for.

    def _listener(self, name: str, command: CommandTopic) -> Callable[[Any, Any], None]:
        return lambda message, info: self._obey(name, command, message, info)

    def _obey(self, name: str, command: CommandTopic, message: Any, info: Any) -> None:
        now = self._monotonic.now()
        try:
            problem = self.robot.command(name, now, read_command(message, command, now, self._stamps))
        except UserError as error:
            self.robot.refusals += 1
            problem = str(error)
        if problem:
            self.get_logger().warning(f"{command.topic}: refused: {problem}", throttle_duration_sec=1.0)

    def _reset(self, request: Trigger.Request, response: Trigger.Response) -> Trigger.Response:
        self.robot.reset(self._next_seed, self._monotonic.now())
        self._next_seed += 1
        self._tell()
        response.success, response.message = True, json.dumps({"seed": self.robot.seed, "task": self.robot.instruction})
        return response

    def _demonstrate(self, request: Trigger.Request, response: Trigger.Response) -> Trigger.Response:
        if self.robot.frozen:
            response.message = "The emergency stop is pressed."
            return response
        if not self.robot.fresh:
            self._reset(request, response)
        if not self._hand:
            self._hand = {
                name: self.create_publisher(MESSAGE_TYPES[command.type], command.topic, qos.COMMAND)
                for name, command in self.contract.commands.items()
            }
        self._hand_since = self._monotonic.now()
        response.success, response.message = True, json.dumps({"seed": self.robot.seed, "task": self.robot.instruction})
        return response

    def _press_estop(self, request: SetBool.Request, response: SetBool.Response) -> SetBool.Response:
        if request.data:
            self.robot.freeze()
        else:
            self.robot.release()
        self._estop.publish(Bool(data=self.robot.frozen))
        self._tell()
        response.success = True
        return response

    def _hear_estop(self, message: Bool) -> None:
        # Only ~/press_estop releases: this node's own "not pressed" comes on the topic too.
        if message.data and not self.robot.frozen:
            self.robot.freeze()

    def _take_parameters(self, changed: list[Any]) -> None:
        for parameter in changed:
            if parameter.name == "seed":
                self._next_seed = int(parameter.value)


def _options(text: str) -> dict[str, Any]:
    try:
        options = json.loads(text)
    except json.JSONDecodeError as error:
        raise UserError(f"options='{text}' is not valid JSON: {error}") from error
    if not isinstance(options, dict):
        raise UserError(f'options=\'{text}\': wanted a JSON object, e.g. {{"arm": "ur5e"}}.')
    return options


def main(args: list[str] | None = None) -> int:
    """Run the node."""
    try:
        return spin.run(SimRobotNode, args)
    except UserError as error:
        raise SystemExit(f"sim_robot_node: {error}") from error


if __name__ == "__main__":
    raise SystemExit(main())
