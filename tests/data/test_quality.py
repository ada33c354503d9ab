"""Quality measures against closed forms and against data of known quality."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import matplotlib.image
import numpy as np
import pytest

from robopolicy.cli.data_questions import add_verbs
from robopolicy.data.neighbours import entropy, local_linear_residuals, other_episode_neighbours
from robopolicy.data.quality import Quality, Scale, Trajectories, assess, measure, quality_table
from robopolicy.data.schema import ArraySpec
from robopolicy.data.store import EpisodeStore
from robopolicy.errors import UserError

A = np.array([[0.9, 0.1], [-0.1, 0.9]])
B = np.array([0.0, 0.5])
GAIN = np.array([-0.3, -0.4])
STEPS = 40


def linear_gaussian(episodes: int, action_noise: float, state_noise: float, seed: int = 0) -> Trajectories:
    """x' = A x + B u + w with u = K x + v: action variance and transition variance are those of v and w."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(episodes, 2))
    states, actions = [], []
    for _ in range(STEPS):
        u = x @ GAIN + action_noise * rng.normal(size=episodes)
        states.append(x)
        actions.append(u)
        x = x @ A.T + u[:, None] * B + state_noise * rng.normal(size=(episodes, 2))
    return Trajectories(
        "linear",
        np.stack(states, axis=1).reshape(-1, 2),
        np.stack(actions, axis=1).reshape(-1, 1),
        np.repeat(np.arange(episodes), STEPS),
        ("p", "q"),
        ("u",),
    )


def test_episodes_of_one_step_have_no_transition_to_judge() -> None:
    data = linear_gaussian(12, 0.1, 0.05)
    with_singles = Trajectories(
        data.name,
        np.concatenate([data.states, data.states[:2]]),
        np.concatenate([data.actions, data.actions[:2]]),
        np.concatenate([data.episodes, [12, 13]]),
        data.state_columns,
        data.action_columns,
    )
    quality = quality_of(with_singles)
    diversity = quality.measures["transition diversity"]
    assert np.isnan(diversity.episodes[12:]).all() and np.isfinite([diversity.low, diversity.high]).all()
    assert not {12, 13} & set(diversity.outliers().tolist())
    stored = json.loads(json.dumps(quality.to_dict(), allow_nan=False))
    assert stored["measures"]["transition diversity"]["episodes"][12:] == [None, None]


def quality_of(data: Trajectories) -> Quality:
    return measure(data, Scale.of([data]))


def write(path: Path, data: Trajectories, scale: float = 1.0) -> Path:
    arrays = (
        ArraySpec("observation.state", (2,), "float32", "state", names=data.state_columns),
        ArraySpec("action", (1,), "float32", "action", names=data.action_columns),
    )
    with EpisodeStore.create(path, arrays, fps=10) as store:
        for episode in range(data.n_episodes):
            mine = data.episodes == episode
            values = {"observation.state": scale * data.states[mine], "action": scale * data.actions[mine]}
            store.append({key: value.astype(np.float32) for key, value in values.items()})
    return path


@pytest.mark.parametrize(("action_noise", "state_noise"), [(0.05, 0.02), (0.2, 0.02), (0.05, 0.1)])
def test_estimates_are_the_noise_of_a_linear_gaussian_system(action_noise: float, state_noise: float) -> None:
    found = quality_of(linear_gaussian(100, action_noise, state_noise))
    assert found.action_noise["u"] == pytest.approx(action_noise, rel=0.03)
    assert found.transition_noise == pytest.approx({"p": state_noise, "q": state_noise}, rel=0.05)


def test_estimates_vanish_for_a_deterministic_expert_and_system() -> None:
    found = quality_of(linear_gaussian(50, 0.0, 0.0))
    assert max(*found.action_noise.values(), *found.transition_noise.values()) < 1e-3


def test_share_is_the_noise_over_the_spread() -> None:
    data = linear_gaussian(100, 0.2, 0.02)
    share = quality_of(data).measures["action divergence"].value
    assert share == pytest.approx(0.2 / data.actions.std(), rel=0.03)


def test_a_curved_policy_converges_with_more_data() -> None:
    def error(episodes: int) -> float:
        data = linear_gaussian(episodes, 0.05, 0.1)
        curved = np.sin(1.5 * data.states[:, :1]) + 0.05 * np.random.default_rng(1).normal(size=data.actions.shape)
        found = quality_of(Trajectories("c", data.states, curved, data.episodes, ("p", "q"), ("u",)))
        return abs(found.action_noise["u"] - 0.05)

    few, many = error(8), error(200)
    assert many < 0.2 * few
    assert many < 0.005


def test_measures_do_not_depend_on_units() -> None:
    data = linear_gaussian(20, 0.1, 0.05)
    in_millimetres = Trajectories("mm", 1000 * data.states, 7 * data.actions, data.episodes, ("p", "q"), ("u",))
    for name, found in quality_of(data).measures.items():
        other = quality_of(in_millimetres).measures[name]
        assert (other.value, other.low, other.high) == pytest.approx((found.value, found.low, found.high))


def test_interval_over_episodes_holds_the_value_and_shrinks() -> None:
    few, many = (quality_of(linear_gaussian(n, 0.1, 0.05)).measures["action divergence"] for n in (10, 160))
    for found in (few, many):
        assert found.low < found.value < found.high
    assert many.high - many.low < 0.5 * (few.high - few.low)


def test_the_careless_episode_stands_out_at_the_right_time() -> None:
    data = linear_gaussian(40, 0.05, 0.02)
    late = (data.episodes == 7) & (np.arange(len(data.episodes)) % STEPS >= STEPS // 2)
    data.actions[late] += 0.3 * np.random.default_rng(1).choice([-1, 1], size=(late.sum(), 1))
    found = quality_of(data)
    assert found.measures["action divergence"].outliers().tolist()[0] == 7
    first, second = np.split(found.measures["action divergence"].phases, 2)
    assert second.mean() > 1.2 * first.mean()
    assert "episode    7  action divergence" in quality_table([found])


def test_entropy_of_a_normal_distribution() -> None:
    points = np.random.default_rng(0).normal(size=(4000, 3)) * [1.0, 2.0, 0.5]
    steps = np.arange(1000)
    _, distance = other_episode_neighbours(points, np.arange(4000), steps, 4)
    exact = 1.5 * np.log(2 * np.pi * np.e)  # the three deviations multiply to 1
    assert entropy(distance[:, 3], np.array(3999), 4, 3).mean() == pytest.approx(exact, abs=0.1)


def test_neighbours_are_the_nearest_of_other_episodes() -> None:
    rng = np.random.default_rng(0)
    points, episodes = rng.normal(size=(300, 2)), np.repeat([0, 1, 2], [250, 30, 20])
    points[episodes == 0] *= 0.01  # the large episode crowds around the others' steps
    steps = np.array([0, 100, 260, 299])
    index, distance = other_episode_neighbours(points, episodes, steps, 10)
    for row, step in enumerate(steps):
        apart = np.linalg.norm(points - points[step], axis=1)
        apart[episodes == episodes[step]] = np.inf
        np.testing.assert_array_equal(index[row], np.argsort(apart)[:10])
        np.testing.assert_allclose(distance[row], np.sort(apart)[:10])


def test_regression_follows_a_slope_exactly() -> None:
    points = np.random.default_rng(0).normal(size=(500, 2))
    near, _ = other_episode_neighbours(points, np.arange(500), np.arange(50), 20)
    residuals = local_linear_residuals(points, points @ [[1.0], [-2.0]], np.arange(50), near)
    assert np.abs(residuals).max() < 0.02


def test_disturbed_recordings_show_more_transition_diversity_and_careless_ones_more_divergence(tmp_path: Path) -> None:
    pytest.importorskip("robopolicy_sim")
    from robopolicy.data.record import record_demonstrations

    paths = [tmp_path / "calm.zarr", tmp_path / "disturbed.zarr", tmp_path / "careless.zarr"]
    for path, noise in zip(paths[:2], (0.0, 0.05), strict=True):
        record_demonstrations("robopolicy_sim/PushPuck-v0", path, episodes=15, noise=noise, progress=False)
    rng = np.random.default_rng(0)
    calm = EpisodeStore.open(paths[0])
    with EpisodeStore.create(paths[2], list(calm.schema.arrays.values()), fps=10) as careless:
        for episode in map(calm.episode, range(calm.n_episodes)):
            shaking = 0.03 * rng.normal(size=episode["action"].shape).astype(np.float32)
            careless.append({**episode, "action": episode["action"] + shaking})
    steady, disturbed, shaky = ({n: m.value for n, m in q.measures.items()} for q in assess(paths))
    assert disturbed["transition diversity"] > 1.5 * steady["transition diversity"]
    assert shaky["action divergence"] > 1.5 * steady["action divergence"]


def test_command_compares_datasets_and_draws(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    good = write(tmp_path / "good.zarr", linear_gaussian(12, 0.05, 0.02))
    poor = write(tmp_path / "poor.zarr", linear_gaussian(12, 0.3, 0.02))
    assert run("quality", good, poor, "--out", tmp_path / "pictures") == 0
    text = capsys.readouterr().out
    assert "good.zarr" in text and "poor.zarr" in text and "action divergence" in text
    assert np.std(matplotlib.image.imread(tmp_path / "pictures" / "quality.png")[..., :3]) > 0.02
    assert run("quality", good, poor, "--json", "--keys", "observation.state") == 0
    first, second = json.loads(capsys.readouterr().out)
    assert second["measures"]["action divergence"]["value"] > 2 * first["measures"]["action divergence"]["value"]
    assert len(first["measures"]["state entropy"]["episodes"]) == 12


def test_unusable_datasets_are_refused_with_advice(tmp_path: Path) -> None:
    path = write(tmp_path / "d.zarr", linear_gaussian(3, 0.05, 0.02))
    with pytest.raises(UserError, match="no array 'observation.stat'. Did you mean 'observation.state'"):
        assess([path], ["observation.stat"])
    with pytest.raises(UserError, match="found 1 episodes"):
        assess([write(tmp_path / "one.zarr", linear_gaussian(1, 0.05, 0.02))])
    with pytest.raises(UserError, match="state columns"):
        assess([path, write(tmp_path / "b.zarr", _renamed(linear_gaussian(3, 0.05, 0.02)))])
    with pytest.raises(UserError, match="all states are the same"):
        assess([write(tmp_path / "still.zarr", linear_gaussian(3, 0.05, 0.02), scale=0.0)])


def _renamed(data: Trajectories) -> Trajectories:
    return Trajectories(data.name, data.states, data.actions, data.episodes, ("p", "speed"), data.action_columns)


def run(*words: object) -> int:
    parser = argparse.ArgumentParser(prog="robopolicy data")
    add_verbs(parser.add_subparsers(required=True))
    args = parser.parse_args([*map(str, words)])
    return args.run(args)
