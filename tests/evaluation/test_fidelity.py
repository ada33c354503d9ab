"""The measures give the numbers that SIMPLER published for its own rates (Li et al. 2024, visual matching)."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from robopolicy.errors import UserError
from robopolicy.evaluation.fidelity import (
    fidelity,
    kendall_tau_b,
    kruskal_wallis,
    mmrv,
    pearson,
    spearman,
    wrong_pairs,
)
from robopolicy.evaluation.rates import SuccessRates

GOOGLE_ROBOT = ("rt-2-x", "rt-1-converged", "rt-1-15pct", "rt-1-x", "rt-1-begin", "octo-base")

# Task: real rates, simulated rates, MMRV, Pearson r, MMRV with the arguments swapped; rates printed to three digits.
PUBLISHED = {
    "pick coke can": (
        [0.907, 0.853, 0.920, 0.760, 0.133, 0.293],
        [0.787, 0.857, 0.710, 0.567, 0.027, 0.170],
        (0.031, 0.975, 0.062),
    ),
    "move near": (
        [0.733, 0.633, 0.583, 0.450, 0.017, 0.350],
        [0.779, 0.442, 0.354, 0.317, 0.050, 0.042],
        (0.111, 0.856, 0.003),
    ),
    "open drawer": (
        [0.333, 0.815, 0.704, 0.519, 0.000, 0.148],
        [0.157, 0.601, 0.463, 0.296, 0.000, 0.009],
        (0.000, 0.983, 0.000),
    ),
    "close drawer": (
        [0.630, 0.926, 0.889, 0.741, 0.000, 0.519],
        [0.343, 0.861, 0.667, 0.891, 0.278, 0.444],
        (0.123, 0.771, 0.113),
    ),
    "apple in top drawer": (
        [0.074, 0.185, 0.185, 0.407, 0.000, 0.000],
        [0.037, 0.065, 0.130, 0.213, 0.000, 0.000],
        (0.000, 0.969, 0.011),
    ),
    "spoon on towel": ([0.000, 0.333, 0.417], [0.000, 0.125, 0.472], (0.000, 0.827, 0.000)),
    "carrot on plate": ([0.000, 0.250, 0.083], [0.042, 0.083, 0.097], (0.111, 0.571, 0.009)),
    "stack cube": ([0.000, 0.000, 0.125], [0.000, 0.000, 0.042], (0.000, 1.000, 0.000)),
    "eggplant in basket": ([0.000, 0.250, 0.400], [0.000, 0.431, 0.569], (0.000, 0.989, 0.000)),
}


def table(rates, n=0, names=None) -> SuccessRates:
    names = names or tuple(f"policy {i}" for i in range(len(rates)))
    return SuccessRates("table", names, np.array(rates, dtype=float), np.full(len(rates), n))


@pytest.mark.parametrize(("real", "simulated", "printed"), PUBLISHED.values(), ids=PUBLISHED.keys())
def test_published_rates_give_the_published_numbers(real, simulated, printed):
    assert round(float(mmrv(real=real, simulated=simulated)), 3) == printed[0]
    assert round(float(pearson(real=real, simulated=simulated)), 3) == printed[1]
    assert round(float(mmrv(real=simulated, simulated=real)), 3) == printed[2]  # swapped: another number


def test_published_drawer_average():
    real, simulated = [0.482, 0.870, 0.796, 0.630, 0.000, 0.334], [0.250, 0.731, 0.565, 0.594, 0.139, 0.226]
    assert round(float(mmrv(real=real, simulated=simulated)), 3) == 0.055
    # Published as 0.916; these averages are rounded twice and give 0.9154.
    assert float(pearson(real=real, simulated=simulated)) == pytest.approx(0.916, abs=1e-3)


def test_arguments_have_names_because_their_order_matters():
    real, simulated, _ = PUBLISHED["move near"]
    with pytest.raises(TypeError):
        mmrv(real, simulated)
    assert mmrv(real=real, simulated=simulated) > 10 * mmrv(real=simulated, simulated=real)


def test_mmrv_by_hand():
    # Only the pair of policies 0 and 1 is reversed: both lose 0.2, policy 2 nothing.
    assert mmrv(real=[0.5, 0.3, 0.9], simulated=[0.1, 0.2, 0.3]) == pytest.approx(0.4 / 3)
    assert mmrv(real=[0.1, 0.2, 0.9], simulated=[0.2, 0.4, 0.5]) == 0
    # A tie in the simulation counts for the better policy only.
    assert mmrv(real=[0.5, 0.3], simulated=[0.4, 0.4]) == pytest.approx(0.2 / 2)


def test_measures_agree_with_scipy_row_by_row():
    rng = np.random.default_rng(0)
    real, simulated = rng.integers(0, 6, size=(2, 50, 8)) / 6  # with ties
    for ours, reference in ((pearson, stats.pearsonr), (spearman, stats.spearmanr), (kendall_tau_b, stats.kendalltau)):
        found = ours(real=real, simulated=simulated)
        wanted = [reference(r, s).statistic for r, s in zip(real, simulated, strict=True)]
        np.testing.assert_allclose(found, wanted, atol=1e-12)


@pytest.mark.parametrize("measure", [pearson, spearman, kendall_tau_b])
def test_a_correlation_with_a_constant_is_not_defined(measure):
    assert np.isnan(measure(real=[0.1, 0.2, 0.3], simulated=[0.7, 0.7, 0.7]))
    assert np.isnan(measure(real=[0.1] * 3, simulated=[0.1, 0.2, 0.3]))


def test_kruskal_wallis_of_two_binary_samples():
    # For two groups H is the tie-corrected square of the rank-sum z, i.e. (N - 1) / N times Pearson's chi-square.
    table_2x2 = np.array([[18, 7], [10, 15]])
    chi_square = stats.chi2_contingency(table_2x2, correction=False).statistic
    found = kruskal_wallis(real_successes=18, real_trials=25, simulated_successes=10, simulated_trials=25)
    assert found == pytest.approx(stats.chi2.sf(chi_square * 49 / 50, df=1))
    assert kruskal_wallis(real_successes=0, real_trials=25, simulated_successes=0, simulated_trials=24) == 1.0
    assert kruskal_wallis(real_successes=25, real_trials=25, simulated_successes=0, simulated_trials=25) < 1e-9


def test_wrong_pairs_are_listed_by_their_size():
    real = table([0.907, 0.853, 0.920, 0.760, 0.133, 0.293], 75, GOOGLE_ROBOT)
    simulated = table([0.787, 0.857, 0.710, 0.567, 0.027, 0.170], 75, GOOGLE_ROBOT)
    pairs = wrong_pairs(real, simulated)
    assert [(p.better, p.worse) for p in pairs] == [
        ("rt-1-15pct", "rt-1-converged"),
        ("rt-2-x", "rt-1-converged"),
        ("rt-1-15pct", "rt-2-x"),
    ]
    assert [p.real for p in pairs] == pytest.approx([0.067, 0.054, 0.013])
    assert [p.simulated for p in pairs] == pytest.approx([-0.147, -0.070, -0.077])
    assert all(p.p_value > 0.2 for p in pairs)  # 75 real trials do not show which of them is better


def test_no_pair_is_wrong_where_the_order_is_the_same_or_reality_has_none():
    assert wrong_pairs(table([0.1, 0.5, 0.5]), table([0.2, 0.3, 0.9])) == ()
    (tied,) = wrong_pairs(table([0.1, 0.5]), table([0.3, 0.3]))
    assert (tied.real, tied.simulated) == (0.4, 0.0)
    assert math.isnan(tied.p_value)


def test_the_headline_and_its_intervals():
    real, simulated, printed = PUBLISHED["pick coke can"]
    found = fidelity(real=table(real, 75, GOOGLE_ROBOT), simulated=table(simulated, 300, GOOGLE_ROBOT))
    r, violation = found.agreement("pearson"), found.agreement("mmrv")
    assert (round(violation.value, 3), round(r.value, 3)) == printed[:2]
    assert r.trials.low < r.value
    assert r.trials.low < r.trials.high <= 1
    assert r.policies.low < r.trials.low  # other policies add spread
    assert 0 <= violation.trials.low <= violation.value <= violation.trials.high
    assert found.kruskal.shape == (6,)
    assert found.kruskal[1] > 0.5 > 0.05 > found.kruskal[2]  # 0.853 and 0.857 agree; 0.920 and 0.710 do not


def test_more_trials_narrow_the_interval():
    real, simulated, _ = PUBLISHED["move near"]

    def width(n: int) -> float:
        interval = fidelity(real=table(real, n), simulated=table(simulated, n)).agreement("pearson").trials
        return interval.high - interval.low

    # The spread of a rate falls with the square root of n.
    assert width(1600) / width(100) == pytest.approx(1 / 4, rel=0.25)


def test_the_interval_over_trials_holds_the_truth_as_often_as_it_says():
    """Known true rates of both sides; 95 % intervals from simulated experiments must hold the true r."""
    true_real, true_simulated = np.array([0.1, 0.3, 0.5, 0.7, 0.9]), np.array([0.3, 0.2, 0.7, 0.5, 0.8])
    truth = float(pearson(real=true_real, simulated=true_simulated))
    rng, n, held = np.random.default_rng(0), 100, []
    for _ in range(40):
        sides = [table(rng.binomial(n, rates) / n, n) for rates in (true_real, true_simulated)]
        interval = fidelity(real=sides[0], simulated=sides[1]).agreement("pearson").trials
        held.append(interval.low <= truth <= interval.high)
    assert np.mean(held) > 0.86  # 0.95 less two and a half standard deviations of 40 draws


def test_a_policy_that_never_fails_is_not_taken_for_one_that_cannot():
    found = fidelity(real=table([0, 0, 1], 10), simulated=table([0, 0, 1], 10)).agreement("mmrv")
    assert found.value == 0
    assert found.trials.high > 0


def test_intervals_that_cannot_be_known_are_not_given():
    real, simulated, _ = PUBLISHED["carrot on plate"]
    few = fidelity(real=table(real, 24), simulated=table(simulated, 24)).agreement("mmrv")
    assert math.isnan(few.policies.low)  # three policies say nothing about others
    assert few.trials.high > few.trials.low
    real, simulated, _ = PUBLISHED["move near"]
    uncounted = fidelity(real=table(real), simulated=table(simulated, 60))
    assert math.isnan(uncounted.agreement("mmrv").trials.low)
    assert uncounted.agreement("mmrv").policies.high > 0
    assert np.isnan(uncounted.kruskal).all()


def test_fewer_than_three_policies_are_refused():
    with pytest.raises(UserError, match="holds 2 policies; agreement needs at least 3"):
        fidelity(real=table([0.1, 0.2]), simulated=table([0.1, 0.2]))


def test_the_same_seed_gives_the_same_intervals():
    tables = {"real": table([0.2, 0.4, 0.9, 0.5, 0.1], 20), "simulated": table([0.3, 0.3, 0.8, 0.6, 0.2], 20)}
    assert fidelity(**tables).agreements == fidelity(**tables).agreements
    assert fidelity(**tables).agreements != fidelity(**tables, seed=1).agreements
