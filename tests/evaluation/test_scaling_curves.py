"""Factored scaling curves: data from known curves, plans against the brute-force optimum."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import matplotlib.image
import numpy as np
import pytest

from robopolicy.errors import UserError
from robopolicy.evaluation.scaling_curves import (
    Trials,
    allocate,
    dispersion,
    failure_rate,
    fit_curves,
    plan_collection,
    plan_table,
    read_trials,
)
from tests.data.test_quality import run

AMOUNTS = np.array([0.0, 25, 50, 75, 100])
CURVES = {"camera": (0.8, 20.0, 0.6), "light": (0.3, 10.0, 1.0), "table": (0.6, 200.0, 0.5)}


def trials(name: str, n: int, rng: np.random.Generator, parameters: tuple[float, float, float]) -> Trials:
    success = 1 - failure_rate(np.array([parameters]), AMOUNTS)[0]
    return Trials(name, AMOUNTS, rng.binomial(n, success).astype(float), np.full(5, float(n)))


def all_trials(n: int, seed: int = 0) -> list[Trials]:
    rng = np.random.default_rng(seed)
    return [trials(name, n, rng, parameters) for name, parameters in CURVES.items()]


def test_parameters_are_recovered_from_many_evaluations() -> None:
    curves, widening = fit_curves(all_trials(10_000_000))
    assert widening < 2.5
    for curve, wanted in zip(curves, CURVES.values(), strict=True):
        assert (curve.start, curve.knee, curve.exponent) == pytest.approx(wanted, rel=0.05)
        assert np.median(curve.draws, axis=0) == pytest.approx(wanted, rel=0.15)


def test_a_curve_through_two_points_does_not_add_to_the_dispersion() -> None:
    curves = all_trials(50)
    parameters = [np.array(CURVES[curve.factor]) for curve in curves]
    exact = 1 - failure_rate(np.array([CURVES["camera"]]), AMOUNTS[:2])[0]
    pair = Trials("pair", AMOUNTS[:2], 50 * exact, np.full(2, 50.0))
    alone = dispersion(curves, [0.8 * p for p in parameters])
    assert alone > 1
    both = [*(0.8 * p for p in parameters), np.array(CURVES["camera"])]
    assert dispersion([*curves, pair], both) == pytest.approx(alone)


def test_a_table_of_a_spreadsheet_is_read(tmp_path: Path) -> None:
    path = tmp_path / "curves.csv"
    path.write_text("\ufefffactor , n_demos,successes,n\ncamera,0,1,10\ncamera,50,5,10\n", encoding="utf-8")
    assert [t.factor for t in read_trials(path)] == ["camera"]


def test_extrapolation_intervals_hold_the_truth_about_as_often_as_they_say() -> None:
    hits = []
    for seed in range(6):
        for curve, parameters in zip(fit_curves(all_trials(50, seed))[0], CURVES.values(), strict=True):
            low, high = np.quantile(curve.draws_at(np.array([200.0])), [0.025, 0.975])
            hits.append(low <= 1 - failure_rate(np.array([parameters]), np.array([200.0]))[0, 0] <= high)
    assert np.mean(hits) > 0.85


def test_allocation_is_the_brute_force_optimum() -> None:
    budget = 60
    parameters = np.array(list(CURVES.values()))
    failures = failure_rate(parameters, np.arange(100, 100 + budget + 1))
    gains = failures[:, :1] - failures
    splits = [(a, b, budget - a - b) for a, b in itertools.product(range(budget + 1), repeat=2) if a + b <= budget]
    best = max(splits, key=lambda split: sum(gains[i, n] for i, n in enumerate(split)))
    assert allocate(gains).tolist() == list(best)
    assert np.count_nonzero(best) == 2  # a split, not one winner


def test_plan_prefers_the_factor_that_still_rises() -> None:
    plan = plan_collection(all_trials(2000), 100)
    assert sum(f.collect for f in plan.factors) == 100
    assert plan.factors[0].curve.trials.factor == "camera"
    assert plan.factors[0].best > 0.8
    assert {f.curve.trials.factor: f.collect for f in plan.factors}["light"] == 0
    assert plan.gain > plan.gain_equal_split
    camera = plan.factors[0]
    truth = failure_rate(np.array([CURVES["camera"]]), np.array([100.0, 200.0]))[0]
    assert camera.gain_alone == pytest.approx(truth[0] - truth[1], rel=0.2)


def test_a_factor_without_effect_promises_little() -> None:
    rng = np.random.default_rng(0)
    flat = trials("flat", 200, rng, (0.4, 1.0, 1e-9))
    plan = plan_collection([flat, trials("camera", 200, rng, CURVES["camera"])], 100)
    by_name = {f.curve.trials.factor: f for f in plan.factors}
    assert by_name["flat"].gain_alone < 0.03 < by_name["camera"].gain_alone


def test_scatter_between_trainings_widens_the_intervals() -> None:
    calm = all_trials(200)
    rng = np.random.default_rng(1)
    shaken = [Trials(t.factor, t.demos, np.clip(t.successes + 25 * rng.choice([-1, 1], 5), 0, 200), t.n) for t in calm]
    (first, *_), one = fit_curves(calm)
    (second, *_), more = fit_curves(shaken)
    assert more > 2 * one
    at = np.array([200.0])
    assert np.ptp(np.quantile(second.draws_at(at), [0.1, 0.9])) > 1.2 * np.ptp(
        np.quantile(first.draws_at(at), [0.1, 0.9])
    )


def test_command_prints_a_plan_and_draws_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    table = tmp_path / "curves.csv"
    rows = [
        f"{t.factor},{int(d)},{int(s)},{int(n)}"
        for t in all_trials(50)
        for d, s, n in zip(t.demos, t.successes, t.n, strict=True)
    ]
    table.write_text("factor,n_demos,successes,n\n" + "\n".join(rows) + "\n")
    assert run("plan", "--results", table, "--budget", 60, "--out", tmp_path / "pictures") == 0
    assert "Collect first: " in capsys.readouterr().out
    assert np.std(matplotlib.image.imread(tmp_path / "pictures" / "plan.png")[..., :3]) > 0.02
    assert run("plan", "--results", table, "--budget", 60, "--json") == 0
    plan = json.loads(capsys.readouterr().out)
    assert sum(f["collect"] for f in plan["factors"]) == 60
    assert plan_table(plan_collection(read_trials(table), 60)).count("\n") > 5


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("factor,demos,successes,n\n", "'n_demos' is missing.*Did you mean 'demos'"),
        ("factor,n_demos,successes,n\ncamera,10,5\n", "line 2: found .*n=None"),
        ("factor,n_demos,successes,n\ncamera,10,0.5,10\n", "successes='0.5', .*whole numbers"),
        ("factor,n_demos,successes,n\ncamera,10,11,10\n", "0 <= successes <= n"),
        ("factor,n_demos,successes,n\ncamera,10,1,10\ncamera,10,2,10\n", "one amount of data, 10"),
        ("factor,n_demos,successes,n\n", "no rows"),
    ],
)
def test_tables_with_mistakes_are_refused(tmp_path: Path, text: str, message: str) -> None:
    table = tmp_path / "curves.csv"
    table.write_text(text)
    with pytest.raises(UserError, match=message):
        read_trials(table)
