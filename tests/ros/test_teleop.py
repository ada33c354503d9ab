"""A scripted operator drives the simulated robot, and takes over from a policy."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("rclpy", reason="rclpy is not installed; see docs/ros_recording.md")
pytest.importorskip("robopolicy_sim", reason="the simulator is not installed")
pytest.importorskip("pygame", reason="pygame is not installed")
import rclpy
import yaml
from geometry_msgs.msg import PoseStamped, TwistStamped
from rclpy.context import Context
from rclpy.executors import SingleThreadedExecutor
from rclpy.node import Node
from rclpy.parameter import Parameter
from sensor_msgs.msg import JointState
from trajectory_msgs.msg import JointTrajectory

from robopolicy.errors import UserError
from robopolicy.runtime.robots import read_robot
from robopolicy.teleoperation.command import Command, SessionKey
from robopolicy_ros import qos
from robopolicy_ros.messages import MESSAGE_TYPES
from robopolicy_ros.teleop_node import TeleopNode
from robopolicy_ros.teleoperation import Operator
from tests.ros.conftest import PACKAGE
from tests.ros.process import NodeProcess, until

ROBOT = PACKAGE / "config" / "sim_ur5e_drawer_close"
UP = np.array([0, 0, 0.1, 0, 0, 0])


class Script:
    """A device that does what the test says."""

    name = "script"
    hints: tuple[tuple[str, str], ...] = ()

    def __init__(self) -> None:
        self.command = Command(np.zeros(6))
        self.resets = 0
        self.lost = False

    def tell(self, twist: np.ndarray, *keys: SessionKey, opening: float = 1.0) -> None:
        self.command = Command(twist, opening, frozenset(keys))

    def read(self, events: Sequence[Any]) -> Command:
        if self.lost:
            raise UserError("The device is lost.")
        command = self.command
        self.command = Command(command.twist, command.opening)  # keys are told once
        return command

    def reset(self) -> None:
        self.resets += 1

    def close(self) -> None:
        """Nothing to give back."""


@pytest.fixture
def context() -> Iterator[Context]:
    context = Context()
    rclpy.init(context=context)
    yield context
    rclpy.try_shutdown(context=context)


def make(context: Context, device: Script, target: str, robot: Path = ROBOT) -> TeleopNode:
    values = {"robot": str(robot), "target": target, "rate": 50.0}
    overrides = [Parameter(name, value=value) for name, value in values.items()]
    node = TeleopNode(device=device, events=list, context=context, parameter_overrides=overrides)
    node.begin()
    return node


def test_an_operator_drives_and_takes_over(context: Context, tmp_path: Path) -> None:
    device = Script()
    sim = NodeProcess("sim_robot_node", "sim_robot", {"robot": str(ROBOT)}, tmp_path)
    watch = Node("watch", context=context)
    heights: list[float] = []
    taken: list[JointState] = []
    watch.create_subscription(PoseStamped, "tcp_pose", lambda m: heights.append(m.pose.position.z), 10)
    watch.create_subscription(JointState, "intervention", taken.append, qos.COMMAND_SUBSCRIPTION)
    executor = SingleThreadedExecutor(context=context)
    executor.add_node(watch)

    def wait(condition: Any, what: str) -> None:
        def holds() -> bool:
            for _ in range(20):
                executor.spin_once(timeout_sec=0.01)
            return bool(condition())

        until(holds, what=what)

    teleop = make(context, device, "commands")
    executor.add_node(teleop)
    try:
        wait(lambda: len(heights) > 20, "the arm's pose")
        start = heights[-1]
        device.tell(UP)
        for _ in range(30):
            executor.spin_once(timeout_sec=0.05)
        assert not teleop.driving and abs(heights[-1] - start) < 2e-3  # not before control is taken
        device.tell(UP, SessionKey.TOGGLE)
        wait(lambda: heights[-1] > start + 0.05, "the arm rises")
        assert device.resets == 1
        device.tell(UP, SessionKey.TOGGLE)
        wait(lambda: not teleop.driving, "control is given back")
        executor.remove_node(teleop)
        teleop.end("the test")
        teleop.destroy_node()

        teleop = make(context, device, "intervention")
        executor.add_node(teleop)
        device.tell(np.zeros(6), opening=0.25)
        wait(lambda: teleop._buffer.measured() is not None, "joint states")
        device.tell(np.zeros(6), SessionKey.TOGGLE, opening=0.25)
        wait(lambda: taken, "the take-over")
        assert tuple(taken[-1].name) == teleop.contract.action.names and taken[-1].position[-1] == 0.25
        device.tell(UP, SessionKey.TOGGLE)
        wait(lambda: not taken[-1].name, "letting go")
    finally:
        executor.remove_node(teleop)
        teleop.destroy_node()
        watch.destroy_node()
        assert sim.end() == 0, sim.log.read_text()


class FollowingRobot(Node):
    """Joints that are at once where they are told to be, and all that was told."""

    def __init__(self, context: Context, node: TeleopNode, start: np.ndarray) -> None:
        super().__init__("robot", context=context)
        self._names = node.contract.joints
        self._positions = start
        self.told: list[np.ndarray] = []
        self._publisher = self.create_publisher(JointState, "joint_states", 10)
        for name, command in node.contract.commands.items():
            kind = MESSAGE_TYPES[command.type]
            self.create_subscription(kind, command.topic, partial(self._take, name), qos.COMMAND_SUBSCRIPTION)
        self.create_timer(0.01, self._publish)

    def _take(self, name: str, message: Any) -> None:
        if isinstance(message, JointTrajectory):
            self._positions = np.array(message.points[-1].positions)
            self.told.append(self._positions)
        elif isinstance(message, TwistStamped):
            linear, angular = message.twist.linear, message.twist.angular
            self.told.append(np.array([linear.x, linear.y, linear.z, angular.x, angular.y, angular.z]))

    def _publish(self) -> None:
        message = JointState(name=[*self._names, "gripper_opening"], position=[*self._positions.tolist(), 0.5])
        message.header.stamp = self.get_clock().now().to_msg()
        self._publisher.publish(message)


def slow_robot(folder: Path, twist: bool) -> Path:
    """``ROBOT`` with joints of 0.1 rad/s, or commanded by twists of at most 0.05."""
    contract, safety = (yaml.safe_load((ROBOT / f"{name}.yaml").read_text()) for name in ("contract", "safety"))
    limits = {"lower": -6.0, "upper": 6.0, "velocity": 0.1, "acceleration": 1.0, "jerk": 20.0}
    if twist:
        names = ["vx", "vy", "vz", "wx", "wy", "wz"]
        contract["action"] = {"names": names, "kind": "tool_twist", "unit": "m/s"}
        topic = {"topic": "twist", "type": "geometry_msgs/msg/TwistStamped", "entries": list(range(6))}
        contract["commands"] = {"arm": topic}
        safety["axes"] = dict.fromkeys(names, limits | {"lower": -0.05, "upper": 0.05})
    else:
        for name in contract["joints"]:
            safety["axes"][name] = limits
    for name, content in (("contract", contract), ("safety", safety)):
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(content))
    return folder


@pytest.mark.parametrize("twist", [False, True], ids=["joints", "twist"])
@pytest.mark.parametrize("ending", ["given back", "device lost", "node ends"])
def test_commands_keep_the_limits_and_end_at_rest(context: Context, tmp_path: Path, twist: bool, ending: str) -> None:
    from robopolicy_sim.arms.arm import find_arm

    device = Script()
    teleop = make(context, device, "commands", slow_robot(tmp_path, twist))
    robot = FollowingRobot(context, teleop, np.array(find_arm("ur5e").home))
    executor = SingleThreadedExecutor(context=context)
    executor.add_node(teleop)
    executor.add_node(robot)

    def spin(condition: Any, what: str) -> None:
        def holds() -> bool:
            executor.spin_once(timeout_sec=0.02)
            return bool(condition())

        until(holds, what=what)

    try:
        spin(lambda: teleop._buffer.measured() is not None, "joint states")
        device.tell(10 * UP, SessionKey.TOGGLE)
        spin(lambda: len(robot.told) > 40, "it moves")
        driven = len(robot.told)
        if ending == "given back":
            device.tell(10 * UP, SessionKey.TOGGLE)
        elif ending == "device lost":
            device.lost = True
        else:
            teleop.end("the test")
        spin(lambda: not teleop.driving and not teleop._braking, "letting go")
        spin(lambda: len(robot.told) > driven, "the last set points")
        for _ in range(200):  # the last ones may still be on their way
            executor.spin_once(timeout_sec=0.005)
        told = np.stack(robot.told)
        if twist:
            assert np.abs(told).max() == pytest.approx(0.05, rel=0.05)
            assert not told[-1].any()
        else:
            speeds = np.abs(np.diff(told, axis=0)).max(axis=1) / 0.02
            assert speeds.max() < 0.25 and np.median(speeds[20:driven]) == pytest.approx(0.1, rel=0.3)
            assert speeds[-1] < 0.05  # at the end of a braking ramp
    finally:
        executor.shutdown()
        teleop.destroy_node()
        robot.destroy_node()


def test_the_target_stays_near_the_tool() -> None:
    contract = read_robot(str(ROBOT)).contract
    operator = Operator(contract, "ur5e", 0.02)
    from robopolicy_sim.arms.arm import find_arm
    from robopolicy_sim.kinematics import ArmKinematics

    arm = find_arm("ur5e")
    kinematics, home = ArmKinematics(arm), np.array(arm.home)
    at, turned = kinematics.forward(home)
    actions = [operator.action(Command(5 * UP, 0.5), home) for _ in range(100)]
    assert actions[-1].shape == (7,) and actions[-1][-1] == 0.5
    assert np.abs(np.diff([a[:6] for a in actions], axis=0)).max() <= np.pi * 0.02 + 1e-9
    position, rotation = kinematics.forward(actions[-1][:6])  # the arm hangs: it does not follow
    assert np.linalg.norm(position - at) == pytest.approx(0.05, abs=5e-3) and position[2] > at[2] + 0.04
    np.testing.assert_allclose(rotation, turned, atol=0.02)
    still = operator.action(Command(np.zeros(6)), home)
    np.testing.assert_array_equal(still[:6], actions[-1][:6])
    with pytest.raises(UserError, match="7 joints, the contract 6"):
        Operator(contract, "panda", 0.02)
