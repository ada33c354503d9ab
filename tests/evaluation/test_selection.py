from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from scipy import stats

from robopolicy.errors import UserError
from robopolicy.evaluation.features import EncodedObservations
from robopolicy.evaluation.selection import (
    Candidate,
    familiarity,
    mahalanobis_distances,
    neighbour_distances,
    select,
)

COVARIANCE = np.array([[4.0, 1.2, 0.0], [1.2, 1.0, -0.3], [0.0, -0.3, 0.25]])


def gaussian(rng: np.random.Generator, n: int, shift: float = 0.0) -> np.ndarray:
    return rng.multivariate_normal([1.0, -2.0, shift], COVARIANCE, size=n)


def encoded(features: np.ndarray, episodes: int = 20) -> EncodedObservations:
    return EncodedObservations(features, np.arange(len(features)) * episodes // len(features))


def test_squared_mahalanobis_distances_of_a_gaussian_are_chi_square():
    rng = np.random.default_rng(0)
    squared = mahalanobis_distances(gaussian(rng, 4000), gaussian(rng, 20_000)) ** 2
    assert squared.mean() == pytest.approx(3, rel=0.05)
    assert stats.kstest(squared, stats.chi2(df=3).cdf).pvalue > 0.01


def test_a_shift_adds_its_squared_mahalanobis_length():
    rng = np.random.default_rng(1)
    squared = mahalanobis_distances(gaussian(rng, 4000, shift=2.0), gaussian(rng, 20_000)) ** 2
    length = 2.0**2 * np.linalg.inv(COVARIANCE)[2, 2]
    assert squared.mean() == pytest.approx(3 + length, rel=0.05)  # mean of the non-central chi-square


@pytest.mark.parametrize("distances", [mahalanobis_distances, neighbour_distances])
def test_distances_do_not_depend_on_units_or_on_dead_features(distances):
    rng = np.random.default_rng(2)
    reference, features = gaussian(rng, 500), gaussian(rng, 100, shift=1.0)
    plain = distances(features, reference)
    np.testing.assert_allclose(distances(1000 * features + 7, 1000 * reference + 7), plain, rtol=1e-6)
    dead = [np.pad(x, ((0, 0), (0, 1)), constant_values=0.3) for x in (features, reference)]
    np.testing.assert_allclose(distances(*dead), plain, rtol=1e-6)


def test_mahalanobis_distances_do_not_depend_on_the_basis():
    rng = np.random.default_rng(3)
    reference, features, mixing = gaussian(rng, 500), gaussian(rng, 100), rng.normal(size=(3, 3))
    np.testing.assert_allclose(
        mahalanobis_distances(features @ mixing, reference @ mixing), mahalanobis_distances(features, reference)
    )


def test_a_feature_that_never_moved_in_training_does_not_outweigh_all_others():
    rng = np.random.default_rng(4)
    reference = np.pad(gaussian(rng, 2000), ((0, 0), (0, 1)))
    noise = rng.normal(0, 1e-4, size=2000)
    moved = np.column_stack([gaussian(rng, 2000), noise])
    assert mahalanobis_distances(moved, reference).mean() == pytest.approx(np.sqrt(3), rel=0.1)


def test_neighbour_distances_by_hand():
    reference = np.arange(11.0)[:, None]
    scale = reference.std()
    # The fifth nearest of 0..10 to 4.9 is 7 (distances 0.1, 0.9, 1.1, 1.9, 2.1); to 20 it is 6.
    np.testing.assert_allclose(neighbour_distances(np.array([[4.9], [20.0]]), reference), np.array([2.1, 14.0]) / scale)


def test_neighbours_know_clusters_that_a_gaussian_does_not():
    rng = np.random.default_rng(5)
    clusters = rng.choice([-5.0, 5.0], size=(1000, 1)) + 0.1 * rng.normal(size=(1000, 1))
    between, inside = np.zeros((1, 1)), np.full((1, 1), 5.0)
    assert mahalanobis_distances(between, clusters) < mahalanobis_distances(inside, clusters)
    assert neighbour_distances(between, clusters) > 10 * neighbour_distances(inside, clusters)


def test_familiarity_is_a_ratio_of_at_most_one():
    assert familiarity(np.array([1.0, 3.0]), np.array([8.0, 8.0])) == 0.25
    assert familiarity(np.array([2.0]), np.array([1.0])) == 1.0
    assert familiarity(np.array([2.0]), np.array([0.0])) == 1.0
    assert familiarity(np.array([0.0]), np.array([0.0])) == 1.0
    assert familiarity(np.array([0.0]), np.array([3.0])) == 0.0


def real_success(estimate: np.ndarray, target: np.ndarray) -> float:
    return float(np.mean(np.abs(estimate - target) < 0.6))


@pytest.mark.parametrize("distance", ["mahalanobis", "neighbours"])
def test_simulation_alone_chooses_wrongly_familiarity_alone_cannot_tell_together_they_choose_rightly(distance: str):
    """A toy reaching task: the target must be estimated from what an encoder passes on.

    The shading gives the target away in the simulation and is different in reality; the outline is noisier and the
    same in both; one policy looks at neither.
    """
    rng = np.random.default_rng(0)

    def world(n: int, lamp: float) -> dict[str, np.ndarray]:
        target = rng.normal(size=n)
        return {
            "target": target,
            "shading": target + lamp + 0.1 * rng.normal(size=n),
            "outline": target + 0.4 * rng.normal(size=n),
            "nothing": rng.normal(size=n),
        }

    training, simulation, reality = world(1000, lamp=0), world(400, lamp=0), world(400, lamp=2.5)
    successes, candidates = {}, []
    for cue in ("shading", "outline", "nothing"):
        slope, offset = np.polyfit(training[cue], training["target"], 1)  # behaviour cloning from this cue
        score = {
            name: real_success(slope * w[cue] + offset, w["target"])
            for name, w in (("sim", simulation), ("real", reality))
        }
        successes[cue] = score
        features = [encoded(w[cue][:, None]) for w in (training, reality)]
        candidates.append(Candidate(cue, round(score["sim"] * 400), 400, *features))
    choices = {choice.name: choice for choice in select(candidates, distance=distance)}
    best_real = max(successes, key=lambda cue: successes[cue]["real"])
    assert best_real == "outline"
    assert max(successes, key=lambda cue: successes[cue]["sim"]) == "shading"
    assert choices["shading"].simulated_rank == 1
    assert choices["nothing"].simulated_rank == 3
    # Strange observations do not reach the policy that looks at nothing.
    assert abs(choices["nothing"].familiarity.value - choices["outline"].familiarity.value) < 0.25
    assert choices["shading"].familiarity.value < 0.6 * choices["nothing"].familiarity.value
    assert choices["outline"].rank == 1
    assert choices["outline"].chance > 0.95
    assert choices["shading"].outside > 0.5 > 0.15 > choices["outline"].outside


def test_intervals_hold_the_spread_of_episodes_not_of_steps():
    """Steps of an episode are alike: with few episodes the interval is wide however many steps there are."""
    rng = np.random.default_rng(0)

    def of(episodes: int, steps: int = 50) -> EncodedObservations:
        centres = rng.normal(size=(episodes, 1, 2))
        return EncodedObservations(
            (centres + 0.05 * rng.normal(size=(episodes, steps, 2))).reshape(-1, 2),
            np.repeat(np.arange(episodes), steps),
        )

    training = of(200)
    widths = []
    for episodes in (4, 64):
        real = of(episodes)
        real = replace(real, features=2 * real.features)
        (choice,) = select([Candidate("a", 50, 100, training, real)])
        widths.append(choice.familiarity.high - choice.familiarity.low)
    assert widths[0] > 2 * widths[1]


def test_ties_share_a_rank_and_the_same_seed_gives_the_same_numbers():
    rng = np.random.default_rng(0)
    training, real = encoded(gaussian(rng, 200)), encoded(gaussian(rng, 100))
    twins = [Candidate(name, 8, 10, training, real) for name in ("a", "b")]
    first, second = select(twins)
    assert first.rank == second.rank == 1
    assert first.chance + second.chance == 1
    assert select(twins) == (first, second)


def test_tied_resamples_count_for_all_who_tie():
    """Policies that always succeed on familiar observations tie in most resamples, whoever is named first."""
    rng = np.random.default_rng(0)
    features = gaussian(rng, 200)
    calm = encoded(features.mean(axis=0) + 0.01 * (features[:100] - features.mean(axis=0)))
    choices = select([Candidate(name, 10, 10, encoded(features), calm) for name in ("a", "b", "c")])
    assert [c.familiarity.value for c in choices] == [1, 1, 1]
    assert [c.chance for c in choices] == pytest.approx([1 / 3] * 3, abs=0.04)


def test_candidates_that_cannot_be_ranked():
    rng = np.random.default_rng(0)
    training, real = encoded(gaussian(rng, 200)), encoded(gaussian(rng, 100))
    candidate = Candidate("a", 8, 10, training, real)
    with pytest.raises(UserError, match="different names"):
        select([candidate, candidate])
    with pytest.raises(UserError, match="'mahalanobi'. Did you mean 'mahalanobis'"):
        select([candidate], distance="mahalanobi")
    with pytest.raises(UserError, match="'a': 200 observations of 1 training episodes are too few"):
        select([replace(candidate, training=encoded(gaussian(rng, 200), episodes=1))])
    with pytest.raises(UserError, match="not finite"):
        encoded(np.full((3, 2), np.nan))
