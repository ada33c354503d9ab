"""The policy node: its life cycle, parameters, services, what it says."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("rclpy", reason="rclpy is not installed: pip install 'robopolicy[ros]'")

from diagnostic_msgs.msg import DiagnosticArray, DiagnosticStatus
from lifecycle_msgs.msg import Transition
from lifecycle_msgs.srv import ChangeState
from rcl_interfaces.msg import Parameter as ParameterMessage
from rcl_interfaces.msg import ParameterType, ParameterValue
from rcl_interfaces.srv import DescribeParameters, SetParameters
from sensor_msgs.msg import JointState
from std_msgs.msg import Float64MultiArray, String
from trajectory_msgs.msg import JointTrajectory

from robopolicy.errors import UserError
from robopolicy.runtime.settings import KINDS
from robopolicy.spec import KeySpec, PolicySpec, TaskSpec
from robopolicy_ros import parameters, qos
from tests.ros.conftest import BENCH
from tests.ros.process import until
from tests.ros.world import World


@pytest.fixture(scope="module")
def world(domain: int, tmp_path_factory: pytest.TempPathFactory, bench_bundle: Callable[..., Path]) -> Iterator[World]:
    world = World(domain, tmp_path_factory.mktemp("world"), bench_bundle())
    yield world
    world.close()


@pytest.fixture(scope="module")
def running(world: World) -> World:
    """The policy drives."""
    world.start_policy()
    world.run()
    return world


def heard(world: World, kind: type, topic: str, profile: object = 10) -> list:
    found: list = []
    world.node.create_subscription(kind, topic, found.append, profile)
    return found


def ask(world: World, kind: type, topic: str, request: object) -> object:
    client = world.node.create_client(kind, topic)
    assert client.wait_for_service(30)
    answer = client.call_async(request)
    return until(lambda: answer.done() and answer.result(), what=topic)


def set_parameter(world: World, name: str, value: bool | str) -> tuple[bool, str]:
    given = ParameterValue(type=ParameterType.PARAMETER_STRING, string_value=value) if isinstance(value, str) else None
    given = given or ParameterValue(type=ParameterType.PARAMETER_BOOL, bool_value=bool(value))
    request = SetParameters.Request(parameters=[ParameterMessage(name=name, value=given)])
    (result,) = ask(world, SetParameters, "/policy/set_parameters", request).results  # type: ignore[attr-defined]
    return result.successful, result.reason


def change_state(world: World, transition: int) -> bool:
    request = ChangeState.Request(transition=Transition(id=transition))
    return ask(world, ChangeState, "/policy/change_state", request).success  # type: ignore[attr-defined]


def test_diagnostics_tell_what_it_is_doing(running):
    found = heard(running, DiagnosticArray, "/diagnostics")
    until(lambda: len(found) >= 2, what="diagnostics")
    parts = {status.name: status for status in found[-1].status}
    assert set(parts) == {f"/policy: {part}" for part in ("state", "streams", "policy", "command loop")}
    state = {pair.key: pair.value for pair in parts["/policy: state"].values}
    assert parts["/policy: state"].message == "running" and parts["/policy: state"].level == DiagnosticStatus.OK
    assert state["engine"] == "onnxruntime-fp32" and len(state["fingerprint"]) == 16 and float(state["chunks"]) > 0
    streams = {pair.key: pair.value for pair in parts["/policy: streams"].values}
    assert {"joints gaps", "camera gaps", "camera age [s]"} <= set(streams)
    loop = {pair.key: pair.value for pair in parts["/policy: command loop"].values}
    assert len(loop["loop period p50 p99 max [ms]"].split()) == 3 and int(loop["cycles"]) > 10
    policy = {pair.key: pair.value for pair in parts["/policy: policy"].values}
    assert policy["alive"] == "True" and float(policy["inference p50 p99 max [ms]"].split()[0]) > 0


def test_trajectories_follow_the_rules_of_their_controller(running):
    found = heard(running, JointTrajectory, "arm_controller/joint_trajectory")
    until(lambda: len(found) >= 2, what="trajectories")
    for message in found:
        assert message.header.stamp.sec == message.header.stamp.nanosec == 0
        assert list(message.joint_names) == ["base_joint", "elbow_joint", "wrist_joint"]
        times = [p.time_from_start.sec + 1e-9 * p.time_from_start.nanosec for p in message.points]
        assert times[0] > 0 and (np.diff(times) > 0).all()
        assert list(message.points[-1].velocities) == [0.0, 0.0, 0.0]
        assert all(len(p.velocities) == 3 for p in message.points)


def test_chunks_and_latencies_are_published(running):
    chunks = heard(running, Float64MultiArray, "/policy/chunk")
    latencies = heard(running, JointState, "/policy/latency")
    until(lambda: chunks and latencies, what="a chunk")
    rows, columns = chunks[0].layout.dim
    assert (rows.label, rows.size, columns.label, columns.size) == ("horizon", 16, "action", 4)
    actions = np.array(chunks[0].data).reshape(16, 4)
    assert np.abs(actions).max() <= 0.081
    times = dict(zip(latencies[0].name, latencies[0].position, strict=True))
    assert list(times) == ["observation", "inference", "delivery", "total"] and min(times.values()) >= 0
    assert times["total"] == pytest.approx(times["observation"] + times["inference"] + times["delivery"])


def test_contract_and_state_are_there_for_those_who_come_later(running):
    contracts = heard(running, String, "/policy/contract", qos.LATCHED)
    states = heard(running, String, "/policy/state", qos.LATCHED)
    until(lambda: contracts and states, what="latched messages")
    assert contracts[0].data == (BENCH / "contract.yaml").read_text()
    assert json.loads(states[-1].data)["state"] == "running"


def test_parameters_are_described_and_guarded(running):
    request = DescribeParameters.Request(names=["threads", "auto_activate", "scheduler.delay.percentile"])
    threads, activate, percentile = ask(running, DescribeParameters, "/policy/describe_parameters", request).descriptors
    assert "CPU threads" in threads.description and threads.integer_range[0].to_value == 256
    assert activate.read_only and percentile.floating_point_range[0].to_value == 100.0
    assert set_parameter(running, "robot", "fr3") == (
        False,
        "robot cannot change while the node is configured; run its transition 'cleanup' first.",
    )
    refused, why = set_parameter(running, "instruction", "fetch tea")
    assert not refused and "not told what to do" in why
    refused, why = set_parameter(running, "goal", "{observation.state: [1, 2, 3]}")
    assert not refused and "takes no goal" in why
    assert set_parameter(running, "auto_start", False)[0]
    assert running.client.state == "running"


def test_services_say_why_they_refuse(running):
    assert "Cannot start while running" in running.client.call("start").message
    assert "Cannot reset while running" in running.client.call("reset_fault").message


def test_the_life_cycle_brings_the_arm_to_rest(running):
    """Deactivated while it runs; afterwards the services say what to do."""
    running.run()
    assert change_state(running, Transition.TRANSITION_DEACTIVATE)
    until(lambda: running.client.state == "idle", what="idle")
    assert "stopping" in [said for _, said, _ in running.client.states]
    answer = running.client.call("start")
    assert not answer.success and "not active" in answer.message
    assert change_state(running, Transition.TRANSITION_CLEANUP)
    assert running.policy is not None and not running.policy.children()
    assert set_parameter(running, "dry_run", True)[0]
    assert change_state(running, Transition.TRANSITION_CONFIGURE)
    assert change_state(running, Transition.TRANSITION_ACTIVATE)
    shadow = heard(running, JointTrajectory, "/policy/shadow/arm_controller/joint_trajectory")
    before = len(running.robot.trajectories)
    until(lambda: running.client.call("start").success, what="a start")
    until(lambda: len(shadow) >= 1, what="a trajectory in the shadow")
    assert len(running.robot.trajectories) == before


def test_a_node_starts_by_itself_where_it_is_told_to(world):
    world.robot.set_healthy()
    world.start_policy(auto_start=True, speed_scale=0.2)
    world.client.until_state("running")
    world.client.call("stop")
    world.client.until_state("idle")


GUIDED = {"engine": "torch-rtc", "scheduler.mode": "vjp"}


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"robot": ""}, "parameter 'robot' is not set"),
        ({"robot": "nowhere"}, "no robot 'nowhere'"),
        ({"bundle": "nowhere"}, "nowhere is not a bundle"),
        ({"engine": "onnxruntime-fp23"}, "Did you mean 'onnxruntime-fp32'"),
        ({"scheduler.name": "rct"}, "Did you mean 'rtc'"),
        ({"scheduler.settle": 2.0}, "scheduler.name=rtc has no such setting"),
        ({"scheduler.execute": 900}, "scheduler.execute=900"),
        ({"scheduler.warm_start": 1}, "are settings of scheduler.mode=vjp, found scheduler.mode=soft"),
        (GUIDED | {"scheduler.warm_start": 2}, "scheduler.warm_start=2 must lie in 0..1"),
        ({"extra_delay": 30.0}, "of inference, 0.1 s until commands are carried out"),
    ],
    ids=lambda value: str(value),
)
def test_what_cannot_work_is_refused_with_one_sentence(given, message, world):
    process = world.spawn_policy(**given)
    assert process.process.wait(60) == 2
    said = process.log.read_text()
    assert message in said and "Traceback" not in said


STATE = KeySpec("observation.state", (2,))
IMAGE = KeySpec("observation.image.top", (4, 6, 3), role="image")


def spec(**more) -> PolicySpec:
    return PolicySpec((STATE, IMAGE), KeySpec("action", (2,), role="action"), 10, 2, 8, 4, **more)


def test_goals_are_numbers_and_pictures(tmp_path):
    from PIL import Image

    Image.fromarray(np.full((8, 12, 3), 7, np.uint8)).save(tmp_path / "goal.png")
    text = f"{{observation.state: [0.5, 1], observation.image.top: {tmp_path}/goal.png}}"
    goal = parameters.goal_of(text, spec(goals=(STATE, IMAGE)))
    assert goal["observation.state"].tolist() == [0.5, 1.0]
    assert goal["observation.image.top"].shape == (4, 6, 3) and (goal["observation.image.top"] == 7).all()
    assert parameters.goal_of("", spec(goals=(STATE,))) == {}
    for bad, message in (
        ("{observation.state: [1]}", "must be 2 numbers"),
        ("{observation.state: [1, .nan]}", "must be 2 numbers"),
        ("{state: [1, 2]}", "wanted a mapping with the keys observation.state"),
        ("[1, 2", "not valid YAML"),
    ):
        with pytest.raises(UserError, match=message):
            parameters.goal_of(bad, spec(goals=(STATE,)))


def test_instructions_are_those_of_the_policy():
    told = spec(tasks=(TaskSpec("open"), TaskSpec("close")))
    assert parameters.instruction_of("close", told) == "close" and parameters.instruction_of("", told) is None
    with pytest.raises(UserError, match="Did you mean 'close'"):
        parameters.instruction_of("clse", told)


def test_every_setting_of_every_scheduler_is_a_parameter():
    import dataclasses

    known = {p.name: p.default for p in parameters.PARAMETERS if p.name.startswith("scheduler.")}
    for kind in KINDS:
        for field in dataclasses.fields(kind):
            if field.name == "delay":
                for inner in dataclasses.fields(field.default_factory):
                    assert known[f"scheduler.delay.{inner.name}"] == inner.default
            elif field.default is None:  # a parameter has always a value
                assert known[f"scheduler.{field.name}"] == -1.0
            elif field.name != "name":
                assert known[f"scheduler.{field.name}"] == field.default
    values = {p.name: p.default for p in parameters.PARAMETERS}
    for kind in KINDS:
        assert parameters.scheduler_settings(values | {"scheduler.name": kind.name}) == kind()
