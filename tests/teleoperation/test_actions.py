"""A twist moves the tool of the simulated arms the way it says, whatever the environment's actions are."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import gymnasium
import numpy as np
import pytest
from numpy.testing import assert_allclose
from scipy.spatial.transform import Rotation

from robopolicy.errors import UserError
from robopolicy.teleoperation.actions import LEASH, action_adapter
from robopolicy.teleoperation.command import Command
from robopolicy.teleoperation.live import make_playable, view_heading


def drive(env: Any, twist: np.ndarray, steps: int, opening: float = 1.0) -> tuple[np.ndarray, np.ndarray]:
    """The observed states before and after; then the arm gets a second to come to rest."""
    adapter = action_adapter(env)
    observation, _ = env.reset(seed=0)
    adapter.reset(observation)
    first = observation["observation.state"]
    for step in range(steps + round(env.metadata["render_fps"])):
        command = Command(twist if step < steps else np.zeros(6), opening)
        action = adapter.action(command, observation)
        assert env.action_space.contains(action)
        observation, *_ = env.step(action)
    return first, observation["observation.state"]


def pose(state: np.ndarray) -> tuple[np.ndarray, Rotation]:
    columns = state[-6:].reshape(2, 3)
    return state[-9:-6], Rotation.from_matrix(np.stack([*columns, np.cross(*columns)], axis=1))


@pytest.mark.parametrize("control", ["ee_pose", "ee_delta_target"])
def test_the_arms_tool_follows_the_twist(control: str) -> None:
    env = make_playable("robopolicy_sim/Lift-v0", time_limit=60, cameras=(), control=control)
    before, after = drive(env, np.array([-0.06, 0.08, -0.04, 0, 0, 0.5]), steps=20, opening=0.0)  # one second
    (start, start_rotation), (end, end_rotation) = pose(before), pose(after)
    assert_allclose(end - start, [-0.06, 0.08, -0.04], atol=0.008)
    assert_allclose((end_rotation * start_rotation.inv()).as_rotvec(), [0, 0, 0.5], atol=0.05)
    opening = env.unwrapped.metadata["names"]["observation.state"].index("opening")
    assert before[opening] > 0.9 and after[opening] < 0.1
    env.close()


def test_the_pusher_follows_the_twist_and_stops_at_the_bounds(push_puck: Any) -> None:
    before, after = drive(push_puck, np.array([0.05, 0.1, 0, 0, 0, 0]), steps=10)
    assert_allclose(after[:2] - before[:2], [0.05, 0.1], atol=0.01)


def test_a_blocked_target_does_not_run_away(push_puck: Any) -> None:
    """So that the tool turns back at once, however long the operator has pushed against a wall."""
    adapter = action_adapter(push_puck)
    observation, _ = push_puck.reset(seed=0)
    adapter.reset(observation)
    for _ in range(100):  # the tool is held in place
        action = adapter.action(Command(np.array([0.15, 0, 0, 0, 0, 0])), observation)
    assert_allclose(action - observation["observation.state"][:2], [LEASH, 0], atol=1e-6)


def test_away_is_where_the_camera_looks(push_puck: Any) -> None:
    push_puck.reset(seed=0)
    heading = view_heading(push_puck)
    camera = push_puck.unwrapped.data.camera("scene")
    looks = -camera.xmat.reshape(3, 3)[:2, 2]
    assert_allclose([np.cos(heading), np.sin(heading)], looks / np.linalg.norm(looks), atol=1e-6)


def test_environments_without_a_camera_of_that_name_have_no_heading() -> None:
    assert view_heading(SimpleNamespace(unwrapped=SimpleNamespace())) == 0.0


def test_actions_that_a_person_cannot_steer_are_refused() -> None:
    env = make_playable("robopolicy_sim/Lift-v0", time_limit=60, cameras=(), control="joint_position")
    with pytest.raises(UserError, match="cannot steer actions with the entries .*opening.*ee_delta_target.*ee_pose"):
        action_adapter(env)
    env.close()
    with pytest.raises(UserError, match="without names"):
        action_adapter(gymnasium.make("Pendulum-v1"))
