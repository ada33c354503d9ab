"""The task PegInsert and its scripted expert."""

from __future__ import annotations

import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env

pytest.importorskip("robopolicy_sim")

from robopolicy_sim.control import CONTROLS, ToolTarget
from robopolicy_sim.envs.peg_insert import CLEARANCE, PegInsertEnv
from robopolicy_sim.experts.peg_insert import PegInsertExpert


@pytest.fixture(scope="module")
def env():
    env = PegInsertEnv()
    yield env
    env.close()


def play(env: PegInsertEnv, seed: int, steps: int = 350, **expert) -> tuple[list[dict], PegInsertExpert]:
    """What ``info`` says at each step of an expert's episode, and the expert."""
    observation, info = env.reset(seed=seed)
    expert = env.make_expert(seed, **expert)
    infos = [info]
    while not infos[-1]["success"] and len(infos) <= steps:
        observation, *_, info = env.step(expert.act(observation))
        infos.append(info)
    return infos, expert


def drop_peg(env: PegInsertEnv, *, yaw: float = 0.0, offset: float = 0.0, height: float = 0.005) -> dict:
    """Let the peg fall from above the hole, turned and shifted against it, and wait while the arm stays away."""
    env.reset(seed=0)
    yaw += env.yaw("socket")
    shift = env.rotation("socket") @ [offset, 0, 0]
    env.place("peg", env.peg_above(height) + shift, yaw)
    action = stay(env)
    for _ in range(30):
        *_, info = env.step(action)
    return info


def stay(env: PegInsertEnv) -> np.ndarray:
    """The action that keeps the open gripper where it is."""
    state = env.tool_state()
    return env.encode(ToolTarget(state.position, state.rotation, 1.0))


def test_gymnasium_accepts_the_environment(env):
    check_env(env, skip_render_check=True)


def test_same_seed_same_start(env):
    starts = [env.reset(seed=seed)[0]["observation.environment_state"] for seed in (3, 3, 4)]
    np.testing.assert_array_equal(starts[0], starts[1])
    assert not np.array_equal(starts[0], starts[2])


def test_start_from_an_observed_state(env):
    wanted = env.reset(seed=5)[0]["observation.environment_state"]
    found, info = env.reset(seed=6, options={"environment_state": wanted})
    np.testing.assert_allclose(found["observation.environment_state"], wanted, atol=1e-6)
    assert not info["success"]


@pytest.mark.parametrize("quarter_turns", range(4))
def test_peg_fits_four_ways_round(env, quarter_turns):
    info = drop_peg(env, yaw=quarter_turns * np.pi / 2)
    assert info["success"] and info["progress"] == 1


@pytest.mark.parametrize(("yaw", "offset"), [(np.pi / 4, 0.0), (0.35, 0.0), (0.0, 2 * CLEARANCE)])
def test_turned_or_shifted_peg_stays_outside(env, yaw, offset):
    info = drop_peg(env, yaw=yaw, offset=offset, height=0.001)
    assert not info["success"] and not info["stages"]["inserted"]


def test_clearance_on_each_side(env):
    assert drop_peg(env, offset=0.8 * CLEARANCE)["success"]


def test_success_needs_some_steps_in_the_hole(env):
    env.reset(seed=0)
    env.place("peg", env.peg_above(-0.95 * env.depth), env.yaw("socket"))
    action = stay(env)
    outcomes = [env.step(action)[-1]["success"] for _ in range(5)]
    assert outcomes == [False] * 4 + [True]


@pytest.mark.parametrize("mode", PegInsertExpert.modes(None))
def test_expert_succeeds_in_every_mode(env, mode):
    for seed in (0, 1):
        infos, _ = play(env, seed, mode=mode)
        assert infos[-1]["success"] and infos[-1]["stages"] == {"grasped": True, "above": True, "inserted": True}


def test_modes_end_in_different_ways_round(env):
    ways = set()
    for mode in PegInsertExpert.modes(env):
        play(env, 2, mode=mode)
        ways.add(round((env.yaw("peg") - env.yaw("socket")) / (np.pi / 2)) % 4)
    assert len(ways) >= 3


def test_the_seed_chooses_among_the_modes(env):
    env.reset(seed=0)
    assert {env.make_expert(seed).mode for seed in range(30)} == set(PegInsertExpert.modes(env))


def test_progress_grows_along_an_episode(env):
    progress = np.array([info["progress"] for info in play(env, 0)[0]])
    assert progress[0] < 0.2 and progress[-1] == 1
    assert np.diff(progress).min() > -0.05


def test_recovering_expert_first_misses_the_hole(env):
    infos, _ = play(env, 1, quality="recovering")
    straight, _ = play(env, 1)
    assert infos[-1]["success"] and len(infos) > len(straight) + 10


def test_failing_expert_never_gets_it_in(env):
    infos, _ = play(env, 1, steps=200, quality="failing")
    assert not any(info["stages"]["inserted"] for info in infos)
    assert infos[-1]["stages"]["grasped"]


@pytest.mark.parametrize("control", CONTROLS[1:])
def test_expert_speaks_every_control(control):
    env = PegInsertEnv(control=control)
    assert play(env, 0)[0][-1]["success"]


@pytest.mark.parametrize("arm", ["ur5e", "so101"])
def test_other_arms(arm):
    env = PegInsertEnv(arm=arm)
    assert play(env, 0)[0][-1]["success"]
