"""DORAEMON: its formulas against quadrature, its steps against the known optimum of a toy."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats
from scipy.integrate import quad
from scipy.optimize import approx_fprime
from scipy.special import betainc, betaln, digamma

from robopolicy.evaluation.doraemon import Betas, Update, _divergence, _entropy, _importance_mean, update

ALPHA, EPSILON = 0.9, 0.3
EDGE = 0.6  # the toy succeeds below


def betas(*shapes: tuple[float, float], ends: tuple[float, float] = (0.0, 1.0)) -> Betas:
    return Betas(tuple("abcdef"[: len(shapes)]), np.array([ends] * len(shapes)), np.array(shapes))


def run(start: Betas, iterations: int, succeeds, n: int = 2000, alpha: float = ALPHA) -> list[Update]:
    rng = np.random.default_rng(0)
    steps: list[Update] = []
    current = start
    for _ in range(iterations):
        values = current.sample(n, rng)
        steps.append(update(current, values, succeeds(values), min_success=alpha, max_divergence=EPSILON))
        current = steps[-1].betas
    return steps


def below_the_edge(values: np.ndarray) -> np.ndarray:
    return (values < EDGE).all(axis=1)


def test_entropy_is_that_of_scipy_in_the_units_of_the_parameter():
    found = betas((2.0, 5.0), (1.0, 1.0), ends=(0.5, 2.5))
    wanted = stats.beta(2, 5, 0.5, 2).entropy() + np.log(2)
    assert found.entropy() == pytest.approx(wanted)
    assert betas((1.0, 1.0), ends=(0.5, 2.5)).entropy() == pytest.approx(found.highest_entropy() / 2)


def test_divergence_is_the_integral():
    p, q = stats.beta(2.5, 4), stats.beta(7, 3)
    wanted, _ = quad(lambda x: p.pdf(x) * (p.logpdf(x) - q.logpdf(x)), 0, 1)
    assert betas((2.5, 4.0)).divergence(betas((7.0, 3.0))) == pytest.approx(wanted, rel=1e-6)
    assert betas((2.5, 4.0)).divergence(betas((2.5, 4.0))) == pytest.approx(0, abs=1e-12)


def test_importance_sampling_estimates_another_distribution():
    rng = np.random.default_rng(1)
    old, new = np.array([[4.0, 6.0]]), np.array([[3.0, 4.0]])
    shares = betas((4.0, 6.0)).sample(200_000, rng)
    found, _ = _importance_mean(new, old, shares, below_the_edge(shares))
    assert found == pytest.approx(stats.beta(3, 4).cdf(EDGE), abs=0.005)


def test_gradients_agree_with_differences():
    rng = np.random.default_rng(2)
    old, new = rng.uniform(1, 9, (2, 3, 2))
    shares = rng.uniform(0.05, 0.95, (50, 3))
    succeeded = rng.integers(0, 2, 50)
    for value in (
        _entropy,
        lambda shapes: _divergence(shapes, old),
        lambda shapes: _importance_mean(shapes, old, shares, succeeded),
    ):
        numeric = approx_fprime(new.ravel(), lambda x, f=value: f(x.reshape(3, 2))[0], 1e-6)
        np.testing.assert_allclose(value(new)[1].ravel(), numeric, rtol=1e-3, atol=1e-4)


def best_entropy(alpha: float) -> float:
    """Of all Beta distributions on [0, 1] that lie below the edge with this probability, by a grid."""
    a, b = np.meshgrid(np.linspace(1, 6, 201), np.linspace(1, 6, 201))
    allowed = betainc(a, b, EDGE) >= alpha
    entropy = betaln(a, b) - (a - 1) * digamma(a) - (b - 1) * digamma(b) + (a + b - 2) * digamma(a + b)
    return float(entropy[allowed].max())


def test_entropy_grows_until_the_success_rate_binds():
    steps = run(Betas.around({"a": (0.0, 0.3, 1.0)}), 15, below_the_edge)
    entropies = np.array([step.betas.entropy() for step in steps])
    best = best_entropy(ALPHA)
    growing = entropies[: np.argmax(entropies > best - 0.2)]
    assert len(growing) >= 2 and (np.diff(growing) > 0.1).all()
    np.testing.assert_allclose(entropies[-5:], best, atol=0.06)
    for step in steps[-5:]:
        assert stats.beta.cdf(EDGE, *step.betas.shapes[0]) == pytest.approx(ALPHA, abs=0.03)


def test_no_step_leaves_the_trust_region():
    steps = run(Betas.around({"a": (0.0, 0.3, 1.0), "b": (0.0, 0.3, 1.0)}), 8, below_the_edge)
    assert all(step.divergence <= EPSILON + 1e-5 for step in steps)
    assert max(step.divergence for step in steps[:2]) > 0.99 * EPSILON


def test_what_always_succeeds_ends_uniform():
    steps = run(Betas.around({"a": (0.0, 0.3, 1.0)}), 8, lambda values: np.ones(len(values), bool))
    np.testing.assert_allclose(steps[-1].betas.shapes, 1.0, atol=0.05)


def test_from_a_bad_start_success_comes_first():
    steps = run(Betas.around({"a": (0.0, 0.75, 1.0)}, concentration=20), 12, below_the_edge)
    rates = [stats.beta.cdf(EDGE, *step.betas.shapes[0]) for step in steps]
    assert steps[0].goal == "success" and rates[0] > stats.beta.cdf(EDGE, 15, 5)
    assert steps[-1].goal == "entropy"
    assert rates[-1] == pytest.approx(ALPHA, abs=0.04)


def test_only_the_harmful_parameter_stays_narrow():
    steps = run(
        Betas.around({"harmful": (0.0, 0.3, 1.0), "harmless": (0.0, 0.3, 1.0)}),
        14,
        lambda values: values[:, 0] < EDGE,
        n=4000,
    )
    harmful, harmless = steps[-1].betas.shapes
    np.testing.assert_allclose(harmless, 1.0, atol=0.25)
    assert stats.beta.cdf(EDGE, *harmful) == pytest.approx(ALPHA, abs=0.04)


def test_the_randomization_is_what_environments_take():
    found = Betas.around({"friction": (0.2, 1.0, 1.8), "action_latency": (0.0, 0.0, 0.2)}, concentration=10)
    assert found.randomization() == {
        "friction": {"beta": [5, 5, 0.2, 1.8]},
        "action_latency": {"beta": [1, 10, 0, 0.2]},
    }
