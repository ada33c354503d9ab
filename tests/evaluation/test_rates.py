from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from robopolicy.errors import UserError
from robopolicy.evaluation.environments import PUSHT
from robopolicy.evaluation.rates import SuccessRates, load_rates, paired, read_rates
from robopolicy.evaluation.suite import Setting, Suite
from robopolicy.evaluation.suite_results import SuiteResult, setting_folder, suite_protocol
from tests.evaluation.test_results import result


def table(source: str, **rates: float) -> SuccessRates:
    return SuccessRates(source, tuple(rates), np.array(list(rates.values())), np.zeros(len(rates), np.int64))


def test_csv_with_rates_or_with_counts(tmp_path: Path):
    (tmp_path / "rates.csv").write_text("policy, rate, n, note\nold, 0.25, 40, first try\nnew, .5,,\n\n")
    found = read_rates(tmp_path / "rates.csv")
    assert (found.policies, found.rates.tolist(), found.trials.tolist()) == (("old", "new"), [0.25, 0.5], [40, 0])
    assert found.successes.tolist() == [10, 0]
    assert not found.counted
    (tmp_path / "counts.csv").write_text("\ufeffpolicy,successes,n\nold,3,12\nnew,12,12\n", encoding="utf-8")
    counts = read_rates(tmp_path / "counts.csv")
    assert counts.rates.tolist() == [0.25, 1.0]
    assert counts.counted


def test_json_with_rates_or_with_counts(tmp_path: Path):
    path = tmp_path / "rates.json"
    path.write_text(json.dumps({"old": 0.25, "new": {"rate": 0.5, "n": 20}, "newest": {"successes": 9, "n": 10}}))
    found = read_rates(path)
    assert dict(zip(found.policies, found.rates, strict=True)) == {"old": 0.25, "new": 0.5, "newest": 0.9}
    assert found.trials.tolist() == [0, 20, 10]


def test_results_folders_by_name(tmp_path: Path):
    result([1.0, 0.5, 1.0, 0.2]).save(tmp_path / "a")
    result([0.2, 0.5]).save(tmp_path / "b")
    found = load_rates([f"old={tmp_path / 'a'}", f"new={tmp_path / 'b'}"])
    assert (found.policies, found.rates.tolist(), found.trials.tolist()) == (("old", "new"), [0.5, 0.0], [4, 2])


def test_results_of_different_tasks_are_not_one_table(tmp_path: Path):
    result([1.0]).save(tmp_path / "a")
    result([1.0], environment=replace(PUSHT, max_steps=50)).save(tmp_path / "b")
    with pytest.raises(UserError, match="max_steps: .*/a has 300, .*/b has 50"):
        load_rates([f"old={tmp_path / 'a'}", f"new={tmp_path / 'b'}"])


def save_suite(folder: Path, names: list[str], scores: list[list[float]]) -> None:
    settings = tuple(Setting(name, "base" if name == "base" else "lighting", name, {}) for name in names)
    results, suite = [result(values) for values in scores], Suite("lights", "", settings)
    policy = results[0].protocol.policy
    for setting, found in zip(settings, results, strict=True):
        found.save(setting_folder(folder, setting.name))
    SuiteResult(suite_protocol(suite, [r.protocol.task for r in results], policy), suite, tuple(results)).save(folder)


def test_of_a_suite_the_aggregate_counts_and_its_seeds_are_the_trials(tmp_path: Path):
    save_suite(tmp_path / "a", ["base", "dark"], [[1, 1, 0, 1], [1, 0, 0, 0]])
    save_suite(tmp_path / "b", ["base", "dark"], [[1, 1, 1, 1], [1, 0, 0, 1]])
    found = load_rates([f"old={tmp_path / 'a'}", f"new={tmp_path / 'b'}"])
    assert (found.rates.tolist(), found.trials.tolist()) == ([0.5, 0.75], [4, 4])
    save_suite(tmp_path / "c", ["base", "bright"], [[1, 1, 1, 1], [1, 0, 0, 1]])
    with pytest.raises(UserError, match="setting bright"):
        load_rates([f"old={tmp_path / 'a'}", f"new={tmp_path / 'c'}"])


def test_rows_are_paired_by_name_not_by_place():
    real, simulated = paired(real=table("real", a=0.1, b=0.9), simulated=table("sim", b=0.8, a=0.2))
    assert real.policies == simulated.policies == ("a", "b")
    assert simulated.rates.tolist() == [0.2, 0.8]


def test_every_policy_that_one_table_lacks_is_named_with_the_file():
    with pytest.raises(UserError) as error:
        paired(real=table("real.csv", octo=0.1, rt1=0.9), simulated=table("sim.csv", octo=0.8, rt_1=0.2, pi0=0.1))
    message = str(error.value)
    assert "sim.csv lacks 'rt1', which real.csv has. Did you mean 'rt_1'?" in message
    assert "real.csv lacks 'pi0'" in message
    assert "octo'," not in message


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", "policy,rate\nold,1.2\n", r"a.csv: the rate of 'old' is 1.2, wanted a share"),
        ("a.csv", "policy,rate\nold,85\n", r"Is it in percent\? Write 0.85"),
        ("a.csv", "policy,rate\nold,-0.1\n", "is -0.1, wanted"),
        ("a.csv", "policy,rate\nold,nan\n", "'old': rate is 'nan', wanted a number"),
        ("a.csv", "policy,rate\nold,half\n", "'old': rate is 'half', wanted a number"),
        ("a.csv", "policy,rate\nold,.1\nold,.2\n", "a.csv: 'old' is there more than once"),
        ("a.csv", "policy,rates\nold,.1\n", r"the header lacks 'rate'; found .*Did you mean 'rates'"),
        ("a.csv", "name,rate\nold,.1\n", "the header lacks 'policy'"),
        ("a.csv", "policy,rate\n", "a.csv holds no policy"),
        ("a.csv", "", "the header lacks 'policy'"),
        ("a.csv", "policy,rate\n,.1\n", "line 2: the policy has no name"),
        ("a.csv", "policy,rate,n\nold,.1,0\n", "n is 0, wanted a whole number"),
        ("a.csv", "policy,rate,n\nold,.1,2.5\n", "n is 2.5, wanted a whole number"),
        ("a.csv", "policy,successes,n\nold,5,4\n", "5 successes of 4 trials are impossible"),
        ("a.csv", "policy,successes\nold,5\n", "wanted a rate, or successes and n"),
        ("a.csv", "policy,rate,successes,n\nold,.9,5,10\n", "rate 0.9 does not fit 5 of 10"),
        ("a.json", '{"old": 0.1, "old": 0.2}', "a.json: 'old' is there more than once"),
        ("a.json", "[0.1]", 'wanted {"policy": rate'),
        ("a.json", "{", "a.json is damaged"),
        ("a.json", '{"old": null}', "'old': wanted a rate"),
        ("a.txt", "", "wanted a .csv file"),
    ],
)
def test_impossible_tables(name: str, content: str, message: str, tmp_path: Path):
    (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=message):
        read_rates(tmp_path / name)


def test_a_missing_table_and_a_mixture_of_both_forms(tmp_path: Path):
    with pytest.raises(UserError, match="absent.csv is not there"):
        load_rates([str(tmp_path / "absent.csv")])
    with pytest.raises(UserError, match="wanted a .csv file"):
        load_rates(["real.csv", "b=results/b"])
