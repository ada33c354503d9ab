"""A light robot of its own thread: it publishes, follows commands, and can be made to fail in every way."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import rclpy
from rclpy.context import Context
from rclpy.exceptions import InvalidHandle
from rclpy.executors import SingleThreadedExecutor
from rclpy.node import Node
from rclpy.qos import QoSProfile, ReliabilityPolicy
from sensor_msgs.msg import Image, JointState, Joy
from std_msgs.msg import Bool, Float64MultiArray
from trajectory_msgs.msg import JointTrajectory

from robopolicy_ros.messages import image_message
from robopolicy_ros.motion_check import Hermite

JOINTS = ("base_joint", "elbow_joint", "wrist_joint")
FINGER = "finger_joint"
_STATES, _IMAGES, _SIGNALS = 100.0, 20.0, 20.0  # messages per second


class FakeRobot(Node):
    """The robot of ``bench_robot/``: follows trajectories and its gripper's set points.

    Attributes:
        publishes: what is published: ``joints``, ``camera``, ``estop``, ``deadman``.
        stamp: makes the stamp [ns of the wall clock] of a state or image from the present time.
        joints, image: change a message before it is sent.
        estop, held: values of the signals.
        trajectories: that came.
        opening: newest set point of the gripper.
    """

    def __init__(self, context: Context) -> None:
        super().__init__("robot", context=context)
        reliable = QoSProfile(depth=10, reliability=ReliabilityPolicy.RELIABLE)
        best = QoSProfile(depth=1, reliability=ReliabilityPolicy.BEST_EFFORT)
        self._joints = self.create_publisher(JointState, "joint_states", reliable)
        self._image = self.create_publisher(Image, "camera/image_raw", best)
        self._estop = self.create_publisher(Bool, "estop", reliable)
        self._joy = self.create_publisher(Joy, "joy", reliable)
        self.create_subscription(JointTrajectory, "arm_controller/joint_trajectory", self._follow, reliable)
        self.create_subscription(Float64MultiArray, "gripper_controller/commands", self._grip, reliable)
        self._pixels = np.random.default_rng(0).integers(0, 256, (40, 40, 3), np.uint8)
        self._start = np.zeros(3)
        self._curve: Hermite | None = None
        self.set_healthy()
        self.trajectories: list[JointTrajectory] = []
        self.opening = 0.0
        self.create_timer(1 / _STATES, self._publish_joints)
        self.create_timer(1 / _IMAGES, self._publish_image)
        self.create_timer(1 / _SIGNALS, self._publish_signals)

    def set_healthy(self) -> None:
        """Everything is published as it should be."""
        self.publishes = {"joints", "camera", "estop", "deadman"}
        self.stamp: Callable[[int], int] = lambda now: now
        self.joints: Callable[[JointState], None] = lambda message: None
        self.image: Callable[[Image], None] = lambda message: None
        self.estop, self.held = False, True

    def posture(self) -> np.ndarray:
        """(3,) where the arm is."""
        return self._start if self._curve is None else self._curve.at(time.monotonic())[0]

    def at_rest(self) -> bool:
        """Whether the arm stands still, its trajectory followed to the end."""
        return self._curve is None or time.monotonic() >= self._curve.times[-1]

    def _stamp(self, message: Any) -> None:
        seconds, nanoseconds = divmod(self.stamp(time.time_ns()), 10**9)
        message.header.stamp.sec, message.header.stamp.nanosec = seconds, nanoseconds

    def _publish_joints(self) -> None:
        if "joints" in self.publishes:
            message = JointState(name=[*JOINTS, FINGER], position=[*self.posture().tolist(), self.opening])
            self._stamp(message)
            self.joints(message)
            self._joints.publish(message)

    def _publish_image(self) -> None:
        if "camera" in self.publishes:
            message = image_message(self._pixels)
            self._stamp(message)
            self.image(message)
            self._image.publish(message)

    def _publish_signals(self) -> None:
        if "estop" in self.publishes:
            self._estop.publish(Bool(data=self.estop))
        if "deadman" in self.publishes:
            self._joy.publish(Joy(buttons=[0, int(self.held)]))

    def _follow(self, message: JointTrajectory) -> None:
        order = [list(message.joint_names).index(name) for name in JOINTS]
        now = time.monotonic()
        position, velocity = (self._start, np.zeros(3)) if self._curve is None else self._curve.at(now)
        times = [now, *(now + p.time_from_start.sec + 1e-9 * p.time_from_start.nanosec for p in message.points)]
        positions = np.array([position, *(np.array(p.positions)[order] for p in message.points)])
        velocities = np.array([velocity, *(np.array(p.velocities)[order] for p in message.points)])
        self._curve = Hermite(np.array(times), positions, velocities)
        self.trajectories.append(message)

    def _grip(self, message: Float64MultiArray) -> None:
        self.opening = message.data[0]


class Spinning:
    """Nodes in a thread and a context of their own."""

    def __init__(self, domain: int) -> None:
        self.context = Context()
        rclpy.init(context=self.context, domain_id=domain)
        self._executor = SingleThreadedExecutor(context=self.context)
        self._ending = threading.Event()
        self._thread = threading.Thread(target=self._spin, daemon=True)
        self._nodes: list[Node] = []

    def add(self, node: Any) -> Any:
        self._nodes.append(node)
        self._executor.add_node(node)
        return node

    def start(self) -> None:
        self._thread.start()

    def close(self) -> None:
        self._ending.set()
        self._thread.join(10)
        for node in self._nodes:
            node.destroy_node()
        rclpy.shutdown(context=self.context)

    def _spin(self) -> None:
        while not self._ending.is_set():
            with contextlib.suppress(InvalidHandle):  # another thread destroys a publisher just now
                self._executor.spin_once(timeout_sec=0.05)
