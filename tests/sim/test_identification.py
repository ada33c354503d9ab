"""System identification: a hidden robot, known only from recorded commands and states, is found again."""

from __future__ import annotations

import gymnasium
import numpy as np
import pytest
from scipy.spatial.transform import Rotation

pytest.importorskip("robopolicy_sim")

from robopolicy_sim.matching.candidates import Bounds  # noqa: E402
from robopolicy_sim.matching.identification import identify, replay_error  # noqa: E402
from robopolicy_sim.matching.replay import Motion, Replayer, step_errors  # noqa: E402
from robopolicy_sim.matching.robot_parameters import RobotParameters  # noqa: E402

HIDDEN = {
    "stiffness": [2500.0, 3000.0, 2000.0, 1800.0, 1200.0, 1500.0, 1100.0],
    "damping": [500.0, 400.0, 380.0, 300.0, 230.0, 260.0, 180.0],
    "friction": [2.0, 3.0, 1.5, 2.0, 0.4, 0.3, 0.2],
    "action_latency": 0.05,
    "gripper_damping": 320.0,
}


def make(task: str = "Lift", **options):
    return gymnasium.make(f"robopolicy_sim/{task}-v0", disable_env_checker=True, **options).unwrapped


def record(env, seed: int, steps: int = 30) -> tuple[np.ndarray, np.ndarray]:
    """Commands and measured states of a smooth motion over the table, with the gripper closing halfway."""
    rng = np.random.default_rng(seed)
    amplitude, frequency = rng.uniform(-0.06, 0.06, 6), rng.uniform(2.0, 6.0, 6)
    observation, _ = env.reset(seed=seed)
    home = env.controller.kinematics.forward(observation["observation.state"][: len(env.arm.joints)])
    actions, states = [], []
    for step in range(steps):
        change = amplitude * np.sin(frequency * step / 20)
        position = home[0] + change[:3] + [0, 0, 0.08 * min(1.0, step / 20)]
        rotation = Rotation.from_rotvec(4 * change[3:]).as_matrix() @ home[1]
        action = np.concatenate([position, rotation[:, :2].T.ravel(), [float(step < steps // 2)]])
        states.append(observation["observation.state"])
        actions.append(action)
        observation, *_ = env.step(action)
    return np.array(actions), np.array(states)


def motions(env, seeds: range, **options) -> list[Motion]:
    return [Motion.from_arrays(*record(env, seed, **options), joints=len(env.arm.joints)) for seed in seeds]


def test_the_rotation_part_of_the_loss_is_half_the_angle_between_the_rotations() -> None:
    turned = Rotation.from_rotvec([[0, 0, 0.4], [0, np.pi, 0], [0, 0, 0]]).as_matrix()
    straight = np.tile(np.eye(3), (3, 1, 1))
    here, there = np.zeros((3, 3)), np.array([[0.03, 0, 0.04], [0, 0, 0], [0, 0.01, 0]])
    np.testing.assert_allclose(step_errors(here, straight, there, turned), [0.05 + 0.2, np.pi / 2, 0.01], atol=1e-7)


@pytest.mark.parametrize("control", ["ee_pose", "ee_delta_current"])
def test_the_recorded_robots_own_parameters_replay_its_motion(control: str) -> None:
    env = make(robot_parameters=HIDDEN, control=control)
    motion = motions(env, range(1))[0] if control == "ee_pose" else recorded_deltas(env)
    replayer = Replayer("panda", control, 20, [motion])
    own = RobotParameters.from_json(HIDDEN, env.arm)
    assert replay_error(replayer, own).loss < 1e-5  # float32 of the recording
    assert replay_error(replayer, RobotParameters()).loss > 1e-3
    assert replay_error(replayer, own).loss < 1e-5  # nothing is left behind


@pytest.mark.parametrize("control", ["ee_pose", "ee_delta_target"])
def test_a_latency_between_time_steps_replays_between_its_neighbours(control: str) -> None:
    env = make(control=control)
    motion = motions(env, range(1))[0] if control == "ee_pose" else recorded_deltas(env)
    replayer = Replayer("panda", control, 20, [motion])
    early, between, late = (
        replayer.replay(0, RobotParameters(action_latency=seconds)).position for seconds in (0.02, 0.0225, 0.025)
    )
    change = np.abs(late - early).max()
    assert change > 3e-4
    # not exactly in the middle where a torque limit is reached
    np.testing.assert_allclose(between, (early + late) / 2, atol=0.1 * change)


def recorded_deltas(env, steps: int = 20) -> Motion:
    observation, _ = env.reset(seed=3)
    action = np.array([0.006, -0.004, 0.005, 0.0, 0.02, 0.01, 1.0], np.float32)
    states = []
    for _ in range(steps):
        states.append(observation["observation.state"])
        observation, *_ = env.step(action)
    return Motion.from_arrays(np.tile(action, (steps, 1)), np.array(states), len(env.arm.joints))


def test_a_hidden_robot_is_found_from_its_recordings() -> None:
    env = make(robot_parameters=HIDDEN)
    seen = []
    found = identify(
        "panda",
        motions(env, range(3)),
        held_out=motions(env, range(10, 12)),
        evaluations=240,
        progress=lambda done, loss: seen.append((done, loss)),
    )
    before, after = found.held_out_before, found.held_out_after
    assert before is not None and after is not None
    assert before.position > 5e-3
    assert after.loss < before.loss / 3
    assert after.position < before.position / 3
    assert found.after.loss < found.before.loss / 3
    assert found.parameters.action_latency == pytest.approx(HIDDEN["action_latency"], abs=0.0051)
    assert found.parameters.gripper_damping == pytest.approx(HIDDEN["gripper_damping"], rel=0.15)
    assert [done for done, _ in seen] == list(range(1, found.evaluations + 1))
    losses = [loss for _, loss in seen]
    assert losses == sorted(losses, reverse=True)
    assert found.evaluations < 300


def test_noise_of_the_measurement_does_not_break_the_fit() -> None:
    rng = np.random.default_rng(0)
    env = make(robot_parameters=HIDDEN)
    noisy = []
    for seed in range(3):
        actions, states = record(env, seed)
        states[:, 8:11] += rng.normal(0, 1e-3, (len(states), 3))  # m
        noisy.append(Motion.from_arrays(actions, states, joints=7))
    found = identify("panda", noisy, held_out=motions(env, range(10, 12)), evaluations=160)
    assert found.held_out_before is not None and found.held_out_after is not None
    assert found.held_out_after.position < found.held_out_before.position / 3


def test_parameters_stay_within_their_bounds() -> None:
    env = make(robot_parameters=HIDDEN)
    bounds = Bounds(stiffness=(0.9, 1.1), damping=(0.9, 1.1), friction=(0.0, 0.01), action_latency=(0.0, 0.01))
    found = identify("panda", motions(env, range(1), steps=15), evaluations=60, bounds=bounds).parameters
    nominal = RobotParameters.of_model(env_model("panda"), env.arm)
    for name in ("stiffness", "damping"):
        factor = np.array(getattr(found, name)) / getattr(nominal, name)
        assert np.all((factor > 0.9 - 1e-6) & (factor < 1.1 + 1e-6))
    assert found.action_latency is not None and found.action_latency <= 0.01


def env_model(arm: str):
    return Replayer(arm, "ee_pose", 20, ()).bench.model


def test_the_same_seed_finds_the_same_in_one_process_and_in_two() -> None:
    env = make(robot_parameters=HIDDEN)
    recorded = motions(env, range(2), steps=10)
    alone, together = (identify("panda", recorded, evaluations=50, workers=workers) for workers in (1, 2))
    assert alone == together


def test_a_task_with_robot_parameters_has_them_and_variations_act_on_top() -> None:
    env = make(robot_parameters=HIDDEN, variation={"gain": 0.5})
    env.reset(seed=0)
    found = RobotParameters.of_model(env.model, env.arm)
    np.testing.assert_allclose(found.stiffness, 0.5 * np.array(HIDDEN["stiffness"]))
    np.testing.assert_allclose(found.damping, HIDDEN["damping"])
    np.testing.assert_allclose(found.friction, HIDDEN["friction"])
    assert found.gripper_damping == HIDDEN["gripper_damping"]
    assert env.action_latency == HIDDEN["action_latency"]


def test_latency_holds_the_arm_still_for_as_long() -> None:
    late, prompt = (make(robot_parameters={"action_latency": seconds}) for seconds in (0.1, 0.0))
    positions = []
    for env in (late, prompt):
        start = env.reset(seed=0)[0]["observation.state"]
        action = np.concatenate([start[8:], [1.0]])
        action[2] += 0.05
        positions.append([env.step(action)[0]["observation.state"][10] - start[10] for _ in range(12)])
    np.testing.assert_allclose(positions[0][:2], 0, atol=1e-5)
    np.testing.assert_allclose(positions[0][2:], positions[1][:-2], atol=1e-4)


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"stifness": [1.0] * 7}, "'stifness' is unknown; it has stiffness, damping"),
        ({"stiffness": [1.0] * 6}, "wanted 7 finite numbers, one for each joint of 'panda'"),
        ({"damping": [0.0] * 7}, "gains cannot be zero"),
        ({"friction": ["high"] * 7}, "wanted 7 finite numbers"),
        ({"action_latency": -0.1}, "cannot be negative"),
        ({"file": "nowhere.json"}, "nowhere.json is no result of 'robopolicy identify'"),
        ({"file": "robot.json", "action_latency": 0.1}, "either 'file' or values"),
    ],
)
def test_impossible_parameters_are_refused(option: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(robot_parameters=option)


def test_latency_cannot_be_given_twice() -> None:
    with pytest.raises(ValueError, match="given twice"):
        make(robot_parameters={"action_latency": 0.1}, action_latency=0.05)


def test_recordings_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match=r"wanted \(T, 17\)"):
        Motion.from_arrays(np.zeros((5, 10)), np.zeros((5, 16)), joints=7)
    actions, states = record(make(), 0, steps=3)
    with pytest.raises(ValueError, match="not finite"):
        Motion.from_arrays(actions * np.nan, states, joints=7)
    motion = Motion.from_arrays(actions, states, joints=7)
    with pytest.raises(ValueError, match="have 10 entries, control='ee_delta_target' of 'panda' takes 7"):
        identify("panda", [motion], control="ee_delta_target")
    with pytest.raises(ValueError, match="no motions"):
        identify("panda", [])
