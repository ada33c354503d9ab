"""Suites: what a file may say, what is played, what is counted."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("robopolicy_sim", reason="needs the simulator: pip install 'robopolicy[sim]'")
from robopolicy.cli.evaluate import suite_path
from robopolicy.errors import UserError
from robopolicy.evaluation.compare import compare_suites
from robopolicy.evaluation.environments import absolute_files, described_options, environment
from robopolicy.evaluation.evaluate import evaluate, evaluate_suite
from robopolicy.evaluation.results import EvaluationResult
from robopolicy.evaluation.rollout import rollout
from robopolicy.evaluation.statistics import bootstrap_mean, wilson
from robopolicy.evaluation.suite import load_suite
from robopolicy.evaluation.suite_results import SuiteResult

from . import sliding
from .sliding import Slider, solvable

SUITE = """
name: slippery
description: More and more friction.
settings:
  - {factor: base}
  - {factor: friction, levels: [0.4, 0.2], at_base: 0.0}
  - {factor: lighting, level: darker, weight: 2}
  - {factor: camera_yaw, levels: [-0.1, 0.1], in_aggregate: false}
"""
SHORT = "name: short\nsettings: [{factor: base}, {factor: friction, levels: [0.4, 0.2]}]"
NAMES = ["base", "friction-0.4", "friction-0.2", "lighting-darker", "camera_yaw--0.1", "camera_yaw-0.1"]
SEEDS = range(100_000, 100_030)


@pytest.fixture(scope="module", autouse=True)
def slide():
    with sliding.registered():
        yield


def written(folder: Path, text: str = SUITE) -> Path:
    path = folder / "suite.yaml"
    path.write_text(text)
    return path


def play(path: Path, out: Path, policy: Slider | None = None, **kwargs) -> SuiteResult:
    options = {"episodes": len(SEEDS), "videos": 0, "progress": False} | kwargs
    return evaluate_suite(policy or Slider(), "slide", load_suite(path), out, **options)


@pytest.fixture(scope="module")
def played(tmp_path_factory) -> tuple[SuiteResult, Path]:
    folder = tmp_path_factory.mktemp("suite")
    return play(written(folder), folder / "out"), folder / "out"


# The file.


def test_a_level_becomes_an_option_and_a_list_of_levels_becomes_settings(tmp_path):
    suite = load_suite(written(tmp_path))
    assert [s.name for s in suite.settings] == NAMES
    assert suite.base.options == {}
    assert suite.settings[1].options == {"variation": {"friction": 0.4}}
    assert [s.name for s in suite.settings if not s.in_aggregate] == NAMES[4:]
    assert suite.at_base == {"friction": 0.0}


def test_options_merge_from_the_file_to_the_user_to_the_setting(tmp_path):
    text = """
name: layers
environment_options: {control_hz: 10, variation: {lighting: brighter, friction: 0.1}}
settings:
  - {factor: base}
  - {factor: friction, level: 0.3, environment_options: {action_latency: 0.2}}
  - {factor: latency, level: 0.1, option: action_latency}
"""
    base, friction, latency = load_suite(
        written(tmp_path, text), {"control_hz": 20, "variation": {"friction": 0.2}}
    ).settings
    assert base.options == {"control_hz": 20, "variation": {"lighting": "brighter", "friction": 0.2}}
    assert friction.options == {
        "control_hz": 20,
        "action_latency": 0.2,
        "variation": {"lighting": "brighter", "friction": 0.3},
    }
    assert latency.options == base.options | {"action_latency": 0.1}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ("- {factor: lighting, level: darker}", "exactly one setting has `factor: base`, found 0"),
        ("- {factor: base}\n- {factor: base, name: again}", "exactly one setting .* found 2"),
        ("- {factor: base}\n- {factor: base}", "names of settings must differ, found base more than once"),
        ("- {factor: base, in_aggregate: false}", "no setting counts in the aggregate"),
        ("- {factor: base, level: 3}", r"settings\[0\]: the base setting has no level"),
        ("- {factor: base, weight: 0}", "weight=0 must be above 0"),
        ("- {factor: base}\n- {factor: f, level: 1, levels: [2]}", r"settings\[1\]: give `level` or `levels`"),
        ("- {factor: base}\n- {factor: f}", r"settings\[1\]: give `level`, `levels` or `environment_options`"),
        ("- {factor: base}\n- {factor: f, levels: []}", "`levels` must not be empty"),
        ("- {factor: base}\n- {factor: f, level: 1, name: ..}", "'..' cannot name a folder"),
        ("- {factor: base}\n- {factor: f, level: [0, 1]}", "cannot name a folder; give the setting a `name`"),
        ("- {factor: base}\n- {facter: f}", r"settings\[1\]: unknown entry 'facter'. Did you mean 'factor'"),
        ("- {factor: base", "cannot be read as YAML"),
    ],
)
def test_an_impossible_file_is_refused(tmp_path, settings, message):
    with pytest.raises(UserError, match=message):
        load_suite(written(tmp_path, f"name: x\nsettings:\n{settings}"))


def test_a_suite_whose_name_cannot_be_a_folder_is_refused(tmp_path):
    with pytest.raises(UserError, match="name 'a/b' cannot name a folder"):
        load_suite(written(tmp_path, "name: a/b\nsettings: [{factor: base}]"))


def test_what_a_suite_leaves_open_must_be_given(tmp_path):
    path = suite_path("visual_matching")
    with pytest.raises(UserError, match=r"needs background.photo. Give it .*'\{background: \{photo: …\}\}'"):
        load_suite(path)
    photo = tmp_path / "desk.png"
    photo.write_bytes(b"pixels")
    suite = load_suite(path, {"background": {"photo": str(photo)}})
    assert {s.options["background"]["photo"] for s in suite.settings} == {str(photo)}
    assert all(s.in_aggregate for s in suite.settings)


def test_the_documented_suite_is_one(tmp_path):
    text = (Path(__file__).parents[2] / "docs" / "evaluation.md").read_text()
    (block,) = re.findall(r"^```yaml\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    suite = load_suite(written(tmp_path, block))
    by_name = {s.name: s for s in suite.settings}
    assert len(by_name) == 9
    assert all(s.options["control"] == "ee_delta_target" for s in suite.settings)
    assert by_name["latency-0.1"].options == {"control": "ee_delta_target", "action_latency": 0.1}
    assert by_name["friction-1.5"].options["variation"] == {"friction": 1.5}


def test_the_shipped_suite_leaves_cameras_out_of_the_aggregate():
    suite = load_suite(suite_path("variant_aggregation"))
    assert len([s for s in suite.settings if s.in_aggregate]) == 9  # as SIMPLER's for picking a can
    assert {s.factor.partition("_")[0] for s in suite.settings if not s.in_aggregate} == {"camera"}
    with pytest.raises(UserError, match="no suite 'variant'.*Did you mean 'variant_aggregation'"):
        suite_path("variant")


# Options and files.


@pytest.mark.parametrize(("option", "key"), [("background", "photo"), ("robot_parameters", "file")])
def test_a_file_is_found_beside_its_suite_and_known_by_its_bytes(tmp_path, option, key):
    (tmp_path / "desk.png").write_bytes(b"pixels")
    text = f"name: x\nenvironment_options: {{{option}: {{{key}: desk.png}}}}\nsettings: [{{factor: base}}]"
    options = load_suite(written(tmp_path, text)).base.options
    assert options[option][key] == str(tmp_path / "desk.png")
    before = described_options(options)
    assert str(tmp_path) not in str(before)
    (tmp_path / "desk.png").write_bytes(b"other pixels")
    assert described_options(options) != before
    with pytest.raises(UserError, match=f"'{key}' names the file .*/chair.png, which is not there"):
        absolute_files({option: {key: "chair.png"}}, tmp_path)


def test_options_reach_the_environment_and_its_protocol():
    world = environment("slide", {"variation": {"friction": 0.5}})
    assert world.make(Slider().spec).unwrapped.variation == {"friction": 0.5}
    tasks = [evaluate(Slider(), w, episodes=1, progress=False).protocol for w in (world, environment("slide"))]
    assert tasks[0].task["options"] == {"variation": {"friction": 0.5}}
    assert tasks[0].task_hash != tasks[1].task_hash
    assert "options" not in tasks[1].task


def test_the_id_of_a_task_is_as_good_as_its_short_name():
    by_id, by_name = environment("robopolicy_sim/Slide-v0"), environment("slide")
    assert (
        (by_id.name, by_id.reset)
        == (by_name.name, by_name.reset)
        == ("slide", "robopolicy_sim/Slide-v0.reset(seed=seed)")
    )


def test_the_step_limit_keeps_its_time_at_another_control_rate():
    world = environment("slide", {"control_hz": 20})
    assert (world.fps, world.max_steps) == (20, 2 * sliding.LIMIT)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        (
            "slide",
            {"variation": {"lighting": "dark"}},
            "'slide' does not take the options .*lighting has no level 'dark'",
        ),
        ("slide", {"frictoin": 1}, "does not take the options .*unexpected keyword argument 'frictoin'"),
        ("slide", {"cameras": ["scene"]}, "'cameras' is settled by the policy"),
        ("pusht", {"variation": {}}, "'pusht' takes no options, found variation"),
    ],
)
def test_options_that_an_environment_does_not_take(name, options, message):
    with pytest.raises(UserError, match=message):
        environment(name, options)


# What is counted.


def test_each_setting_plays_the_same_seeds_and_finds_what_is_known(played):
    result, _ = played
    for setting, friction in zip(result.settings[:3], (0.0, 0.4, 0.2), strict=True):
        assert {e.seed: e.success for e in setting.result.episodes} == {s: solvable(s, friction) for s in SEEDS}
    assert not any(e.success for e in result.settings[3].result.episodes)  # the dark one


def test_rates_drops_and_aggregate(played):
    result, _ = played
    base, hard, easy = (np.array([solvable(s, f) for s in SEEDS], float) for f in (0.0, 0.4, 0.2))
    assert 0.1 < hard.mean() < easy.mean() < base.mean() < 1  # the test would say nothing otherwise
    rate = result.settings[1].rate
    assert (rate.value, rate.low, rate.high) == tuple(vars(wilson(int(hard.sum()), len(SEEDS))).values())
    assert result.settings[1].drop == bootstrap_mean(base - hard)
    friction = result.factors[0]
    assert friction.rate == bootstrap_mean((hard + easy) / 2)
    assert friction.drop == bootstrap_mean(base - (hard + easy) / 2)
    # lighting (no success) has weight 2, the camera's settings do not count
    expected = bootstrap_mean((base + hard + easy) / 5)
    aggregate = result.aggregate
    assert (aggregate.value, aggregate.low, aggregate.high) == pytest.approx(tuple(vars(expected).values()))
    assert aggregate.n == len(SEEDS)


def test_the_interval_of_the_aggregate_takes_seeds_as_clusters(played):
    """Settings share their seeds, so five equal settings say no more than one."""
    result, _ = played
    same = replace(result, results=(result.results[0],) * len(result.results))
    one = bootstrap_mean([e.success for e in result.results[0].episodes])
    assert (same.aggregate.low, same.aggregate.high) == pytest.approx((one.low, one.high))
    assert same.settings[1].drop.low == same.settings[1].drop.high == 0


def test_numeric_levels_make_a_curve_with_the_base_on_it(played):
    result, _ = played
    curves = {f.factor: [level for level, _ in f.curve] for f in result.factors}
    assert curves == {"friction": [0.0, 0.2, 0.4], "lighting": [], "camera_yaw": [-0.1, 0.1]}
    assert result.factors[0].curve[0][1] == result.base.rate


def test_rows_keep_stages_variation_and_instruction(played):
    result, out = played
    for e in EvaluationResult.load(out / "settings" / "friction-0.4").episodes:
        assert e.variation == {"friction": 0.4}
        assert e.instruction == ("go left" if sliding.start(e.seed) > 0 else "go right")
        assert e.stages["at_the_middle"] == e.success and list(e.stages) == ["halfway", "at_the_middle"]
    base = result.base.result
    halfway, middle = base.stages
    assert middle.value == base.metric("success_rate").value <= halfway.value
    assert sum(m.n for m in base.instructions) == len(SEEDS)


def test_rows_of_before_there_were_stages_still_load(tmp_path):
    evaluate(Slider(), "slide", episodes=2, videos=0, out=tmp_path, progress=False)
    path = tmp_path / "episodes.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    for row in rows:
        for name in ("stages", "variation", "instruction"):
            del row[name]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    result = EvaluationResult.load(tmp_path)
    assert result.stages == () and result.instructions == ()


# Folders.


def test_what_is_saved_comes_back(played):
    result, out = played
    loaded = SuiteResult.load(out)
    assert loaded.protocol == result.protocol
    assert loaded.results == result.results
    assert [f.rate for f in loaded.factors] == [f.rate for f in result.factors]
    summary = json.loads((out / "summary.json").read_text())
    assert summary["aggregate"]["value"] == result.aggregate.value
    assert [s["name"] for s in summary["settings"]] == NAMES
    assert summary["factors"][0]["drop"]["low"] == result.factors[0].drop.low
    assert summary["protocol_hash"] == json.loads((out / "protocol.json").read_text())["hash"]


def test_an_interrupted_suite_goes_on_where_it_was(tmp_path):
    asked: list[str] = []

    def player(policy, world, seeds, **how):
        asked.append(world.options.get("variation", {}).get("friction", "base"))
        if len(asked) == 3:
            raise KeyboardInterrupt
        return rollout(policy, world, seeds, **how)

    path, out = written(tmp_path, SHORT), tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        play(path, out, episodes=3, player=player)
    assert asked == ["base", 0.4, 0.2]
    resumed = play(path, out, episodes=3, player=player)
    assert asked == ["base", 0.4, 0.2, 0.2]
    assert (resumed.successes == [[solvable(s, f) for s in SEEDS[:3]] for f in (0.0, 0.4, 0.2)]).all()
    assert play(path, out, episodes=3, player=player).results == resumed.results
    assert len(asked) == 4


def test_a_folder_with_another_evaluation_is_not_touched(tmp_path):
    path, out = written(tmp_path, SHORT), tmp_path / "out"
    play(path, out, episodes=2)
    before = (out / "summary.json").read_text()
    with pytest.raises(UserError, match="holds another evaluation.*\n  seeds: it has"):
        play(path, out, episodes=3)
    with pytest.raises(UserError, match="fingerprint: it has None, this one has b"):
        play(path, out, episodes=2, policy_info={"fingerprint": "b"})
    assert (out / "summary.json").read_text() == before


def test_every_setting_is_checked_before_the_first_episode(tmp_path):
    path = written(tmp_path, SUITE.replace("darker", "gloomy"))
    with pytest.raises(UserError, match="Setting 'lighting-gloomy': .*lighting has no level 'gloomy'"):
        play(path, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_setting_that_was_exchanged_is_noticed(tmp_path):
    out = tmp_path / "out"
    play(written(tmp_path, SHORT), out, episodes=2)
    (out / "settings" / "base").rename(out / "aside")
    (out / "settings" / "friction-0.2").rename(out / "settings" / "base")
    with pytest.raises(UserError, match="settings/base is not the setting 'base' of this suite"):
        SuiteResult.load(out)


def test_two_policies_are_compared_setting_by_setting(played):
    a, _ = played
    worlds = [environment("slide", setting.options) for setting in a.suite.settings]
    slow_results = [evaluate(Slider(speed=0.8), world, episodes=len(SEEDS), progress=False) for world in worlds]
    b = replace(a, results=tuple(slow_results))
    comparison = compare_suites(a, b, label_a="fast", label_b="slow")
    fast, slow = (np.array([solvable(s, f) for s in SEEDS], float) for f in (0.0, 0.2))
    paired = dict(comparison.settings)["base"]
    assert paired.success == bootstrap_mean(fast - slow) and paired.only_b == 0 and paired.only_a > 0
    assert comparison.aggregate.value == pytest.approx(a.aggregate.value - b.aggregate.value)


def test_different_suites_are_not_compared(played):
    a, _ = played
    task = dict(a.protocol.task) | {"settings": [s for s in a.protocol.task["settings"] if s["level"] != 0.4]}
    b = replace(a, protocol=replace(a.protocol, task=task))
    with pytest.raises(UserError, match="\n  setting friction-0.4: a has .*friction.*, b has None"):
        compare_suites(a, b, label_a="a", label_b="b")
