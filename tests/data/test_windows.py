import numpy as np
import pytest

from robopolicy.data.windows import build_windows, split_episodes
from robopolicy.errors import UserError


def published_indices(lengths, horizon, pad_before, pad_after):
    """The sampling convention written as the plainest loop: every window as the list of its steps."""
    windows, first = [], 0
    for length in lengths:
        for start in range(-pad_before, length - horizon + pad_after + 1):
            windows.append([first + min(max(start + i, 0), length - 1) for i in range(horizon)])
        first += length
    return np.array(windows)


@pytest.mark.parametrize("lengths", [[30], [5, 40, 17], [8, 1, 25]])
@pytest.mark.parametrize(("horizon", "pad_before", "pad_after"), [(16, 1, 7), (4, 0, 0), (8, 3, 7)])
def test_windows_are_the_published_ones(lengths, horizon, pad_before, pad_after):
    table = build_windows(np.cumsum(lengths), horizon, pad_before, pad_after)
    expected = published_indices(lengths, horizon, pad_before, pad_after)
    np.testing.assert_array_equal(table.steps(np.arange(len(table)), horizon), expected)


def test_number_of_windows_per_episode():
    table = build_windows(np.array([50, 80]), horizon=16, pad_before=1, pad_after=7)
    assert np.bincount(table.episode).tolist() == [50 - 16 + 1 + 8, 30 - 16 + 1 + 8]


def test_windows_of_chosen_episodes_stay_inside_them():
    table = build_windows(np.array([20, 45, 70]), 8, 1, 3, episodes=np.array([False, True, False]))
    steps = table.steps(np.arange(len(table)), 8)
    assert steps.min() == 20 and steps.max() == 44
    assert set(table.episode) == {1}


def test_no_window_is_an_error_that_names_the_lengths():
    with pytest.raises(UserError, match="longest has 4 steps.*needs at least 8"):
        build_windows(np.array([4, 7]), horizon=16, pad_before=1, pad_after=7)


def test_pusht_has_the_published_number_of_windows(pusht_zarr):
    from robopolicy.data.store import EpisodeStore

    ends = EpisodeStore.open(pusht_zarr).episode_ends
    table = build_windows(ends, 16, 1, 7)
    assert len(table) == 25650 - 206 * 7


def test_split_is_the_published_draw():
    training, validation = split_episodes(206, 0.02, seed=42, max_train_episodes=90)
    drawn = np.random.default_rng(42).choice(206, size=4, replace=False)
    assert set(np.flatnonzero(validation)) == set(drawn)
    assert training.sum() == 90 and not (training & validation).any()


def test_split_without_validation_uses_everything():
    training, validation = split_episodes(10, 0.0, seed=0)
    assert training.all() and not validation.any()


def test_split_never_holds_everything_out():
    training, validation = split_episodes(2, 0.99, seed=0)
    assert training.sum() == 1 and validation.sum() == 1
