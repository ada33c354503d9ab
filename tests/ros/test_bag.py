"""Bags that others recorded: no marks, SQLite, a namespace; and those that cannot be converted."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("rclpy", reason="rclpy is not installed; see docs/ros_recording.md")
pytest.importorskip("rosbags", reason="rosbags is not installed; see docs/ros_recording.md")
from rosbags.rosbag2 import StoragePlugin, Writer
from rosbags.typesys import Stores, get_typestore

from robopolicy.data.store import EpisodeStore
from robopolicy.errors import UserError
from robopolicy.runtime.clock import NS
from robopolicy.runtime.contract import Contract, read_contract
from robopolicy_ros import bag

CONTRACT = """
robot: wave
policy_rate: 10
command_rate: 100
joints: [a]
measured: joints
streams:
  joints: {topic: joint_states, type: sensor_msgs/msg/JointState, rate: 50, stale_after: 0.2}
observations:
  observation.state: {parts: [{stream: joints, align: interpolate, field: position, names: [a]}]}
action: {names: [a]}
commands:
  arm: {topic: commands, type: std_msgs/msg/Float64MultiArray, entries: [0], names: [a], scale: [2.0]}
"""
TYPES = get_typestore(Stores.ROS2_KILTED)


@pytest.fixture
def contract(tmp_path: Path) -> Contract:
    (tmp_path / "contract.yaml").write_text(CONTRACT)
    return read_contract(tmp_path / "contract.yaml")


def write(
    path: Path, *, plugin: StoragePlugin = StoragePlugin.SQLITE3, commands: bool = True, gap: bool = False
) -> None:
    """Three seconds: joint ``a`` is the time, the command five times the time."""
    stamp, header = TYPES.types["builtin_interfaces/msg/Time"], TYPES.types["std_msgs/msg/Header"]
    joint_state, array = TYPES.types["sensor_msgs/msg/JointState"], TYPES.types["std_msgs/msg/Float64MultiArray"]
    layout = TYPES.types["std_msgs/msg/MultiArrayLayout"]
    with Writer(path, version=9, storage_plugin=plugin) as writer:
        joints = writer.add_connection("/cell/joint_states", "sensor_msgs/msg/JointState", typestore=TYPES)
        command = writer.add_connection("/cell/commands", "std_msgs/msg/Float64MultiArray", typestore=TYPES)
        for k in range(150):
            time = 1_700_000_000 * NS + k * NS // 50
            if not (gap and 60 < k < 90):
                sent = header(stamp(time // NS, time % NS), "")
                message = joint_state(sent, ["a"], np.array([k / 50]), np.zeros(0), np.zeros(0))
                writer.write(joints, time + 1000, bytes(TYPES.serialize_cdr(message, joint_state.__msgtype__)))
            if commands and k % 5 == 0 and k >= 10:
                message = array(layout([], 0), np.array([k / 10]))
                writer.write(command, time + 2000, bytes(TYPES.serialize_cdr(message, array.__msgtype__)))


@pytest.mark.parametrize("plugin", list(StoragePlugin))
def test_a_bag_without_marks_is_one_episode(contract: Contract, tmp_path: Path, plugin: StoragePlugin) -> None:
    write(tmp_path / "recorded", plugin=plugin)
    done = bag.convert(tmp_path / "recorded", contract, tmp_path / "data.zarr", task="rise", namespace="/cell")
    assert (done.episodes, done.skipped, done.refused) == (1, (), {})
    with EpisodeStore.open(tmp_path / "data.zarr") as store:
        episode = store.episode(0)
        assert store.tasks == ["rise"] and store.episode_success == [True] and store.fps == 10
        assert store.schema.attributes["bag"] == "recorded"
    assert done.rows == len(episode["timestamp"]) >= 25
    # The first command comes at 0.2 s, and from then on one each 0.1 s, just before the row's end.
    np.testing.assert_allclose(episode["observation.state"][:, 0], 0.2 + episode["timestamp"], atol=1e-5)
    np.testing.assert_allclose(episode["action"][:, 0], 2 * 5 * (0.3 + episode["timestamp"]), atol=1e-5)


def test_a_gap_ends_the_episode_of_a_bag(contract: Contract, tmp_path: Path) -> None:
    write(tmp_path / "recorded", gap=True)
    done = bag.convert(tmp_path / "recorded", contract, tmp_path / "data.zarr", namespace="/cell")
    assert done.episodes == 0 and "was silent" in done.skipped[0]


def test_bags_that_do_not_fit(contract: Contract, tmp_path: Path) -> None:
    write(tmp_path / "recorded", commands=False)
    with pytest.raises(UserError, match="/joint_states is not there.*It has /cell/"):
        bag.convert(tmp_path / "recorded", contract, tmp_path / "data.zarr")
    done = bag.convert(tmp_path / "recorded", contract, tmp_path / "data.zarr", namespace="/cell")
    assert done.episodes == 0 and "no command has come on commands" in done.skipped[0]
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="cannot be read as a rosbag2"):
        bag.convert(tmp_path / "empty", contract, tmp_path / "other.zarr", namespace="/cell")


def test_the_command_line(contract: Contract, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(tmp_path / "recorded")
    (tmp_path / "safety.yaml").write_text(
        "source: none\naxes: {a: {lower: -30, upper: 30, velocity: 1, acceleration: 1, jerk: 1}}\n"
    )
    arguments = ["--bag", str(tmp_path / "recorded"), "--robot", str(tmp_path), "--out", str(tmp_path / "data.zarr")]
    assert bag.main([*arguments, "--namespace", "/cell"]) == 0
    assert "1 episodes, " in capsys.readouterr().out
    with pytest.raises(SystemExit) as ended:
        bag.main([*arguments, "--namespace", "/cell"])
    assert ended.value.code == 1 and "exists already" in capsys.readouterr().err
