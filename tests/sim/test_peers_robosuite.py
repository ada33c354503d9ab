"""robosuite's tasks behind our interface."""

from __future__ import annotations

import numpy as np
import pytest

import robopolicy_sim  # noqa: F401  (selects OpenGL's backend before MuJoCo is imported)
from robopolicy.data.record import record_demonstrations
from robopolicy.errors import UserError

pytest.importorskip("robosuite", reason="robosuite is not installed")

from robopolicy_sim.peers.robosuite import RobosuiteEnv  # noqa: E402


@pytest.fixture(scope="module")
def lift():
    return RobosuiteEnv("Lift")


def test_observations_fit_their_description(lift):
    observation, info = lift.reset(seed=0)
    assert lift.observation_space.contains(observation)
    assert not info["success"] and 0 <= info["progress"] < 0.5
    assert lift.metadata["names"]["observation.environment_state"][:3] == ("cube_pos_0", "cube_pos_1", "cube_pos_2")


def test_a_seed_is_one_episode_and_another_seed_another(lift):
    def start(seed: int) -> np.ndarray:
        return np.concatenate(list(lift.reset(seed=seed)[0].values()))

    first = start(3)
    for _ in range(3):
        lift.step(lift.action_space.sample())
    assert not np.array_equal(first, start(4))
    np.testing.assert_array_equal(first, start(3))


def test_the_tool_pose_is_in_the_frame_of_the_base(lift):
    observation, _ = lift.reset(seed=0)
    position, rotation = lift._base
    tool = position + rotation @ observation["observation.state"][8:11]
    np.testing.assert_allclose(tool, lift._observed["robot0_eef_pos"], atol=1e-6)
    columns = observation["observation.state"][11:].reshape(2, 3)
    np.testing.assert_allclose(columns @ columns.T, np.eye(2), atol=1e-6)


def test_the_gripper_opens_and_closes(lift):
    lift.reset(seed=0)
    openings = []
    for grip in (-1, 1):
        for _ in range(12):
            observation, *_ = lift.step(np.array([0, 0, 0, 0, 0, 0, grip]))
        openings.append(observation["observation.state"][7])
    assert openings[0] > 0.9 and openings[1] < 0.1


def test_progress_is_robosuites_reward_and_success_ends_the_episode(lift):
    lift.reset(seed=0)
    hold = np.zeros(7)
    _, reward, terminated, _, info = lift.step(hold)
    assert reward == info["progress"] == pytest.approx(lift._suite.reward()) and not terminated
    lift.data.joint("cube_joint0").qpos[2] += 0.3
    _, reward, terminated, _, info = lift.step(hold)
    assert reward == 1.0 and terminated and info["success"]


def test_collision_shapes_are_not_drawn(lift):
    assert not (lift.model.geom_group == 0).any()


def test_recording_says_that_there_is_no_expert(tmp_path):
    with pytest.raises(UserError, match="no scripted expert"):
        record_demonstrations("robopolicy_sim/RobosuiteLift-v0", tmp_path / "d.zarr", episodes=1, progress=False)
