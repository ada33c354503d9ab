from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest

from robopolicy.errors import UserError
from robopolicy.evaluation.compare import compare
from robopolicy.evaluation.environments import PUSHT
from robopolicy.evaluation.episode import EpisodeResult
from robopolicy.evaluation.results import EvaluationResult, Protocol, task_of
from robopolicy.evaluation.statistics import bootstrap_mean, wilson

ACTIONS = np.zeros((4, 2), np.float32)


def result(scores, *, first_seed=100, environment=PUSHT, policy=None) -> EvaluationResult:
    episodes = tuple(
        EpisodeResult(first_seed + i, s, s >= 1, 4 + i, 2 * s, 0.5, ACTIONS, video="videos/a.mp4" if i == 0 else "")
        for i, s in enumerate(scores)
    )
    task = task_of(environment, [e.seed for e in episodes])
    return EvaluationResult(Protocol(task, policy or {"sampler": "ddim-16"}), episodes, 2.0)


def test_numbers_come_with_n_interval_and_definition():
    scores = [1.0, 0.5, 1.0, 0.25]
    found = result(scores)
    score, rate = found.metric("mean_score"), found.metric("success_rate")
    assert (score.value, score.low, score.high, score.n) == (
        0.6875,
        bootstrap_mean(scores).low,
        bootstrap_mean(scores).high,
        4,
    )
    assert (rate.value, rate.low, rate.high, rate.n) == (0.5, wilson(2, 4).low, wilson(2, 4).high, 4)
    assert "coverage" in score.definition and "0.95" in rate.definition
    assert (found.metric("steps_to_success").value, found.metric("steps_to_success").n) == (5.0, 2)
    assert found.throughput["steps_per_s"] == (4 + 5 + 6 + 7) / 2.0


def test_saved_results_come_back(tmp_path):
    found = result([1.0, 0.5])
    found.save(tmp_path)
    assert EvaluationResult.load(tmp_path) == found
    rows = [json.loads(line) for line in (tmp_path / "episodes.jsonl").read_text().splitlines()]
    assert [(row["seed"], row["score"], row["video"]) for row in rows] == [(100, 1.0, "videos/a.mp4"), (101, 0.5, "")]


def test_the_summary_is_json_without_nan(tmp_path):
    result([0.2, 0.5]).save(tmp_path)

    def refuse(name):
        raise AssertionError(f"{name} is not JSON")

    summary = json.loads((tmp_path / "summary.json").read_text(), parse_constant=refuse)
    assert summary["metrics"]["steps_to_success"]["value"] is None
    assert summary["metrics"]["mean_score"]["n"] == 2
    assert summary["protocol_hash"] == json.loads((tmp_path / "protocol.json").read_text())["hash"]


def test_a_protocol_that_was_changed_later_is_refused(tmp_path):
    result([0.2]).save(tmp_path)
    path = tmp_path / "protocol.json"
    path.write_text(path.read_text().replace('"max_steps": 300', '"max_steps": 900'))
    with pytest.raises(UserError, match="protocol.json.*changed after the evaluation"):
        EvaluationResult.load(tmp_path)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("protocol.json", "{", "protocol.json is damaged"),
        ("protocol.json", '{"format": 99}', "found format 99, wanted 1"),
        ("episodes.jsonl", '{"seed": 100}\n', "episodes.jsonl line 1: the entry 'score' is missing"),
        ("episodes.jsonl", "", "its seeds are not those of protocol.json"),
        ("summary.json", "{}", "throughput.wall_s is missing"),
    ],
)
def test_damaged_files_are_named(tmp_path, name, content, message):
    result([0.2]).save(tmp_path)
    (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=message):
        EvaluationResult.load(tmp_path)


def test_a_video_outside_the_folder_is_refused(tmp_path):
    result([0.2]).save(tmp_path / "results")
    rows = tmp_path / "results" / "episodes.jsonl"
    row = json.loads(rows.read_text()) | {"video": "../secret.mp4"}
    rows.write_text(json.dumps(row) + "\n")
    with pytest.raises(UserError, match="secret.mp4.*outside the folder"):
        EvaluationResult.load(tmp_path / "results")


def test_a_missing_folder_is_named(tmp_path):
    with pytest.raises(UserError, match="nothing/protocol.json is not there"):
        EvaluationResult.load(tmp_path / "nothing")


def test_the_policy_may_differ_and_episodes_are_paired_by_seed():
    a = result([1.0, 0.5, 0.0], policy={"sampler": "ddim-16"})
    b = result([0.9, 0.5, 0.1], policy={"sampler": "ddpm-100"})
    assert a.protocol.hash != b.protocol.hash
    shuffled = replace(a, episodes=a.episodes[::-1])
    difference = compare(shuffled, b).difference
    assert difference == compare(a, b).difference
    assert (difference.score.low, difference.score.high) == pytest.approx((-0.1, 0.1))
    assert (difference.only_a, difference.neither) == (1, 2)


def test_different_tasks_are_not_compared():
    a = result([1.0, 0.5])
    b = result([1.0, 0.5], first_seed=7, environment=replace(PUSHT, max_steps=50))
    with pytest.raises(UserError) as error:
        compare(a, b, label_a="old", label_b="new")
    assert "max_steps: old has 300, new has 50." in str(error.value)
    assert "seeds: old has [100, 101], new has [7, 8]." in str(error.value)
    assert "reset" not in str(error.value)
