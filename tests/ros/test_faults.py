"""Faults over real DDS: each ends in the documented state, and no command outside of the limits is ever sent.

The policy node, its inference and the monitor that judges every command are processes of their own; the robot is a
thread of the test. A pulled cable is in `tests.ros.test_network`, a full disk in `tests.ros.test_recorder`.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("rclpy", reason="rclpy is not installed: pip install 'robopolicy[ros]'")

from sensor_msgs.msg import Image, JointState, Joy
from std_msgs.msg import Bool, Float64MultiArray
from trajectory_msgs.msg import JointTrajectory

from tests.ros.process import until
from tests.ros.world import World

SECOND = 10**9
SLOW_MACHINE = 3.0  # seconds that a loaded machine may take on top of the documented time
STALE_JOINTS, STALE_CAMERA, STALE_SIGNAL = 0.5, 0.6, 0.8  # of bench_robot/contract.yaml
GRACE, HEARTBEAT, TIMEOUT, OPEN_LOOP, BRAKING = 2.0, 1.5, 2.5, 1.0, 0.6  # of bench_robot/safety.yaml


@pytest.fixture(scope="module")
def world(domain: int, tmp_path_factory: pytest.TempPathFactory, bench_bundle: Callable[..., Path]) -> Iterator[World]:
    world = World(domain, tmp_path_factory.mktemp("world"), bench_bundle())
    yield world
    world.close()


@pytest.fixture(scope="module")
def shared(world: World) -> World:
    """With one policy node for all faults that it survives."""
    world.start_policy()
    return world


@pytest.fixture(autouse=True)
def no_violation(world: World) -> Iterator[None]:
    """After every fault: the monitor saw all commands and objects to none."""
    before = world.call_monitor()
    yield
    after = world.call_monitor()
    new = {name: found for name, found in after.items() if found["violations"] != before[name]["violations"]}
    assert not new, new


@dataclass(frozen=True)
class Fault:
    """Something that goes wrong while the policy drives.

    Attributes:
        name: of the fault.
        inject: makes it.
        state: where the node ends up.
        within: seconds from the fault to that state, as documented.
        reason: is part of what the node says.
    """

    name: str
    inject: Callable[[World], object]
    state: str
    within: float
    reason: str

    def __str__(self) -> str:
        return self.name


def stop(*names: str) -> Callable[[World], None]:
    return lambda world: world.robot.publishes.difference_update(names)


def stamp(make: Callable[[int], int]) -> Callable[[World], None]:
    return lambda world: setattr(world.robot, "stamp", make)


def frozen_stamps(world: World) -> None:
    now = time.time_ns()
    world.robot.stamp = lambda _: now


def joints(change: Callable[[JointState], object]) -> Callable[[World], None]:
    return lambda world: setattr(world.robot, "joints", change)


def image(change: Callable[[Image], object]) -> Callable[[World], None]:
    return lambda world: setattr(world.robot, "image", change)


def not_finite(message: JointState) -> None:
    message.position = [float("nan")] * len(message.position)


def infinite(message: JointState) -> None:
    message.position[1] = float("inf")


def other_names(message: JointState) -> None:
    message.name = [f"left_{name}" for name in message.name]


def too_few(message: JointState) -> None:
    message.position = message.position[:-1]


def other_size(message: Image) -> None:
    message.height, message.data = 20, message.data[: 20 * message.step]


def unknown_encoding(message: Image) -> None:
    message.encoding = "bayer_rggb8"


def torn(message: Image) -> None:
    message.data = message.data[:100]


def press_estop(world: World) -> None:
    world.robot.estop = True


def press_estop_during_inference(world: World) -> None:
    """Right after a chunk came, so that the next inference is under way or soon will be."""
    before = len(world.robot.trajectories)
    until(lambda: len(world.robot.trajectories) > before)
    press_estop(world)


def let_go(world: World) -> None:
    world.robot.held = False


def publish_too(world: World) -> None:
    """Another node commands the arm; it only has to be there."""
    other = world.node.create_publisher(JointTrajectory, "arm_controller/joint_trajectory", 1)
    until(lambda: world.client.state in ("stopping", "fault"), what="the other publisher is found")
    world.node.destroy_publisher(other)


def ask(service: str) -> Callable[[World], object]:
    return lambda world: world.client.call(service)


def ask_when_chunks_change(service: str) -> Callable[[World], None]:
    def inject(world: World) -> None:
        before = len(world.robot.trajectories)
        until(lambda: len(world.robot.trajectories) > before)
        world.client.call(service)

    return inject


def take_over_and_fall_silent(world: World) -> None:
    for _ in range(20):
        world.drive(np.array([0.1, 0.1, 0.1, 0.1]))
        time.sleep(0.05)
    assert [said for _, said, _ in world.client.states][-1] == "intervention"


def take_over_and_let_go(world: World) -> None:
    take_over_and_fall_silent(world)
    world.drive(None)


SILENT = GRACE * STALE_JOINTS + BRAKING
BLIND = GRACE * STALE_CAMERA + BRAKING
FAULTS = (
    Fault("the camera freezes", stop("camera"), "fault", BLIND, "'camera'"),
    Fault("joint states stop", stop("joints"), "fault", SILENT, "'joints'"),
    Fault("the network is cut", stop("joints", "camera", "estop", "deadman"), "fault", SILENT, "silent"),
    Fault("stamps jump back", stamp(lambda now: now - 10 * SECOND), "fault", SILENT, "silent"),
    Fault("stamps jump ahead", stamp(lambda now: now + 10 * SECOND), "fault", SILENT, "silent"),
    Fault("stamps do not move", frozen_stamps, "fault", SILENT, "silent"),
    Fault("stamps are zero", stamp(lambda now: 0), "fault", SILENT, "silent"),
    Fault("joint states are not numbers", joints(not_finite), "fault", SILENT, "'joints'"),
    Fault("a joint state is infinite", joints(infinite), "fault", SILENT, "'joints'"),
    Fault("joints have other names", joints(other_names), "fault", SILENT, "'joints'"),
    Fault("joint states are too short", joints(too_few), "fault", SILENT, "'joints'"),
    Fault("images have another size", image(other_size), "fault", BLIND, "'camera'"),
    Fault("images have an unknown encoding", image(unknown_encoding), "fault", BLIND, "'camera'"),
    Fault("images are torn", image(torn), "fault", BLIND, "'camera'"),
    Fault("the e-stop is pressed", press_estop, "fault", 0.1 + BRAKING, "e-stop is pressed"),
    Fault("the e-stop is pressed during inference", press_estop_during_inference, "fault", 0.1 + BRAKING, "e-stop"),
    Fault("the e-stop's topic is silent", stop("estop"), "fault", STALE_SIGNAL + BRAKING, "silent"),
    Fault("the service ~/estop is called", ask("estop"), "fault", BRAKING, "~/estop"),
    Fault("the dead man's switch is let go", let_go, "holding", 0.1 + BRAKING, "not held"),
    Fault("the dead man's switch is silent", stop("deadman"), "holding", STALE_SIGNAL + BRAKING, "silent"),
    Fault("another node commands the arm", publish_too, "fault", 1.0 + BRAKING, "Another node publishes"),
    Fault("hold while chunks change", ask_when_chunks_change("hold"), "holding", BRAKING, "Held"),
    Fault("stop while chunks change", ask_when_chunks_change("stop"), "idle", BRAKING, "Stopped"),
    Fault("a person falls silent", take_over_and_fall_silent, "holding", 0.25 + BRAKING, "let go"),
    Fault("a person lets go", take_over_and_let_go, "holding", BRAKING, "let go"),
)


@pytest.mark.parametrize("fault", FAULTS, ids=str)
def test_a_fault_ends_in_the_documented_state(fault: Fault, shared: World) -> None:
    shared.run()
    fault.inject(shared)
    shared.client.until_state(fault.state, within=fault.within + SLOW_MACHINE)
    assert fault.reason in shared.client.reason
    until(shared.at_rest, OPEN_LOOP + SLOW_MACHINE, "the arm at rest")
    posture = shared.robot.posture()
    if fault.state == "fault":
        assert not shared.client.call("start").success
        np.testing.assert_array_equal(shared.robot.posture(), posture)


@dataclass(frozen=True)
class Nuisance:
    """Something odd that changes nothing."""

    name: str
    inject: Callable[[World], object]

    def __str__(self) -> str:
        return self.name


def permuted(message: JointState) -> None:
    message.name, message.position = message.name[::-1], message.position[::-1]


def every_other_from_another_arm() -> Callable[[JointState], None]:
    count = iter(range(10**9))

    def change(message: JointState) -> None:
        if next(count) % 2:
            other_names(message)

    return change


def shortly(change: Callable[[JointState], object], seconds: float) -> Callable[[World], None]:
    def inject(world: World) -> None:
        world.robot.joints = change
        time.sleep(seconds)
        world.robot.joints = lambda message: None

    return inject


def bad_targets(world: World) -> None:
    world.drive(np.full(4, np.nan))
    world.drive(np.zeros(0))
    world.person.publish(JointState(name=["other"], position=[1.0]))


NUISANCES = (
    Nuisance("joints in another order", joints(permuted)),
    Nuisance("every other joint state is of another arm", joints(every_other_from_another_arm())),
    Nuisance("joint states that are not numbers for a moment", shortly(not_finite, 0.1)),
    Nuisance("a person's target that is no number", bad_targets),
)


@pytest.mark.parametrize("nuisance", NUISANCES, ids=str)
def test_what_changes_nothing(nuisance: Nuisance, shared: World) -> None:
    shared.run()
    nuisance.inject(shared)
    before = len(shared.robot.trajectories)
    until(lambda: len(shared.robot.trajectories) >= before + 2, what="chunks")
    assert shared.client.state == "running", shared.client.reason


def test_no_start_beside_another_publisher(shared: World) -> None:
    shared.run()
    shared.client.call("stop")
    shared.client.until_state("idle")
    other = shared.node.create_publisher(Float64MultiArray, "gripper_controller/commands", 1)

    def refused() -> bool:
        answer = shared.client.call("start")
        if answer.success:  # the other publisher was not known yet
            shared.client.call("stop")
        return "Another node publishes on /gripper_controller/commands, too: /tester" in answer.message

    try:
        until(refused, what="a refusal")
    finally:
        shared.node.destroy_publisher(other)


def test_a_cut_network_that_comes_back(shared: World) -> None:
    """The fault stays until a person resets it; then everything works again."""
    shared.run()
    everything = set(shared.robot.publishes)
    shared.robot.publishes.clear()
    shared.client.until_state("fault")
    time.sleep(STALE_SIGNAL)
    assert "e-stop" in shared.client.call("reset_fault").message
    shared.robot.publishes |= everything
    time.sleep(0.5)
    assert shared.client.state == "fault"
    shared.run()


def test_ten_thousand_random_messages(shared: World) -> None:
    """On every topic that the node hears, beside the real ones: it lives, and ends in a known state."""
    shared.run()
    random = np.random.default_rng(0)
    node = shared.node
    publishers = {
        kind: node.create_publisher(kind, topic, 50)
        for kind, topic in (
            (JointState, "joint_states"),
            (Image, "camera/image_raw"),
            (Joy, "joy"),
            (Bool, "estop"),
        )
    }
    person = shared.person
    for i in range(10_000):
        kind = (JointState, Image, Joy, Bool, None)[random.choice(5, p=[0.5, 0.2, 0.15, 0.05, 0.1])]
        if kind is None:
            person.publish(random_joints(random))
        else:
            publishers[kind].publish(
                {JointState: random_joints, Image: random_image, Joy: random_joy}.get(kind, random_bool)(random)
            )
        if i % 50 == 0:
            time.sleep(0.01)  # the queues hold 50 messages
    for publisher in publishers.values():
        node.destroy_publisher(publisher)
    assert shared.policy is not None and shared.policy.process.poll() is None, shared.policy.log.read_text()
    shared.client.until_state("fault", "holding", "idle", "running", "intervention")
    shared.run()


def random_joints(random: np.random.Generator) -> JointState:
    names = ["base_joint", "elbow_joint", "wrist_joint", "finger_joint", "opening", "", "x" * 300]
    count = int(random.integers(0, 7))
    message = JointState(name=random.choice(names, count).tolist())
    for field in ("position", "velocity", "effort"):
        values = random.choice([0.0, np.nan, np.inf, -np.inf, 1e308, -1e-308, 0.05], int(random.integers(0, 7)))
        setattr(message, field, values.tolist())
    random_stamp(message, random)
    return message


def random_image(random: np.random.Generator) -> Image:
    message = Image(
        height=int(random.choice([0, 1, 40, 2**32 - 1])),
        width=int(random.choice([0, 1, 40, 2**32 - 1])),
        step=int(random.choice([0, 3, 120, 2**32 - 1])),
        encoding=str(random.choice(["rgb8", "bgr8", "mono8", "", "32FC1", "é" * 50])),
    )
    message.data = random.bytes(int(random.choice([0, 1, 4800, 10_000])))
    random_stamp(message, random)
    return message


def random_joy(random: np.random.Generator) -> Joy:
    return Joy(buttons=random.integers(-(2**31), 2**31 - 1, int(random.integers(0, 5))).tolist())


def random_bool(random: np.random.Generator) -> Bool:
    return Bool(data=bool(random.random() < 0.01))


RANDOM = {JointState: random_joints, Image: random_image, Joy: random_joy, Bool: random_bool}


def random_stamp(message: JointState | Image, random: np.random.Generator) -> None:
    now = int(time.time())
    message.header.stamp.sec = int(random.choice([0, now, now + 1, now - 1, 2**31 - 1, -(2**31)]))
    message.header.stamp.nanosec = int(random.choice([0, 999_999_999, 2**32 - 1]))


# Faults that end the node, or that need one of their own.


@pytest.mark.parametrize(
    ("number", "within", "reason"),
    [
        (signal.SIGKILL, 0.1 + BRAKING, "process has ended"),
        (signal.SIGSTOP, HEARTBEAT + BRAKING, "no sign of life"),
    ],
    ids=["killed", "hangs"],
)
def test_the_policys_process(number: int, within: float, reason: str, world: World) -> None:
    policy = world.start_policy()
    world.run()
    (child,) = policy.children()
    os.kill(child, number)
    world.client.until_state("fault", within=within + SLOW_MACHINE)
    assert reason in world.client.reason
    until(world.at_rest, what="the arm at rest")
    assert not world.client.call("start").success


def test_a_policy_that_is_a_little_slow_drives_on(world: World) -> None:
    world.start_policy(extra_delay=0.3)
    world.run()
    before = len(world.robot.trajectories)
    until(lambda: len(world.robot.trajectories) >= before + 3, what="chunks")
    assert world.client.state == "running"


def test_a_policy_that_is_much_too_slow(world: World) -> None:
    world.start_policy(extra_delay=3.0, **{"scheduler.name": "asynchronous"})  # rtc would not begin with that
    world.recover()
    until(lambda: world.client.call("start").success, what="a start")
    world.client.until_state("fault", within=TIMEOUT + BRAKING + SLOW_MACHINE)
    assert "policy_timeout" in world.client.reason
    assert world.at_rest()


def test_actions_out_of_range(world: World, bench_bundle: Callable[..., Path]) -> None:
    world.start_policy(bundle=str(bench_bundle(reach=50.0)))
    world.recover()
    before = len(world.robot.trajectories)
    until(lambda: world.client.call("start").success, what="a start")
    world.client.until_state("fault")
    assert "unusable chunks" in world.client.reason
    assert len(world.robot.trajectories) - before <= 1  # at most that of standing still


def test_actions_that_are_not_numbers(world: World, bench_bundle: Callable[..., Path]) -> None:
    """Of a policy with a damaged normaliser: all is well at zero, where it is warmed up; elsewhere it overflows."""
    world.start_policy(bundle=str(bench_bundle(gain=1e38)))
    world.recover()
    world.robot.joints = moved
    before = len(world.robot.trajectories)
    until(lambda: world.client.call("start").success, what="a start")
    world.client.until_state("fault")
    assert "unusable chunks" in world.client.reason and "not finite" in world.client.reason
    assert len(world.robot.trajectories) - before <= 1  # at most that of standing still


def moved(message: JointState) -> None:
    message.position = [0.01 + position for position in message.position]


def test_a_killed_node_leaves_the_arm_coming_to_rest_and_its_successor_goes_on(world: World) -> None:
    """Without the node the controller follows the last trajectory, which ends at rest."""
    policy = world.start_policy()
    world.run()
    policy.send(signal.SIGKILL)
    policy.process.wait()
    until(world.at_rest, OPEN_LOOP + BRAKING + SLOW_MACHINE, "the arm at rest")
    policy = world.start_policy()
    world.run()  # waits until the dead node's publishers are forgotten
    assert world.client.state == "running"
    policy.send(signal.SIGTERM)  # unlike SIGKILL it brings the arm to rest first
    assert policy.process.wait(20) == 0
    assert [said for _, said, _ in world.client.states if said != "unconfigured"][-2:] == ["stopping", "idle"]
    until(world.at_rest, BRAKING + SLOW_MACHINE, "the arm at rest")


def test_the_bundle_of_another_robot_is_refused(world: World) -> None:
    policy = world.spawn_policy(robot="ur5e")
    assert policy.process.wait(40) == 2
    said = policy.log.read_text()
    assert "do not fit" in said and "policy_rate" in said
    assert "Traceback" not in said
