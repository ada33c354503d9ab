"""A robot, an independent monitor and policy nodes in one domain."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import rclpy
from sensor_msgs.msg import JointState

from tests.ros.conftest import BENCH
from tests.ros.fake_robot import FakeRobot, Spinning
from tests.ros.process import Client, NodeProcess, until

ACTION = ("base_joint", "elbow_joint", "wrist_joint", "opening")


class World:
    """Everything but the policy node, which `start_policy` starts.

    Args:
        domain: of ROS.
        folder: for parameters and logs.
        bundle: of the policy that is used where no other is named.
        within: a command that runs the policy node, as ``nsenter``.

    Attributes:
        robot: the fake robot.
        client: of the policy node.
        node: to publish and ask with.
        policy: the node's process, while there is one.
    """

    def __init__(self, domain: int, folder: Path, bundle: Path, within: Sequence[str] = ()) -> None:
        self._folder, self._bundle, self._within, self._count = folder, bundle, within, 0
        self._threads = Spinning(domain)
        self.robot: FakeRobot = self._threads.add(FakeRobot(self._threads.context))
        self.node = self._threads.add(rclpy.create_node("tester", context=self._threads.context))
        self.person = self.node.create_publisher(JointState, "intervention", 10)
        self.client = Client(self.node)
        self._threads.start()
        self.monitor = NodeProcess("monitor_node", "monitor", {"robot": str(BENCH)}, folder)
        self.policy: NodeProcess | None = None
        self.call_monitor()

    def close(self) -> None:
        self.end_policy()
        self.monitor.end()
        self._threads.close()

    def start_policy(self, **parameters: Any) -> NodeProcess:
        """A policy node, loaded and idle."""
        process = self.spawn_policy(**parameters)
        until(lambda: self.client.state == "idle" or process.process.poll() is not None, what="a configured node")
        assert process.process.poll() is None, process.log.read_text()
        return process

    def spawn_policy(self, **parameters: Any) -> NodeProcess:
        """A policy node, not waited for."""
        self.end_policy()
        self.client.states.clear()
        self._count += 1
        given = {"robot": str(BENCH), "bundle": str(self._bundle)} | parameters
        folder = self._folder / str(self._count)
        folder.mkdir()
        self.policy = NodeProcess("policy_node", "policy", given, folder, self._within)
        return self.policy

    def end_policy(self) -> None:
        if self.policy is not None:
            self.policy.end()
            self.policy = None

    def run(self) -> None:
        """Everything is well and the policy drives."""
        self.recover()
        self.client.call("stop")
        self.client.until_state("idle")
        refused = ""

        def started() -> bool:
            nonlocal refused
            answer = self.client.call("start")
            refused = answer.message
            return answer.success

        until(started, what=lambda: f"a start, refused: {refused}")
        before = len(self.robot.trajectories)
        self.client.until_state("running")
        until(lambda: len(self.robot.trajectories) > before, what="a trajectory")

    def recover(self) -> None:
        """A healthy robot and no fault."""
        self.robot.set_healthy()
        until(lambda: self.client.state not in ("stopping", "intervention"), what="a quiet state")
        if self.client.state == "fault":
            until(lambda: self.client.call("reset_fault").success, what="a reset")
        self.client.until_state("idle", "holding", "armed", "running")

    def drive(self, target: np.ndarray | None) -> None:
        """A person wants to be at ``target`` (4,), in action space; None: lets go."""
        message = JointState()
        if target is not None:
            message = JointState(name=list(ACTION), position=target.tolist())
        self.person.publish(message)

    def call_monitor(self) -> dict[str, Any]:
        return json.loads(self.client.call("report", "monitor").message)

    def violations(self) -> dict[str, Any]:
        """What the monitor objects to, by command."""
        return {name: found["examples"] for name, found in self.call_monitor().items() if found["violations"]}

    def at_rest(self) -> bool:
        """Whether the arm stands still."""
        return self.robot.at_rest()
