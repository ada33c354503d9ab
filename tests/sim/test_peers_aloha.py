"""gym-aloha's tasks behind our interface: its starts, physics and reward, without its images."""

from __future__ import annotations

import gymnasium
import numpy as np
import pytest

import robopolicy_sim  # noqa: F401  (selects OpenGL's backend before MuJoCo is imported)
from robopolicy.data.record import record_demonstrations
from robopolicy.errors import UserError

gym_aloha = pytest.importorskip("gym_aloha", reason="gym-aloha is not installed")

from robopolicy_sim.peers.aloha import AlohaEnv  # noqa: E402


@pytest.mark.parametrize("task", ["insertion", "transfer-cube"])
def test_starts_and_physics_are_those_of_gym_aloha(task):
    env = AlohaEnv(task)
    original = gymnasium.make(f"gym_aloha/Aloha{task.title().replace('-', '')}-v0", disable_env_checker=True).unwrapped
    simulation = original._env
    simulation.physics.render = lambda **size: np.zeros((1, 1, 3), np.uint8)  # images cost seconds here
    observation, _ = env.reset(seed=4)
    original.reset(seed=4)
    rng = np.random.default_rng(0)
    for _ in range(5):
        np.testing.assert_array_equal(env.data.qpos, simulation.physics.data.qpos)
        expected = simulation.task.get_qpos(simulation.physics).astype(np.float32)
        np.testing.assert_array_equal(observation["observation.state"], expected)
        action = np.clip(rng.normal(expected, 0.2), env.action_space.low, env.action_space.high)
        observation, reward, *_ = env.step(action)
        _, their_reward, *_ = original.step(action)
        assert reward == their_reward / 4


def test_poses_are_xyz_and_quaternion_xyzw():
    env = AlohaEnv("insertion")
    poses = env.reset(seed=0)[0]["observation.environment_state"].reshape(2, 7)
    np.testing.assert_array_equal(poses[:, 3:], [[0, 0, 0, 1], [0, 0, 0, 1]])
    assert poses[0, 0] > 0 > poses[1, 0]  # the peg lies on the right


def test_a_seed_is_one_episode_and_another_seed_another():
    env = AlohaEnv("transfer-cube")
    first = env.reset(seed=1)[0]["observation.environment_state"]
    other = env.reset(seed=2)[0]["observation.environment_state"]
    np.testing.assert_array_equal(first, env.reset(seed=1)[0]["observation.environment_state"])
    assert not np.array_equal(first, other)


def test_reached_stages_stay_reached():
    env = AlohaEnv("transfer-cube")
    observation, info = env.reset(seed=0)
    assert not any(info["stages"].values())
    cube = env.data.joint("red_box_joint").qpos
    on_table = cube[:3].copy()
    cube[:3] = env.data.geom("vx300s_right/10_right_gripper_finger").xpos
    _, reward, *_, info = env.step(observation["observation.state"])
    assert info["stages"]["touched"] and not info["success"] and reward >= 0.25
    cube[:3] = on_table
    for _ in range(5):
        _, reward, *_, info = env.step(observation["observation.state"])
    assert reward == 0 and info["stages"]["touched"]


def test_the_action_moves_the_joints_to_absolute_targets():
    env = AlohaEnv("transfer-cube")
    target = env.reset(seed=0)[0]["observation.state"].copy()
    target[0], target[7] = 0.3, -0.2
    for _ in range(60):
        observation, *_ = env.step(target)
    np.testing.assert_allclose(observation["observation.state"][[0, 7]], [0.3, -0.2], atol=0.02)


def test_recording_says_that_there_is_no_expert(tmp_path):
    with pytest.raises(UserError, match="no scripted expert"):
        record_demonstrations("robopolicy_sim/AlohaInsertion-v0", tmp_path / "d.zarr", episodes=1, progress=False)
