"""Records episodes straight to our dataset: what the contract's streams showed and what was commanded.

``~/start`` begins an episode; ``~/success`` and ``~/failure`` end and store it, and answer when it is on the disk;
``~/discard`` throws it away. ``~/state`` tells what the recorder is doing. A process that is killed loses the episode
that runs and nothing else.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rcl_interfaces.msg import ParameterDescriptor
from rclpy.clock import Clock
from rclpy.clock_type import ClockType
from rclpy.node import Node
from rclpy.serialization import serialize_message
from std_msgs.msg import String
from std_srvs.srv import Trigger

from robopolicy.errors import UserError
from robopolicy.runtime.clock import MonotonicClock
from robopolicy.runtime.recorder import EpisodeRecorder, Phase, open_recording
from robopolicy.runtime.robots import read_robot
from robopolicy_ros import qos, spin
from robopolicy_ros.bag import BagWriter
from robopolicy_ros.ingest import Ingest, received_at, topics
from robopolicy_ros.messages import MESSAGE_TYPES
from robopolicy_ros.stamps import Stamps

_ADVANCE_PERIOD = 0.02  # s
_STRING = "std_msgs/msg/String"

PARAMETERS: tuple[tuple[str, Any, str], ...] = (
    ("robot", "", "Name of a shipped arm, or folder with its contract.yaml and safety.yaml."),
    ("dataset", "", "The dataset, a Zarr folder."),
    ("append", False, "Add to an existing dataset."),
    ("task", "", "Instruction of the episodes. It may be set while the node runs."),
    ("behaviour", "teleoperated", "How the episodes are done: teleoperated, policy, or another word."),
    ("max_seconds", 120.0, "An episode stops growing after so long."),
    ("policy_state", "", "Topic of the policy node's state, e.g. /policy/state; then rows tell who drove."),
    ("bag", "", "Folder of a rosbag2 to which all messages are written as well; empty: none."),
)


class RecorderNode(Node):
    """See the module."""

    def __init__(self, interrupted: spin.Interrupted | None = None) -> None:
        super().__init__("recorder")
        values = {}
        for name, default, description in PARAMETERS:
            values[name] = self.declare_parameter(name, default, ParameterDescriptor(description=description)).value
        if not values["dataset"]:
            raise UserError("The parameter 'dataset' is empty. Give the folder to record to, e.g. dataset:=data.zarr.")
        self._stamps, self._monotonic = Stamps.measure(), MonotonicClock()
        contract = read_robot(values["robot"]).contract
        self._store = open_recording(
            Path(values["dataset"]),
            contract,
            append=values["append"],
            intervention=bool(values["policy_state"]),
            attributes={"recorder": "recorder_node"},
        )
        self.recorder = EpisodeRecorder(
            contract,
            self._store,
            task=values["task"],
            behaviour=values["behaviour"],
            max_seconds=values["max_seconds"],
        )
        self._ingest = Ingest(contract, self.recorder, self._stamps)
        self._bag = BagWriter(Path(values["bag"])) if values["bag"] else None
        self._told = ""
        self._state = self.create_publisher(String, "~/state", qos.LATCHED)
        self._marks = self.create_publisher(String, "~/marks", 10)
        for name, (topic, kind) in topics(contract, self.resolve_topic_name).items():
            stream = contract.streams.get(name)
            profile = qos.COMMAND_SUBSCRIPTION if stream is None else qos.subscription(stream)
            self.create_subscription(MESSAGE_TYPES[kind], topic, self._listener(name, topic, kind), profile)
        if values["policy_state"]:
            topic = self.resolve_topic_name(values["policy_state"])
            self.create_subscription(String, topic, self._policy_listener(topic), qos.LATCHED)
        self.create_service(Trigger, "~/start", self._start)
        self.create_service(Trigger, "~/success", lambda _, response: self._finish(True, response))
        self.create_service(Trigger, "~/failure", lambda _, response: self._finish(False, response))
        self.create_service(Trigger, "~/discard", self._discard)
        steady = Clock(clock_type=ClockType.STEADY_TIME)
        self.create_timer(_ADVANCE_PERIOD, self._advance, clock=steady)
        self.add_post_set_parameters_callback(self._take_parameters)
        self._tell()

    def begin(self) -> bool:
        self.get_logger().info(f"Recording to {self._store.path}, {self._store.n_episodes} episodes so far.")
        return True

    def end(self, reason: str) -> None:
        """Give the dataset back; an episode that nobody has judged is not stored."""
        if self.recorder.phase is not Phase.IDLE:
            self.get_logger().warning(f"The episode of {self.recorder.rows} rows is not stored: {reason}")
        if self._bag is not None:
            self._bag.close()
        self._store.close()

    # Messages.

    def _listener(self, name: str, topic: str, kind: str) -> Callable[[Any, Any], None]:
        def listen(message: Any, info: Any) -> None:
            received = self._received(topic, kind, message, info)
            if problem := self._ingest.take(name, message, received):
                self.get_logger().warning(f"{topic}: {problem}", throttle_duration_sec=2.0)

        return listen

    def _policy_listener(self, topic: str) -> Callable[[Any, Any], None]:
        def listen(message: Any, info: Any) -> None:
            if problem := self._ingest.take_state(message, self._received(topic, _STRING, message, info)):
                self.get_logger().warning(f"{topic}: {problem}", throttle_duration_sec=2.0)

        return listen

    def _received(self, topic: str, kind: str, message: Any, info: Any) -> int:
        """When a message came [ns]; written to the bag with this time."""
        received = received_at(info, self._stamps, self._monotonic.now())
        if self._bag is not None:
            self._bag.write(topic, kind, received + self._stamps.offset, serialize_message(message))
        return received

    # Services.

    def _start(self, request: Trigger.Request, response: Trigger.Response) -> Trigger.Response:
        now = self._monotonic.now()
        try:
            self.recorder.start(now)
        except UserError as error:
            return self._answer(response, False, str(error))
        self._mark("start", now, task=self.recorder.task)
        return self._answer(response, True, "An episode begins with the first commands.")

    def _finish(self, success: bool, response: Trigger.Response) -> Trigger.Response:
        now = self._monotonic.now()
        try:
            stored = self.recorder.finish(now, success)
        except UserError as error:
            self.get_logger().error(str(error))
            return self._answer(response, False, str(error))
        self._mark("success" if success else "failure", now, rows=stored.rows)
        label = "success" if success else "failure"
        return self._answer(response, True, f"Episode {stored.index} stored: {label}, {stored.rows} rows.")

    def _discard(self, request: Trigger.Request, response: Trigger.Response) -> Trigger.Response:
        rows = self.recorder.rows
        self.recorder.discard()
        self._mark("discard", self._monotonic.now())
        return self._answer(response, True, f"{rows} rows thrown away.")

    def _answer(self, response: Trigger.Response, success: bool, message: str) -> Trigger.Response:
        response.success, response.message = success, message
        self._tell()
        return response

    def _mark(self, event: str, now: int, **more: Any) -> None:
        """Tell where an episode begins or ends; in a bag this lets `robopolicy_ros.bag` find it."""
        time = now + self._stamps.offset
        message = String(data=json.dumps({"event": event, "time": time, **more}))
        self._marks.publish(message)
        if self._bag is not None:
            self._bag.write(self.resolve_topic_name("~/marks"), _STRING, time, serialize_message(message))

    # Time.

    def _advance(self) -> None:
        self.recorder.advance(self._monotonic.now())
        self._tell()

    def _tell(self) -> None:
        recorder = self.recorder
        missed = {name: count.missed for name, count in recorder.buffer.counts.items() if count.missed}
        told = {"state": recorder.phase.name.lower(), "reason": recorder.reason, "episodes": self._store.n_episodes}
        if json.dumps(told) != self._told:
            self._told = json.dumps(told)
            more = {"rows": recorder.rows, "refused": dict(recorder.counts), "missed": missed}
            self._state.publish(String(data=json.dumps({**told, **more})))
            if recorder.phase is Phase.STOPPED:
                self.get_logger().warning(f"The episode has stopped: {recorder.reason}")

    def _take_parameters(self, changed: list[Any]) -> None:
        for parameter in changed:
            if parameter.name == "task":
                self.recorder.task = str(parameter.value)
            elif parameter.name == "behaviour":
                self.recorder.behaviour = str(parameter.value)


def main(args: list[str] | None = None) -> int:
    """Run the node."""
    try:
        return spin.run(RecorderNode, args)
    except UserError as error:
        raise SystemExit(f"recorder_node: {error}") from error


if __name__ == "__main__":
    raise SystemExit(main())
