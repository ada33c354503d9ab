"""What a robot without a trajectory controller is sent: joint set points, tool poses, twists, at the command rate."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("rclpy", reason="rclpy is not installed: pip install 'robopolicy[ros]'")

from geometry_msgs.msg import PoseStamped, TwistStamped
from rclpy.context import Context
from rclpy.node import Node
from sensor_msgs.msg import JointState
from std_msgs.msg import Float64MultiArray

from robopolicy.runtime.contract import read_contract
from robopolicy_ros import qos
from tests.ros.conftest import make_bundle
from tests.ros.fake_robot import Spinning
from tests.ros.process import Client, NodeProcess, until

CONTRACT = """
robot: servo
policy_rate: 10
command_rate: 50
joints: [a, b]
measured: joints
streams:
  joints: {topic: joint_states, type: sensor_msgs/msg/JointState, rate: 50, stale_after: 1.0}
  tool: {topic: tool_pose, type: geometry_msgs/msg/PoseStamped, rate: 50, stale_after: 1.0}
observations:
  observation.state: {parts: [{stream: tool, align: interpolate, field: pose}]}
"""
JOINTS = """
action: {names: [a, b]}
commands:
  arm: {topic: commands, type: std_msgs/msg/Float64MultiArray, entries: [0, 1], names: [a, b], scale: [0.5]}
"""
POSE = """
action: {names: [x, y, z, r11, r21, r31, r12, r22, r32], kind: tool_pose}
commands:
  arm: {topic: commands, type: geometry_msgs/msg/PoseStamped, entries: [0, 1, 2, 3, 4, 5, 6, 7, 8], frame: base}
"""
TWIST = """
action: {names: [vx, vy, vz, wx, wy, wz], kind: tool_twist}
commands:
  arm: {topic: commands, type: geometry_msgs/msg/TwistStamped, entries: [0, 1, 2, 3, 4, 5], frame: base}
"""
AXIS = "{lower: -1.0, upper: 1.0, velocity: 0.5, acceleration: 2.0, jerk: 40.0}"
WAITS = "max_start_jump: 0.3\nmax_tracking_error: 0.3\nmax_chunk_age: 2.0\nmax_open_loop: 3.0\npolicy_timeout: 10.0\n"
POSTURE = np.array([0.3, -0.2, 0.4, 1, 0, 0, 0, 1, 0])
"""Of the tool, before it moves."""


class Servo(Node):
    """A robot that is at once where a command wants it."""

    def __init__(self, context: Context, kind: type) -> None:
        super().__init__("robot", context=context)
        self.commands: list[Any] = []
        self._states = self.create_publisher(JointState, "joint_states", 10)
        self._poses = self.create_publisher(PoseStamped, "tool_pose", 10)
        self.create_subscription(kind, "commands", self.commands.append, qos.COMMAND_SUBSCRIPTION)
        self.create_timer(1 / 50, self._publish)

    def _publish(self) -> None:
        newest = self.commands[-1] if self.commands else None
        values = newest.data.tolist() if isinstance(newest, Float64MultiArray) else [0.0, 0.0]
        joints, pose = JointState(name=["a", "b"], position=values), PoseStamped()
        if isinstance(newest, PoseStamped):
            pose.pose = newest.pose
        else:
            place = pose.pose.position
            place.x, place.y, place.z = POSTURE[:3].tolist()
        joints.header.stamp = pose.header.stamp = self.get_clock().now().to_msg()
        self._states.publish(joints)
        self._poses.publish(pose)


def numbers(message: Any) -> np.ndarray:
    """(n,) what a command asks for; of a pose its position."""
    if isinstance(message, PoseStamped):
        place = message.pose.position
        return np.array([place.x, place.y, place.z])
    if isinstance(message, TwistStamped):
        both = (message.twist.linear, message.twist.angular)
        return np.array([getattr(part, name) for part in both for name in "xyz"])
    return np.array(message.data)


def rests(last: list[Any]) -> bool:
    return bool(np.ptp([numbers(message) for message in last], axis=0).max() < 1e-3)


def stands_still(last: list[Any]) -> bool:
    return not numbers(last[-1]).any()


@pytest.mark.parametrize(
    ("words", "kind", "centre", "stopped"),
    [
        (JOINTS, Float64MultiArray, np.zeros(2), rests),
        (POSE, PoseStamped, POSTURE, rests),
        (TWIST, TwistStamped, np.zeros(6), stands_still),
    ],
    ids=["joints", "poses", "twists"],
)
def test_set_points_over_dds(
    words: str, kind: type, centre: np.ndarray, stopped: Callable[[list[Any]], bool], domain: int, tmp_path: Path
) -> None:
    """The policy drives and is stopped; the monitor objects to nothing."""
    (tmp_path / "contract.yaml").write_text(CONTRACT + words)
    contract = read_contract(tmp_path)
    names = contract.action.names[:3] if kind is PoseStamped else contract.action.names
    turning = "rotation: {velocity: 1.0, acceleration: 4.0}\n" if kind is PoseStamped else ""
    axes = "".join(f"  {name}: {AXIS}\n" for name in names)
    (tmp_path / "safety.yaml").write_text(f"source: made up for tests\naxes:\n{axes}{turning}{WAITS}")
    ranges = {
        "observation.state": np.stack([POSTURE - 1, POSTURE + 1]),
        "action": np.stack([centre - 0.1, centre + 0.1]),
    }
    given = {"robot": str(tmp_path), "bundle": str(make_bundle(tmp_path / "policy", contract, ranges))}
    threads = Spinning(domain)
    robot = threads.add(Servo(threads.context, kind))
    client = Client(threads.add(Node("tester", context=threads.context)))
    threads.start()
    monitor = NodeProcess("monitor_node", "monitor", {"robot": str(tmp_path)}, tmp_path)
    policy = NodeProcess("policy_node", "policy", given, tmp_path)
    try:
        client.call("report", "monitor")
        until(lambda: client.state == "idle" or policy.process.poll() is not None, what="a configured node")
        answers: list[str] = []

        def started() -> bool:
            answer = client.call("start")
            answers.append(answer.message)
            return answer.success

        until(started, what=lambda: answers[-1])
        client.until_state("running")
        until(lambda: len(robot.commands) > 100, what="commands")
        client.call("stop")
        client.until_state("idle")
        found = json.loads(client.call("report", "monitor").message)["arm"]
    finally:
        monitor.end()
        assert policy.end() == 0, policy.log.read_text()
        threads.close()
    assert found["messages"] > 100 and not found["violations"], found
    moved = np.ptp([numbers(message) for message in robot.commands], axis=0)
    assert moved.max() > 0.01
    assert stopped(robot.commands[-2:])
    if kind is not Float64MultiArray:
        assert {message.header.frame_id for message in robot.commands} == {"base"}
        stamps = [message.header.stamp.sec + 1e-9 * message.header.stamp.nanosec for message in robot.commands]
        assert (np.diff(stamps) > 0).all()
