"""Meta-World's tasks behind our interface: its physics and starts, our observations, its experts."""

from __future__ import annotations

import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env

import robopolicy_sim  # noqa: F401  (selects OpenGL's backend before MuJoCo is imported)
from robopolicy.data.record import record_demonstrations
from robopolicy.data.store import EpisodeStore
from robopolicy.evaluation.environments import environment
from robopolicy.spec import PolicySpec
from robopolicy_sim.peers.catalogue import METAWORLD_MT10_TASKS, METAWORLD_TASKS

tasks = pytest.importorskip("metaworld.env_dict", reason="Meta-World is not installed")

from robopolicy_sim.peers.metaworld import UPSIDE_DOWN, MetaworldEnv  # noqa: E402


def play(env: MetaworldEnv, seed: int, steps: int = 500) -> tuple[np.ndarray, bool]:
    """Observed vectors of one episode of the expert, (T + 1, 21), and its success."""
    expert = env.make_expert(seed)
    observation, info = env.reset(seed=seed)
    rows = [np.concatenate(list(observation.values()))]
    while not info["success"] and len(rows) <= steps:
        observation, *_, info = env.step(expert.act(observation))
        rows.append(np.concatenate(list(observation.values())))
    return np.array(rows), info["success"]


def test_every_task_opens_and_its_expert_acts():
    starts = {}
    for task in METAWORLD_TASKS:
        env = MetaworldEnv(task)
        expert = env.make_expert(0)
        observation, info = env.reset(seed=1)
        assert env.observation_space.contains(observation) and not info["success"]
        assert env.action_space.contains(expert.act(observation))
        _, reward, *_ = env.step(expert.act(observation))
        assert 0 <= reward <= 1
        starts[task] = np.concatenate(list(observation.values()))
        assert not np.array_equal(starts[task], np.concatenate(list(env.reset(seed=2)[0].values())))


@pytest.mark.filterwarnings("ignore:.*Box observation space:UserWarning")
def test_gymnasium_accepts_the_environment():
    check_env(MetaworldEnv("pick-place"), skip_render_check=True)


@pytest.mark.parametrize("task", ["drawer-open", "pick-place", "reach"])
def test_a_seed_is_one_episode_whatever_was_played_before(task):
    env = MetaworldEnv(task)
    first, _ = play(env, 7, steps=20)
    play(env, 8, steps=30)
    again, _ = play(env, 7, steps=20)
    elsewhere, _ = play(MetaworldEnv(task), 7, steps=20)
    np.testing.assert_array_equal(first, again)
    np.testing.assert_array_equal(first, elsewhere)


def test_starts_spread_over_the_ranges_of_metaworld():
    env = MetaworldEnv("reach")
    goals = np.array([env.reset(seed=seed)[0]["observation.environment_state"][14:] for seed in range(40)])
    low, high = np.array([-0.1, 0.8, 0.05]), np.array([0.1, 0.9, 0.3])
    assert (goals >= low - 1e-6).all() and (goals <= high + 1e-6).all()
    np.testing.assert_allclose(np.ptp(goals, axis=0), high - low, rtol=0.25)


def test_physics_rewards_and_success_are_those_of_metaworld():
    env = MetaworldEnv("push")
    original = tasks.ALL_V3_ENVIRONMENTS["push-v3"]()
    original._partially_observable, original._set_task_called = False, True
    del original.sawyer_observation_space
    original._freeze_rand_vec, original.seeded_rand_vec = False, True
    original.seed(5)
    observation, _ = env.reset(seed=5)
    expected, _ = original.reset()
    expert = env.make_expert(5)
    for _ in range(150):
        np.testing.assert_array_equal(observation["observation.state"], expected[:4].astype(np.float32))
        vector = observation["observation.environment_state"]
        np.testing.assert_array_equal(vector, np.concatenate([expected[4:18], expected[-3:]]).astype(np.float32))
        action = expert.act(observation)
        observation, reward, terminated, _, info = env.step(action)
        expected, their_reward, _, _, their_info = original.step(action)
        assert terminated == info["success"] == bool(their_info["success"])
        assert reward == (1.0 if terminated else pytest.approx(their_reward / 10))
        if terminated:
            break
    assert terminated


def test_experts_solve_mt10():
    outcomes = []
    for task in METAWORLD_MT10_TASKS:
        env = MetaworldEnv(task)
        outcomes += [play(env, seed)[1] for seed in range(2)]
    assert sum(outcomes) >= 18


def test_the_expert_has_one_quality():
    with pytest.raises(ValueError, match="'good' only"):
        MetaworldEnv("reach").make_expert(0, quality="sloppy")


def test_images_are_upright():
    env = MetaworldEnv("reach", cameras=("scene", "front", "wrist"), image_size=48)
    observation, _ = env.reset(seed=0)
    for camera in ("scene", "front", "wrist"):
        image = observation[f"observation.image.{camera}"]
        assert image.shape == (48, 48, 3) and image.std() > 10
    for camera in UPSIDE_DOWN:
        up = env.data.camera(camera).xmat.reshape(3, 3)[:, 1]
        assert up[2] > 0.3
    env.close()


def test_an_unknown_camera_is_named():
    with pytest.raises(ValueError, match="no camera 'corner9'; there are scene, front, wrist"):
        MetaworldEnv("reach", cameras=("corner9",))


def test_demonstrations_are_recorded_with_the_instruction(tmp_path):
    env_id = "robopolicy_sim/MetaworldButtonPressTopdown-v0"
    report = record_demonstrations(env_id, tmp_path / "d.zarr", episodes=2, progress=False)
    assert report.succeeded == 2
    with EpisodeStore.open(tmp_path / "d.zarr") as store:
        assert store.fps == 80
        assert set(store.tasks) == {"button press topdown"}
        assert set(store.behaviours) == {"good:scripted"}


def test_policies_are_evaluated_in_it():
    world = environment("metaworld_reach")
    assert world.fps == 80 and world.max_steps == 500 and "metaworld" in world.packages
    assert {"observation.environment_state", "observation.image.scene", "observation.image.wrist"} < set(world.keys)
    spec = PolicySpec((world.keys["observation.image.scene"],), world.action, fps=80)
    env = world.make(spec)
    observation, _ = env.reset(seed=0)
    assert observation["observation.image.scene"].shape == (96, 96, 3)
    env.close()
