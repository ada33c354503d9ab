"""Listens to a robot's topics for some seconds; sends nothing."""

from __future__ import annotations

import time
from functools import partial
from pathlib import Path
from typing import Any

import rclpy
from rclpy.context import Context
from rclpy.executors import SingleThreadedExecutor
from rclpy.node import Node
from rclpy.qos import ReliabilityPolicy

from robopolicy.manifest import read_manifest
from robopolicy.runtime.check import Finding
from robopolicy.runtime.contract import Contract, Stream
from robopolicy.runtime.graph_check import HeardCommand, HeardStream, check_graph
from robopolicy.runtime.limits import Limits
from robopolicy.spec import PolicySpec
from robopolicy_ros.messages import MESSAGE_TYPES, read_joints
from robopolicy_ros.qos import subscription
from robopolicy_ros.stamps import stamp_ns

DISCOVERY = 1.0
LONGEST_DISCOVERY = 6.0
"""Seconds in which nodes find each other: at least, and as long as somebody is missing."""


class Listener:
    """Subscribes to every stream of a contract.

    Args:
        contract: of the robot.
        namespace: in which relative topics are resolved.
        context: of rclpy.
    """

    def __init__(self, contract: Contract, namespace: str, context: Context) -> None:
        self.contract = contract
        self.node = Node("hardware_check", namespace=namespace, context=context)
        self.heard = {name: HeardStream() for name in contract.streams}
        for name, stream in contract.streams.items():
            receive = partial(self._receive, stream, self.heard[name])
            self.node.create_subscription(MESSAGE_TYPES[stream.type], stream.topic, receive, subscription(stream))

    def _receive(self, stream: Stream, heard: HeardStream, message: Any) -> None:
        heard.received.append(time.time_ns())
        heard.stamps.append(stamp_ns(message.header.stamp))
        if stream.type == "sensor_msgs/msg/JointState":
            heard.joints = read_joints(message)
        elif stream.type == "sensor_msgs/msg/Image":
            heard.size = (message.height, message.width)

    def forget(self) -> None:
        """Start to count anew."""
        for heard in self.heard.values():
            heard.received.clear()
            heard.stamps.clear()

    def complete(self) -> bool:
        """Whether every topic has its publisher or reader."""
        published = all(heard.publishers for heard in self.streams().values())
        return published and all(heard.readers for heard in self.commands().values())

    def streams(self) -> dict[str, HeardStream]:
        """What was heard, with who publishes it now."""
        for name, stream in self.contract.streams.items():
            publishers = self.node.get_publishers_info_by_topic(self.node.resolve_topic_name(stream.topic))
            heard = self.heard[name]
            heard.publishers = len(publishers)
            heard.types = tuple(sorted({info.topic_type for info in publishers}))
            heard.reliable = tuple(info.qos_profile.reliability == ReliabilityPolicy.RELIABLE for info in publishers)
        return self.heard

    def commands(self) -> dict[str, HeardCommand]:
        """Who is on the command topics."""
        found = {}
        for name, command in self.contract.commands.items():
            topic = self.node.resolve_topic_name(command.topic)
            writers = self.node.get_publishers_info_by_topic(topic)
            readers = self.node.get_subscriptions_info_by_topic(topic)
            found[name] = HeardCommand(
                tuple(sorted({info.topic_type for info in (*writers, *readers)})),
                tuple(info.node_name for info in writers),
                tuple(info.node_name for info in readers),
            )
        return found


def check_live(
    contract: Contract, limits: Limits, seconds: float, namespace: str = "", bundle: Path | None = None
) -> list[Finding]:
    """Listen, then judge.

    Args:
        contract, limits: of the robot.
        seconds: to listen.
        namespace: of the robot's topics.
        bundle: a policy; only the streams that it needs must be there. None: all.
    """
    context = Context()
    rclpy.init(args=[], context=context)
    executor = SingleThreadedExecutor(context=context)
    listener = Listener(contract, namespace, context)
    executor.add_node(listener.node)
    try:
        _spin(executor, DISCOVERY)
        longest = time.monotonic() + LONGEST_DISCOVERY - DISCOVERY
        while not listener.complete() and time.monotonic() < longest:
            _spin(executor, 0.1)
        listener.forget()
        _spin(executor, seconds)
        return check_graph(contract, limits, listener.streams(), listener.commands(), needed_streams(contract, bundle))
    finally:
        executor.shutdown()
        listener.node.destroy_node()
        rclpy.shutdown(context=context)


def needed_streams(contract: Contract, bundle: Path | None) -> set[str]:
    """Streams behind the observations that a policy sees, and the one that tells where the joints are."""
    if bundle is None:
        return set(contract.streams)
    spec = PolicySpec.from_dict(read_manifest(bundle)["spec"])
    keys = [key.key for key in spec.observations if key.key in contract.observations]
    return {contract.measured} | {part.stream for key in keys for part in contract.observations[key].parts}


def _spin(executor: SingleThreadedExecutor, seconds: float) -> None:
    end = time.monotonic() + seconds
    while (left := end - time.monotonic()) > 0:
        executor.spin_once(timeout_sec=left)
