"""The task PushPuck and its scripted expert."""

from __future__ import annotations

from dataclasses import replace

import gymnasium
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env

import robopolicy_sim  # noqa: F401  (registers the environments)
from robopolicy_sim.envs.push_puck import PushPuckConfig, PushPuckEnv
from robopolicy_sim.experts.push_puck import PushPuckExpert, PushPuckGeometry

ENV_ID = "robopolicy_sim/PushPuck-v0"
GEOMETRY = PushPuckGeometry(puck_radius=0.04, pusher_radius=0.025, tolerance=0.03, reach=0.29)


@pytest.fixture
def env():
    env = PushPuckEnv()
    yield env
    env.close()


def play(env: PushPuckEnv, seed: int) -> tuple[np.ndarray, bool]:
    """States of one episode of the expert, (T + 1, 6) with T at most 150, and its success."""
    expert = env.make_expert(seed)
    observation, info = env.reset(seed=seed)
    states = [observation["observation.state"]]
    while not info["success"] and len(states) <= 150:
        observation, *_, info = env.step(expert.act(observation))
        states.append(observation["observation.state"])
    return np.array(states), info["success"]


def test_gymnasium_accepts_the_environment(env):
    check_env(env, skip_render_check=True)


def test_registered_with_an_episode_limit():
    with_limit = gymnasium.make(ENV_ID)
    assert with_limit.spec.max_episode_steps == 150
    with_limit.close()


def test_same_seed_same_episode(env):
    first, _ = play(env, 7)
    again, _ = play(env, 7)
    other, _ = play(env, 8)
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(first[0], other[0])


def test_no_start_is_a_success_or_in_contact(env):
    for seed in range(200):
        observation, info = env.reset(seed=seed)
        pusher, puck, goal = observation["observation.state"].reshape(3, 2)
        assert not info["success"]
        assert np.linalg.norm(goal - puck) > 2 * env.geometry.tolerance
        assert np.linalg.norm(pusher - puck) > env.geometry.contact_distance
    assert info["progress"] == 0


def test_starts_from_a_given_state(env):
    state = np.array([-0.2, 0.1, 0.05, -0.1, 0.0, 0.2], dtype=np.float32)
    first, info = env.reset(seed=0, options={"state": state})
    again, _ = env.reset(seed=0, options={"state": first["observation.state"]})
    np.testing.assert_array_equal(first["observation.state"], state)
    np.testing.assert_array_equal(again["observation.state"], state)
    assert info["progress"] == 0
    random_start, _ = env.reset(seed=0)  # the option holds for one episode
    assert not np.allclose(random_start["observation.state"], state)


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ([0.4, 0, 0, 0, 0, 0.1], "within"),
        ([0.1, 0, 0, 0], "six positions"),
        ([np.nan, 0, 0, 0, 0, 0.1], "within"),
        ([0.06, 0, 0, 0, 0, 0.1], "overlaps"),
    ],
)
def test_impossible_starts_are_refused(env, state, message):
    with pytest.raises(ValueError, match=message):
        env.reset(seed=0, options={"state": state})


def test_success_needs_the_puck_inside_the_ring_for_some_steps(env):
    env.reset(seed=0)
    stay = env._pusher.astype(np.float32)
    goal = np.array([0.05, 0.0]) if stay[0] < 0 else np.array([-0.05, 0.0])
    env.data.mocap_pos[0, :2] = goal
    env.data.joint("puck").qpos[:2] = goal + [env.geometry.tolerance + 0.002, 0]
    for _ in range(10):
        *_, terminated, _, info = env.step(stay)
        assert not terminated and not info["success"] and info["progress"] < 1
    env.data.joint("puck").qpos[:2] = goal + [env.geometry.tolerance - 0.002, 0]
    outcomes = [env.step(stay)[1:3] for _ in range(env.config.dwell_steps)]
    assert [terminated for _, terminated in outcomes] == [False] * (env.config.dwell_steps - 1) + [True]
    assert outcomes[-1][0] == 1.0


def test_reward_is_the_progress_towards_the_goal(env):
    env.reset(seed=3)
    start, goal = env._puck.copy(), env._goal.copy()
    env.data.joint("puck").qpos[:2] = start + 0.25 * (goal - start)
    _, reward, _, _, info = env.step(env._pusher)
    assert reward == info["progress"] == pytest.approx(0.25, abs=0.02)


def test_commanded_speed_is_limited(env):
    env.reset(seed=0)
    far_corner = -np.sign(env._pusher) * 0.29
    path = [env._pusher.copy()]
    for _ in range(8):
        env.step(far_corner)
        path.append(env._pusher.copy())
    speed = np.linalg.norm(np.diff(path, axis=0), axis=1) * 10
    assert speed.max() < 1.1 * env.config.max_speed
    assert speed[4] > 0.8 * env.config.max_speed


def test_pushing_takes_contact_and_the_puck_stops_when_the_pusher_stops(env):
    env.reset(seed=0)
    env.data.qpos[[1, 0]] = [-0.2, 0.0]
    env._setpoint = np.array([-0.2, 0.0])
    env.data.joint("puck").qpos[:2] = [-0.1, 0.0]
    env.data.mocap_pos[0, :2] = [0.25, 0.25]
    for x in np.arange(-0.2, 0.0, 0.01):
        env.step(np.array([x, 0.0]))
    touching = env._puck[0] - env._pusher[0]
    assert touching == pytest.approx(env.geometry.contact_distance, abs=0.003)
    for _ in range(10):
        env.step(np.array([-0.01, 0.0]))
    at_rest = env._puck.copy()
    env.step(np.array([-0.1, 0.0]))
    np.testing.assert_allclose(env._puck, at_rest, atol=1e-4)


@pytest.mark.parametrize("action", [[np.nan, 0.0], [0.0, 0.0, 0.0]])
def test_impossible_actions_are_refused(env, action):
    env.reset(seed=0)
    with pytest.raises(ValueError, match="finite"):
        env.step(np.array(action))


def test_configuration_sets_the_start_ranges():
    env = PushPuckEnv(config=replace(PushPuckConfig(), goal_range=0.0))
    goals = [env.reset(seed=seed)[0]["observation.state"][4:] for seed in range(5)]
    np.testing.assert_array_equal(goals, np.zeros((5, 2)))


def test_expert_succeeds(env):
    outcomes = [play(env, seed) for seed in range(20)]
    assert all(success for _, success in outcomes)
    assert np.mean([len(states) for states, _ in outcomes]) < 70


def test_expert_goes_around_without_touching_the_puck(env):
    env.reset(seed=0)
    expert = env.make_expert(0)
    # The pusher starts between puck and goal, so it has to go around.
    env.data.mocap_pos[0, :2] = [0.1, 0.0]
    env.data.joint("puck").qpos[:2] = [-0.1, 0.0]
    env.data.qpos[[1, 0]] = env._setpoint = np.array([0.0, 0.01])
    observation = env._observation()
    gaps = []
    while observation["observation.state"][0] > -0.16:
        observation, *_ = env.step(expert.act(observation))
        gaps.append(np.linalg.norm(env._pusher - env._puck) - env.geometry.contact_distance)
        assert len(gaps) < 60
    assert min(gaps) > 0.01


def test_expert_goes_around_on_both_sides_when_both_are_as_short():
    observation = {"observation.state": np.array([0.1, 0.0, 0.0, 0.0, 0.2, 0.0])}
    sideways = {np.sign(PushPuckExpert(GEOMETRY, seed=seed).act(observation)[1]) for seed in range(20)}
    assert sideways == {-1, 1}


@pytest.mark.parametrize("offset", [-0.01, 0.01])
def test_expert_corrects_drift_while_pushing(offset):
    observation = {"observation.state": np.array([-0.068, offset, 0.0, 0.0, 0.2, 0.0])}
    target = PushPuckExpert(GEOMETRY, seed=0).act(observation)
    assert target[0] > -0.068
    assert abs(target[1]) < abs(offset)
