"""Messages and what the runtime makes of them, both ways."""

from __future__ import annotations

import time

import numpy as np
import pytest

pytest.importorskip("rclpy", reason="rclpy is not installed; see docs/ros_recording.md")
import imagecodecs
from builtin_interfaces.msg import Time
from geometry_msgs.msg import PoseStamped, WrenchStamped
from rclpy.serialization import serialize_message
from rosbags.typesys import Stores, get_typestore
from sensor_msgs.msg import CompressedImage, Image, JointState
from std_msgs.msg import Float64MultiArray
from trajectory_msgs.msg import JointTrajectory

from robopolicy.errors import UserError
from robopolicy.runtime.alignment import rotation_6d
from robopolicy.runtime.clock import NS
from robopolicy.runtime.contract import CommandTopic
from robopolicy.runtime.exchange import Command, Trajectory
from robopolicy.runtime.samples import Joints, Pose, Wrench
from robopolicy_ros import messages
from robopolicy_ros.ingest import received_at
from robopolicy_ros.stamps import Stamps, stamp_ns

STAMPS = Stamps(5 * NS)
TRAJECTORY = CommandTopic(
    "arm", "trajectory_msgs/msg/JointTrajectory", (2, 0), ("b", "a"), scale=(2.0, -0.5), offset=(0.1, 1.0)
)


def picture(height: int = 6, width: int = 5) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)


def padded(pixels: np.ndarray, encoding: str, padding: int) -> Image:
    height, width = pixels.shape[:2]
    rows = pixels.reshape(height, -1)
    data = np.pad(rows, ((0, 0), (0, padding)), constant_values=7).tobytes()
    return Image(height=height, width=width, encoding=encoding, step=rows.shape[1] + padding, data=data)


@pytest.mark.parametrize("padding", [0, 3])
def test_images_of_every_encoding(padding: int) -> None:
    pixels = picture()
    grey = pixels[..., 0]
    np.testing.assert_array_equal(messages.read_image(padded(pixels, "rgb8", padding)), pixels)
    np.testing.assert_array_equal(messages.read_image(padded(pixels[..., ::-1], "bgr8", padding)), pixels)
    np.testing.assert_array_equal(messages.read_image(padded(grey, "mono8", padding)), np.stack([grey] * 3, axis=-1))


def test_images_that_cannot_be_read_are_refused() -> None:
    with pytest.raises(UserError, match="'bayer_rggb8', wanted rgb8, bgr8, mono8"):
        messages.read_image(padded(picture(), "bayer_rggb8", 0))
    short = padded(picture(), "rgb8", 0)
    short.data = short.data[:-1]
    with pytest.raises(UserError, match="89 bytes"):
        messages.read_image(short)


def test_compressed_images() -> None:
    smooth = np.broadcast_to(np.linspace(0, 255, 64).astype(np.uint8)[:, None, None], (64, 48, 3)).copy()
    png = CompressedImage(format="rgb8; png compressed bgr8", data=imagecodecs.png_encode(picture()))
    np.testing.assert_array_equal(messages.read_compressed(png), picture())
    found = messages.read_compressed(messages.compressed_message(smooth))
    assert found.shape == smooth.shape and np.abs(found.astype(int) - smooth).max() <= 3
    grey = CompressedImage(format="mono8; jpeg compressed ", data=imagecodecs.jpeg_encode(smooth[..., 0].copy()))
    assert messages.read_compressed(grey).shape == (64, 48, 3)
    with pytest.raises(UserError, match="compressedDepth"):
        messages.read_compressed(CompressedImage(format="16UC1; compressedDepth png", data=b"x"))
    with pytest.raises(UserError, match="damaged"):
        messages.read_compressed(CompressedImage(format="jpeg", data=b"no jpeg"))


def test_an_image_keeps_its_pixels() -> None:
    found = messages.read_sample(messages.image_message(picture()), "sensor_msgs/msg/Image")
    assert isinstance(found, np.ndarray)
    np.testing.assert_array_equal(found, picture())


def test_vectors() -> None:
    joints = messages.read_sample(JointState(name=["a", "b"], position=[1.0, 2.0]), "sensor_msgs/msg/JointState")
    assert isinstance(joints, Joints) and joints.names == ("a", "b") and joints.velocity is None
    np.testing.assert_array_equal(joints.position, [1.0, 2.0])
    pose = PoseStamped()
    pose.pose.position.x, pose.pose.orientation.z, pose.pose.orientation.w = 0.5, 2.0, 0.0
    found = messages.read_sample(pose, "geometry_msgs/msg/PoseStamped")
    assert isinstance(found, Pose)
    np.testing.assert_array_equal(found.quaternion, [0, 0, 1, 0])
    pose.pose.orientation.z = 0.0
    with pytest.raises(UserError, match="no rotation"):
        messages.read_pose(pose)
    wrench = WrenchStamped()
    wrench.wrench.torque.y = 3.0
    value = messages.read_sample(wrench, "geometry_msgs/msg/WrenchStamped")
    assert isinstance(value, Wrench) and value.torque.tolist() == [0, 3, 0]


@pytest.mark.parametrize(
    ("kind", "names"),
    [("std_msgs/msg/Float64MultiArray", ("b", "a")), ("sensor_msgs/msg/JointState", ("b", "a"))],
)
def test_a_set_point_comes_back(kind: str, names: tuple[str, ...]) -> None:
    topic = CommandTopic("x", kind, (2, 0), names, scale=(2.0, -0.5), offset=(0.1, 1.0))  # type: ignore[arg-type]
    action = np.array([0.3, 9.0, -0.4])
    message = messages.command_message(Command(0, action, action, action), topic, Time(sec=3))
    points = messages.read_command(message, topic, 17, STAMPS)
    np.testing.assert_allclose(points.positions[0], action[[2, 0]])
    assert points.hold and points.times.tolist() == [17]
    if kind == "sensor_msgs/msg/JointState":
        assert message.header.stamp.sec == 3
        np.testing.assert_allclose(message.velocity, [-0.4 / 2.0, 0.3 / -0.5])  # no offset
        message.name, message.position = ["a", "b"], list(reversed(message.position))
        np.testing.assert_allclose(messages.read_command(message, topic, 17, STAMPS).positions, points.positions)


def test_poses_and_twists_come_back() -> None:
    quaternion = np.array([0.1, -0.5, 0.3, 0.8]) / np.linalg.norm([0.1, -0.5, 0.3, 0.8])
    action = np.concatenate([[0.1, 0.2, 0.3], rotation_6d(quaternion), [0.7]])
    topic = CommandTopic("pose", "geometry_msgs/msg/PoseStamped", tuple(range(9)), frame="base")
    stretched = action * np.array([1, 1, 1, 2, 2, 2, 3, 3, 3, 1])  # a policy's columns are not of length 1
    message = messages.command_message(Command(0, stretched, action, action), topic, Time())
    assert message.header.frame_id == "base"
    np.testing.assert_allclose(messages.read_command(message, topic, 0, STAMPS).positions[0], action[:9], atol=1e-12)
    with pytest.raises(UserError, match="no two columns"):
        messages.command_message(Command(0, np.zeros(9), action, action), topic, Time())
    twist = CommandTopic("twist", "geometry_msgs/msg/TwistStamped", tuple(range(6)), scale=(2.0,))
    message = messages.command_message(Command(0, action, action, action), twist, Time())
    assert message.twist.linear.x == pytest.approx(0.05)
    np.testing.assert_allclose(messages.read_command(message, twist, 0, STAMPS).positions[0], action[:6])


def test_a_trajectory_keeps_what_lies_ahead() -> None:
    rng = np.random.default_rng(0)
    now = 100 * NS
    ahead = np.array([-20, 0, 1, 40, 90]) * NS // 1000
    p, v, a = rng.normal(size=(3, 5, 3))
    message = messages.trajectory_message(Trajectory(now + ahead, p, v, a), TRAJECTORY, now, margin=0.002)
    assert message is not None and message.joint_names == ["b", "a"] and stamp_ns(message.header.stamp) == 0
    assert [point.time_from_start.nanosec for point in message.points] == [40_000_000, 90_000_000]
    points = messages.read_command(message, TRAJECTORY, now, STAMPS)
    np.testing.assert_array_equal(points.times, now + ahead[3:])
    for found, wanted in ((points.positions, p), (points.velocities, v), (points.accelerations, a)):
        assert found is not None
        np.testing.assert_allclose(found, wanted[3:][:, [2, 0]])
    assert messages.trajectory_message(Trajectory(now + ahead[:2], p[:2], v[:2], a[:2]), TRAJECTORY, now) is None


def broken(change: str) -> JointTrajectory:
    now = 100 * NS
    rows = np.zeros((2, 3))
    message = messages.trajectory_message(Trajectory(now + np.array([1, 2]) * NS, rows, rows, rows), TRAJECTORY, now)
    assert message is not None
    if change == "names":
        message.joint_names = ["b", "c"]
    elif change == "times":
        message.points[1].time_from_start.sec = 1
    elif change == "lengths":
        message.points[1].velocities = [0.0]
    elif change == "numbers":
        message.points[0].positions = [0.0, float("nan")]
    else:
        message.points = []
    return message


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ("names", r"joints \['b', 'c'\], wanted \['b', 'a'\]"),
        ("times", "do not rise"),
        ("lengths", "other numbers of velocities"),
        ("numbers", "not finite"),
        ("points", "no points"),
    ],
)
def test_trajectories_that_mean_nothing_are_refused(change: str, reason: str) -> None:
    with pytest.raises(UserError, match=reason):
        messages.read_command(broken(change), TRAJECTORY, 0, STAMPS)


def test_a_trajectory_may_say_when_it_begins() -> None:
    message = JointTrajectory(joint_names=["a", "b"])
    now = 100 * NS
    rows = np.zeros((1, 3))
    made = messages.trajectory_message(Trajectory(now + np.array([NS]), rows, rows, rows), TRAJECTORY, now)
    assert made is not None
    message.points = made.points
    message.header.stamp = STAMPS.to_stamp(now + 7)
    assert messages.read_command(message, TRAJECTORY, now, STAMPS).times.tolist() == [now + 7 + NS]


def test_messages_of_bags_read_the_same() -> None:
    store = get_typestore(Stores.ROS2_KILTED)
    joints = JointState(name=["a"], position=[1.5], velocity=[2.0])
    for message, kind in ((messages.image_message(picture()), "sensor_msgs/msg/Image"), (joints, "JointState")):
        kind = kind if "/" in kind else f"sensor_msgs/msg/{kind}"
        definition = store.get_msgdef(kind)
        read, _ = definition.deserialize_cdr_le(serialize_message(message)[4:], 0, definition.cls, store)
        found, wanted = messages.read_sample(read, kind), messages.read_sample(message, kind)
        if isinstance(wanted, Joints):
            assert isinstance(found, Joints) and found.names == wanted.names and found.effort is None
            np.testing.assert_array_equal(found.velocity, wanted.velocity)
        else:
            np.testing.assert_array_equal(found, wanted)


def test_a_chunk_tells_its_shape() -> None:
    message = messages.chunk_message(np.arange(6.0).reshape(2, 3))
    assert [(d.label, d.size, d.stride) for d in message.layout.dim] == [("horizon", 2, 6), ("action", 3, 3)]
    assert isinstance(message, Float64MultiArray) and list(message.data) == [0, 1, 2, 3, 4, 5]


def test_a_middleware_that_does_not_say_when_a_message_came() -> None:
    info = {"source_timestamp": 3, "received_timestamp": 7 * NS}
    assert received_at(info, STAMPS, 11) == 2 * NS
    assert received_at(info | {"received_timestamp": 0}, STAMPS, 11) == 11


def test_stamps_and_the_clock() -> None:
    stamps = Stamps.measure()
    assert stamps.to_monotonic(stamps.to_stamp(123_456_789_012)) == 123_456_789_012
    now, wall = time.monotonic_ns(), time.time_ns()
    assert abs(stamps.wall_to_monotonic(wall) - now) < NS // 10
