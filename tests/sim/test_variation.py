"""Factors of variation of the arm tasks: each has its effect, none leaks into the next episode or moves the start."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest

pytest.importorskip("robopolicy_sim")

import mujoco  # noqa: E402

from robopolicy_sim.variation import BASE, FACTORS, PRESETS, Variations  # noqa: E402
from robopolicy_sim.variation.distractors import THINGS  # noqa: E402

PAGE = Path(__file__).resolve().parents[2] / "docs" / "randomization.md"
SEED = 3
SEEN = ("lighting", "light_angle", "table_texture", "table_colour", "background", "arm_colour", "object_hue")
SEEN += ("camera_yaw", "camera_pitch", "camera_distance", "camera_fov", "distractors", "table_height")


def make(task: str = "Lift", **options: Any) -> Any:
    return gymnasium.make(f"robopolicy_sim/{task}-v0", disable_env_checker=True, **options).unwrapped


def snapshot(value: Any, name: str = "model") -> dict[str, Any]:
    """Every number in a MuJoCo structure, by dotted name."""
    found: dict[str, Any] = {}
    for field in dir(value):
        if field.startswith("_") or field in ("signature", "names", "paths", "text_data"):
            continue
        part = getattr(value, field)
        if isinstance(part, np.ndarray):
            found[f"{name}.{field}"] = part.copy()
        elif isinstance(part, (int, float)):
            found[f"{name}.{field}"] = part
        elif field in ("stat", "opt", "vis", "headlight", "map", "quality", "rgba", "scale", "global_"):
            found |= snapshot(part, f"{name}.{field}")
    return found


def changed(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    return [name for name, value in before.items() if not np.array_equal(value, after[name], equal_nan=True)]


def possible(name: str) -> list[Any]:
    """All levels of a factor, or some numbers."""
    factor = FACTORS[name]
    return [*factor.levels] or ([1, 4, 6] if factor.integer else [factor.bounds[0] / 2, factor.bounds[1] / 2])


@pytest.mark.parametrize("name", SEEN)
def test_every_level_is_seen(name: str):
    values = possible(name)
    env = make(cameras=("scene",), image_size=64, randomization={name: {"choice": [BASE, *values]}})
    shown = []
    for value in (BASE, *values):
        observation, info = env.reset(seed=SEED, options={"variation": {name: value}})
        assert info["variation"] == {name: value}
        shown.append(observation["observation.image.scene"].astype(float))
    env.close()
    for i in range(len(shown)):
        for j in range(i):
            assert (np.abs(shown[i] - shown[j]).max(axis=2) > 12).mean() > 0.0005, (i, j)


def test_nominal_numbers_are_the_base_level():
    numbers = {name: factor.nominal for name, factor in FACTORS.items() if factor.nominal is not None}
    del numbers["arm_colour"]  # each arm has its own
    env = make(variation=numbers)
    before = snapshot(env.model)
    env.reset(seed=SEED)
    after = snapshot(env.model)
    changes = [np.abs(before[name] - after[name]).max() for name in changed(before, after)]
    assert max(changes, default=0) < 1e-9


@pytest.mark.parametrize("name", ("model.cam_pos", "model.body_mass", "model.dof_invweight0", "model.mat_rgba"))
def test_strong_randomization_changes(name: str):
    env = make(randomization="strong")
    before = snapshot(env.model)
    env.reset(seed=1)
    assert name in changed(before, snapshot(env.model))


@pytest.mark.parametrize("task", ("Lift", "DrawerOpen", "StackUr5e"))
def test_an_episode_leaves_nothing_behind(task: str):
    env = make(task, randomization={name: {"choice": possible(name)} for name in FACTORS})
    before = snapshot(env.model)
    for seed in range(3):
        env.reset(seed=seed)
    assert len(changed(before, snapshot(env.model))) > 20
    env.variations.restore(env)
    assert changed(before, snapshot(env.model)) == []
    assert (env.table_height, env.action_latency) == (0.0, 0.0)


@pytest.mark.parametrize("task", ("Lift", "PickPlace", "DrawerClose", "LiftSo101"))
def test_the_start_does_not_depend_on_the_variation(task: str):
    plain, varied = make(task), make(task, randomization="strong")
    for seed in (0, 1):
        (a, _), (b, info) = plain.reset(seed=seed), varied.reset(seed=seed)
        assert set(info["variation"]) == set(PRESETS["strong"])
        np.testing.assert_allclose(a["observation.state"], b["observation.state"], atol=1e-6)
        assert plain.instruction == varied.instruction
        for body in range(1, plain.model.nbody):
            name = plain.model.body(body).name
            rise = varied.position(name) - plain.position(name)
            on_table = plain.model.body_rootid[body] != plain.model.body(plain.arm.base).id
            np.testing.assert_allclose(rise, [0, 0, varied.table_height * on_table], atol=1e-9)


def test_draws_repeat_with_the_seed_and_differ_between_seeds():
    env = make(randomization="mild")
    first, again, other = (env.reset(seed=seed)[1]["variation"] for seed in (5, 5, 6))
    following = env.reset()[1]["variation"]
    assert first == again
    assert all(first[name] != other[name] != following[name] for name in first)


def test_one_more_factor_leaves_the_draws_of_the_others():
    friction = {"friction": {"uniform": [0.5, 1.2]}}
    alone = make(randomization=friction).reset(seed=2)[1]["variation"]
    more = make(randomization={"lighting": {"choice": ["darker", "base"]}} | friction, variation={"gain": 0.5})
    assert more.reset(seed=2)[1]["variation"]["friction"] == alone["friction"]


# Physics.


def slide(friction: float) -> float:
    """How far the cube slides from 0.5 m/s."""
    env = make(variation={"friction": friction})
    env.reset(seed=SEED)
    start = env.position("cube")
    env.data.qvel[env.model.jnt_dofadr[env.model.body("cube").jntadr[0]]] = 0.5
    for _ in range(200):
        mujoco.mj_step(env.model, env.data)
    return float(np.linalg.norm(env.position("cube") - start))


def test_half_the_friction_slides_twice_as_far():
    assert slide(0.25) == pytest.approx(2 * slide(0.5), rel=0.1)  # at its own friction the cube tips over


def rising_speed(mass: float) -> float:
    """Speed of the cube after 10 ms under a force of 8 N upwards."""
    env = make(variation={"object_mass": mass})
    env.reset(seed=SEED)
    env.data.body("cube").xfrc_applied[2] = 8.0
    mujoco.mj_step(env.model, env.data, nstep=2)
    return float(env.data.qvel[env.model.jnt_dofadr[env.model.body("cube").jntadr[0]] + 2])


def test_mass_obeys_newton():
    for scale in (1.0, 2.0):
        assert rising_speed(scale) == pytest.approx(0.01 * (8.0 / (0.08 * scale) - 9.81), rel=0.02)


def lag(**variation: Any) -> np.ndarray:
    """Distance of the TCP from a target 10 cm away, for 30 control steps."""
    env = make(variation=variation)
    env.reset(seed=SEED)
    target = env.tool_state().position + [0, 0, -0.1]
    action = env.action_space.sample()
    action[:3], action[9] = target - env.base_position, 1
    action[3:9] = env.tool_state().rotation[:, :2].T.ravel()
    distances = []
    for _ in range(30):
        env.step(action)
        distances.append(np.linalg.norm(env.tool_state().position - target))
    return np.array(distances)


def test_soft_servos_and_strong_damping_lag():
    nominal = lag()
    assert lag(gain="soft")[5] > nominal[5] + 0.005
    assert lag(damping="sluggish")[5] > nominal[5] + 0.005
    assert nominal[-1] < 0.005


def test_latency_shifts_the_motion_by_whole_control_steps():
    nominal, late = lag(), lag(action_latency=0.1)
    np.testing.assert_allclose(late[2:], nominal[:-2], atol=1e-3)
    assert late[1] > 0.099


def test_the_table_carries_the_cube_at_its_height():
    env = make(variation={"table_height": 0.03})
    env.reset(seed=SEED)
    mujoco.mj_step(env.model, env.data, nstep=100)
    assert env.position("cube")[2] == pytest.approx(0.05, abs=1e-3)


@pytest.mark.parametrize("task", ("Lift", "PickPlace", "Stack", "PegInsert", "DrawerClose", "PushT", "LiftSo101"))
def test_distractors_lie_still_off_the_task(task: str):
    env = make(task, variation={"distractors": 6})
    kinds = set()
    for seed in range(3):
        env.reset(seed=seed)
        model, data = env.model, env.data
        bodies = {f"distractor_{kind}": model.body(f"distractor_{kind}").id for kind in THINGS}
        start = {name: env.position(name) for name in bodies}
        on_table = {name for name in bodies if start[name][2] > -0.01}
        assert len(on_table) == 6
        kinds.add(frozenset(on_table))
        for _ in range(60):
            mujoco.mj_step(model, data)
            touching = model.body_rootid[model.geom_bodyid[data.contact.geom]]
            mine = np.isin(touching, list(bodies.values()))
            assert set(touching[mine.any(axis=1)][~mine[mine.any(axis=1)]]) <= {model.body("bench").id}
            assert not mine.all(axis=1).any()
        for name in bodies:
            assert np.linalg.norm(env.position(name) - start[name]) < 0.003
    assert len(kinds) > 1


@pytest.mark.parametrize("task", ("Lift", "PickPlace", "DrawerOpen"))
def test_the_expert_succeeds_among_distractors(task: str):
    env = make(task, variation={"distractors": 6})
    observation, info = env.reset(seed=SEED)
    expert = env.make_expert(SEED)
    for _ in range(200):
        observation, *_, info = env.step(expert.act(observation))
        if info["success"]:
            return
    pytest.fail(f"stages {info['stages']}")


def test_the_documentation_lists_every_factor_and_level():
    rows = [line.split("|") for line in PAGE.read_text().splitlines() if line.startswith("| `")]
    listed = {row[1].strip(" `"): set(re.findall(r"`(\w+)`", row[2])) for row in rows if row[1].strip(" `") in FACTORS}
    assert listed == {name: set(factor.levels) for name, factor in FACTORS.items()}


# What users type.


def test_values_can_be_chosen_at_a_reset():
    env = make(randomization={"friction": {"uniform": [0.5, 1.2]}, "distractors": {"choice": [0, 2]}})
    _, info = env.reset(seed=SEED, options={"variation": {"friction": 0.3}})
    assert info["variation"]["friction"] == 0.3
    for chosen, message in (({"gain": 1.0}, "gain cannot be chosen"), ({"distractors": 3}, "not among .* choices")):
        with pytest.raises(ValueError, match=message):
            env.reset(options={"variation": chosen})


@pytest.mark.parametrize(
    ("variation", "randomization", "message"),
    [
        ({"lightning": "darker"}, {}, "no factor of variation 'lightning'; choose from lighting,"),
        ({"lighting": "dim"}, {}, "lighting='dim' is unknown; choose one of base, darker, .* from 0.2 to 2"),
        ({"friction": 0}, {}, "friction=0 is unknown.* a number from 0.05 to 3"),
        ({"distractors": 7}, {}, "distractors=7 .* a whole number from 0 to 6"),
        ({"table_colour": [1, 0]}, {}, "table_colour.* 3 numbers, each from 0 to 1"),
        ({"background": 1}, {}, "background=1 is unknown; choose one of base, wood"),
        ({}, "weak", "randomization='weak' is unknown; give one of mild, strong"),
        ({}, {"gain": {"gamma": [1, 2]}}, "gain: .* no distribution; give one of"),
        ({}, {"gain": {"uniform": [2, 1]}}, "low end"),
        ({}, {"gain": {"uniform": [0, 9]}}, "gain=0 is unknown"),
        ({}, {"gain": {"uniform": ["soft", "stiff"]}}, "uniform takes numbers, found 'soft'"),
        ({}, {"gain": {"normal": [1, float("nan")]}}, "spread above 0"),
        ({}, {"gain": {"beta": [0, 1, 0.5, 1]}}, "shape or spread above 0"),
        ({}, {"background": {"uniform": [0, 1]}}, "choice"),
        ({}, {"distractors": {"uniform": [0, 4]}}, "choice"),
        ({"gain": 1}, {"gain": {"uniform": [1, 2]}}, "both set gain"),
    ],
)
def test_mistakes_are_named(variation: Any, randomization: Any, message: str):
    with pytest.raises(ValueError, match=message):
        Variations(variation, randomization)


@pytest.mark.parametrize(
    ("given", "mean", "deviation"),
    [
        ({"uniform": [0.5, 1.5]}, 1.0, 1 / np.sqrt(12)),
        ({"normal": [1.0, 0.1]}, 1.0, 0.1),
        ({"beta": [2, 6, 0.5, 2.5]}, 1.0, 2 * np.sqrt(12 / (64 * 9))),
        ({"choice": [0.5, "slippery", 1.5]}, None, None),
    ],
)
def test_distributions(given: dict[str, Any], mean: float | None, deviation: float | None):
    env = make(randomization={"friction": given})
    rng = np.random.default_rng(0)
    draws = [env.variations.apply(env, rng)["friction"] for _ in range(2000)]
    if mean is None:
        assert {value: draws.count(value) > 600 for value in (0.5, "slippery", 1.5)} == dict.fromkeys(set(draws), True)
    else:
        assert (np.mean(draws), np.std(draws)) == pytest.approx((mean, deviation), abs=0.03)
