"""`robopolicy hardware check --live` against a small driver over DDS: a good one, and each way to be a bad one."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest

pytest.importorskip("rclpy", reason="ROS 2 is not installed: pip install 'robopolicy[ros]'")

from builtin_interfaces.msg import Time  # noqa: E402
from rclpy.executors import SingleThreadedExecutor  # noqa: E402
from rclpy.node import Node  # noqa: E402
from rclpy.qos import QoSProfile, ReliabilityPolicy  # noqa: E402
from sensor_msgs.msg import JointState  # noqa: E402
from std_msgs.msg import Float64MultiArray  # noqa: E402
from trajectory_msgs.msg import JointTrajectory  # noqa: E402

from robopolicy.runtime.check import Finding, failed  # noqa: E402
from robopolicy.runtime.clock import NS  # noqa: E402
from robopolicy.runtime.contract import Contract  # noqa: E402
from robopolicy.runtime.robots import read_robot  # noqa: E402
from robopolicy_ros.live_check import check_live  # noqa: E402
from robopolicy_ros.messages import image_message  # noqa: E402


@dataclass(frozen=True)
class Driver:
    """What the small driver does; the defaults are right.

    Attributes:
        rate: of the joint states [Hz].
        names, position: of the joints, in another order than the contract's.
        stamp_offset: of the stamps from now [s]; None: it does not stamp.
        backwards: every second stamp is older than the one before.
        camera: whether there is one, and its image's size.
        reliable: QoS of the joint states.
        controller: whether the command topics are listened to.
        writers: others that send commands.
        publishers: of the joint states.
        type: of the joint states' topic.
    """

    rate: float = 20.0
    names: tuple[str, ...] = ("joint_2", "joint_1")
    position: tuple[float, ...] = (0.2, 0.4)
    stamp_offset: float | None = 0.0
    backwards: bool = False
    camera: tuple[int, int] | None = (48, 64)
    reliable: bool = True
    controller: bool = True
    writers: int = 0
    publishers: int = 1
    type: type = JointState


def contract(**joints: Any) -> Contract:
    """The template's, with a small camera and rates that a busy machine keeps."""
    robot = read_robot("template").contract
    streams = dict(robot.streams)
    streams["joints"] = replace(streams["joints"], **({"rate": 20.0, "stale_after": 1.0} | joints))
    streams["gripper_state"] = replace(streams["gripper_state"], rate=10.0, stale_after=1.0)
    streams["wrist_camera"] = replace(streams["wrist_camera"], rate=5.0, stale_after=1.5, size=(48, 64))
    return replace(robot, streams=streams)


class Running:
    """The driver in a thread."""

    def __init__(self, context: Any, driver: Driver) -> None:
        self.driver, self.count = driver, 0
        self.node = Node("driver", context=context)
        policy = ReliabilityPolicy.RELIABLE if driver.reliable else ReliabilityPolicy.BEST_EFFORT
        qos = QoSProfile(depth=10, reliability=policy)
        self.joints = [self.node.create_publisher(driver.type, "joint_states", qos) for _ in range(driver.publishers)]
        self.gripper = self.node.create_publisher(JointState, "gripper/joint_states", qos)
        self.node.create_timer(1 / driver.rate, self.send_joints)
        self.node.create_timer(1 / 10, self.send_gripper)
        if driver.camera:
            from sensor_msgs.msg import Image

            self.camera = self.node.create_publisher(Image, "wrist_camera/image_raw", qos)
            self.node.create_timer(1 / 5, self.send_image)
        if driver.controller:
            self.node.create_subscription(JointTrajectory, "arm_controller/joint_trajectory", lambda m: None, 1)
            self.node.create_subscription(Float64MultiArray, "gripper_controller/commands", lambda m: None, 1)
        self.others = [
            self.node.create_publisher(JointTrajectory, "arm_controller/joint_trajectory", 1)
            for _ in range(driver.writers)
        ]
        self.executor = SingleThreadedExecutor(context=context)
        self.executor.add_node(self.node)
        self.end = threading.Event()
        self.thread = threading.Thread(target=self.spin, daemon=True)
        self.thread.start()

    def spin(self) -> None:
        while not self.end.is_set():
            self.executor.spin_once(timeout_sec=0.05)

    def close(self) -> None:
        self.end.set()
        self.thread.join(10)
        self.executor.shutdown()
        self.node.destroy_node()

    def stamp(self) -> Time:
        self.count += 1
        if self.driver.stamp_offset is None:
            return Time()
        offset = self.driver.stamp_offset - (0.05 if self.driver.backwards and self.count % 2 else 0.0)
        seconds, rest = divmod(time.time_ns() + round(offset * NS), NS)
        return Time(sec=seconds, nanosec=rest)

    def send_joints(self) -> None:
        message = self.driver.type()
        if isinstance(message, JointState):
            message.name, message.position = list(self.driver.names), list(self.driver.position)
            message.header.stamp = self.stamp()
        for publisher in self.joints:
            publisher.publish(message)

    def send_gripper(self) -> None:
        message = JointState(name=["finger_joint"], position=[0.02])
        seconds, rest = divmod(time.time_ns(), NS)
        message.header.stamp = Time(sec=seconds, nanosec=rest)
        self.gripper.publish(message)

    def send_image(self) -> None:
        assert self.driver.camera is not None
        message = image_message(np.zeros((*self.driver.camera, 3), np.uint8))
        seconds, rest = divmod(time.time_ns(), NS)
        message.header.stamp = Time(sec=seconds, nanosec=rest)
        self.camera.publish(message)


@pytest.fixture
def drive(ros_context: Any) -> Iterator[Any]:
    running: list[Running] = []

    def start(seconds: float = 1.0, found: Contract | None = None, **settings: Any) -> dict[str, Finding]:
        running.append(Running(ros_context, Driver(**settings)))
        found = found or contract()
        findings = check_live(found, read_robot("template").limits, seconds)
        return {finding.check: finding for finding in findings}

    yield start
    for driver in running:
        driver.close()


def both(joints: Any, **driver: Any) -> tuple[dict[str, Any], Contract]:
    """A driver's settings, and the contract with other settings of the joints' stream."""
    return driver, contract(**joints)


GOOD = {
    "joints in another order": both({}),
    "best effort, no stamps where the contract says so": both({"stamp": "receive"}, reliable=False, stamp_offset=None),
}


@pytest.mark.parametrize("given", GOOD.values(), ids=GOOD)
def test_a_good_driver_passes(drive: Any, given: tuple[dict[str, Any], Contract]) -> None:
    driver, found = given
    findings = drive(found=found, **driver)
    assert not failed(findings.values()), [f for f in findings.values() if f.level == "FAIL"]
    assert findings["command arm"].message.endswith("read by driver")
    stamps = set() if found.streams["joints"].stamp == "receive" else {"stamps joints"}
    assert set(findings) >= {"stream joints", "names joints", "posture", "workspace now"} | stamps


BAD = {
    "slow joints, stamps of the future, images of another size": (
        both({}, rate=5.0, stamp_offset=5.0, camera=(24, 32)),
        {
            "stream joints": "Wanted 20 Hz",
            "stamps joints": "Stamps of the future",
            "stream wrist_camera": "the contract says (48, 64)",
        },
    ),
    "two drivers, old stamps, degrees, another writer": (
        both({}, publishers=2, stamp_offset=-3.0, position=(90.0, 45.0), writers=1),
        {
            "stream joints": "2 nodes publish here",
            "stamps joints": "the clocks differ",
            "posture": "Degrees?",
            "command arm": "driver already publishes",
        },
    ),
    "no stamps, a joint is missing, no camera, no controller": (
        both({}, stamp_offset=None, names=("joint_1", "joint_3"), camera=None, controller=False),
        {
            "stamps joints": "set stamp: receive",
            "names joints": "joint_2 are not among joint_1, joint_3",
            "stream wrist_camera": "nobody publishes",
            "command arm": "nobody listens",
            "command gripper": "nobody listens",
        },
    ),
    "gaps that would stop the robot, which is outside of its limits": (
        both({"rate": 2.0, "stale_after": 0.1}, rate=2.0, position=(1.79, 0.4)),
        {"stream joints": "it would stop the robot", "posture": "joint_2 at 1.790"},
    ),
    "stamps that run backwards, joints that are not finite": (
        both({}, backwards=True, position=(float("nan"), 0.4)),
        {"stamps joints": "run backwards", "posture": "not finite"},
    ),
    "a message of another type": (
        both({}, type=Float64MultiArray),
        {"stream joints": "carries std_msgs/msg/Float64MultiArray"},
    ),
    "a reliable subscription to a best effort publisher": (
        both({"reliability": "reliable"}, reliable=False),
        {"stream joints": "set reliability: best_effort"},
    ),
}


@pytest.mark.parametrize(("given", "wrong"), BAD.values(), ids=BAD)
def test_every_mistake_is_named_and_nothing_else(
    drive: Any, given: tuple[dict[str, Any], Contract], wrong: dict[str, str]
) -> None:
    driver, found = given
    findings = drive(seconds=1.5 if found.streams["joints"].rate < 5 else 1.0, found=found, **driver)
    assert {check for check, finding in findings.items() if finding.level == "FAIL"} == set(wrong)
    for check, text in wrong.items():
        assert text in f"{findings[check].message} {findings[check].advice}"
