"""The recorder over DDS: what it stores against what was published, and what happens when things fail."""

from __future__ import annotations

import json
import math
import resource
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("rclpy", reason="rclpy is not installed; see docs/ros_recording.md")
import rclpy
from rclpy.context import Context
from rclpy.node import Node
from sensor_msgs.msg import Image, JointState
from std_msgs.msg import String
from trajectory_msgs.msg import JointTrajectory, JointTrajectoryPoint

from robopolicy.data.store import EpisodeStore
from robopolicy.runtime.clock import NS
from robopolicy.runtime.contract import read_contract
from robopolicy_ros import qos
from robopolicy_ros.bag import convert
from robopolicy_ros.client import Client
from robopolicy_ros.messages import duration, image_message, joints_message
from robopolicy_ros.stamps import Stamps
from tests.ros.process import NodeProcess

CONTRACT = """
robot: wave
policy_rate: 20
command_rate: 100
joints: [a, b]
measured: joints
streams:
  joints: {topic: joint_states, type: sensor_msgs/msg/JointState, rate: 100, stale_after: 1.0, latency: 0.005}
  top: {topic: top, type: sensor_msgs/msg/Image, rate: 20, stale_after: 1.0, size: [96, 96]}
observations:
  observation.state: {parts: [{stream: joints, align: interpolate, field: position, names: [b, a]}]}
  observation.image.top: {parts: [{stream: top, align: nearest}]}
action: {names: [a, b]}
commands:
  arm: {topic: commands, type: trajectory_msgs/msg/JointTrajectory, entries: [0, 1], names: [a, b]}
"""
SAFETY = """
source: none, nothing moves
axes:
  a: {lower: -3, upper: 3, velocity: 3, acceleration: 10, jerk: 100}
  b: {lower: -3, upper: 3, velocity: 3, acceleration: 10, jerk: 100}
"""


def wave(seconds: float | np.ndarray) -> np.ndarray:
    """(..., 2): joints a and b at a time of the wall clock."""
    s = np.asarray(seconds) % 1000.0
    return np.stack([np.sin(2 * s), 0.5 * np.cos(3 * s)], axis=-1)


class Wave(threading.Thread):
    """A robot that follows `wave`: stamps jitter, joints come in another order, images are noise."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self._context = Context()
        rclpy.init(context=self._context)
        self._node = Node("wave", context=self._context)
        self._joints = self._node.create_publisher(JointState, "joint_states", 10)
        self._top = self._node.create_publisher(Image, "top", 2)
        self._commands = self._node.create_publisher(JointTrajectory, "commands", qos.COMMAND)
        self.policy = self._node.create_publisher(String, "policy/state", qos.LATCHED)
        self._over = threading.Event()
        self.silent = False
        self.start()

    def run(self) -> None:
        rng, stamps, k = np.random.default_rng(0), Stamps(0), 0
        while not self._over.wait(0.01 * rng.uniform(0.6, 1.4)):
            now = time.time_ns()
            if not self.silent:
                moment = now - 5 * NS // 1000
                self._joints.publish(joints_message(("a", "b"), wave(moment / NS), stamp=stamps.to_stamp(now)))
            if k % 5 == 0:
                self._publish_image(now, rng)
                points = [self._point(now, ahead) for ahead in np.arange(1, 21) * NS // 20]
                message = JointTrajectory(joint_names=["a", "b"], points=points)
                message.header.stamp = stamps.to_stamp(now)
                self._commands.publish(message)
            k += 1

    def _point(self, now: int, ahead: int) -> JointTrajectoryPoint:
        at = (now + int(ahead)) / NS
        velocity = (wave(at + 1e-3) - wave(at - 1e-3)) / 2e-3
        return JointTrajectoryPoint(
            positions=wave(at).tolist(), velocities=velocity.tolist(), time_from_start=duration(int(ahead))
        )

    def _publish_image(self, now: int, rng: np.random.Generator) -> None:
        pixels = rng.integers(0, 256, (96, 96, 3), dtype=np.uint8)
        message = image_message(pixels)
        message.header.stamp = Stamps(0).to_stamp(now)
        self._top.publish(message)

    def stop(self) -> None:
        self._over.set()
        self.join(5)
        self._node.destroy_node()
        rclpy.try_shutdown(context=self._context)


@pytest.fixture(scope="module")
def robot(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wave")
    (folder / "contract.yaml").write_text(CONTRACT)
    (folder / "safety.yaml").write_text(SAFETY)
    return folder


@pytest.fixture
def publisher() -> Iterator[Wave]:
    publisher = Wave()
    yield publisher
    publisher.stop()


def begin(client: Client) -> float:
    """Start an episode as soon as the recorder hears every stream; returns the wall clock shortly before [s]."""
    client.watch("/recorder/state")
    for _ in range(200):
        asked = time.time()
        if client.try_trigger("/recorder/start")[0]:
            break
        client.wait(0.1)
    assert client.wait_for(lambda: client.said("/recorder/state").get("state") == "recording", 20)
    return asked


def test_rows_are_what_was_published(robot: Path, publisher: Wave, tmp_path: Path) -> None:
    """Against the known signal, and bit for bit against the bag of the same messages."""
    data, bag = tmp_path / "data.zarr", tmp_path / "messages"
    parameters = {
        "robot": str(robot),
        "dataset": str(data),
        "bag": str(bag),
        "policy_state": "/policy/state",
        "behaviour": "policy",
    }
    recorder = NodeProcess("recorder_node", "recorder", parameters, tmp_path)
    try:
        with Client("test") as client:
            publisher.policy.publish(String(data=json.dumps({"state": "running", "reason": ""})))
            client.set_parameter("/recorder", "task", "follow the wave")
            asked = begin(client)
            client.wait(1.0)
            publisher.policy.publish(String(data=json.dumps({"state": "intervention", "reason": ""})))
            client.wait(1.0)
            assert "Episode 0 stored: success" in client.trigger("/recorder/success")
    finally:
        assert recorder.end() == 0, recorder.log.read_text()
    store = EpisodeStore.open(data)
    assert (store.tasks, store.episode_success, store.behaviours) == (["follow the wave"], [True], ["policy"])
    episode = store.episode(0)
    assert len(episode["action"]) >= 20
    # The wave repeats after 6.3 s: only one begin of the first row fits two joints to a few milliradians.
    begins = np.arange(asked, asked + 6.0, 5e-4)
    errors = [np.abs(episode["observation.state"] - wave(at + episode["timestamp"])[:, ::-1]).max() for at in begins]
    grid = begins[int(np.argmin(errors))] + episode["timestamp"]
    assert min(errors) < 5e-3  # speeds up to 2 rad/s times the search's step, and interpolation
    # Trajectories say when they begin; one replaces the one before at any time, and all are the same wave.
    np.testing.assert_allclose(episode["action"], wave(grid + 0.05), atol=0.01)
    assert 0.2 < episode["intervention"].mean() < 0.8 and (np.diff(episode["intervention"].astype(int)) >= 0).all()

    done = convert(bag, read_contract(robot), tmp_path / "again.zarr", policy_state="/policy/state")
    assert (done.episodes, done.rows, done.skipped) == (1, len(grid), ())
    with EpisodeStore.open(tmp_path / "again.zarr") as same:
        for key, values in episode.items():
            np.testing.assert_array_equal(same.read(key), values, err_msg=key)


def test_silence_and_a_full_disk(robot: Path, publisher: Wave, tmp_path: Path) -> None:
    data = tmp_path / "data.zarr"
    recorder = NodeProcess("recorder_node", "recorder", {"robot": str(robot), "dataset": str(data)}, tmp_path)
    try:
        with Client("test") as client:
            begin(client)
            client.wait(0.5)
            publisher.silent = True
            assert client.wait_for(lambda: client.said("/recorder/state")["state"] == "stopped", 10)
            assert "joint_states" in client.said("/recorder/state")["reason"]
            assert not client.try_trigger("/recorder/success")[0]
            assert client.try_trigger("/recorder/failure")[0]
            assert "is silent" in client.try_trigger("/recorder/start")[1]
            publisher.silent = False

            begin(client)
            client.wait(0.5)
            limits = resource.prlimit(recorder.process.pid, resource.RLIMIT_FSIZE)
            resource.prlimit(recorder.process.pid, resource.RLIMIT_FSIZE, (20_000, limits[1]))
            stored, why = client.try_trigger("/recorder/success")
            assert not stored and "could not be written" in why and "Earlier episodes are intact" in why
            assert client.wait_for(lambda: client.said("/recorder/state")["state"] == "not_stored", 10)
            with EpisodeStore.open(data) as store:
                assert store.n_episodes == 1
                assert math.isfinite(store.episode(0)["observation.state"].sum())
            resource.prlimit(recorder.process.pid, resource.RLIMIT_FSIZE, limits)
            assert "Episode 1 stored" in client.trigger("/recorder/success")
    finally:
        assert recorder.end() == 0, recorder.log.read_text()
    with EpisodeStore.open(data) as store:
        assert store.episode_success == [False, True]
