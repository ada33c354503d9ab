from __future__ import annotations

import os
import zlib
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch

from robopolicy.errors import UserError
from robopolicy.evaluation import pusht
from robopolicy.evaluation.environments import PUSHT
from robopolicy.evaluation.rollout import rollout
from robopolicy.spec import PolicySpec

from .conftest import Counter, RandomPusher, Script, same, scripted_environment

SHORT_PUSHT = replace(PUSHT, max_steps=40)
SEEDS = list(range(100_000, 100_006))


def ones(length):
    return lambda seed: [1.0] * length


def play(policy, environment, seeds, **kwargs):
    return rollout(policy, environment, seeds, progress=False, **kwargs)


def test_action_k_of_a_chunk_is_executed_at_step_k():
    (result,) = play(Counter(n_action_steps=3), scripted_environment(Script(ones(8))), [5])
    np.testing.assert_array_equal(result.actions[:, 0], np.arange(8))


def test_history_starts_with_the_first_observation_repeated_and_then_slides():
    policy = Counter(n_obs_steps=4, n_action_steps=2)
    play(policy, scripted_environment(Script(ones(7))), [9])
    times = [seen[0, :, 1].tolist() for seen in policy.seen]
    assert times == [[0, 0, 0, 0], [0, 0, 1, 2], [1, 2, 3, 4], [3, 4, 5, 6]]


def test_history_of_a_new_episode_holds_nothing_of_the_last_one_in_its_slot():
    policy = Counter()
    play(policy, scripted_environment(Script(ones(4))), [1, 2], batch_size=1)
    assert policy.seen[2].tolist() == [[[2, 0], [2, 0]]]


def test_score_is_the_maximum_over_time_and_success_is_kept():
    script = Script(lambda seed: [0.1, 0.9, 0.3], success_at=lambda seed: 2)
    (result,) = play(Counter(), scripted_environment(script), [0])
    assert (result.score, result.success, result.steps) == (0.9, True, 3)
    assert result.episode_return == pytest.approx(1.3)


def test_ended_episodes_cost_no_steps_and_results_keep_the_order_of_the_seeds():
    script = Script(lambda seed: [0.0] * (seed + 1))
    seeds = [7, 0, 3, 11, 1]
    results = play(Counter(), scripted_environment(script), seeds, batch_size=3)
    assert [(r.seed, r.steps) for r in results] == [(seed, seed + 1) for seed in seeds]
    assert script.steps_taken == sum(seed + 1 for seed in seeds)


def test_only_running_episodes_are_in_the_batch():
    policy = Counter(n_action_steps=3)
    play(policy, scripted_environment(Script(lambda seed: [0.0] * seed)), [1, 4, 9], batch_size=3)
    assert [seen[:, 0, 0].tolist() for seen in policy.seen] == [[1, 4, 9], [4, 9], [9]]


def test_a_waiting_seed_takes_the_place_of_an_ended_episode_at_once():
    policy = Counter(n_action_steps=3)
    play(policy, scripted_environment(Script(lambda seed: [0.0] * seed)), [1, 6, 2], batch_size=2)
    assert [seen[:, 0, 0].tolist() for seen in policy.seen] == [[1, 6], [2, 6]]


def test_max_steps_ends_an_episode_inside_a_chunk():
    (result,) = play(Counter(n_action_steps=3), scripted_environment(Script(ones(50)), max_steps=7), [0])
    assert result.steps == 7


def test_a_seed_has_the_same_outcome_at_every_batch_size(pusher):
    reference = play(pusher, SHORT_PUSHT, SEEDS, batch_size=1)
    assert len({r.actions.tobytes() for r in reference}) == len(SEEDS), (
        "the seeds must differ for this to mean anything"
    )
    for batch_size in (4, 6):
        assert same(reference, play(pusher, SHORT_PUSHT, SEEDS, batch_size=batch_size))


def test_a_seed_has_the_same_outcome_in_another_company_and_order(pusher):
    reference = play(pusher, SHORT_PUSHT, SEEDS)
    assert same(reversed(reference), play(pusher, SHORT_PUSHT, SEEDS[::-1], batch_size=4))
    assert same(reference[3:4], play(pusher, SHORT_PUSHT, SEEDS[3:4]))


def test_batches_are_formed_within_shards():
    policy = Counter(n_action_steps=3)
    play(policy, scripted_environment(Script(lambda seed: [0.0] * seed)), [1, 4, 2, 5, 3], shard_size=2)
    assert [seen[:, 0, 0].tolist() for seen in policy.seen] == [[1, 4], [4], [2, 5], [5], [3]]


@dataclass
class BatchReader(RandomPusher):
    """Its actions depend on which rows are in a batch, and in which order, as a network's last digits do."""

    def act(self, observations, generators):
        digest = zlib.crc32(np.ascontiguousarray(observations["observation.state"]).tobytes())
        return super().act(observations, generators) + digest / 2**32


def test_workers_that_play_two_shards_at_a_time_keep_the_batches():
    reference = play(BatchReader(), SHORT_PUSHT, SEEDS, shard_size=2)
    assert same(reference, play(BatchReader(), SHORT_PUSHT, SEEDS, shard_size=2, workers=3))
    assert same(reference[2:4], play(BatchReader(), SHORT_PUSHT, SEEDS[2:4], shard_size=50))
    assert not same(reference, play(BatchReader(), SHORT_PUSHT, SEEDS, shard_size=3)), "or this test means nothing"


def test_the_policy_computes_with_the_threads_asked_for(pusher):
    class Threads(RandomPusher):
        def act(self, observations, generators):
            self.seen = torch.get_num_threads()
            return super().act(observations, generators)

    policy, before = Threads(), torch.get_num_threads()
    play(policy, replace(SHORT_PUSHT, max_steps=8), [3], threads=before + 1)
    assert (policy.seen, torch.get_num_threads()) == (before + 1, before)


@dataclass
class PictureReader(RandomPusher):
    """Its actions depend on every pixel that it is given."""

    spec: PolicySpec = PolicySpec((pusht.STATE, pusht.IMAGE), pusht.ACTION, fps=10)

    def act(self, observations, generators):
        brightness = observations["observation.image.top"].mean(axis=(1, 2, 3, 4))
        return super().act(observations, generators) + brightness[:, None, None]


def test_worker_processes_change_nothing():
    environment = replace(SHORT_PUSHT, max_steps=20)
    reference = play(PictureReader(), environment, SEEDS, batch_size=4)
    assert same(reference, play(PictureReader(), environment, SEEDS, batch_size=4, workers=2))


@dataclass
class Broken(RandomPusher):
    """Predicts numbers that are not finite."""

    def act(self, observations, generators):
        return super().act(observations, generators) * np.nan


@pytest.mark.parametrize("workers", [0, 1])
def test_actions_that_are_not_finite_are_refused(workers):
    with pytest.raises(UserError, match="not finite in the episode of seed 3 at step 0"):
        play(Broken(), SHORT_PUSHT, [3], workers=workers)


def test_what_goes_wrong_while_a_worker_opens_its_environments_is_raised_here(pusher):
    with pytest.raises(TypeError, match="os.PathLike"):
        play(pusher, replace(PUSHT, build=os.fspath), [0], workers=1)


def test_a_chunk_of_the_wrong_length_is_refused(pusher):
    class Long(Counter):
        def act(self, observations, generators):
            return super().act(observations, generators)[:, :-1]

    with pytest.raises(ValueError, match=r"shape \(1, 2, 1\), wanted \(1, 3, 1\)"):
        play(Long(), scripted_environment(Script(ones(3))), [0])


@pytest.mark.parametrize("seeds", [[], [1, 1]])
def test_seeds_must_be_there_and_differ(pusher, seeds):
    with pytest.raises(UserError, match="each seed once"):
        play(pusher, PUSHT, seeds)
