"""The runner under a simulated clock, with the real buffer, filter, schedulers and simulated worker."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from robopolicy.errors import UserError
from robopolicy.runtime.chunk_scheduler import RealTimeChunkingSettings, SynchronousSettings
from robopolicy.runtime.clock import NS, SimulatedClock, nanoseconds
from robopolicy.runtime.contract import Action, CommandTopic, Contract, ObservationKey, Part, Signal, Signals, Stream
from robopolicy.runtime.exchange import Command, Health
from robopolicy.runtime.limits import AxisLimits, Limits
from robopolicy.runtime.runner import Runner, RunnerSettings
from robopolicy.runtime.samples import Joints
from robopolicy.runtime.simulated_worker import SimulatedWorker
from robopolicy.runtime.states import TRANSITIONS, Event, Machine, State
from robopolicy.spec import KeySpec, PolicySpec

JOINTS = ("a", "b")
SPEC = PolicySpec(
    (KeySpec("observation.state", (2,)),), KeySpec("action", (2,), "action"), 10, n_obs_steps=2, horizon=16
)
CONTRACT = Contract(
    robot="two joints",
    policy_rate=10,
    command_rate=100,
    joints=JOINTS,
    measured="joints",
    streams={"joints": Stream("joint_states", "sensor_msgs/msg/JointState", rate=100, stale_after=0.05)},
    observations={"observation.state": ObservationKey((Part("joints", "interpolate", "position", JOINTS),))},
    action=Action(JOINTS),
    commands={"arm": CommandTopic("command", "sensor_msgs/msg/JointState", (0, 1), JOINTS)},
)
AXIS = AxisLimits(-2.0, 2.0, velocity=1.0, acceleration=4.0, jerk=80.0)
LIMITS = Limits("a test", dict.fromkeys(JOINTS, AXIS), max_open_loop=1.0, policy_timeout=0.6, ramp=0.2)


class Towards:
    """A policy that moves to ``goal`` at 0.4 units a second."""

    spec = SPEC
    noise_shape = (1, SPEC.horizon, 2)
    timings = SimpleNamespace(total=0.0)

    def __init__(self, goal: tuple[float, float] = (1.0, -1.0)) -> None:
        self.goal = np.array(goal)
        self.spoil: Callable[[np.ndarray], np.ndarray] = lambda chunk: chunk
        self.calls: list[dict[str, Any]] = []

    def draw_noise(self, rows: int, rng: np.random.Generator) -> np.ndarray:
        return rng.standard_normal((rows, *self.noise_shape), np.float32)

    def sample(
        self, observations: Any, noise: Any, previous: np.ndarray | None = None, mask: np.ndarray | None = None
    ) -> np.ndarray:
        here = np.asarray(observations["observation.state"], np.float64)[:, -1]
        steps = np.arange(SPEC.horizon)[:, None] - (SPEC.n_obs_steps - 1) + 1
        away = self.goal - here[0]
        share = np.clip(0.04 * steps / max(float(np.abs(away).max()), 1e-9), -1, 1)
        self.calls.append({"observations": observations, "previous": previous, "mask": mask})
        return self.spoil((here[0] + share * away)[None].astype(np.float32))


class Robot:
    """A runner with its world: joints that follow commands at once."""

    def __init__(
        self, contract: Contract = CONTRACT, limits: Limits = LIMITS, *, delay: float = 0.03, settings: Any = None,
        how: RunnerSettings | None = None,
    ) -> None:  # fmt: skip
        self.clock = SimulatedClock(NS)
        self.policy = Towards()
        self.worker = SimulatedWorker(self.policy, self.clock, lambda id: delay)
        scheduler = settings or SynchronousSettings(settle=0.02)
        self.runner = Runner(contract, limits, self.worker, scheduler, self.clock, how)
        self.position = np.zeros(2)
        self.commands: list[Command] = []
        self.publishing = True
        self.deadman: bool | None = None
        self.estop: bool | None = None

    @property
    def state(self) -> State:
        return self.runner.machine.state

    @property
    def reason(self) -> str:
        return self.runner.machine.reason

    def step(self, seconds: float = 0.01) -> None:
        for _ in range(round(seconds * 100)):
            if self.publishing:
                self.runner.observe("joints", self.clock.now(), Joints(JOINTS, self.position.copy()))
            for name in ("deadman", "estop"):
                if (value := getattr(self, name)) is not None:
                    self.runner.signal(name, value)
            command = self.runner.tick()
            self.runner.think()
            if command is not None:
                self.commands.append(command)
                self.position = command.position.copy()
            self.clock.advance(nanoseconds(0.01))

    def until(self, state: State, seconds: float) -> float:
        """Let time pass until the state is reached; returns how long it took."""
        began = self.clock.now()
        while self.state is not state:
            assert self.clock.now() - began < nanoseconds(seconds), f"{self.state} {self.reason}"
            self.step()
        return (self.clock.now() - began) / NS

    def check_limits(self) -> None:
        positions = np.array([c.position for c in self.commands])
        velocities = np.array([c.velocity for c in self.commands])
        accelerations = np.array([c.acceleration for c in self.commands])
        assert np.abs(positions).max() <= AXIS.upper + 1e-9
        assert np.abs(velocities).max() <= AXIS.velocity + 1e-9
        assert np.abs(accelerations).max() <= AXIS.acceleration + 1e-9
        assert np.abs(np.diff(positions, axis=0)).max() <= 0.01 * AXIS.velocity + 1e-9
        assert np.abs(np.diff(velocities, axis=0)).max() <= 0.01 * AXIS.acceleration + 1e-9

    def start(self) -> None:
        self.step(0.1)
        assert self.runner.start() == ""


def with_signals() -> Contract:
    return replace(
        CONTRACT,
        signals=Signals(Signal("estop", "std_msgs/msg/Bool", 0.2), Signal("joy", "sensor_msgs/msg/Joy", 0.2)),
    )


def test_the_policy_drives_to_its_goal() -> None:
    robot = Robot()
    robot.start()
    robot.step(6.0)
    assert robot.state is State.RUNNING
    np.testing.assert_allclose(robot.position, [1, -1], atol=5e-3)
    robot.check_limits()
    counters = robot.runner.status().counters
    assert counters["chunks"] > 3 and not counters.get("invalid chunks")


def test_it_says_why_it_does_not_start() -> None:
    robot = Robot()
    assert "silent" in robot.runner.start()
    robot.step(0.05)
    robot.worker.health = lambda: Health(ready=False, beat=robot.clock.now())  # type: ignore[method-assign]
    assert "not loaded" in robot.runner.start()
    assert robot.state is State.IDLE and not robot.commands


def test_a_silent_stream_is_a_smooth_stop_and_a_fault() -> None:
    robot = Robot()
    robot.start()
    robot.step(0.5)
    robot.publishing = False
    silent = robot.clock.now()
    robot.until(State.STOPPING, 0.2)
    assert (robot.clock.now() - silent) / NS <= 0.1 + 0.03  # stale_after times stream_grace, and a tick
    braking = robot.runner.filter.braking_time()
    assert robot.until(State.FAULT, 2.0) <= braking + 0.03
    assert "joint_states" in robot.reason and "silent" in robot.reason
    assert not robot.commands[-1].velocity.any()
    sent = len(robot.commands)
    robot.publishing = True
    robot.step(1.0)
    assert robot.state is State.FAULT and len(robot.commands) == sent  # latched
    robot.check_limits()
    assert robot.runner.reset() == "" and robot.state is State.IDLE
    assert robot.runner.start() == ""


@pytest.mark.parametrize(
    ("health", "reason"),
    [
        ({"alive": False, "error": "killed by signal 9"}, "killed by signal 9"),
        ({"beat": 0}, "sign of life"),
        ({"busy_since": 0}, "policy_timeout"),
    ],
)
def test_a_broken_policy_is_a_fault(health: dict[str, Any], reason: str) -> None:
    robot = Robot(limits=replace(LIMITS, heartbeat_timeout=0.3))
    robot.start()
    robot.step(0.5)
    robot.worker.health = lambda: replace(Health(True, beat=robot.clock.now()), **health)  # type: ignore[method-assign]
    robot.until(State.FAULT, 1.0)
    assert reason in robot.reason
    robot.check_limits()


def test_one_bad_chunk_is_counted_and_three_are_a_fault() -> None:
    robot = Robot()
    robot.start()
    spoiled = []

    def once(chunk: np.ndarray) -> np.ndarray:
        if len(spoiled) == 1:
            spoiled.append("nan")
            return np.full_like(chunk, np.nan)
        spoiled.append("")
        return chunk

    robot.policy.spoil = once
    robot.step(3.0)
    assert robot.state is State.RUNNING and robot.runner.status().counters["invalid chunks"] == 1
    robot.policy.spoil = lambda chunk: np.full_like(chunk, np.nan)
    robot.until(State.FAULT, 3.0)
    assert "3 unusable chunks" in robot.reason
    robot.check_limits()


def test_a_jump_of_the_policy_is_thrown_away() -> None:
    robot = Robot()
    robot.start()
    robot.step(0.3)
    robot.policy.spoil = lambda chunk: chunk + np.float32(1.0)
    robot.until(State.FAULT, 3.0)
    robot.check_limits()


def test_a_policy_that_never_answers_is_a_fault() -> None:
    robot = Robot(delay=100.0)
    robot.start()
    robot.until(State.FAULT, 1.5)
    assert "policy_timeout" in robot.reason


def test_a_plan_is_followed_for_max_open_loop_only() -> None:
    robot = Robot(limits=replace(LIMITS, max_open_loop=0.3, policy_timeout=5.0))
    robot.start()
    robot.step(0.2)
    robot.worker.submit = lambda request: None  # type: ignore[method-assign]
    robot.step(1.0)
    assert robot.state is State.RUNNING and not robot.commands[-1].velocity.any()
    assert robot.runner.status().counters["plans cut short"] > 0
    robot.check_limits()


def test_the_estop_latches_until_it_is_released_and_reset() -> None:
    robot = Robot(with_signals())
    robot.estop, robot.deadman = False, True
    robot.start()
    robot.step(0.5)
    robot.estop = True
    robot.until(State.FAULT, 1.0)
    assert "e-stop" in robot.reason
    assert "e-stop" in robot.runner.reset()
    robot.estop = False
    robot.step(0.05)
    assert robot.state is State.FAULT
    assert robot.runner.reset() == ""
    robot.check_limits()


def test_a_silent_estop_is_a_pressed_one() -> None:
    robot = Robot(with_signals())
    robot.estop, robot.deadman = False, True
    robot.start()
    robot.step(0.3)
    robot.estop = None
    robot.until(State.FAULT, 1.5)
    assert "silent" in robot.reason


@pytest.mark.parametrize("silent", [True, False])
def test_the_dead_mans_switch_holds(silent: bool) -> None:
    robot = Robot(with_signals())
    robot.estop, robot.deadman = False, True
    robot.start()
    robot.step(0.5)
    robot.deadman = None if silent else False
    robot.until(State.HOLDING, 1.5)
    assert "dead man" in robot.runner.start()
    robot.deadman = True
    robot.step(0.05)
    assert robot.runner.start() == "" and robot.state is State.RUNNING
    robot.step(0.5)
    robot.check_limits()


@pytest.mark.parametrize("resume", [True, False])
def test_a_person_takes_over_and_lets_go(resume: bool) -> None:
    robot = Robot(delay=0.2, how=RunnerSettings(resume_after_intervention=resume))
    robot.start()
    robot.step(0.35)
    chunks = robot.runner.status().counters["chunks"]
    for target in np.linspace(robot.position, [-0.5, 0.5], 150):
        robot.runner.intervene(target)
        robot.step()
        assert robot.state is State.INTERVENTION
    for _ in range(50):
        robot.runner.intervene(np.array([-0.5, 0.5]))
        robot.step()
    np.testing.assert_allclose(robot.position, [-0.5, 0.5], atol=1e-2)
    counters = robot.runner.status().counters
    assert counters["chunks"] == chunks  # what was in flight is thrown away
    assert counters["interventions"] == 1
    robot.step(0.3)  # nothing comes any more
    robot.until(State.RUNNING if resume else State.HOLDING, 0.5)
    if not resume:
        assert robot.runner.start() == ""
    robot.step(6.0)
    np.testing.assert_allclose(robot.position, [1, -1], atol=5e-3)
    robot.check_limits()


def test_an_intervention_of_another_size_or_with_nan_is_refused() -> None:
    robot = Robot()
    robot.start()
    robot.step(0.2)
    robot.runner.intervene(np.array([np.nan, 0.0]))
    robot.runner.intervene(np.zeros(3))
    assert robot.state is State.RUNNING
    assert robot.runner.status().counters["refused interventions"] == 2


def test_a_person_far_from_the_robot_does_not_take_over() -> None:
    robot = Robot()
    robot.start()
    robot.step(0.2)
    robot.runner.intervene(robot.position + [0.0, 1.0])
    assert robot.state is State.RUNNING
    assert "b is 1.000 from where the robot is" in robot.runner.status().waiting


def test_who_is_held_must_let_go_before_taking_over_again() -> None:
    robot = Robot()
    robot.start()
    robot.step(0.2)
    robot.runner.intervene(robot.position)
    robot.step(0.05)
    assert robot.runner.hold() == ""
    for _ in range(60):
        robot.runner.intervene(robot.position)
        robot.step()
    assert robot.state is State.HOLDING
    robot.runner.intervene(None)
    robot.runner.intervene(robot.position)
    assert robot.state is State.INTERVENTION


def test_a_policy_resumes_from_rest_after_a_person_who_moved() -> None:
    robot = Robot(how=RunnerSettings(resume_after_intervention=True))
    robot.start()
    robot.step(0.2)
    for i in range(60):
        robot.runner.intervene(robot.position + 0.1 + 0.0 * i)
        robot.step()
    speed = robot.commands[-1].velocity.max()
    assert speed > 0.5
    robot.runner.intervene(None)
    before = len(robot.commands)
    robot.step(0.2)
    velocities = np.array([c.velocity for c in robot.commands[before:]])
    assert robot.state is State.RUNNING and velocities.min() > -1e-9  # it slows down, and does not turn back at once
    robot.check_limits()


def test_a_refused_start_arms_nothing() -> None:
    robot = Robot(with_signals())
    robot.estop, robot.deadman = False, False
    robot.step(0.1)
    assert "not held" in robot.runner.start()
    assert robot.state is State.IDLE


def test_an_estop_is_one_fault_and_its_silence_does_not_disturb_a_stop() -> None:
    robot = Robot(with_signals())
    robot.estop, robot.deadman = False, True
    robot.start()
    robot.step(0.6)
    assert robot.runner.stop() == ""
    robot.estop = None
    robot.until(State.IDLE, 2.0)
    assert not robot.runner.status().counters.get("faults")
    robot.estop = False
    robot.step(0.1)
    assert "comes to rest" in robot.runner.start()  # what is measured lags behind what was commanded
    robot.step(1.0)
    robot.start()
    robot.step(0.6)
    robot.estop = True
    robot.until(State.FAULT, 2.0)
    assert robot.runner.status().counters["faults"] == 1


def test_a_silent_gripper_stops_too() -> None:
    """A stream that the policy does not read, but that tells where a commanded joint is."""
    fingers = Stream("fingers", "sensor_msgs/msg/JointState", rate=50, stale_after=0.05)
    key = ObservationKey((Part("joints", "interpolate", "position", ("a", "seen")),))
    robot = Robot(
        replace(
            CONTRACT,
            joints=("a",),
            streams=CONTRACT.streams | {"fingers": fingers},
            observations={"observation.state": key},
        )
    )
    robot.publishing = False

    def publish(with_fingers: bool) -> None:
        now, position = robot.clock.now(), robot.position
        robot.runner.observe("joints", now, Joints(("a", "seen"), position.copy()))
        if with_fingers:
            robot.runner.observe("fingers", now, Joints(("b",), position[1:].copy()))

    for _ in range(40):
        publish(True)
        robot.step()
    assert robot.runner.start() == ""
    for _ in range(60):
        publish(False)
        robot.step()
    assert robot.state in (State.STOPPING, State.FAULT) and "fingers" in robot.reason


def test_a_trajectory_that_took_too_long_is_not_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    robot = Robot()
    robot.start()
    while not robot.runner.trajectory_due:
        robot.step()
    compute = robot.runner.filter.preview

    def held_up(*arguments: Any, **more: Any) -> Any:
        robot.clock.advance(nanoseconds(0.1))
        return compute(*arguments, **more)

    monkeypatch.setattr(robot.runner.filter, "preview", held_up)
    assert robot.runner.preview() is None and robot.runner.trajectory_due
    before = robot.position.copy()
    robot.step(0.05)
    np.testing.assert_array_equal(robot.position, before)  # the controller was told nothing
    assert robot.runner.preview() is not None  # by now its owner knows how long it takes
    robot.clock.advance(nanoseconds(1.0))
    assert robot.runner.too_late_to_send  # held up between there and its publisher
    robot.runner.take_back()
    robot.step(0.05)
    np.testing.assert_array_equal(robot.position, before)
    assert robot.runner.trajectory_due and robot.runner.preview() is not None and not robot.runner.too_late_to_send
    robot.check_limits()


def test_a_trajectory_that_comes_late_has_no_seam() -> None:
    robot = Robot(settings=RealTimeChunkingSettings(execute=4), delay=0.13)
    robot.start()
    old = None
    for _ in range(200):
        robot.step()
        if robot.runner.trajectory_due:
            trajectory = robot.runner.preview()
            assert trajectory is not None
            if old is not None:
                shared = [t for t in trajectory.times[:1] if t in set(old.times)]
                for t in shared:
                    now, then = list(trajectory.times).index(t), list(old.times).index(t)
                    np.testing.assert_allclose(trajectory.positions[now], old.positions[then], atol=1e-12)
            old = trajectory
    assert robot.runner.status().counters["chunks"] > 3
    robot.check_limits()


def test_hold_and_stop() -> None:
    robot = Robot()
    robot.start()
    robot.step(0.5)
    assert robot.runner.hold() == ""
    robot.until(State.HOLDING, 1.0)
    held = robot.position.copy()
    robot.step(0.5)
    np.testing.assert_array_equal(robot.position, held)
    assert robot.runner.start() == ""
    robot.step(0.5)
    assert robot.runner.stop() == ""
    robot.until(State.IDLE, 1.0)
    sent = len(robot.commands)
    robot.step(0.5)
    assert len(robot.commands) == sent
    assert "idle" in robot.runner.stop()
    robot.check_limits()


@pytest.mark.parametrize("settings", [SynchronousSettings(), RealTimeChunkingSettings(execute=5)])
def test_the_same_run_twice_is_the_same(settings: Any) -> None:
    runs = []
    for _ in range(2):
        robot = Robot(settings=settings, delay=0.13)
        robot.start()
        robot.step(3.0)
        runs.append(np.array([c.position for c in robot.commands]))
        robot.check_limits()
    np.testing.assert_array_equal(*runs)


def test_previews_end_at_rest_and_are_what_is_done() -> None:
    robot = Robot()
    robot.start()
    while not robot.runner.trajectory_due:
        robot.step()
    trajectory = robot.runner.preview()
    assert trajectory is not None
    assert not robot.runner.trajectory_due
    assert not trajectory.velocities[-1].any() and (np.diff(trajectory.times) > 0).all()
    assert trajectory.times[0] > robot.clock.now()
    first = len(robot.commands)
    robot.step(0.3)
    done = {c.time: c.position for c in robot.commands[first:]}
    shared = [t for t in trajectory.times if t in done]
    assert len(shared) > 5
    for t in shared:
        np.testing.assert_allclose(trajectory.positions[list(trajectory.times).index(t)], done[t], atol=1e-9)


def test_a_policy_of_another_robot_is_refused() -> None:
    with pytest.raises(UserError, match="observation.state: found shape"):
        other = replace(CONTRACT.observations["observation.state"].parts[0], names=("a",))
        Robot(replace(CONTRACT, observations={"observation.state": ObservationKey((other,))}))
    with pytest.raises(UserError, match="10 steps a second"):
        Robot(replace(CONTRACT, policy_rate=20))


def test_a_policy_that_is_known_to_be_too_slow_is_refused() -> None:
    worker, clock = Robot().worker, SimulatedClock(NS)
    quick = Runner(CONTRACT, LIMITS, worker, RealTimeChunkingSettings(), clock, prior_delay=0.2)
    assert quick.status().delay == 0.2  # what it reckons with before the first chunk
    with pytest.raises(UserError, match=r"of 7 steps; 10 are expected \(0.9 s of inference, 0.1 s until"):
        Runner(CONTRACT, LIMITS, worker, RealTimeChunkingSettings(), clock, prior_delay=0.9)
    assert Runner(CONTRACT, LIMITS, worker, SynchronousSettings(), clock, prior_delay=0.9)
    assert worker.health().usual == 0  # a simulated inference takes as long as each request is told to


def test_every_state_can_be_left_and_a_fault_only_by_a_person() -> None:
    assert {event for (state, event) in TRANSITIONS if state is State.FAULT} == {Event.RESET}
    for state in State:
        assert state is State.STOPPING or any(s is state for s, _ in TRANSITIONS)
    moving = {State.RUNNING, State.INTERVENTION}
    for (state, event), (after, end) in TRANSITIONS.items():
        if state in moving and after not in moving:
            assert after is State.STOPPING and end is not None, (state, event)


def test_a_stop_for_a_fault_is_not_softened() -> None:
    machine = Machine()
    for event in (Event.ARM, Event.START, Event.FAIL, Event.STOP, Event.AT_REST):
        assert machine.handle(event, event.value)
    assert machine.state is State.FAULT and machine.reason == "fail"
