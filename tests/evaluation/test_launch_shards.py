import pytest

from robopolicy.errors import UserError
from robopolicy.evaluation.launch.launcher import player
from robopolicy.evaluation.launch.shards import describe_seeds, split_seeds


def test_shards_follow_the_order_of_the_seeds():
    assert split_seeds([7, 3, 9, 1, 4], 2) == [(7, 3), (9, 1), (4,)]
    assert split_seeds(range(100, 103), 50) == [(100, 101, 102)]


def test_the_first_shards_of_a_longer_evaluation_are_those_of_a_shorter_one():
    assert split_seeds(range(100), 25)[:2] == split_seeds(range(50), 25)


@pytest.mark.parametrize("seeds, shard_size, message", [([], 5, "each seed once"), ([1], 0, "shard_size=0")])
def test_what_cannot_be_cut_is_refused(seeds, shard_size, message):
    with pytest.raises(UserError, match=message):
        split_seeds(seeds, shard_size)


def test_seeds_are_described_briefly():
    assert describe_seeds((5, 6, 7, 8)) == "5 to 8"
    assert describe_seeds((5, 7)) == "5, 7"


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"launcher": "rya"}, "no launcher 'rya'. Did you mean 'ray'"),
        ({"launcher": "local", "threads": 0}, "threads=0"),
        ({"launcher": "ray", "ray_gpus": 0}, "ray_gpus=0"),
    ],
)
def test_impossible_settings_of_a_launcher_are_refused(settings, message):
    with pytest.raises(UserError, match=message):
        player(**settings)
