"""A scripted operator drives the simulated robot, and takes over from a policy."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("rclpy", reason="rclpy is not installed; see docs/ros_recording.md")
pytest.importorskip("robopolicy_sim", reason="the simulator is not installed")
pytest.importorskip("pygame", reason="pygame is not installed")
import rclpy
from geometry_msgs.msg import PoseStamped
from rclpy.context import Context
from rclpy.executors import SingleThreadedExecutor
from rclpy.node import Node
from rclpy.parameter import Parameter
from sensor_msgs.msg import JointState

from robopolicy.errors import UserError
from robopolicy.runtime.robots import read_robot
from robopolicy.teleoperation.command import Command, SessionKey
from robopolicy_ros import qos
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

    def tell(self, twist: np.ndarray, *keys: SessionKey, opening: float = 1.0) -> None:
        self.command = Command(twist, opening, frozenset(keys))

    def read(self, events: Sequence[Any]) -> Command:
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


def make(context: Context, device: Script, target: str) -> TeleopNode:
    values = {"robot": str(ROBOT), "target": target, "rate": 50.0}
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
