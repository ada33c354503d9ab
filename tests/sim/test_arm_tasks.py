"""What every task of an arm keeps to: its interface, its controls, its experts."""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import Any

import gymnasium
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env

pytest.importorskip("robopolicy_sim")

from robopolicy_sim import ARM_TASKS, NAMESPACE
from robopolicy_sim.arms.arm import ARMS
from robopolicy_sim.control import CONTROLS, ToolTarget
from robopolicy_sim.envs.arm_task import ArmTaskEnv
from robopolicy_sim.experts.scripted import QUALITIES
from robopolicy_sim.kinematics import rotation_error, rotation_from_vector

TASKS = tuple(ARM_TASKS)
NAMES = tuple(f"{task}{suffix}" for task, (_, _, arms) in ARM_TASKS.items() for suffix in arms.values())


def make(name: str, **options: Any) -> ArmTaskEnv:
    env = gymnasium.make(f"{NAMESPACE}/{name}-v0", disable_env_checker=True, **options).unwrapped
    assert isinstance(env, ArmTaskEnv)
    return env


shared = functools.cache(make)  # tests that leave nothing behind share environments


def episode(name: str, seed: int, *, quality: str = "good", mode: str | None = None) -> dict[str, Any]:
    """The last info of an episode of the expert."""
    env, limit = shared(name), ARM_TASKS[name][1]
    observation, info = env.reset(seed=seed)
    expert = env.make_expert(seed, quality=quality, mode=mode)
    for _ in range(limit):
        observation, *_, info = env.step(expert.act(observation))
        if info["success"]:
            break
    return info


def start(env: ArmTaskEnv, seed: int, steps: int = 0) -> np.ndarray:
    """All vectors that are observed from a start on, under the expert, (steps + 1, n)."""
    observation, _ = env.reset(seed=seed)
    expert = env.make_expert(seed)
    seen = [observation]
    for _ in range(steps):
        observation, *_ = env.step(expert.act(observation))
        seen.append(observation)
    return np.stack([np.concatenate([one[key] for key in sorted(one)]) for one in seen])


# Interface.


@pytest.mark.parametrize("name", NAMES)
def test_gymnasium_accepts_the_task_and_names_fit(name: str) -> None:
    env = shared(name)
    check_env(env, skip_render_check=True)
    assert set(env.metadata["names"]) == set(env.metadata["units"]) == {*env.observation_space.spaces, "action"}
    for key, names in env.metadata["names"].items():
        space = env.action_space if key == "action" else env.observation_space[key]
        assert space.shape == (len(names),), key
        assert len(set(names)) == len(names), key


@pytest.mark.parametrize("name", NAMES)
def test_a_start_is_not_a_success_and_has_an_instruction(name: str) -> None:
    env = shared(name)
    for seed in range(5):
        _, info = env.reset(seed=seed)
        assert not info["success"] and 0 <= info["progress"] < 0.9
        assert not any(info["stages"].values())
        assert len(env.instruction.split()) >= 3


@pytest.mark.parametrize("task", TASKS)
def test_the_seed_settles_the_episode(task: str) -> None:
    used, fresh = shared(task), make(task)
    np.testing.assert_array_equal(start(used, 7, steps=15), start(fresh, 7, steps=15))
    assert np.abs(start(used, 7) - start(used, 8)).max() > 1e-3


@pytest.mark.parametrize("name", NAMES)
def test_an_observed_state_of_the_objects_is_restored(name: str) -> None:
    env = shared(name)
    key = "observation.environment_state"
    wanted = env.reset(seed=1)[0][key]
    other = env.reset(seed=2)[0][key]
    restored = env.reset(seed=2, options={"environment_state": wanted})[0][key]
    assert np.abs(other - wanted).max() > 1e-3
    np.testing.assert_allclose(restored, wanted, atol=1e-6)
    np.testing.assert_array_equal(env.reset(seed=2)[0][key], other)


def test_a_state_of_the_wrong_size_is_refused() -> None:
    with pytest.raises(ValueError, match=r"environment_state.*\(4,\).*wanted \(9,\)"):
        shared("Lift").reset(options={"environment_state": np.zeros(4)})


def test_an_unknown_option_of_reset_is_refused_with_the_choices() -> None:
    with pytest.raises(ValueError, match="'state' is unknown; there are environment_state, variation"):
        shared("Lift").reset(options={"state": np.zeros(9)})


def test_options_may_come_from_json() -> None:
    env = make("Lift", cameras=["front"], image_size=32, render_mode="rgb_array", render_size=[24, 40])
    observation, _ = env.reset(seed=0)
    assert observation["observation.image.front"].shape == (32, 32, 3)
    assert env.render().shape == (24, 40, 3)
    env.close()
    env.close()


def test_a_start_at_the_goal_has_a_progress() -> None:
    env = shared("PickPlace")
    key = "observation.environment_state"
    state = env.reset(seed=0)[0][key]
    state[:2] = state[-2:]
    env.reset(seed=0, options={key.removeprefix("observation."): state})
    env.place("cube", [*env.position("bin")[:2], 0.3])
    _, reward, *_ = env.step(env.encode(ToolTarget(env.tool_state().position, env.tool_state().rotation, 1.0)))
    assert 0 <= reward < 0.5


def test_a_task_that_grasps_asks_for_finger_pads() -> None:
    panda = ARMS["panda"]
    env = make("Lift", arm=replace(panda, gripper=replace(panda.gripper, pads=())))
    with pytest.raises(ValueError, match="'panda' names 0 finger pads.*pads="):
        env.reset(seed=0)


# Controls.


@pytest.mark.parametrize("control", CONTROLS)
@pytest.mark.parametrize("arm", ARMS)
def test_encode_then_step_asks_for_that_tool_pose(arm: str, control: str) -> None:
    env = make("Lift", arm=arm, control=control)
    env.reset(seed=0)
    state = env.tool_state()
    wanted = ToolTarget(
        state.position + [0.006, -0.008, 0.005], rotation_from_vector(np.array([0, 0, 0.05])) @ state.rotation, 0.4
    )
    action = env.encode(wanted)
    assert env.action_space.contains(action)
    env.step(action)
    servos = env.data.ctrl
    position, rotation = env.kinematics.forward(servos[[env.model.actuator(name).id for name in env.arm.actuators]])
    np.testing.assert_allclose(position + env.base_position, wanted.position, atol=1e-3)
    assert np.linalg.norm(rotation_error(wanted.rotation, rotation)) < 0.01
    gripper = env.arm.gripper
    assert servos[env.model.actuator(gripper.actuator).id] == pytest.approx(gripper.command(0.4))


@pytest.mark.parametrize("control", CONTROLS)
def test_the_tool_arrives_where_actions_send_it(control: str) -> None:
    env = make("Lift", control=control)
    env.reset(seed=0)
    state = env.tool_state()
    wanted = ToolTarget(state.position + [0.05, 0.08, 0.04], state.rotation, 1.0)
    for _ in range(40):
        env.step(env.encode(wanted))
    assert np.linalg.norm(env.tool_state().position - wanted.position) < 0.004


@pytest.mark.parametrize("control", CONTROLS)
def test_impossible_actions_are_refused(control: str) -> None:
    env = make("Lift", control=control)
    env.reset(seed=0)
    size = len(env.metadata["names"]["action"])
    for action in (np.full(size, np.nan), np.zeros(size + 1), np.zeros((1, size))):
        with pytest.raises(ValueError, match="finite numbers"):
            env.step(action)


@pytest.mark.parametrize("steps", [1, 7])
def test_latency_delays_the_motion_by_exactly_that_time(steps: int) -> None:
    paths = {}
    for delay in (0, steps):
        env = make("Lift", control="joint_position", control_hz=200, action_latency=delay * 0.005)
        env.reset(seed=0)
        command = np.append(env.tool_state().joints, 1.0)
        command[:-1] += 0.2
        path = [env.tool_state().joints]
        for _ in range(40):
            env.step(command)
            path.append(env.tool_state().joints)
        paths[delay] = np.array(path) - path[0]
    moved = np.abs(paths[0][-1]).min()
    assert moved > 0.1
    np.testing.assert_allclose(paths[steps][steps:], paths[0][: len(paths[0]) - steps], atol=0.005 * moved)
    assert np.abs(paths[steps][: steps + 1]).max() < 0.005 * moved


@pytest.mark.parametrize("control_hz", [10, 15, 30, 400])
def test_a_control_step_takes_exactly_its_share_of_a_second(control_hz: float) -> None:
    env = make("Lift", control="joint_position", control_hz=control_hz)
    env.reset(seed=0)
    action = np.append(env.tool_state().joints, 1.0)
    for _ in range(6):
        env.step(action)
    assert env.metadata["render_fps"] == control_hz
    assert env.data.time == pytest.approx(6 / control_hz)
    assert env.model.opt.timestep <= 0.005


def test_deltas_from_the_target_keep_their_sum_while_the_arm_lags_and_deltas_from_the_tool_do_not() -> None:
    reached = {}
    for control in ("ee_delta_current", "ee_delta_target"):
        env = make("Lift", control=control, action_latency=0.1)
        env.reset(seed=0)
        before = env.tool_state().position
        for step in range(40):
            forward = 0.01 if step < 10 else 0.0
            env.step(np.array([0, forward, 0, 0, 0, 0, 1]))
        reached[control] = env.tool_state().position - before
    np.testing.assert_allclose(reached["ee_delta_target"], [0, 0.1, 0], atol=0.003)
    assert reached["ee_delta_current"][1] < 0.08


# Experts.


@pytest.mark.parametrize("task", TASKS)
def test_every_mode_of_the_expert_occurs_and_succeeds(task: str) -> None:
    env = shared(task)
    env.reset(seed=0)
    modes = env.expert_class.modes(env)
    assert {env.make_expert(seed).mode for seed in range(60)} == set(modes)
    for seed in range(max(3, len(modes))):
        mode = modes[seed % len(modes)]
        assert episode(task, seed, mode=mode)["success"], (seed, mode)


@pytest.mark.parametrize("task", TASKS)
def test_a_failing_expert_fails(task: str) -> None:
    info = episode(task, 0, quality="failing")
    assert not info["success"] and info["progress"] < 1


@pytest.mark.parametrize("task", TASKS)
def test_an_expert_that_recovers_succeeds_after_a_mistake(task: str) -> None:
    assert episode(task, 1, quality="recovering")["success"]


# Wrong names.


@pytest.mark.parametrize(
    ("options", "choices"), [({"arm": "kuka"}, "panda, ur5e, so101"), ({"control": "torque"}, ", ".join(CONTROLS))]
)
def test_unknown_arms_and_controls_are_refused_with_the_choices(options: dict[str, str], choices: str) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(options.values()))}.*{choices}"):
        make("Lift", **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"control_hz": 0}, "control_hz=0 is no rate"),
        ({"action_latency": -0.1}, "action_latency=-0.1 is no time"),
        ({"cameras": "scene"}, "cameras='scene' is a string"),
        ({"variation": "darker"}, "variation='darker' is no mapping"),
        ({"randomization": ["mild"]}, r"randomization=\['mild'\] is no mapping"),
    ],
)
def test_options_of_the_wrong_kind_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make("Lift", **options)


def test_unknown_qualities_and_modes_are_refused_with_the_choices() -> None:
    env = shared("Reach")
    with pytest.raises(ValueError, match=f"'perfect'.*{', '.join(QUALITIES)}"):
        env.make_expert(0, quality="perfect")
    with pytest.raises(ValueError, match="'above'.*left, right"):
        env.make_expert(0, mode="above")
