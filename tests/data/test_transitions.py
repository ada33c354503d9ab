"""Chunk transitions against an episode computed by hand."""

import numpy as np
import pytest
import torch

from robopolicy.data.schema import ArraySpec
from robopolicy.data.store import EpisodeStore
from robopolicy.data.transitions import episode_transitions, store_transitions, success_rewards
from robopolicy.errors import UserError
from robopolicy.spec import KeySpec, PolicySpec
from robopolicy.values.critic import bellman_target

STATE, ACTION = KeySpec("observation.state", (1,)), KeySpec("action", (1,), role="action")
GAMMA = 0.9


def spec(n_obs_steps=1, horizon=1, n_action_steps=1):
    return PolicySpec((STATE,), ACTION, 10, n_obs_steps, horizon, n_action_steps)


def chain(steps, success, **horizons):
    """States 0, 1, 2, …; the action of state i is 10 i."""
    numbers = np.arange(steps, dtype=np.float32)[:, None]
    vectors = {STATE.key: numbers, ACTION.key: 10 * numbers}
    return episode_transitions(vectors, success_rewards(steps, success), success, spec(**horizons), GAMMA)


def test_single_steps_of_a_success():
    found = chain(3, success=True)
    assert found.observations[STATE.key].flatten().tolist() == [0, 1, 2]
    assert found.action.flatten().tolist() == [0, 10, 20]
    assert found.reward.tolist() == [-1, -1, 0]
    assert found.discount.tolist() == pytest.approx([GAMMA, GAMMA, 0])
    assert found.next_observations[STATE.key].flatten().tolist()[:2] == [1, 2]


def test_a_time_limit_is_no_end():
    """The state after the last action was not recorded, so nothing can be said of that action; the others bootstrap."""
    found = chain(3, success=False)
    assert found.observations[STATE.key].flatten().tolist() == [0, 1]
    assert found.reward.tolist() == [-1, -1]
    assert found.discount.tolist() == pytest.approx([GAMMA, GAMMA])


def test_chunks_sum_their_rewards_up_to_the_end():
    found = chain(5, success=True, n_obs_steps=2, horizon=4, n_action_steps=3)
    assert found.reward.tolist() == pytest.approx([-1 - GAMMA - GAMMA**2] * 2 + [-1 - GAMMA, -1, 0])
    assert found.discount.tolist() == pytest.approx([GAMMA**3] * 2 + [0, 0, 0])
    assert found.observations[STATE.key][..., 0].tolist() == [[0, 0], [0, 1], [1, 2], [2, 3], [3, 4]]
    assert found.action[0, :, 0].tolist() == [0, 0, 10, 20]  # the window begins one step before the executed part
    assert found.next_observations[STATE.key][:2, :, 0].tolist() == [[2, 3], [3, 4]]
    assert len(chain(5, success=False, n_obs_steps=2, horizon=4, n_action_steps=3)) == 2


def test_values_of_a_three_step_task():
    """Iterating the Bellman target gives minus the discounted number of steps to success, or -1 / (1 - gamma)."""

    def values(found):
        table = torch.zeros(3)
        for _ in range(300):
            following = table[found.next_observations[STATE.key].flatten().long()]
            target = bellman_target(found.reward, found.discount, torch.stack([following] * 2), (-10.0, 0.0))
            table = table.index_put((found.observations[STATE.key].flatten().long(),), target)
        return table

    assert values(chain(3, success=True)).tolist() == pytest.approx([-1 - GAMMA, -1, 0])
    cut_off = chain(3, success=False)  # and a state 2 in which nothing changes any more
    still = episode_transitions(
        {STATE.key: np.full((2, 1), 2.0), ACTION.key: np.zeros((2, 1))}, success_rewards(2, False), False, spec(), GAMMA
    )
    both = type(cut_off).concatenate([cut_off, still])
    assert values(both).tolist() == pytest.approx([-10, -10, -10], abs=1e-3)


@pytest.fixture
def store(tmp_path):
    arrays = [
        ArraySpec("full", (3,), "float32", "state"),
        ArraySpec("action", (1,), "float32", "action"),
        ArraySpec("reward", (), "float32", "reward"),
    ]
    with EpisodeStore.create(tmp_path / "data.zarr", arrays, fps=10) as store:
        for success in (True, False, True, None):
            full = np.arange(12, dtype=np.float32).reshape(4, 3)
            store.append(
                {"full": full, "action": full[:, :1], "reward": np.linspace(0, 1, 4, dtype=np.float32)}, success=success
            )
        yield store


def columns():
    return PolicySpec((KeySpec("observation.state", (1,), source="full", columns=(2,)),), ACTION, 10, 1, 1, 1)


def test_reads_chosen_episodes_and_columns(store):
    found = store_transitions(store, columns(), [1, 2], "success", GAMMA)
    assert found.observations["observation.state"].flatten().tolist() == [2, 5, 8, 2, 5, 8, 11]
    assert found.reward.tolist() == [-1, -1, -1, -1, -1, -1, 0]
    assert (found.discount == 0).nonzero().flatten().tolist() == [6]


def test_takes_the_rewards_of_the_dataset(store):
    found = store_transitions(store, columns(), [2, 3], "dataset", GAMMA)
    assert found.reward.tolist() == pytest.approx([0, 1 / 3, 2 / 3, 1, 0, 1 / 3, 2 / 3])
    assert (found.discount == 0).tolist() == [False] * 3 + [True] + [False] * 3  # unknown success: cut off


def test_unknown_success_is_named(store):
    with pytest.raises(UserError, match="episode 3 does not say whether it succeeded.*rl.reward=dataset"):
        store_transitions(store, columns(), [2, 3], "success", GAMMA)
