"""The tasks DrawerOpen and DrawerClose and their scripted experts."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env

pytest.importorskip("robopolicy_sim")

from robopolicy_sim.control import CONTROLS, ToolTarget
from robopolicy_sim.envs.drawer import CLOSED, DrawerCloseEnv, DrawerEnv, DrawerOpenEnv
from robopolicy_sim.experts.drawer import DrawerCloseExpert, DrawerOpenExpert

TASKS = {"open": DrawerOpenEnv, "close": DrawerCloseEnv}
MODES = [("open", mode) for mode in DrawerOpenExpert.modes(None)] + [
    ("close", mode) for mode in DrawerCloseExpert.modes(None)
]


@pytest.fixture(scope="module")
def envs():
    envs = {verb: task() for verb, task in TASKS.items()}
    yield envs
    for env in envs.values():
        env.close()


def play(env: DrawerEnv, seed: int, steps: int = 200, **expert: Any) -> list[dict]:
    """What ``info`` says at each step of an expert's episode."""
    observation, info = env.reset(seed=seed)
    expert = env.make_expert(seed, **expert)
    infos = [info]
    while not infos[-1]["success"] and len(infos) <= steps:
        observation, *_, info = env.step(expert.act(observation))
        infos.append(info)
    return infos


def step_with(env: DrawerEnv, **out: float) -> dict:
    """One step of a still arm, with drawers put where they are wanted, in metres."""
    for side, position in out.items():
        env.data.joint(f"{side}_drawer").qpos[0] = position
    state = env.tool_state()
    return env.step(env.encode(ToolTarget(state.position, state.rotation, 1.0)))[-1]


@pytest.mark.parametrize("verb", TASKS)
def test_gymnasium_accepts_the_environment(envs, verb):
    check_env(envs[verb], skip_render_check=True)


@pytest.mark.parametrize("verb", TASKS)
def test_same_seed_same_start(envs, verb):
    starts = [envs[verb].reset(seed=seed)[0]["observation.environment_state"] for seed in (3, 3, 4)]
    np.testing.assert_array_equal(starts[0], starts[1])
    assert not np.array_equal(starts[0], starts[2])


@pytest.mark.parametrize("verb", TASKS)
def test_instruction_and_state_name_the_same_drawer(envs, verb):
    env, instructions = envs[verb], set()
    for seed in range(10):
        state = env.reset(seed=seed)[0]["observation.environment_state"]
        side = ("left", "right")[int(np.argmax(state[-2:]))]
        assert env.instruction == f"{verb} the {side} drawer"
        instructions.add(env.instruction)
    assert len(instructions) == 2


@pytest.mark.parametrize("verb", TASKS)
def test_start_from_an_observed_state(envs, verb):
    env = envs[verb]
    wanted = env.reset(seed=5)[0]["observation.environment_state"]
    for seed in range(6, 10):
        found, info = env.reset(seed=seed, options={"environment_state": wanted})
        np.testing.assert_allclose(found["observation.environment_state"], wanted, atol=1e-6)
        assert not info["success"]


def test_open_at_twelve_centimetres_for_three_steps(envs):
    env = envs["open"]
    env.reset(seed=0)
    assert not step_with(env, **{env.wanted: 0.118})["stages"]["done"]
    outcomes = [step_with(env, **{env.wanted: 0.122})["success"] for _ in range(3)]
    assert outcomes == [False, False, True]


def test_closed_below_one_centimetre(envs):
    env = envs["close"]
    env.reset(seed=0)
    assert not step_with(env, **{env.wanted: CLOSED + 0.001})["stages"]["done"]
    outcomes = [step_with(env, **{env.wanted: CLOSED - 0.001})["success"] for _ in range(3)]
    assert outcomes == [False, False, True]


@pytest.mark.parametrize("verb", TASKS)
def test_moving_the_other_drawer_fails_the_episode(envs, verb):
    env = envs[verb]
    env.reset(seed=0)
    done = 0.125 if verb == "open" else 0.0
    moved = abs(env.pulled_out(env.other) - 0.04)
    infos = [step_with(env, **{env.other: moved, env.wanted: done}) for _ in range(5)]
    assert infos[-1]["stages"]["moved_the_other"] and not infos[-1]["success"]
    assert infos[-1]["progress"] == 0


@pytest.mark.parametrize("verb", TASKS)
def test_drawer_stays_where_it_is_left(envs, verb):
    env = envs[verb]
    env.reset(seed=0)
    step_with(env, left=0.07)
    for _ in range(20):
        step_with(env)
    assert env.pulled_out("left") == pytest.approx(0.07, abs=1e-3)


@pytest.mark.parametrize(("verb", "mode"), MODES)
def test_expert_succeeds_in_every_mode_and_on_both_drawers(envs, verb, mode):
    env, wanted = envs[verb], set()
    for seed in range(4):
        infos = play(env, seed, mode=mode)
        assert infos[-1]["success"] and not infos[-1]["stages"]["moved_the_other"]
        wanted.add(env.wanted)
    assert wanted == {"left", "right"}


def test_hook_does_not_close_on_the_handle(envs):
    env = envs["open"]
    observation, info = env.reset(seed=0)
    expert = env.make_expert(0, mode="hook")
    openings = []
    while not info["success"]:
        observation, *_, info = env.step(expert.act(observation))
        openings.append(env.opening())
    assert max(openings[-10:]) < 0.03


@pytest.mark.parametrize("verb", TASKS)
def test_progress_grows_along_an_episode(envs, verb):
    progress = np.array([info["progress"] for info in play(envs[verb], 0)])
    assert progress[0] < 0.1 and progress[-1] == 1
    assert np.diff(progress).min() > -0.05


@pytest.mark.parametrize("verb", TASKS)
def test_recovering_expert_makes_a_mistake_first(envs, verb):
    infos, straight = play(envs[verb], 1, quality="recovering"), play(envs[verb], 1)
    assert infos[-1]["success"] and len(infos) > len(straight) + 10


@pytest.mark.parametrize("verb", TASKS)
def test_failing_expert_fails(envs, verb):
    assert not any(info["stages"]["done"] for info in play(envs[verb], 1, quality="failing"))


@pytest.mark.parametrize("control", CONTROLS[1:])
@pytest.mark.parametrize("verb", TASKS)
def test_expert_speaks_every_control(verb, control):
    assert play(TASKS[verb](control=control), 0)[-1]["success"]


@pytest.mark.parametrize("arm", ["ur5e", "so101"])
@pytest.mark.parametrize("verb", TASKS)
def test_other_arms(verb, arm):
    assert play(TASKS[verb](arm=arm), 0)[-1]["success"]
