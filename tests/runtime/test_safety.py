"""The safety filter: limits under any target, stops from anywhere, and plans that are followed."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest

pytest.importorskip("ruckig", reason="needs the extra 'runtime'")

from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.interpolate import BPoly

from robopolicy.errors import UserError
from robopolicy.runtime import rotation, safety
from robopolicy.runtime.axis import Axis
from robopolicy.runtime.braking import Motion, duration, end_of, range_of, stop, stopping_path
from robopolicy.runtime.contract import Action, CommandTopic, Contract, Stream
from robopolicy.runtime.kinematics import forward
from robopolicy.runtime.limits import AxisLimits, JointFrame, Kinematics, Limits, RotationLimits, Workspace
from robopolicy.runtime.safety import SafetyFilter

PERIOD = 0.01
TICK = 10_000_000
LOOKAHEAD = 0.1
ARM = AxisLimits(-2.0, 2.0, velocity=1.5, acceleration=5.0, jerk=100.0, margin=0.05)
GRIPPER = AxisLimits(0.0, 0.08, velocity=0.1, acceleration=1.0, jerk=20.0)
TABLE = Kinematics(
    (
        JointFrame((0.0, 0.0, 0.3), (0.0, 0.0, 0.0)),
        JointFrame((0.0, 0.0, 0.0), (-math.pi / 2, 0.0, 0.0)),
        JointFrame((0.4, 0.0, 0.0), (0.0, 0.0, 0.0)),
    ),
    tool_xyz=(0.35, 0.0, 0.0),
)


def contract(joints: int = 3, kind: str = "joint_position", gripper: bool = True) -> Contract:
    arm = {
        "joint_position": tuple(f"joint{i}" for i in range(joints)),
        "tool_pose": ("x", "y", "z", "r11", "r21", "r31", "r12", "r22", "r32"),
        "tool_twist": ("vx", "vy", "vz", "wx", "wy", "wz"),
    }[kind]
    entries = tuple(range(len(arm)))
    commands = {
        "joint_position": CommandTopic("arm", "trajectory_msgs/msg/JointTrajectory", entries, arm),
        "tool_pose": CommandTopic("arm", "geometry_msgs/msg/PoseStamped", entries),
        "tool_twist": CommandTopic("arm", "geometry_msgs/msg/TwistStamped", entries),
    }
    topics = {"arm": commands[kind]}
    if gripper:
        topics["gripper"] = CommandTopic(
            "gripper", "std_msgs/msg/Float64MultiArray", (len(arm),), ("finger",), gripper=True
        )
    return Contract(
        robot="test",
        policy_rate=20.0,
        command_rate=100.0,
        joints=arm if kind == "joint_position" else (),
        measured="joints",
        streams={"joints": Stream("joint_states", "sensor_msgs/msg/JointState", 100.0, 0.1)},
        observations={},
        action=Action((*arm, "opening") if gripper else arm, kind),  # type: ignore[arg-type]
        commands=topics,
    )


def limits(robot: Contract, axis: AxisLimits = ARM, **changes: object) -> Limits:
    names = [name for name in robot.action.names if not name.startswith("r") or len(name) != 3]
    axes = {name: GRIPPER if name == "opening" else axis for name in names}
    turn = RotationLimits(1.0, 4.0) if robot.action.kind == "tool_pose" else None
    return replace(Limits("test", axes, rotation=turn), **changes)  # type: ignore[arg-type]


def arm_filter(**changes: object) -> SafetyFilter:
    robot = contract()
    return SafetyFilter(robot, limits(robot, **changes), PERIOD)


class Wave:
    """A plan that every axis of `arm_filter` can follow."""

    end = 60_000_000_000

    def __init__(self, rate: float = 2.0, size: float = 0.5) -> None:
        self.rate, self.size = rate, np.array([size, size, size, 0.02])

    def at(self, time: int) -> tuple[np.ndarray, np.ndarray]:
        phase = self.rate * min(time, self.end) / 1e9 + np.array([0.0, 1.0, 2.0, 0.0])
        speed = 0.0 if time > self.end else self.rate
        return np.array([0, 0, 0, 0.04]) - self.size * np.cos(phase), self.size * speed * np.sin(phase)


def run(guard: SafetyFilter, target: Callable[[int], tuple[np.ndarray, np.ndarray]], steps: int) -> np.ndarray:
    """Position, velocity and acceleration (steps + 1, 3, A) of the commanded state."""
    states = [guard.state]
    states += [guard.step(*target(step), LOOKAHEAD) for step in range(steps)]
    return np.array([(state.position, state.velocity, state.acceleration) for state in states])


def adversary(rng: np.random.Generator, lower: np.ndarray, upper: np.ndarray, fastest: np.ndarray) -> Callable:
    """Targets that jump, flip their sign, rush at the limits or lie far outside; each way for a while."""
    way, since, still = 0, 0, (lower + upper) / 2

    def target(step: int) -> tuple[np.ndarray, np.ndarray]:
        nonlocal way, since, still
        if step >= since:
            way, since = int(rng.integers(6)), step + int(rng.integers(1, 60))
            still = rng.uniform(lower, upper)
        size, sign = upper - lower, (-1.0) ** step
        return [
            (rng.uniform(lower - size, upper + size), rng.uniform(-3, 3, len(lower)) * fastest),
            (still, np.zeros_like(still)),
            (still + sign * size, sign * fastest),
            (np.where(still > (lower + upper) / 2, upper, lower), np.sign(still - (lower + upper) / 2) * fastest),
            (still + 1e6 * sign * size, np.full_like(still, 1e9)),
            (still + 0.01 * sign * size, -sign * fastest * rng.uniform()),
        ][way]

    return target


def check_limits(states: np.ndarray, axes: list[AxisLimits], period: float) -> None:
    lower, upper = (np.array([getattr(axis, side) for axis in axes]) for side in ("lower", "upper"))
    most = {name: np.array([getattr(axis, name) for axis in axes]) for name in ("velocity", "acceleration", "jerk")}
    position, velocity, acceleration = states.transpose(1, 0, 2)
    assert np.all(position >= lower - 1e-8) and np.all(position <= upper + 1e-8)
    one = 1 + 1e-6
    assert np.all(np.abs(velocity) <= one * most["velocity"])
    assert np.all(np.abs(acceleration) <= one * most["acceleration"])
    assert np.all(np.abs(np.diff(acceleration, axis=0)) <= one * period * most["jerk"])
    assert np.all(np.abs(np.diff(velocity, axis=0)) <= one * period * most["acceleration"])
    assert np.all(np.abs(np.diff(position, axis=0)) <= one * period * most["velocity"] + 1e-12)
    # What is reported is one motion: the position is the integral of the velocity, up to what the jerk can add.
    drift = np.diff(position, axis=0) - period * (velocity[:-1] + velocity[1:]) / 2
    assert np.all(np.abs(drift) <= one * period**3 * most["jerk"] / 4 + 1e-12)


axis_limits = st.builds(
    lambda lower, room, velocity, acceleration, jerk, margin: AxisLimits(
        lower, lower + room, velocity, acceleration, jerk, margin * room
    ),
    st.floats(-3, 3),
    st.floats(0.05, 6),
    st.floats(0.05, 5),
    st.floats(0.2, 30),
    st.floats(2, 3000),
    st.floats(0, 0.2),
)


@settings(max_examples=15, deadline=None)
@given(st.lists(axis_limits, min_size=3, max_size=3), st.sampled_from([0.002, 0.01, 0.02]), st.integers(0, 2**32))
def test_no_target_breaks_a_limit_and_every_stop_ends_inside(axes: list[AxisLimits], period: float, seed: int) -> None:
    robot, rng = contract(gripper=False), np.random.default_rng(seed)
    guard = SafetyFilter(robot, Limits("test", dict(zip(robot.action.names, axes, strict=True))), period)
    lower, upper, fastest = (np.array([getattr(a, name) for a in axes]) for name in ("lower", "upper", "velocity"))
    guard.start(rng.uniform(lower, upper))
    states = run(guard, adversary(rng, lower, upper, fastest), 250)
    check_limits(states, axes, period)
    longest = math.ceil(guard.braking_time() / period) + 1
    stop = [states[-1]]
    while not guard.at_rest:
        state = guard.brake()
        stop.append(np.array([state.position, state.velocity, state.acceleration]))
        assert len(stop) <= longest + 1
    check_limits(np.array(stop), axes, period)
    assert not guard.state.velocity.any() and not guard.state.acceleration.any()


def test_those_tests_would_see_a_filter_that_does_not_look_at_its_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Axis, "_stays", lambda *_: True)
    guard, rng = arm_filter(), np.random.default_rng(0)
    axes = [ARM, ARM, ARM, GRIPPER]
    lower, upper, fastest = (np.array([getattr(a, name) for a in axes]) for name in ("lower", "upper", "velocity"))
    guard.start((lower + upper) / 2)
    states = run(guard, adversary(rng, lower, upper, fastest), 3000)
    with pytest.raises(AssertionError):
        check_limits(states, axes, PERIOD)


@settings(max_examples=200, deadline=None)
@given(st.floats(-3, 3), st.floats(-1, 1), st.floats(0.1, 20), st.floats(1, 3000))
def test_stops_are_as_fast_as_ruckigs(velocity: float, share: float, acceleration: float, jerk: float) -> None:
    import ruckig

    motion = Motion(0.3, velocity, share * acceleration)
    wanted, found = ruckig.InputParameter(1), ruckig.Trajectory(1)
    wanted.control_interface = ruckig.ControlInterface.Velocity
    wanted.max_acceleration, wanted.max_jerk = [acceleration], [jerk]
    wanted.current_position, wanted.current_velocity = [motion.position], [motion.velocity]
    wanted.current_acceleration, wanted.target_velocity = [motion.acceleration], [0.0]
    ruckig.Ruckig(1).calculate(wanted, found)
    pieces = stop(motion, acceleration, jerk)
    assert duration(pieces) == pytest.approx(found.duration, rel=1e-6, abs=1e-9)
    rest = end_of(motion, pieces)
    assert rest == pytest.approx((found.at_time(found.duration)[0][0], 0.0, 0.0), rel=1e-6, abs=1e-7)
    samples = np.array([found.at_time(t)[0][0] for t in np.linspace(0, found.duration, 400)])
    low, high = range_of(motion, pieces)
    near = pytest.approx
    assert (low, high) == near((samples.min(), samples.max()), abs=1e-4 * (high - low) + 1e-9)
    assert low <= samples.min() + 1e-9 and high >= samples.max() - 1e-9
    spacing = max(found.duration / 50, 1e-3)
    path, speeds = stopping_path(np.array([motion]), np.array([acceleration]), np.array([jerk]), spacing)
    for row, (position, speed) in enumerate(zip(path[:, 0], speeds[:, 0], strict=True)):
        (p,), (v,), _ = found.at_time(row * spacing)
        assert (position, speed) == near((p, v), rel=1e-6, abs=1e-6)


@pytest.mark.parametrize("start", [-2.3, 2.3])
def test_from_outside_it_moves_back_and_never_farther_out(start: float) -> None:
    guard = arm_filter()
    guard.start(np.array([start, 0.0, 0.0, 0.04]))
    out = run(guard, lambda step: (np.array([math.copysign(5.0, start), 0, 0, 0.04]), np.zeros(4)), 300)
    assert np.max(np.abs(out[:, 0, 0])) <= abs(start)
    assert abs(out[-1, 0, 0]) == pytest.approx(ARM.upper - ARM.margin, abs=1e-6)


def test_a_target_beyond_a_limit_is_clamped_to_the_margin_and_counted() -> None:
    guard = arm_filter()
    guard.start(np.array([1.5, 0.0, 0.0, 0.04]))
    states = run(guard, lambda step: (np.array([2.1, 0, 0, 0.09]), np.array([9.0, 0, 0, 0])), 300)
    assert states[-1, 0] == pytest.approx([1.95, 0, 0, 0.08], abs=1e-6)
    assert guard.counts[safety.CLAMPED_POSITION] == 300 and safety.CLAMPED_VELOCITY not in guard.counts
    run(guard, lambda step: (np.zeros(4) + 0.04, np.array([-9.0, 0, 0, 0])), 10)
    assert guard.counts[safety.CLAMPED_VELOCITY] == 10


def errors(guard: SafetyFilter, plan: Wave, lookahead: float, steps: int = 1000) -> np.ndarray:
    """Distance of the commanded state from the plan at its time (steps, A), without the start."""
    guard.start(plan.at(0)[0])
    found = []
    for step in range(steps):
        state = guard.step(*plan.at(step * TICK + round(lookahead * 1e9)), lookahead)
        found.append(np.abs(state.position - plan.at((step + 1) * TICK)[0]))
    return np.array(found[steps // 2 :])


@pytest.mark.parametrize("lookahead", [0.05, 0.1, 0.15])
def test_a_feasible_plan_is_followed_without_lag_from_rest_on(lookahead: float) -> None:
    assert errors(arm_filter(), Wave(), lookahead)[:, :3].max() < 5e-4
    assert errors(arm_filter(), Wave(), lookahead)[:, 3].max() < 2e-5


def test_a_plan_at_its_limits_is_caught_up_with() -> None:
    plan = Wave(rate=2.8)
    assert 0.75 * ARM.acceleration < 2.8**2 * 0.5 and 0.9 * ARM.velocity < 2.8 * 0.5
    assert errors(arm_filter(), plan, LOOKAHEAD).max() < 1e-3


def test_the_target_of_now_lags() -> None:
    plan, guard = Wave(), arm_filter()
    guard.start(plan.at(0)[0])
    lag = []
    for step in range(1000):
        position, velocity = plan.at((step + 1) * TICK)
        state = guard.step(position, velocity, LOOKAHEAD)
        lag.append(np.abs(state.position - position)[:3].max())
    assert max(lag[500:]) > 0.05


def test_the_jerk_of_a_smooth_plan_stays_the_plans_own() -> None:
    plan, guard = Wave(), arm_filter()
    guard.start(plan.at(0)[0])
    states = run(guard, lambda step: plan.at(step * TICK + round(LOOKAHEAD * 1e9)), 1000)
    jerk = np.diff(states[300:, 2, :3], axis=0) / PERIOD
    assert np.abs(jerk).max() < 1.02 * 0.5 * plan.rate**3


def test_the_gripper_does_not_slow_the_arm() -> None:
    arms = []
    for opening in (0.04, 0.0):
        guard = arm_filter()
        guard.start(np.array([0.0, 0.0, 0.0, 0.08]))
        arms.append(run(guard, lambda step, o=opening: (np.array([0.3, 0.2, 0.1, o]), np.zeros(4)), 60))
    np.testing.assert_array_equal(arms[0][:, :, :3], arms[1][:, :, :3])
    assert arms[1][60, 0, :3] == pytest.approx([0.3, 0.2, 0.1], abs=1e-3)
    assert arms[1][60, 0, 3] > 0.02
    assert np.abs(arms[1][:, 1, 3]).max() <= GRIPPER.velocity * (1 + 1e-9)


TABLE_BOX = Workspace(x=(-1.0, 1.0), y=(-0.3, 0.4), z=(0.05, 1.2))


@settings(max_examples=6, deadline=None)
@given(st.integers(0, 2**32))
def test_the_tool_never_leaves_its_box(seed: int) -> None:
    guard = arm_filter(workspace=TABLE_BOX, kinematics=TABLE)
    rng = np.random.default_rng(seed)
    lower, upper = np.array([-2, -2, -2, 0.0]), np.array([2, 2, 2, 0.08])
    guard.start(np.array([0.0, -0.3, 0.6, 0.04]))
    target = adversary(rng, lower, upper, np.array([1.5, 1.5, 1.5, 0.1]))
    states = run(guard, target, 400)
    check_limits(states, [ARM, ARM, ARM, GRIPPER], PERIOD)
    stop = []
    while not guard.at_rest:
        stop.append(guard.brake().position)
    tools = forward(TABLE, np.concatenate([states[:, 0], np.array(stop).reshape(-1, 4)])[:, :3])[0]
    box = np.array([TABLE_BOX.x, TABLE_BOX.y, TABLE_BOX.z])
    assert np.all(tools >= box[:, 0] - 1e-6) and np.all(tools <= box[:, 1] + 1e-6)


def test_the_table_is_reached_but_not_touched_and_left_again() -> None:
    guard = arm_filter(workspace=TABLE_BOX, kinematics=TABLE)
    high, low = np.array([0.0, 0.0, 0.5, 0.04]), np.array([0.0, 0.9, 0.5, 0.04])
    assert forward(TABLE, low[:3])[0][2] < TABLE_BOX.z[0] - 0.2
    guard.start(high)
    down = run(guard, lambda step: (low, np.zeros(4)), 300)
    height = forward(TABLE, down[:, 0, :3])[0][:, 2]
    assert TABLE_BOX.z[0] <= height.min() < TABLE_BOX.z[0] + 0.02
    assert guard.counts[safety.BRAKED_WORKSPACE] > 50
    up = run(guard, lambda step: (high, np.zeros(4)), 200)
    assert up[-1, 0] == pytest.approx(high, abs=1e-6)


def test_a_tool_that_starts_below_the_table_may_only_rise() -> None:
    guard = arm_filter(workspace=TABLE_BOX, kinematics=TABLE)
    below = np.array([0.0, 0.9, 0.0, 0.04])
    guard.start(below)
    down = run(guard, lambda step: (below + [0, 0.3, 0, 0], np.zeros(4)), 100)
    assert forward(TABLE, down[:, 0, :3])[0][:, 2].min() >= forward(TABLE, below[:3])[0][2] - 1e-9
    up = run(guard, lambda step: (np.array([0, 0, 0.5, 0.04]), np.zeros(4)), 300)
    assert up[-1, 0] == pytest.approx([0, 0, 0.5, 0.04], abs=1e-6)


def test_the_preview_is_what_the_steps_will_do() -> None:
    plan, guard = Wave(), arm_filter()
    guard.start(plan.at(0)[0])
    for step in range(50):
        guard.step(*plan.at(step * TICK + round(LOOKAHEAD * 1e9)), LOOKAHEAD)
    now, before, counts = 50 * TICK, guard.state, dict(guard.counts)
    seen = guard.preview(plan, now, 0.5, 0.02, LOOKAHEAD)
    np.testing.assert_array_equal(guard.state.position, before.position)
    assert dict(guard.counts) == counts
    np.testing.assert_array_equal(np.diff(seen.times), 2 * TICK)
    assert seen.times[0] == now + 2 * TICK
    done = {}
    for step in range(50, 100):
        done[(step + 1) * TICK] = guard.step(*plan.at(step * TICK + round(LOOKAHEAD * 1e9)), LOOKAHEAD)
    step = 100
    while not guard.at_rest:
        step += 1
        done[step * TICK] = guard.brake()
    for time, *row in zip(seen.times, seen.positions, seen.velocities, seen.accelerations, strict=True):
        state = done.get(int(time), guard.state)
        np.testing.assert_array_equal(row, [state.position, state.velocity, state.acceleration])
    assert not seen.velocities[-1].any() and not seen.accelerations[-1].any()


@settings(max_examples=10, deadline=None)
@given(st.integers(0, 2**32), st.floats(0.0, 0.6), st.sampled_from([0.02, 0.05]))
def test_every_preview_ends_at_rest_and_its_splines_keep_the_limits(seed: int, length: float, spacing: float) -> None:
    guard, rng = arm_filter(), np.random.default_rng(seed)
    axes = [ARM, ARM, ARM, GRIPPER]
    lower, upper, fastest, strongest, jerk = (
        np.array([getattr(axis, name) for axis in axes])
        for name in ("lower", "upper", "velocity", "acceleration", "jerk")
    )
    guard.start((lower + upper) / 2)
    run(guard, adversary(rng, lower, upper, fastest), 100)
    first, now = guard.state, int(rng.integers(10**10))
    seen = guard.preview(Wave(rng.uniform(0.5, 4)), now, length, spacing, LOOKAHEAD)
    assert not seen.velocities[-1].any() and not seen.accelerations[-1].any()
    times = np.array([now, *seen.times]) / 1e9
    assert np.all(np.diff(times) == pytest.approx(spacing, abs=1e-6))
    rows = [
        np.concatenate([start[None], rest])
        for start, rest in zip(
            (first.position, first.velocity, first.acceleration),
            (seen.positions, seen.velocities, seen.accelerations),
            strict=True,
        )
    ]
    fine = np.linspace(times[0], times[-1], 20 * len(times))
    for given_rows in (rows[:2], rows):
        spline = BPoly.from_derivatives(times - times[0], np.stack(given_rows, axis=1))
        speed, acceleration = (spline.derivative(order)(fine - times[0]) for order in (1, 2))
        assert np.all(np.abs(speed) <= fastest + 0.25 * jerk * spacing**2 / 2)
        # Between two points the jerk may jump once from one limit to the other.
        assert np.all(np.abs(acceleration) <= strongest + jerk * spacing)


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 2**32))
def test_previews_go_on_along_the_one_before_by_the_time(seed: int) -> None:
    """However late the command loop runs: the controller follows by the time. Set points do not jump either."""
    guard, rng, now, old = arm_filter(), np.random.default_rng(seed), 10**9, {}
    plan = Wave(2.0)
    guard.start(plan.at(0)[0])
    strongest = np.array([ARM.acceleration] * 3 + [GRIPPER.acceleration])
    for _ in range(10):
        for passed in (*rng.uniform(0.6, 2.5, 8), 1, 1) if old else ():
            now += int(passed * TICK)
            guard.follow(now)
        before = guard.state
        seen = guard.preview(plan, now, 0.5, PERIOD, LOOKAHEAD, lead=0.05)
        np.testing.assert_array_equal(guard.state.position, before.position)
        new = dict(zip(seen.times.tolist(), seen.positions, strict=True))
        shared = [time for time in new if now <= time <= now + 0.045e9]
        assert len(shared) >= 4
        if old:
            np.testing.assert_array_equal([new[time] for time in shared], [old[time] for time in shared])
        old, velocity = new, before.velocity
        for _ in range(3):
            now += TICK
            after = guard.follow(now)
            assert np.all(np.abs(after.velocity - velocity) <= strongest * PERIOD * (1 + 1e-9))
            np.testing.assert_allclose(
                after.position, before.position + PERIOD * velocity, atol=strongest.max() * PERIOD**2
            )
            before, velocity = after, after.velocity


def test_a_preview_of_a_plan_that_ends_brakes_at_its_end() -> None:
    class Short(Wave):
        end = 10**9

    guard = arm_filter()
    guard.start(Short().at(0)[0])
    seen = guard.preview(Short(), 9 * 10**8, 0.5, 0.02, LOOKAHEAD)
    assert seen.times[-1] < 10**9 + 4 * 10**8


def pose(position: np.ndarray, turn: np.ndarray) -> np.ndarray:
    return np.concatenate([position, rotation.to_columns(rotation.from_vector(turn)), [0.04]])


def pose_filter() -> SafetyFilter:
    robot = contract(kind="tool_pose")
    axis = AxisLimits(-1.0, 1.0, velocity=0.5, acceleration=2.0, jerk=40.0)
    return SafetyFilter(robot, limits(robot, axis, workspace=Workspace((-0.5, 0.5), (-0.5, 0.5), (0.1, 0.6))), PERIOD)


@settings(max_examples=6, deadline=None)
@given(st.integers(0, 2**32))
def test_a_tool_pose_turns_and_moves_within_its_limits(seed: int) -> None:
    guard, rng = pose_filter(), np.random.default_rng(seed)
    guard.start(pose(np.array([0.2, 0.0, 0.3]), rng.normal(size=3)))
    target, rates = np.zeros(10), np.zeros(10)
    matrices, positions = [rotation.from_columns(guard.state.position[3:9])], [guard.state.position[:3]]
    for step in range(300):
        if step % int(rng.integers(1, 40)) == 0:
            target, rates = rng.normal(size=10), 3 * rng.normal(size=10)
        state = guard.step(target, rates, LOOKAHEAD)
        six = state.position[3:9]
        matrices.append(rotation.from_columns(six))
        positions.append(state.position[:3])
        np.testing.assert_allclose(rotation.to_columns(matrices[-1]), six, atol=1e-12)
    while not guard.at_rest:
        positions.append(guard.brake().position[:3])
        matrices.append(rotation.from_columns(guard.state.position[3:9]))
    assert (
        np.all(np.abs(positions) <= [0.5 + 1e-8, 0.5 + 1e-8, 0.6 + 1e-8]) and np.min(positions, axis=0)[2] > 0.1 - 1e-8
    )
    turns = np.array([rotation.to_vector(b @ a.T) for a, b in zip(matrices, matrices[1:], strict=False)]) / PERIOD
    assert np.all(np.linalg.norm(turns, axis=1) <= 1.0 + 1e-6)
    assert np.all(np.linalg.norm(np.diff(turns, axis=0), axis=1) <= 4.0 * PERIOD * (1 + 1e-6))


def test_a_turning_tool_is_followed_and_its_rates_are_derivatives() -> None:
    guard, axis = pose_filter(), np.array([0.6, 0.0, 0.8])

    def plan(time: float) -> tuple[np.ndarray, np.ndarray]:
        turn, late = [pose(np.array([0.2, 0.0, 0.3]), axis * 0.5 * math.sin(t)) for t in (time, time + 1e-6)]
        return turn, (late - turn) / 1e-6

    guard.start(plan(0.0)[0])
    states = [guard.step(*plan(step * PERIOD + LOOKAHEAD), LOOKAHEAD) for step in range(400)]
    late = np.array([state.position for state in states]) - [plan((k + 1) * PERIOD)[0] for k in range(400)]
    assert np.abs(late[200:]).max() < 1e-4
    position, velocity = (np.array([getattr(s, name) for s in states[200:]]) for name in ("position", "velocity"))
    np.testing.assert_allclose(np.gradient(position, PERIOD, axis=0)[1:-1], velocity[1:-1], atol=1e-3)
    acceleration = np.array([s.acceleration for s in states[200:]])
    np.testing.assert_allclose(np.gradient(velocity, PERIOD, axis=0)[1:-1], acceleration[1:-1], atol=1e-2)


def test_six_numbers_that_are_no_rotation_keep_the_present_one() -> None:
    guard, start = pose_filter(), pose(np.array([0.2, 0.0, 0.3]), np.array([0.1, 0.2, 0.3]))
    guard.start(start)
    target = start.copy()
    target[3:9] = [1, 0, 0, 2, 0, 0]
    for _ in range(100):
        guard.step(target, np.zeros(10), LOOKAHEAD)
    np.testing.assert_allclose(guard.state.position, start, atol=1e-12)
    assert guard.counts[safety.KEPT_ROTATION] == 100


@settings(max_examples=6, deadline=None)
@given(st.integers(0, 2**32))
def test_a_twist_changes_slowly_and_stops_at_zero(seed: int) -> None:
    robot, rng = contract(kind="tool_twist"), np.random.default_rng(seed)
    axis = AxisLimits(-0.3, 0.3, velocity=1.0, acceleration=10.0, jerk=300.0)
    guard = SafetyFilter(robot, limits(robot, axis), PERIOD)
    guard.start(np.array([0, 0, 0, 0, 0, 0, 0.04]))
    axes = [axis] * 6 + [GRIPPER]
    lower, upper, fastest = (np.array([getattr(a, name) for a in axes]) for name in ("lower", "upper", "velocity"))
    states = run(guard, adversary(rng, lower, upper, fastest), 200)
    check_limits(states, axes, PERIOD)
    longest = math.ceil(guard.braking_time() / PERIOD) + 2
    stop = [states[-1]]
    while not guard.at_rest:
        state = guard.brake()
        stop.append(np.array([state.position, state.velocity, state.acceleration]))
        assert len(stop) <= longest
    check_limits(np.array(stop), axes, PERIOD)
    assert not guard.state.position[:6].any() and not guard.state.velocity.any()


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("which", [0, 1])
def test_a_target_that_is_not_finite_is_refused_and_changes_nothing(value: float, which: int) -> None:
    guard = arm_filter()
    guard.start(np.zeros(4))
    before, target = guard.state, [np.zeros(4), np.zeros(4)]
    target[which][2] = value
    with pytest.raises(ValueError, match="not finite"):
        guard.step(*target, LOOKAHEAD)
    np.testing.assert_array_equal(guard.state.position, before.position)
    with pytest.raises(ValueError, match="shape"):
        guard.step(np.zeros(3), np.zeros(3), LOOKAHEAD)


NOW = 10**10


def chunk(**entries: float) -> np.ndarray:
    """Eight actions at rest; ``r3c1=5`` puts 5 into row 3, column 1."""
    actions = np.tile([0.1, 0.2, 0.3, 0.04], (8, 1))
    for name, value in entries.items():
        row, column = name[1:].split("c")
        actions[int(row), int(column)] = value
    return actions


START = np.array([0.1, 0.2, 0.3, 0.0])


@pytest.mark.parametrize(
    ("actions", "age", "said"),
    [
        (chunk(), 0.1, ""),
        (chunk(r3c1=2.1), 0.1, ""),
        (chunk(r0c3=0.0), 0.1, ""),
        (chunk()[:, :3], 0.1, r"shape \(8, 3\), wanted \(H, 4\)"),
        (chunk()[:0], 0.1, "shape"),
        (chunk(r3c1=math.nan), 0.1, "joint1 of action 3 is nan"),
        (chunk(r7c0=-math.inf), 0.1, "joint0 of action 7 is -inf"),
        (chunk(r3c1=2.3), 0.1, r"joint1 of action 3 is 2.300, wanted -2.0 to 2.0"),
        (chunk(r3c3=0.5), 0.1, r"opening of action 3"),
        (chunk(), 0.6, "0.600 s old, wanted at most 0.5 s"),
        (chunk(), -0.11, "old"),
        (chunk(), -0.05, ""),
        (chunk()[:2], 0.3, "ended 0.200 s ago"),
        (chunk() + [0.5, 0, 0, 0], 0.1, r"joint0 of action 2 is 0.500 from where the robot is, wanted at most 0.275"),
        (chunk(r0c0=1.9), 0.1, ""),
        (chunk(r0c0=1.9), 0.0, "joint0 of action 0"),
    ],
)
def test_a_chunk_is_checked(actions: np.ndarray, age: float, said: str) -> None:
    guard = arm_filter()
    found = guard.check_chunk(actions, NOW - round(age * 1e9), NOW, START)
    assert re.search(said, found) if said else found == ""


def test_the_first_usable_action_counts_the_observations() -> None:
    robot = contract()
    actions = chunk(r0c0=1.9, r1c0=1.9)
    assert SafetyFilter(robot, limits(robot), PERIOD).check_chunk(actions, NOW, NOW, START)
    assert SafetyFilter(robot, limits(robot), PERIOD, n_obs_steps=3).check_chunk(actions, NOW, NOW, START) == ""
    assert arm_filter().check_chunk(actions, NOW, NOW, None) == ""


def test_a_pose_chunk_is_checked_for_its_rotation() -> None:
    guard, start = pose_filter(), pose(np.array([0.2, 0.0, 0.3]), np.zeros(3))
    actions = np.tile(start, (4, 1))
    assert guard.check_chunk(actions, NOW, NOW, start) == ""
    turned = np.tile(pose(start[:3], np.array([0, 0, 1.0])), (4, 1))
    assert "rotation of action 0 is 1.000" in guard.check_chunk(turned, NOW, NOW, start)
    actions[2, 3:9] = 0
    assert "action 2" in guard.check_chunk(actions, NOW, NOW, start)


def test_a_robot_that_does_not_follow_is_named() -> None:
    guard = arm_filter()
    guard.start(np.zeros(4))
    assert guard.tracking_problem(np.array([0.1, -0.19, 0.0, 0.08])) == ""
    assert "joint1 is 0.250" in guard.tracking_problem(np.array([0.1, -0.25, 0.0, 0.0]))
    assert "joint2 is nan" in guard.tracking_problem(np.array([0.1, 0.0, math.nan, 0.0]))
    turned = pose_filter()
    turned.start(pose(np.zeros(3) + 0.2, np.zeros(3)))
    assert "rotation is 0.300" in turned.tracking_problem(pose(np.zeros(3) + 0.2, np.array([0, 0.3, 0])))


def test_limits_that_do_not_fit_are_refused() -> None:
    twist = contract(kind="tool_twist")
    with pytest.raises(UserError, match="twist"):
        SafetyFilter(twist, limits(twist, workspace=TABLE_BOX), PERIOD)
    with pytest.raises(UserError, match="kinematics"):
        arm_filter(workspace=TABLE_BOX)
    with pytest.raises(ValueError, match="start"):
        arm_filter().brake()


def test_joints_in_other_units_reach_the_same_tool_positions() -> None:
    """A contract in degrees, with an offset and a sign, is stopped at the same table."""
    robot = contract()
    arm = robot.commands["arm"]
    scale, offset = (180 / math.pi, -180 / math.pi, 180 / math.pi), (0.0, 30.0, -10.0)
    degrees = replace(robot, commands={**robot.commands, "arm": replace(arm, scale=scale, offset=offset)})
    wide = AxisLimits(-180, 180, *(180 / math.pi * value for value in (1.5, 5.0, 100.0)))
    guard = SafetyFilter(degrees, limits(degrees, wide, workspace=TABLE_BOX, kinematics=TABLE), PERIOD)

    def entries(joints: list[float]) -> np.ndarray:
        return np.append(np.array(joints) * scale + offset, 0.04)

    guard.start(entries([0.0, 0.0, 0.5]))
    down = run(guard, lambda step: (entries([0.0, 0.9, 0.5]), np.zeros(4)), 300)
    height = forward(TABLE, (down[:, 0, :3] - offset) / scale)[0][:, 2]
    assert TABLE_BOX.z[0] <= height.min() < TABLE_BOX.z[0] + 0.02
