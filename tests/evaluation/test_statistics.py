from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from robopolicy.evaluation.statistics import bootstrap_mean, mcnemar, paired_difference, wilson

Z = 1.959963984540054


@pytest.mark.parametrize(("successes", "n"), [(0, 10), (15, 20), (32, 50), (50, 50)])
def test_wilson_solves_the_score_equation(successes, n):
    interval = wilson(successes, n)
    for end in (interval.low, interval.high):
        assert (interval.value - end) ** 2 == pytest.approx(Z**2 * end * (1 - end) / n, abs=1e-12)
    assert interval.low <= interval.value <= interval.high


def test_wilson_known_values():
    assert wilson(0, 10).high == pytest.approx(Z**2 / (10 + Z**2))
    # Newcombe 1998, table I, method 3: 81/263 -> 0.2553 to 0.3662.
    assert (wilson(81, 263).low, wilson(81, 263).high) == (
        pytest.approx(0.2553, abs=5e-5),
        pytest.approx(0.3662, abs=5e-5),
    )


def test_nothing_is_claimed_about_nothing():
    assert math.isnan(wilson(0, 0).value)
    assert math.isnan(bootstrap_mean([]).value)
    one = bootstrap_mean([0.4])
    assert one.value == 0.4 and math.isnan(one.low) and math.isnan(one.high)


def test_wilson_covers_the_truth_as_often_as_it_says():
    draws = np.random.default_rng(0).binomial(50, 0.1, size=4000)
    ends = {k: wilson(int(k), 50) for k in np.unique(draws)}
    covered = np.mean([ends[k].low <= 0.1 <= ends[k].high for k in draws])
    assert 0.93 < covered < 0.98


def test_bootstrap_agrees_with_scipy_and_repeats():
    values = np.random.default_rng(1).beta(2, 1, size=60)
    ours = bootstrap_mean(values)
    theirs = stats.bootstrap((values,), np.mean, n_resamples=20_000, method="percentile", random_state=3)
    assert ours.low == pytest.approx(theirs.confidence_interval.low, abs=0.004)
    assert ours.high == pytest.approx(theirs.confidence_interval.high, abs=0.004)
    assert ours == bootstrap_mean(values)
    assert ours != bootstrap_mean(values, seed=1)


def test_bootstrap_covers_the_truth_as_often_as_it_says():
    rng = np.random.default_rng(2)
    intervals = [bootstrap_mean(rng.uniform(size=25), seed=i) for i in range(100)]
    covered = np.mean([i.low <= 0.5 <= i.high for i in intervals])
    assert 0.88 < covered < 0.99


def test_mcnemar_known_values():
    assert mcnemar(1, 9) == pytest.approx(2 * (1 + 10) / 2**10)
    assert mcnemar(9, 1) == mcnemar(1, 9)
    assert mcnemar(4, 4) == 1.0
    assert mcnemar(0, 0) == 1.0


def test_pairs_show_what_unpaired_intervals_hide():
    hard = np.random.default_rng(3).uniform(size=50)  # seeds differ much more than policies do
    a, b = np.clip(hard + 0.05, 0, 1), hard
    result = paired_difference(a, b, a > 0.9, b > 0.9)
    assert 0 < result.score.low < result.score.value < result.score.high
    assert bootstrap_mean(a).low < bootstrap_mean(b).high
    assert result.score.value == pytest.approx((a - b).mean())


def test_discordant_episodes_are_counted_by_who_won():
    a = [True, True, True, False, False]
    b = [True, False, False, True, False]
    result = paired_difference([1] * 5, [0] * 5, a, b)
    assert (result.both, result.only_a, result.only_b, result.neither, result.n) == (1, 2, 1, 1, 5)
    assert result.p_value == mcnemar(2, 1)
    assert result.success.value == pytest.approx(0.2)
