"""Between ROS messages and what the runtime works with.

Messages that are read may come from rclpy or from a bag file (``rosbags``), which have the same fields. Messages that
are written are rclpy's.
"""

from __future__ import annotations

import array
from collections.abc import Sequence
from typing import Any

import numpy as np
from builtin_interfaces.msg import Duration, Time
from geometry_msgs.msg import PoseStamped, TwistStamped, WrenchStamped
from sensor_msgs.msg import CompressedImage, Image, JointState
from std_msgs.msg import Float64MultiArray, MultiArrayDimension
from trajectory_msgs.msg import JointTrajectory, JointTrajectoryPoint

from robopolicy.errors import UserError
from robopolicy.runtime.clock import NS, nanoseconds
from robopolicy.runtime.commanded import Points
from robopolicy.runtime.contract import CommandTopic
from robopolicy.runtime.exchange import Command, Trajectory
from robopolicy.runtime.samples import Joints, Pose, Value, Wrench
from robopolicy_ros.stamps import Stamps, stamp_ns

MESSAGE_TYPES: dict[str, type] = {
    "sensor_msgs/msg/JointState": JointState,
    "sensor_msgs/msg/Image": Image,
    "sensor_msgs/msg/CompressedImage": CompressedImage,
    "geometry_msgs/msg/PoseStamped": PoseStamped,
    "geometry_msgs/msg/TwistStamped": TwistStamped,
    "geometry_msgs/msg/WrenchStamped": WrenchStamped,
    "std_msgs/msg/Float64MultiArray": Float64MultiArray,
    "trajectory_msgs/msg/JointTrajectory": JointTrajectory,
}
"""Classes of the contract's message types."""

_CHANNELS = {"rgb8": 3, "bgr8": 3, "mono8": 1}


# From messages.


def read_sample(message: Any, type_name: str) -> Value:
    """What a message of a stream says.

    Args:
        message: of rclpy or of rosbags.
        type_name: as the contract has it.

    Raises:
        UserError: an image has an encoding or a size that cannot be read.
    """
    if type_name == "sensor_msgs/msg/JointState":
        return read_joints(message)
    if type_name == "sensor_msgs/msg/Image":
        return read_image(message)
    if type_name == "sensor_msgs/msg/CompressedImage":
        return read_compressed(message)
    if type_name == "geometry_msgs/msg/PoseStamped":
        return read_pose(message)
    if type_name == "geometry_msgs/msg/WrenchStamped":
        force, torque = message.wrench.force, message.wrench.torque
        return Wrench(np.array([force.x, force.y, force.z]), np.array([torque.x, torque.y, torque.z]))
    raise UserError(f"A {type_name} is no stream of a contract.")


def read_joints(message: Any) -> Joints:
    """A ``JointState``; what it leaves empty is None."""
    values = (np.array(getattr(message, name), dtype=np.float64) for name in ("position", "velocity", "effort"))
    return Joints(tuple(message.name), *(value if len(value) else None for value in values))


def read_pose(message: Any) -> Pose:
    """A ``PoseStamped``, its quaternion normalised.

    Raises:
        UserError: the quaternion is zero or not finite.
    """
    p, q = message.pose.position, message.pose.orientation
    quaternion = np.array([q.x, q.y, q.z, q.w], dtype=np.float64)
    length = float(np.linalg.norm(quaternion))
    if not 1e-6 < length < np.inf:
        raise UserError(f"The orientation {quaternion.tolist()} is no rotation.")
    return Pose(np.array([p.x, p.y, p.z], dtype=np.float64), quaternion / length)


def read_image(message: Any) -> np.ndarray:
    """An ``Image`` as (height, width, 3) uint8 RGB; padding at the end of rows is left out.

    Raises:
        UserError: an encoding that is not known, or fewer bytes than the size wants.
    """
    channels = _CHANNELS.get(message.encoding)
    if channels is None:
        raise UserError(
            f"An image has the encoding '{message.encoding}', wanted {', '.join(_CHANNELS)}. Set it in the camera's "
            "driver, or convert the topic with image_proc."
        )
    height, width, step = message.height, message.width, message.step
    data = np.frombuffer(message.data, dtype=np.uint8)
    if step < width * channels or len(data) < height * step:
        raise UserError(
            f"An image of {height}x{width} {message.encoding} has step={step} and {len(data)} bytes; that is too few."
        )
    pixels = data[: height * step].reshape(height, step)[:, : width * channels].reshape(height, width, channels)
    if message.encoding == "bgr8":
        return np.ascontiguousarray(pixels[..., ::-1])
    return np.repeat(pixels, 3, axis=2) if channels == 1 else np.ascontiguousarray(pixels)


def read_compressed(message: Any) -> np.ndarray:
    """A ``CompressedImage`` (JPEG or PNG) as (height, width, 3) uint8 RGB.

    Raises:
        UserError: another format, or damaged data.
    """
    import imagecodecs

    form = message.format.lower()
    data = bytes(message.data)
    if "compresseddepth" in form or not ("jpeg" in form or "jpg" in form or "png" in form):
        raise UserError(f"A compressed image has the format '{message.format}', wanted jpeg or png.")
    decode = imagecodecs.png_decode if "png" in form.rpartition(";")[2] else imagecodecs.jpeg_decode
    try:
        pixels = np.asarray(decode(data))
    except (ValueError, RuntimeError) as error:
        raise UserError(f"A compressed image ({message.format}, {len(data)} bytes) is damaged: {error}") from error
    if pixels.dtype != np.uint8:
        raise UserError(f"A compressed image has {pixels.dtype} values, wanted 8 bits.")
    if pixels.ndim == 2:
        pixels = np.repeat(pixels[..., None], 3, axis=2)
    return np.ascontiguousarray(pixels[..., :3])


def read_command(message: Any, topic: CommandTopic, received: int, stamps: Stamps) -> Points:
    """What a message on a command topic asks for, as entries of the action.

    Args:
        message: of the topic's type.
        topic: of the contract.
        received: when it came [ns]; a trajectory begins then, unless its header says when.
        stamps: of the runtime's clock.

    Raises:
        UserError: names, lengths or times do not fit; nothing of the message is to be used.
    """
    if topic.type == "trajectory_msgs/msg/JointTrajectory":
        return _read_trajectory(message, topic, received, stamps)
    if topic.type == "sensor_msgs/msg/JointState":
        values = _by_name(topic.names, message.name, np.array(message.position, dtype=np.float64)[None], "position")[0]
    elif topic.type == "std_msgs/msg/Float64MultiArray":
        values = np.array(message.data, dtype=np.float64)
    elif topic.type == "geometry_msgs/msg/PoseStamped":
        pose = read_pose(message)
        values = np.concatenate([pose.position, _columns(pose.quaternion)])
    else:
        linear, angular = message.twist.linear, message.twist.angular
        values = np.array([linear.x, linear.y, linear.z, angular.x, angular.y, angular.z])
    if values.shape != (len(topic.entries),):
        raise UserError(f"A command on {topic.topic} has {values.shape[0]} values, wanted {len(topic.entries)}.")
    _finite(values, topic)
    return Points(np.array([received]), to_action(values, topic)[None], hold=True)


def _read_trajectory(message: Any, topic: CommandTopic, received: int, stamps: Stamps) -> Points:
    points = message.points
    start = stamps.to_monotonic(message.header.stamp) if stamp_ns(message.header.stamp) else received
    if not len(points):
        raise UserError(f"A trajectory on {topic.topic} has no points.")
    ahead = [p.time_from_start.sec * NS + p.time_from_start.nanosec for p in points]
    if ahead[0] < 0 or any(b <= a for a, b in zip(ahead, ahead[1:], strict=False)):
        raise UserError(f"The times of a trajectory on {topic.topic} do not rise: {[t / NS for t in ahead]}.")
    rows = {}
    for name in ("positions", "velocities", "accelerations"):
        values = [np.array(getattr(point, name), dtype=np.float64) for point in points]
        if name != "positions" and not any(len(value) for value in values):
            continue
        if any(len(value) != len(message.joint_names) for value in values):
            raise UserError(f"Points of a trajectory on {topic.topic} have other numbers of {name} than joints.")
        rows[name] = _by_name(topic.names, message.joint_names, np.stack(values), name)
        _finite(rows[name], topic)
    if "accelerations" in rows and "velocities" not in rows:
        raise UserError(f"A trajectory on {topic.topic} has accelerations without velocities.")
    return Points(
        start + np.array(ahead, dtype=np.int64),
        to_action(rows["positions"], topic),
        None if "velocities" not in rows else rows["velocities"] * np.array(topic.scale),
        None if "accelerations" not in rows else rows["accelerations"] * np.array(topic.scale),
    )


def _by_name(wanted: Sequence[str], found: Sequence[str], rows: np.ndarray, what: str) -> np.ndarray:
    found = list(found)
    if sorted(found) != sorted(wanted) or rows.shape[1] != len(found):
        raise UserError(f"A command has {rows.shape[1]} {what} for the joints {found}, wanted {list(wanted)}.")
    return rows[:, [found.index(name) for name in wanted]]


def _finite(values: np.ndarray, topic: CommandTopic) -> None:
    if not np.isfinite(values).all():
        raise UserError(f"A command on {topic.topic} holds numbers that are not finite: {values.ravel().tolist()}.")


def to_action(values: np.ndarray, topic: CommandTopic) -> np.ndarray:
    """Entries of the action (..., n) of a command's values."""
    return np.array(topic.scale) * values + np.array(topic.offset)


def from_action(entries: np.ndarray, topic: CommandTopic) -> np.ndarray:
    """A command's values (..., n) of the action's entries."""
    return (entries - np.array(topic.offset)) / np.array(topic.scale)


# To messages.


def command_message(command: Command, topic: CommandTopic, stamp: Time) -> Any:
    """The message of one set point; a ``JointTrajectory`` is made by `trajectory_message`."""
    entries = list(topic.entries)
    values = from_action(command.position[entries], topic)
    if topic.type == "std_msgs/msg/Float64MultiArray":
        return Float64MultiArray(data=values.tolist())
    if topic.type == "sensor_msgs/msg/JointState":
        velocity = command.velocity[entries] / np.array(topic.scale)
        message = JointState(name=list(topic.names), position=values.tolist(), velocity=velocity.tolist())
    elif topic.type == "geometry_msgs/msg/PoseStamped":
        message = pose_message(values[:3], _quaternion(values[3:9]))
    elif topic.type == "geometry_msgs/msg/TwistStamped":
        message = TwistStamped()
        for part, three in ((message.twist.linear, values[:3]), (message.twist.angular, values[3:])):
            part.x, part.y, part.z = three.tolist()
    else:
        raise UserError(f"{topic.topic}: one set point is no {topic.type}.")
    message.header.stamp = stamp
    message.header.frame_id = topic.frame
    return message


def trajectory_message(
    trajectory: Trajectory, topic: CommandTopic, now: int, margin: float = 0.002
) -> JointTrajectory | None:
    """The part of a trajectory that lies ahead, for a joint trajectory controller.

    The header's stamp is zero, which means at once. Points carry velocities and accelerations, so that the controller
    interpolates with quintic splines. The plan has taken the topic's latency into account already.

    Args:
        now: when the message is sent [ns].
        margin: a point must lie so far ahead [s]; a point at zero would be a step.

    Returns:
        The message, or None when nothing lies ahead.
    """
    ahead = trajectory.times - now
    rows = np.flatnonzero(ahead > nanoseconds(margin))
    if not len(rows):
        return None
    entries, scale = list(topic.entries), np.array(topic.scale)
    positions = from_action(trajectory.positions[rows][:, entries], topic).tolist()
    velocities = (trajectory.velocities[rows][:, entries] / scale).tolist()
    accelerations = (trajectory.accelerations[rows][:, entries] / scale).tolist()
    message = JointTrajectory(joint_names=list(topic.names))
    for time, position, velocity, acceleration in zip(ahead[rows], positions, velocities, accelerations, strict=True):
        point = JointTrajectoryPoint(positions=position, velocities=velocity, accelerations=acceleration)
        point.time_from_start = duration(int(time))
        message.points.append(point)
    return message


def target_message(action: np.ndarray, topic: CommandTopic, ahead: float, stamp: Time) -> Any:
    """The message that asks for an action (A,) as a person does, set point by set point.

    Args:
        ahead: seconds in which a trajectory reaches it, in a straight line; others are asked for it at once.
        stamp: of messages that have one, but for trajectories, which begin at once.
    """
    if topic.type == "trajectory_msgs/msg/JointTrajectory":
        positions = from_action(action[list(topic.entries)], topic).tolist()
        point = JointTrajectoryPoint(positions=positions, time_from_start=duration(nanoseconds(ahead)))
        return JointTrajectory(joint_names=list(topic.names), points=[point])
    zero = np.zeros_like(action)
    return command_message(Command(0, action, zero, zero), topic, stamp)


def duration(ns: int) -> Duration:
    seconds, nanoseconds_left = divmod(ns, NS)
    return Duration(sec=seconds, nanosec=nanoseconds_left)


def joints_message(
    names: Sequence[str], position: np.ndarray, velocity: np.ndarray | None = None, stamp: Time | None = None
) -> JointState:
    """A ``JointState``."""
    message = JointState(name=list(names), position=position.tolist())
    if velocity is not None:
        message.velocity = velocity.tolist()
    if stamp is not None:
        message.header.stamp = stamp
    return message


def pose_message(position: np.ndarray, quaternion: np.ndarray) -> PoseStamped:
    """A ``PoseStamped`` of a position (3,) and a quaternion (4,) xyzw."""
    message = PoseStamped()
    p, q = message.pose.position, message.pose.orientation
    p.x, p.y, p.z = position.tolist()
    q.x, q.y, q.z, q.w = quaternion.tolist()
    return message


def image_message(pixels: np.ndarray) -> Image:
    """An ``Image`` of (height, width, 3) uint8 RGB."""
    height, width, _ = pixels.shape
    # rclpy takes an array of bytes as it is; it would go through any other sequence byte by byte.
    data = array.array("B", np.ascontiguousarray(pixels).tobytes())
    return Image(height=height, width=width, encoding="rgb8", step=3 * width, data=data)


def compressed_message(pixels: np.ndarray, quality: int = 90) -> CompressedImage:
    """A JPEG ``CompressedImage`` of (height, width, 3) uint8 RGB."""
    import imagecodecs

    return CompressedImage(format="jpeg", data=array.array("B", imagecodecs.jpeg_encode(pixels, level=quality)))


def chunk_message(actions: np.ndarray) -> Float64MultiArray:
    """A chunk (H, A) with its layout."""
    horizon, width = actions.shape
    message = Float64MultiArray(data=actions.astype(np.float64).ravel().tolist())
    message.layout.dim = [
        MultiArrayDimension(label="horizon", size=horizon, stride=horizon * width),
        MultiArrayDimension(label="action", size=width, stride=width),
    ]
    return message


def _columns(quaternion: np.ndarray) -> np.ndarray:
    """First two columns (6,) of the matrix of a unit quaternion xyzw."""
    x, y, z, w = quaternion
    return np.array(
        [
            1 - 2 * (y * y + z * z),
            2 * (x * y + z * w),
            2 * (x * z - y * w),
            2 * (x * y - z * w),
            1 - 2 * (x * x + z * z),
            2 * (y * z + x * w),
        ]
    )


def _quaternion(columns: np.ndarray) -> np.ndarray:
    """Unit quaternion xyzw of the two columns (6,) of a rotation matrix, made orthonormal first (Gram-Schmidt).

    Raises:
        UserError: the columns are zero or parallel.
    """
    from scipy.spatial.transform import Rotation

    first, second = columns[:3], columns[3:6]
    length = float(np.linalg.norm(first))
    first = first / max(length, 1e-12)
    second = second - (second @ first) * first
    rest = float(np.linalg.norm(second))
    if min(length, rest) < 1e-6:
        raise UserError(f"{columns.tolist()} are no two columns of a rotation.")
    second = second / rest
    quaternion: np.ndarray = Rotation.from_matrix(np.stack([first, second, np.cross(first, second)], axis=1)).as_quat()
    return quaternion
