"""However a process is ended, what it has started ends, and what moves comes to rest."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("rclpy", reason="rclpy is not installed; see docs/ros_recording.md")

import rclpy
from rclpy.executors import SingleThreadedExecutor
from rclpy.lifecycle import TransitionCallbackReturn
from rclpy.parameter import Parameter
from rclpy.signals import SignalHandlerOptions

from robopolicy.errors import UserError
from robopolicy.runtime.chunk_scheduler import RealTimeChunkingSettings
from robopolicy.runtime.clock import NS, MonotonicClock
from robopolicy.runtime.delays import DelaySettings
from robopolicy.runtime.settings import SCHEDULERS, scheduler_settings
from robopolicy.runtime.states import State
from robopolicy_ros import evaluate, parameters
from robopolicy_ros.policy_node import PolicyNode
from tests.ros.conftest import BENCH, PACKAGE
from tests.ros.fake_robot import FakeRobot, Spinning
from tests.ros.process import until

ROBOT = PACKAGE / "config" / "sim_ur5e_drawer_close"

INTERRUPTED = """
from robopolicy_ros.spin import Interrupted
import signal, sys
if sys.argv[1] == "ignore":
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
interrupted = Interrupted()
print("ready", flush=True)
interrupted.wait(20 if sys.argv[1] == "take" else 0.5)
print(interrupted.signal or "none", flush=True)
"""


@pytest.fixture(autouse=True)
def hangups_count() -> Iterator[None]:
    """Under nohup they are ignored, and children inherit that."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize(("mode", "number"), [("take", signal.SIGHUP), ("take", signal.SIGTERM), ("ignore", 0)])
def test_a_closed_terminal_interrupts(mode: str, number: int) -> None:
    process = subprocess.Popen([sys.executable, "-c", INTERRUPTED, mode], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    process.send_signal(number or signal.SIGHUP)
    said, _ = process.communicate(timeout=30)
    assert process.returncode == 0
    assert said.strip() == (signal.Signals(number).name if number else "none")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_the_nodes_of_a_tool_end_with_it(tmp_path: Path, number: signal.Signals) -> None:
    command = [sys.executable, "-m", "robopolicy_ros.collect", "--demonstrations", "1", "--robot", str(ROBOT)]
    process = subprocess.Popen([*command, "--dataset", str(tmp_path / "data.zarr")])
    try:
        nodes = until(lambda: len(found := children(process.pid)) == 2 and found, what="two nodes")
        process.send_signal(number)
        assert process.wait(40) == 128 + number
    finally:
        process.kill()
        process.wait()
    assert not [node for node in nodes if Path(f"/proc/{node}").exists()]


def test_settings_without_a_value_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        evaluate.main(["--set", "lookahead"])
    assert ended.value.code == 2
    assert "found 'lookahead', wanted NAME=VALUE" in capsys.readouterr().err


def test_only_settings_that_were_changed_reach_the_scheduler() -> None:
    values = {p.name: p.default for p in parameters.PARAMETERS}
    for name in SCHEDULERS:
        assert parameters.scheduler_settings(values | {"scheduler.name": name}) == scheduler_settings(name, {})
    changed = values | {"scheduler.execute": 4, "scheduler.delay.window": 3}
    expected = RealTimeChunkingSettings(execute=4, delay=DelaySettings(window=3))
    assert parameters.scheduler_settings(changed) == expected
    guided = values | {"scheduler.mode": "vjp", "scheduler.beta": 0.0, "scheduler.warm_start": 3}
    expected = RealTimeChunkingSettings(mode="vjp", beta=0.0, warm_start=3)
    assert parameters.scheduler_settings(guided) == expected
    with pytest.raises(UserError, match=r"scheduler.name=synchronous has no such setting; it has execute, settle"):
        parameters.scheduler_settings(values | {"scheduler.name": "synchronous", "scheduler.mode": "vjp"})
    with pytest.raises(UserError, match="'rct'"):
        parameters.scheduler_settings(values | {"scheduler.name": "rct"})


def test_the_runner_gets_its_parameters() -> None:
    values = {p.name: p.default for p in parameters.PARAMETERS}
    settings = parameters.runner_settings(values | {"intervention_timeout": 0.7})
    assert settings.intervention_timeout == 0.7


def children(pid: int | None = None) -> list[str]:
    """Processes that a process, by default this one, has started and that have not ended."""
    pid = pid or os.getpid()
    return Path(f"/proc/{pid}/task/{pid}/children").read_text().split()


class HeldUp:
    """A clock that is read much later than it was meant to be."""

    def now(self) -> int:
        return MonotonicClock().now() + 100 * NS


class HeldUpOnce:
    """A clock that is read 50 ms later than it was meant to be, at its second reading."""

    def __init__(self) -> None:
        self.readings = 0

    def now(self) -> int:
        self.readings += 1
        return MonotonicClock().now() + (NS // 20 if self.readings == 2 else 0)


@pytest.fixture
def robot(domain: int) -> Iterator[FakeRobot]:
    threads = Spinning(domain)
    robot = threads.add(FakeRobot(threads.context))
    threads.start()
    yield robot
    threads.close()


@pytest.fixture
def policy(robot: FakeRobot, bench_bundle: Callable[..., Path]) -> Iterator[PolicyNode]:
    """In this process, so that its parts can be made to fail; active."""
    rclpy.init(
        args=["--ros-args", "-p", f"robot:={BENCH}", "-p", f"bundle:={bench_bundle()}"],
        signal_handler_options=SignalHandlerOptions.NO,
    )
    node = PolicyNode()
    try:
        assert node.begin()
        yield node
    finally:
        node.end("The test is over.")
        node.destroy_node()
        rclpy.shutdown()


def test_a_policy_node_stops_whatever_fails(robot: FakeRobot, policy: PolicyNode) -> None:
    executor = SingleThreadedExecutor()
    executor.add_node(policy)
    active = policy._active
    assert active is not None
    before = set(children()) - {str(active.worker.pid)}
    runner = active.runner

    def spin(condition: Callable[[], Any], what: str) -> None:
        def holds() -> Any:
            executor.spin_once(timeout_sec=0.05)
            return condition()

        until(holds, what=what)

    spin(lambda: not runner.arm(), "armed")
    policy.set_parameters([Parameter("auto_start", value=True)])
    spin(lambda: runner.machine.state is State.RUNNING and len(robot.trajectories) > 2, "a start by itself, from armed")

    with pytest.MonkeyPatch.context() as patch:  # a graph that does not list this node
        patch.setattr(policy, "get_fully_qualified_name", lambda: "/renamed")
        assert "/policy" in policy._other_publishers(active)
    assert policy._other_publishers(active) == ""

    policy._monotonic = HeldUp()  # type: ignore[assignment]
    seen = len(robot.trajectories)
    policy._publish_trajectories(active)
    assert runner.trajectory_due  # nothing of it lay ahead any more
    policy._monotonic = MonotonicClock()
    spin(lambda: len(robot.trajectories) > seen, "another trajectory instead")

    policy._monotonic = clock = HeldUpOnce()  # type: ignore[assignment]
    while not clock.readings:  # a slow preview is not sent at all
        runner.tick()
        policy._publish_trajectories(active)
    assert clock.readings >= 4  # made a second time
    policy._monotonic = MonotonicClock()

    def broken() -> None:
        raise RuntimeError("a bug")

    runner.tick = broken  # type: ignore[method-assign,assignment]
    assert len(set(children()) - before) == 1
    policy.end("the test")
    assert runner.filter.at_rest and runner.machine.state is State.IDLE
    assert not set(children()) - before and policy._active is None
    until(robot.at_rest, what="the arm at rest")
    executor.shutdown()


def test_a_transition_that_fails_leaves_no_process_behind(policy: PolicyNode, monkeypatch: pytest.MonkeyPatch) -> None:
    assert policy._active is not None
    before = set(children()) - {str(policy._active.worker.pid)}
    assert policy.trigger_deactivate() == TransitionCallbackReturn.SUCCESS
    assert policy.trigger_cleanup() == TransitionCallbackReturn.SUCCESS

    def broken(*_: object) -> None:
        raise RuntimeError("a bug")

    monkeypatch.setattr(policy, "_output", broken)
    assert policy.trigger_configure() == TransitionCallbackReturn.ERROR
    assert not set(children()) - before
