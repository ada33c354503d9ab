"""The task Buttons and its scripted expert."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env

pytest.importorskip("robopolicy_sim")

from robopolicy_sim.control import CONTROLS, ToolTarget
from robopolicy_sim.envs.buttons import COLOURS, LAMP_OFF, LAMP_ON, TRAVEL, ButtonsEnv, Wish


@pytest.fixture(scope="module")
def env():
    env = ButtonsEnv()
    yield env
    env.close()


def play(env: ButtonsEnv, seed: int, steps: int = 250, **expert: Any) -> list[dict]:
    """What ``info`` says at each step of an expert's episode."""
    observation, info = env.reset(seed=seed)
    expert = env.make_expert(seed, **expert)
    infos = [info]
    while not infos[-1]["success"] and len(infos) <= steps:
        observation, *_, info = env.step(expert.act(observation))
        infos.append(info)
    return infos


def start(env: ButtonsEnv, *colours: str, ordered: bool = False) -> None:
    """Begin an episode with this wish."""
    state = env.reset(seed=0)[0]["observation.environment_state"]
    names = list(COLOURS)
    choices = [[name == colour for name in names] for colour in (*colours, "")[:2]]
    state[9:] = [*choices[0], *choices[1], ordered, 0, 0, 0]
    env.reset(seed=0, options={"environment_state": state})


def press(env: ButtonsEnv, colour: str, share: float = 1.0, steps: int = 10) -> dict:
    """Push a button down to a share of its travel, let it go, and wait while the arm stays away."""
    tool = env.tool_state()
    action = env.encode(ToolTarget(tool.position, tool.rotation, 1.0))
    joint = env.model.joint(f"{colour}_button")
    dof = joint.dofadr[0]
    env.data.qpos[joint.qposadr[0]] = share * TRAVEL
    # Held there for one step against the force of the spring.
    env.data.qfrc_applied[dof] = joint.stiffness[0] * (share * TRAVEL - env.model.qpos_spring[joint.qposadr[0]])
    *_, info = env.step(action)
    env.data.qfrc_applied[dof] = 0
    for _ in range(steps):
        *_, info = env.step(action)
    return info


def test_gymnasium_accepts_the_environment(env):
    check_env(env, skip_render_check=True)


def test_same_seed_same_start(env):
    starts = [env.reset(seed=seed)[0]["observation.environment_state"] for seed in (3, 3, 4)]
    np.testing.assert_array_equal(starts[0], starts[1])
    assert not np.array_equal(starts[0], starts[2])


@pytest.mark.parametrize(
    ("wish", "instruction"),
    [
        (Wish(("red",), False), "press the red button"),
        (Wish(("red", "blue"), True), "press the red button, then the blue one"),
        (Wish(("green", "red"), False), "press the green and the red button"),
    ],
)
def test_instructions(wish, instruction):
    assert wish.instruction == instruction


def test_all_kinds_of_instruction_occur_and_the_state_tells_them(env):
    kinds = set()
    for seed in range(30):
        state = env.reset(seed=seed)[0]["observation.environment_state"]
        instruction = env.instruction
        assert not env.reset(seed=99, options={"environment_state": state})[1]["success"]
        assert env.instruction == instruction
        kinds.add((len(env.wish.colours), env.wish.ordered))
    assert kinds == {(1, False), (2, False), (2, True)}


def test_button_springs_back(env):
    start(env, "red")
    press(env, "green", share=0.5, steps=0)
    assert env.pressed("green") == pytest.approx(0.5, abs=0.05)
    press(env, "green", share=0.5)
    assert env.pressed("green") < 0.02


def test_half_a_press_does_not_count(env):
    start(env, "red")
    assert press(env, "red", share=0.7)["success"] is False
    assert press(env, "red", share=0.9)["success"] is True


def test_lamp_stays_lit(env):
    start(env, "red", "blue")
    lamp = env.model.geom("red_lamp")
    np.testing.assert_allclose(lamp.rgba, LAMP_OFF)
    press(env, "red")
    np.testing.assert_allclose(lamp.rgba, LAMP_ON)
    start(env, "red", "blue")
    np.testing.assert_allclose(lamp.rgba, LAMP_OFF)


@pytest.mark.parametrize("order", [("red", "blue"), ("blue", "red")])
def test_free_order(env, order):
    start(env, "red", "blue")
    first = press(env, order[0])
    assert not first["success"] and 0.5 <= first["progress"] < 1
    assert press(env, order[1])["success"]


def test_given_order(env):
    start(env, "red", "blue", ordered=True)
    press(env, "red")
    assert press(env, "blue")["success"]
    start(env, "red", "blue", ordered=True)
    press(env, "blue")
    info = press(env, "red")
    assert not info["success"] and info["stages"]["pressed_another"] and info["progress"] == 0


def test_wrong_button_fails_the_episode(env):
    start(env, "red")
    press(env, "green")
    info = press(env, "red")
    assert not info["success"] and info["progress"] == 0


def test_pressing_again_changes_nothing(env):
    start(env, "red", "blue", ordered=True)
    press(env, "red")
    press(env, "red")
    assert press(env, "blue")["success"]


@pytest.mark.parametrize("mode", ["left", "right"])
def test_expert_succeeds_in_both_modes(env, mode):
    for seed in range(8):
        infos = play(env, seed, mode=mode)
        assert infos[-1]["success"] and not infos[-1]["stages"]["pressed_another"]


def test_mode_settles_the_order_where_it_is_free(env):
    seed = next(s for s in range(50) if env.reset(seed=s) and len(env.wish.colours) == 2 and not env.wish.ordered)
    orders = []
    for mode in ("left", "right"):
        play(env, seed, mode=mode)
        orders.append(env.lit)
    assert orders[0] == orders[1][::-1]


def test_progress_grows_along_an_episode(env):
    progress = np.array([info["progress"] for info in play(env, 1)])
    assert progress[0] < 0.1 and progress[-1] == 1
    assert np.diff(progress).min() > -0.1


def test_recovering_expert_first_misses_the_button(env):
    infos, straight = play(env, 1, quality="recovering"), play(env, 1)
    assert infos[-1]["success"] and len(infos) > len(straight) + 10


def test_failing_expert_presses_nothing(env):
    infos = play(env, 1, quality="failing")
    assert not env.lit and not infos[-1]["success"]


@pytest.mark.parametrize("control", CONTROLS[1:])
def test_expert_speaks_every_control(control):
    assert play(ButtonsEnv(control=control), 0)[-1]["success"]


@pytest.mark.parametrize("arm", ["ur5e", "so101"])
def test_other_arms(arm):
    assert play(ButtonsEnv(arm=arm), 0)[-1]["success"]
