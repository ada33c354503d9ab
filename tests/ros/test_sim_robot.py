"""The simulated robot: its controllers, its expert, its topics; demonstrations recorded through them."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("rclpy", reason="rclpy is not installed; see docs/ros_recording.md")
pytest.importorskip("robopolicy_sim", reason="the simulator is not installed")
from std_srvs.srv import SetBool

from robopolicy.data.store import EpisodeStore
from robopolicy.errors import UserError
from robopolicy.runtime.clock import NS
from robopolicy.runtime.commanded import Points
from robopolicy.runtime.robots import read_robot
from robopolicy_ros.bag import convert
from robopolicy_ros.client import Client
from robopolicy_ros.collect import collect
from robopolicy_ros.joint_trajectory_controller import JointTrajectoryController
from robopolicy_ros.simulated_robot import SimulatedRobot
from tests.ros.conftest import PACKAGE
from tests.ros.process import NodeProcess, until

ROBOT = PACKAGE / "config" / "sim_ur5e_drawer_close"


@pytest.fixture(scope="module")
def robot() -> SimulatedRobot:
    return SimulatedRobot(read_robot(str(ROBOT)).contract, "drawer_close", {"arm": "ur5e"}, start=0)


def test_the_expert_succeeds_through_the_controllers(robot: SimulatedRobot) -> None:
    for seed in range(5):
        robot.reset(seed, robot.time)
        robot.demonstrate()
        while not robot.over:
            action = robot.expert_action()
            if action is not None:
                for name, command in robot.contract.commands.items():
                    entries, hold = list(command.entries), name == "gripper"
                    at = robot.time if hold else robot.time + NS // 20
                    assert (
                        robot.command(name, robot.time, Points(np.array([at]), action[entries][None], hold=hold)) == ""
                    )
            robot.step()
        assert robot.success, seed
        assert not robot.demonstrating


def test_the_emergency_stop_freezes(robot: SimulatedRobot) -> None:
    robot.reset(0, robot.time)
    start = robot.sample("joints").position  # type: ignore[union-attr]
    assert start is not None
    far = Points(np.array([robot.time + NS]), start[None, :6] + 0.5)
    assert robot.command("arm", robot.time, far) == ""
    for _ in range(30):
        robot.step()
    robot.freeze()
    for _ in range(50):
        robot.step()
    frozen = robot.sample("joints").position  # type: ignore[union-attr]
    assert "emergency stop" in robot.command("arm", robot.time, far)
    for _ in range(50):
        robot.step()
    later = robot.sample("joints").position  # type: ignore[union-attr]
    assert frozen is not None and later is not None
    np.testing.assert_allclose(later, frozen, atol=1e-3)
    assert 0.05 < np.abs(frozen[:6] - start[:6]).max() < 0.3
    robot.release()
    assert robot.command("arm", robot.time, replace_times(far, robot.time + NS)) == ""


def replace_times(points: Points, time: int) -> Points:
    return Points(np.array([time]), points.positions)


def test_a_contract_that_does_not_fit_the_task_is_refused() -> None:
    contract = read_robot(str(ROBOT)).contract
    with pytest.raises(UserError, match="joints"):
        SimulatedRobot(contract, "drawer_close", {"arm": "panda"}, start=0)
    with pytest.raises(UserError, match="no 'cabinet_x'"):
        SimulatedRobot(contract, "lift", {"arm": "ur5e"}, start=0)


def test_trajectories_that_the_controller_refuses() -> None:
    controller = JointTrajectoryController(tolerance=0.2)
    controller.hold(0, np.zeros(2))
    moving = Points(np.array([NS]), np.ones((1, 2)), np.full((1, 2), 0.1))
    assert "last velocity is not zero" in controller.accept(0, moving)
    assert "past" in controller.accept(2 * NS, Points(np.array([NS]), np.ones((1, 2))))
    assert (controller.accepted, controller.refused) == (0, 2)
    assert controller.accept(0, Points(np.array([NS]), np.ones((1, 2)), np.zeros((1, 2)))) == ""
    np.testing.assert_allclose(controller.at(NS // 2).position, 0.5)
    assert controller.check(NS // 2, np.array([0.4, 0.5])) == ""
    assert "entry 1" in controller.check(NS // 2, np.array([0.4, 0.1]))
    np.testing.assert_allclose(controller.at(NS).position, [0.4, 0.1])


def test_demonstrations_over_dds(tmp_path: Path) -> None:
    """Two recorded demonstrations, the same from the bag; then the recorder is killed in the third."""
    data, bag = tmp_path / "data.zarr", tmp_path / "messages"
    recording = {"robot": str(ROBOT), "dataset": str(data), "bag": str(bag)}
    sim = NodeProcess("sim_robot_node", "sim_robot", {"robot": str(ROBOT), "seed": 3}, tmp_path)
    recorder = NodeProcess("recorder_node", "recorder", recording, tmp_path)
    try:
        with Client("test") as client:
            done = collect(client, 2)
            assert done.succeeded == 2
            recorder.send(signal.SIGTERM)
            assert recorder.process.wait(20) == 0
            recorded = EpisodeStore.open(data)
            assert recorded.n_episodes == done.stored
            assert set(recorded.tasks) <= {"close the left drawer", "close the right drawer"}
            again = convert(bag, read_robot(str(ROBOT)).contract, tmp_path / "again.zarr")
            assert again.episodes == done.stored
            with EpisodeStore.open(tmp_path / "again.zarr") as same:
                for key in recorded.keys:
                    np.testing.assert_array_equal(same.read(key), recorded.read(key), err_msg=key)

            more = {"robot": str(ROBOT), "dataset": str(data), "append": True}
            recorder = NodeProcess("recorder_node", "recorder", more, tmp_path)
            client.trigger("/sim_robot/reset")
            client.wait(0.3)
            until(lambda: client.try_trigger("/recorder/start")[0], what="fresh streams")
            client.trigger("/sim_robot/demonstrate")
            assert client.wait_for(lambda: client.said("/recorder/state").get("state") == "recording", 15)
            client.wait(0.5)
            recorder.send(signal.SIGKILL)
            recorder.process.wait(20)
            with EpisodeStore.open(data, "a") as survived:
                assert survived.n_episodes == done.stored
                np.testing.assert_array_equal(survived.read("action"), recorded.read("action"))
    finally:
        recorder.end()
        assert sim.end() == 0, sim.log.read_text()


def test_the_emergency_stop_over_dds(tmp_path: Path) -> None:
    sim = NodeProcess("sim_robot_node", "sim_robot", {"robot": str(ROBOT)}, tmp_path)
    try:
        with Client("test") as client:
            client.watch("/sim_robot/episode")
            client.trigger("/sim_robot/demonstrate")
            assert client.wait_for(lambda: bool(client.said("/sim_robot/episode").get("demonstrating")), 15)
            assert client.call(SetBool, "/sim_robot/press_estop", SetBool.Request(data=True)).success
            assert client.wait_for(lambda: bool(client.said("/sim_robot/episode").get("estop")), 10)
            assert not client.said("/sim_robot/episode")["demonstrating"]
            assert client.try_trigger("/sim_robot/demonstrate") == (False, "The emergency stop is pressed.")
            assert json.loads(client.trigger("/sim_robot/reset"))["seed"] == 1
            assert not client.try_trigger("/sim_robot/demonstrate")[0]  # a reset does not release it
            client.call(SetBool, "/sim_robot/press_estop", SetBool.Request(data=False))
            assert client.try_trigger("/sim_robot/demonstrate")[0]
    finally:
        sim.end()
