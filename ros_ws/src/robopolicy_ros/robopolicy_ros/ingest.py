"""From messages to the recorder: the one path that live recording and bag files share."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any

from robopolicy.errors import UserError
from robopolicy.runtime.contract import CommandTopic, Contract, Stream
from robopolicy.runtime.recorder import EpisodeRecorder
from robopolicy_ros.messages import read_command, read_sample
from robopolicy_ros.stamps import Stamps

INTERVENTION = "intervention"


def received_at(info: Mapping[str, Any], stamps: Stamps, now: int) -> int:
    """When a message came, on the recorder's clock [ns]: as the middleware says, else now.

    Args:
        info: of rclpy; Cyclone DDS says zero.
        stamps: between the wall clock and the recorder's.
        now: the recorder's clock.
    """
    wall = int(info["received_timestamp"])
    return stamps.wall_to_monotonic(wall) if wall else now


class Ingest:
    """Reads the messages of a contract's topics into a recorder.

    Args:
        contract: of the robot.
        recorder: takes what is read.
        stamps: between header stamps and the recorder's clock.
    """

    def __init__(self, contract: Contract, recorder: EpisodeRecorder, stamps: Stamps) -> None:
        self._contract, self._recorder, self._stamps = contract, recorder, stamps

    def take(self, name: str, message: Any, received: int) -> str:
        """Take a message of a stream or a command topic.

        Args:
            name: in the contract's streams or commands.
            message: of rclpy or of rosbags.
            received: when it came, on the recorder's clock [ns].

        Returns:
            Empty, or why it was refused.
        """
        try:
            if name in self._contract.streams:
                return self._stream(name, self._contract.streams[name], message, received)
            points = read_command(message, self._contract.commands[name], received, self._stamps)
            self._recorder.command(name, received, points)
        except UserError as error:
            self._recorder.counts[f"{name}: refused"] += 1
            return str(error)
        return ""

    def take_state(self, message: Any, received: int) -> str:
        """Take what the policy node tells of its state (``std_msgs/String``, JSON)."""
        try:
            state = json.loads(message.data)["state"]
        except (ValueError, TypeError, KeyError):
            return f"'{message.data}' is no state of a policy node"
        self._recorder.intervene(received, state == INTERVENTION)
        return ""

    def _stream(self, name: str, stream: Stream, message: Any, received: int) -> str:
        stamp = received if stream.stamp == "receive" else self._stamps.to_monotonic(message.header.stamp)
        return self._recorder.observe(name, stamp, received, read_sample(message, stream.type))


def topics(contract: Contract, resolve: Callable[[str], str]) -> dict[str, tuple[str, str]]:
    """What is recorded: full topic and message type by name of the stream or command.

    Args:
        resolve: from a topic of the contract to its full name.
    """
    items: dict[str, Stream | CommandTopic] = {**contract.streams, **contract.commands}
    return {name: (resolve(item.topic), item.type) for name, item in items.items()}
