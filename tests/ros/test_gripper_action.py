"""Set points become goals for a gripper's driver.

The choice of goals is tested by itself, without ROS. The node hears real messages over DDS; its action client and
``control_msgs`` are stand-ins, since no wheel on PyPI has that package: here no goal ever reached a driver.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("rclpy", reason="rclpy is not installed: pip install 'robopolicy[ros]'")

import rclpy
from action_msgs.msg import GoalStatus
from rclpy.context import Context
from rclpy.executors import SingleThreadedExecutor
from rclpy.node import Node
from rclpy.parameter import Parameter
from rclpy.task import Future
from std_msgs.msg import Float64MultiArray

from robopolicy.errors import UserError
from robopolicy.runtime.clock import NS
from robopolicy.runtime.robots import robot_folder
from robopolicy_ros import gripper_action_node, qos
from robopolicy_ros.gripper_action_node import STOPPING, Goal, GoalChoice, GripperActionNode, gripper_command
from tests.ros.conftest import BENCH
from tests.ros.process import NodeProcess, until

DEADBAND, TIMEOUT = 0.005, 5.0

# The choice of goals.


@pytest.fixture
def choice() -> GoalChoice:
    return GoalChoice(DEADBAND, TIMEOUT)


def send(choice: GoalChoice, position: float, now: int = 0) -> Goal | None:
    choice.take(position)
    return choice.send(now)


def test_no_goal_before_the_first_set_point(choice: GoalChoice) -> None:
    assert not choice.due and choice.send(0) is None
    assert send(choice, 0.0) == Goal(1, 0.0)  # also one that asks for zero


def test_one_goal_at_a_time_and_the_newest_set_point_wins(choice: GoalChoice) -> None:
    first = send(choice, 0.04)
    assert send(choice, 0.03) is None and send(choice, 0.01) is None
    assert first is not None and choice.end(first)
    assert choice.send(0) == Goal(2, 0.01)


def test_set_points_near_the_last_goal_make_none(choice: GoalChoice) -> None:
    """Near the goal, not near the set point before: a slow motion adds up."""
    first = send(choice, 0.04)
    assert first is not None and choice.end(first)
    assert send(choice, 0.0355) is None and send(choice, 0.0445) is None
    assert send(choice, 0.0345) == Goal(2, 0.0345)


def test_a_set_point_that_came_back_makes_no_goal(choice: GoalChoice) -> None:
    first = send(choice, 0.04)
    choice.take(0.0)
    choice.take(0.039)
    assert first is not None and choice.end(first) and not choice.due


def test_a_goal_without_a_result_is_overdue_and_waited_for_no_longer(choice: GoalChoice) -> None:
    first, late = send(choice, 0.04, now=7), 7 + round(TIMEOUT * NS)
    assert not choice.watch(late - 1) and choice.watch(late) and choice.overdue
    assert not choice.watch(late + STOPPING - 1) and choice.running == first
    assert not choice.watch(late + STOPPING) and choice.running is None
    assert not choice.due  # the same set point does not repeat it
    second = send(choice, 0.0, now=late + STOPPING)
    assert second == Goal(2, 0.0) and not choice.overdue
    assert first is not None and not choice.end(first) and choice.running == second  # its result came late


def test_the_next_goal_goes_as_soon_as_an_overdue_one_has_ended(choice: GoalChoice) -> None:
    first, late = send(choice, 0.04), round(TIMEOUT * NS)
    assert choice.watch(late) and send(choice, 0.0, now=late) is None
    assert first is not None and choice.end(first)
    assert choice.send(late + 1) == Goal(2, 0.0)
    assert not choice.watch(late + 2)


def test_a_forgotten_set_point_makes_no_goal(choice: GoalChoice) -> None:
    choice.take(0.04)
    choice.forget()
    assert not choice.due and choice.send(0) is None
    assert send(choice, 0.04) == Goal(1, 0.04)


EVENTS = st.one_of(
    st.floats(0.0, 0.08).map(lambda position: ("set point", position)),
    st.just(("end", 0.0)),
    st.floats(0.0, 2 * TIMEOUT).map(lambda seconds: ("time", seconds)),
)


@settings(max_examples=200, deadline=None)
@given(st.lists(EVENTS, max_size=60))
def test_goals_never_overlap_and_end_near_the_last_set_point(events: list[tuple[str, float]]) -> None:
    choice, now = GoalChoice(DEADBAND, TIMEOUT), 0
    running: list[Goal] = []
    goals: list[Goal] = []
    newest: float | None = None

    def act() -> None:
        if (goal := choice.send(now)) is not None:
            assert not running and goal.position == newest
            goals.append(goal)
            running.append(goal)

    for event, value in [*events, ("end", 0.0), ("end", 0.0)]:
        if event == "set point":
            newest = value
            choice.take(value)
        elif event == "end" and running:
            assert choice.end(running.pop())
        elif event == "time":
            now += round(value * NS)
            overdue = choice.overdue
            assert not choice.watch(now) or not overdue
            if running and choice.running is None:
                assert overdue
                running.pop()
        act()
    assert bool(goals) == (newest is not None) and not running
    assert newest is None or abs(goals[-1].position - newest) <= DEADBAND
    assert all(abs(b.position - a.position) > DEADBAND for a, b in zip(goals, goals[1:], strict=False))


# The node.


class Command:
    """A goal, as the driver has it."""

    def __init__(self, executor: SingleThreadedExecutor, command: Any) -> None:
        self.position, self.effort = command.position, command.max_effort
        self.accepted, self.cancelled = True, False
        self.answer, self._result = Future(executor=executor), Future(executor=executor)

    def get_result_async(self) -> Future:
        return self._result

    def cancel_goal_async(self) -> Future:
        self.cancelled = True
        answer = Future()
        answer.set_result(None)
        return answer

    def end(self, status: int = GoalStatus.STATUS_SUCCEEDED) -> None:
        self._result.set_result(SimpleNamespace(status=status))


class Driver:
    """A driver with its action client: it remembers all goals, and does what the test says.

    Attributes:
        ready: it is there.
        accepts: its answer; None: it gives none.
    """

    def __init__(self) -> None:
        self.goals: list[Command] = []
        self.ready = True
        self.accepts: bool | None = True
        self.action, self.destroyed = "", False
        self._node: Any = None

    def client(self, node: Node, kind: Any, action: str) -> Driver:
        assert kind is GripperCommand
        self._node, self.action = node, action
        return self

    def server_is_ready(self) -> bool:
        return self.ready

    def send_goal_async(self, goal: Any) -> Future:
        assert isinstance(goal, GripperCommand.Goal)
        command = Command(self._node.executor, goal.command)
        self.goals.append(command)
        if self.accepts is not None:
            command.accepted = self.accepts
            command.answer.set_result(command)
        return command.answer

    def destroy(self) -> None:
        self.destroyed = True

    @property
    def positions(self) -> list[float]:
        return [goal.position for goal in self.goals]


class GripperCommand:
    """Stands for the type of the action."""

    class Goal:
        def __init__(self) -> None:
            self.command = SimpleNamespace(position=0.0, max_effort=0.0)


class Bench:
    """The node, its driver, and a policy that repeats its set point as a stream."""

    def __init__(self, context: Context, **parameters: Any) -> None:
        self.driver = Driver()
        with pytest.MonkeyPatch.context() as patch:
            package, module = ModuleType("control_msgs"), ModuleType("control_msgs.action")
            module.GripperCommand = GripperCommand  # type: ignore[attr-defined]
            patch.setitem(sys.modules, "control_msgs", package)
            patch.setitem(sys.modules, "control_msgs.action", module)
            patch.setattr(gripper_action_node, "ActionClient", self.driver.client)
            self.node = make(context, **parameters)
        self._policy = Node("policy", context=context)
        self._set_points = self._policy.create_publisher(Float64MultiArray, "gripper_controller/commands", qos.COMMAND)
        self._executor = SingleThreadedExecutor(context=context)
        self._executor.add_node(self.node)
        until(self._set_points.get_subscription_count, what="the node's subscription")
        assert self.node.begin()

    def stream(self, *values: float, condition: Callable[[], Any]) -> None:
        """Publish a set point again and again until something holds."""

        def holds() -> bool:
            self._set_points.publish(Float64MultiArray(data=values))
            self.spin()
            return bool(condition())

        until(holds, what=f"{values}: goals {self.driver.positions}, {dict(self.node.counts)}")

    def heard(self, position: float) -> None:
        """Let the node hear a set point."""
        self.stream(position, condition=lambda: self.node.choice._newest == position)

    def wait(self, condition: Callable[[], Any], what: str) -> None:
        """Without set points."""

        def holds() -> bool:
            self.spin()
            return bool(condition())

        until(holds, what=what)

    def spin(self, count: int = 4) -> None:
        for _ in range(count):
            self._executor.spin_once(timeout_sec=0.005)

    def close(self) -> None:
        self._executor.shutdown()
        self.node.destroy_node()
        self._policy.destroy_node()


def make(context: Context, **parameters: Any) -> GripperActionNode:
    overrides = [Parameter(name, value=value) for name, value in ({"robot": str(BENCH)} | parameters).items()]
    return GripperActionNode(context=context, parameter_overrides=overrides)


@pytest.fixture
def context(domain: int) -> Iterator[Context]:
    context = Context()
    rclpy.init(context=context, domain_id=domain)
    yield context
    rclpy.try_shutdown(context=context)


@pytest.fixture
def bench(context: Context, request: pytest.FixtureRequest) -> Iterator[Bench]:
    bench = Bench(context, **getattr(request, "param", {}))
    yield bench
    bench.close()


def test_set_points_become_goals(bench: Bench) -> None:
    goals = bench.driver.goals
    bench.spin(20)
    assert not goals and bench.driver.action == "franka_gripper/gripper_action"
    bench.stream(0.04, condition=lambda: goals)
    assert (goals[0].position, goals[0].effort) == (0.04, 20.0)
    for position in (0.03, 0.02, 0.0):
        bench.heard(position)
    assert bench.driver.positions == [0.04]
    goals[0].end()
    bench.wait(lambda: len(goals) > 1, "the next goal, without another set point")
    goals[1].end()
    bench.wait(lambda: bench.node.choice.running is None, "its result")
    bench.heard(0.0015)
    bench.spin(20)
    assert bench.driver.positions == [0.04, 0.0] and dict(bench.node.counts) == {"goals": 2}


@pytest.mark.parametrize("values", [(float("nan"),), (float("inf"),), (), (0.01, 0.02)], ids=str)
def test_set_points_that_are_none_are_refused(bench: Bench, values: tuple[float, ...]) -> None:
    bench.stream(*values, condition=lambda: bench.node.counts["refused set points"] > 2)
    assert not bench.driver.goals
    bench.stream(0.02, condition=lambda: bench.driver.goals)
    assert bench.driver.positions == [0.02]


def test_a_rejected_goal_is_not_repeated(bench: Bench) -> None:
    bench.driver.accepts = False
    bench.stream(0.04, condition=lambda: bench.node.counts["rejected"])
    bench.heard(0.0415)
    bench.spin(20)
    assert bench.driver.positions == [0.04]
    bench.driver.accepts = True
    bench.stream(0.0, condition=lambda: len(bench.driver.goals) > 1)
    assert bench.driver.positions == [0.04, 0.0] and bench.node.counts["rejected"] == 1


@pytest.mark.parametrize(
    ("status", "what"),
    [
        (GoalStatus.STATUS_ABORTED, "aborted"),
        (GoalStatus.STATUS_CANCELED, "cancelled"),
        (GoalStatus.STATUS_UNKNOWN, "ended with the status 0"),
    ],
    ids=["aborted", "cancelled", "unknown"],
)
def test_a_goal_that_fails_is_not_repeated(bench: Bench, status: int, what: str) -> None:
    bench.stream(0.0, condition=lambda: bench.driver.goals)
    bench.driver.goals[0].end(status)
    bench.stream(0.0, condition=lambda: bench.node.counts[what])
    bench.heard(0.001)
    bench.spin(20)
    assert bench.driver.positions == [0.0]
    bench.stream(0.04, condition=lambda: len(bench.driver.goals) > 1)
    assert bench.driver.positions == [0.0, 0.04] and bench.node.counts[what] == 1


@pytest.mark.parametrize("ends", [True, False], ids=["it ends", "the driver hangs"])
@pytest.mark.parametrize("bench", [{"timeout": 0.2}], indirect=True, ids=["timeout=0.2"])
def test_a_goal_without_a_result_is_cancelled_and_the_next_one_goes(bench: Bench, ends: bool) -> None:
    goals = bench.driver.goals
    bench.stream(0.04, condition=lambda: goals)
    bench.heard(0.0)
    bench.wait(lambda: goals[0].cancelled, "cancelling")
    if ends:
        goals[0].end(GoalStatus.STATUS_CANCELED)
    bench.wait(lambda: len(goals) > 1, "the next goal")
    assert goals[1].position == 0.0 and bench.node.counts["timed out"] >= 1
    if not ends:
        goals[0].end(GoalStatus.STATUS_CANCELED)  # late, and not the result of the goal that runs now
    bench.spin(20)
    assert not bench.node.counts["cancelled"] and len(goals) == 2


@pytest.mark.parametrize("bench", [{"timeout": 0.2}], indirect=True, ids=["timeout=0.2"])
def test_a_goal_that_is_accepted_too_late_is_cancelled(bench: Bench) -> None:
    bench.driver.accepts = None
    bench.stream(0.04, condition=lambda: bench.driver.goals)
    bench.wait(lambda: bench.node.counts["timed out"], "giving up")
    (goal,) = bench.driver.goals
    assert not goal.cancelled  # nobody knows yet by which name
    goal.answer.set_result(goal)
    bench.wait(lambda: goal.cancelled, "its end")


def test_without_a_driver_nothing_is_sent_and_nothing_kept(bench: Bench) -> None:
    """A driver that starts later does not move for a set point of before."""
    bench.driver.ready = False
    bench.node._take(Float64MultiArray(data=[0.0]))  # not over DDS, where another one might be on its way
    assert bench.node.counts["set points without a driver"] == 1
    bench.driver.ready = True
    bench.spin(20)
    assert not bench.driver.goals
    bench.stream(0.04, condition=lambda: bench.driver.goals)
    assert bench.driver.positions == [0.04]


def test_at_the_end_the_running_goal_is_cancelled_and_no_other_sent(bench: Bench) -> None:
    bench.stream(0.04, condition=lambda: bench.node._handle)
    bench.heard(0.0)
    bench.node.end("the test")
    assert bench.driver.goals[0].cancelled and bench.driver.destroyed
    bench.driver.goals[0].end(GoalStatus.STATUS_CANCELED)
    bench.spin(20)
    assert bench.driver.positions == [0.04]


def test_at_the_end_a_goal_that_is_just_accepted_is_cancelled_too(bench: Bench) -> None:
    bench.driver.accepts = None
    bench.stream(0.04, condition=lambda: bench.driver.goals)
    (goal,) = bench.driver.goals
    bench._policy.create_timer(0.05, lambda: goal.answer.done() or goal.answer.set_result(goal))
    bench._executor.add_node(bench._policy)
    bench.node.end("the test")
    assert goal.cancelled and bench.driver.positions == [0.04]


@pytest.mark.parametrize(
    "bench",
    [{"action": "hand/gripper_cmd", "max_effort": 5.0, "deadband": 0.02}],
    indirect=True,
    ids=["another driver"],
)
def test_parameters_are_used_and_read_only(bench: Bench) -> None:
    assert bench.driver.action == "hand/gripper_cmd"
    bench.stream(0.04, condition=lambda: bench.driver.goals)
    assert bench.driver.goals[0].effort == 5.0
    bench.driver.goals[0].end()
    bench.wait(lambda: bench.node.choice.running is None, "its result")
    bench.heard(0.025)
    assert bench.driver.positions == [0.04]
    for name in gripper_action_node.PARAMETERS:
        about = bench.node.describe_parameter(name)
        assert about.description and about.read_only


# What is refused.


def changed_robot(folder: Path, change: Callable[[dict], Any]) -> Path:
    contract = yaml.safe_load((BENCH / "contract.yaml").read_text())
    change(contract["commands"])
    (folder / "contract.yaml").write_text(yaml.safe_dump(contract))
    return folder


def test_the_grippers_command_is_found() -> None:
    assert gripper_command(BENCH).topic == "gripper_controller/commands"
    assert gripper_command(robot_folder("fr3")).names == ("fr3_finger_joint1",)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda commands: commands["gripper"].pop("gripper"), "none of the commands arm, gripper"),
        (lambda commands: commands["arm"].update(gripper=True), "arm, gripper of the commands"),
        (lambda commands: commands["gripper"].update(type="sensor_msgs/msg/JointState"), "is a sensor_msgs"),
        (
            lambda commands: commands.update(
                arm=commands["arm"] | {"entries": [0, 1], "names": ["base_joint", "elbow_joint"]},
                gripper=commands["gripper"] | {"entries": [2, 3], "names": ["a", "b"]},
            ),
            "with 2 names",
        ),
    ],
    ids=["none", "several", "another type", "two fingers"],
)
def test_contracts_without_one_gripper_are_refused(tmp_path: Path, change: Callable[[dict], Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        gripper_command(changed_robot(tmp_path, change))


@pytest.mark.parametrize(
    ("parameters", "said"),
    [
        ({"robot": ""}, "-p robot:="),
        ({"robot": "fr4"}, "Did you mean 'fr3'"),
        ({"max_effort": 0.0}, "max_effort=0.0"),
        ({"deadband": -0.1}, "deadband=-0.1"),
        ({"timeout": float("inf")}, "timeout=inf"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_parameters_that_make_no_sense_are_refused(context: Context, parameters: dict, said: str) -> None:
    with pytest.raises(UserError, match=said):
        make(context, **parameters)


@pytest.mark.skipif(find_spec("control_msgs") is not None, reason="control_msgs is installed here")
def test_without_control_msgs_the_process_says_how_to_install_it(tmp_path: Path) -> None:
    process = NodeProcess("gripper_action_node", "gripper_action", {"robot": str(BENCH)}, tmp_path)
    assert process.process.wait(60) == 2
    assert "sudo apt install ros-$ROS_DISTRO-control-msgs" in process.log.read_text()
