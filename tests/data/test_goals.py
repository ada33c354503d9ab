"""Goals are later steps of the same episode, drawn uniformly and again the same after a resume."""

import itertools

import numpy as np
import pytest
import torch

from robopolicy.data.goals import draw_chances, goal_steps
from robopolicy.data.loader import WindowLoader
from robopolicy.data.schema import ArraySpec
from robopolicy.data.store import EpisodeStore
from robopolicy.errors import UserError
from robopolicy.spec import KeySpec, PolicySpec

LENGTHS = [13, 40, 9, 31]
STATE = KeySpec("observation.state", (2,), source="pose", columns=(1, 0))
CAMERA = KeySpec("observation.image.top", (16, 16, 3), role="image", source="camera")


def spec(*goals, horizon=None):
    action = KeySpec("action", (1,), role="action")
    return PolicySpec((STATE, CAMERA), action, 10, 2, 8, 4, goals=goals, goal_horizon=horizon)


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """Every state, action and picture tells its step; the state its episode too."""
    arrays = [
        ArraySpec("pose", (2,), "float32", "state"),
        ArraySpec("camera", (16, 16, 3), "uint8", "image"),
        ArraySpec("action", (1,), "float32", "action"),
    ]
    path, first = tmp_path_factory.mktemp("goals") / "steps.zarr", 0
    with EpisodeStore.create(path, arrays, fps=10, image_codec="blosc") as writer:
        for episode, length in enumerate(LENGTHS):
            steps = np.arange(first, first + length)
            pose = np.stack([steps, np.full(length, episode)], 1).astype(np.float32)
            camera = np.broadcast_to(steps[:, None, None, None], (length, 16, 16, 3)).astype(np.uint8)
            writer.append({"pose": pose, "camera": camera, "action": steps[:, None].astype(np.float32)})
            first += length
    return EpisodeStore.open(path)


def batches(store, spec, count, start=0, **options):
    loader = WindowLoader(store, spec, **{"batch_size": 16, "seed": 1, **options})
    return list(itertools.islice(loader.batches(start), count))


def test_every_later_step_within_the_horizon_is_equally_likely():
    chances = (np.arange(1200) + 0.5) / 1200
    newest, last = np.full(1200, 10), np.full(1200, 30)
    for horizon, reachable in ((None, 20), (50, 20), (12, 12), (1, 1)):
        steps, counts = np.unique(goal_steps(newest, last, chances, horizon), return_counts=True)
        assert steps.tolist() == list(range(11, 11 + reachable))
        assert set(counts) == {1200 // reachable}


def test_at_the_end_of_an_episode_its_last_step_is_the_goal():
    assert goal_steps(np.array([30, 29]), np.array([30, 30]), np.array([0.99, 0.0]), None).tolist() == [30, 30]


def test_chances_depend_on_seed_and_batch_alone():
    assert np.array_equal(draw_chances(3, 7, 50), draw_chances(3, 7, 50))
    assert not np.array_equal(draw_chances(3, 7, 50), draw_chances(3, 8, 50))
    assert not np.array_equal(draw_chances(3, 7, 50), draw_chances(4, 7, 50))


@pytest.mark.parametrize("horizon", [None, 5])
def test_goals_come_later_in_the_same_episode(store, horizon):
    ends = np.cumsum(LENGTHS) - 1
    ahead = []
    for batch in batches(store, spec(STATE, horizon=horizon), 40):
        newest, goal = batch["observation.state"][:, -1], batch["goal.observation.state"]
        assert goal.shape == (16, 2) and torch.equal(goal[:, 0], newest[:, 0])
        last = torch.from_numpy(ends)[newest[:, 0].long()]
        steps = (goal - newest)[:, 1]
        assert ((steps >= 1) | (newest[:, 1] == last)).all() and (goal[:, 1] <= last).all()
        ahead.append(steps)
    assert torch.cat(ahead).max() == (5 if horizon else torch.cat(ahead).max()) and torch.cat(ahead).max() >= 5


def test_images_are_goals_of_the_same_step_as_states(store):
    for batch in batches(store, spec(STATE, CAMERA), 5):
        image = batch["goal.observation.image.top"]
        assert image.shape == (16, 16, 16, 3) and image.dtype == torch.uint8
        assert torch.equal(image[:, 3, 4, 0].float(), batch["goal.observation.state"][:, 1])


def test_a_resumed_run_sees_the_same_goals(store):
    whole = batches(store, spec(STATE), 30)
    for start in (1, 13, 27):
        for a, b in zip(batches(store, spec(STATE), 3, start), whole[start:], strict=False):
            assert all(torch.equal(a[key], b[key]) for key in a)


def test_processes_share_the_goals_of_the_global_batch(store):
    (whole,) = batches(store, spec(STATE, CAMERA), 1, 3)
    parts = [batches(store, spec(STATE, CAMERA), 1, 3, rank=r, world=4)[0] for r in range(4)]
    for key, value in whole.items():
        assert torch.equal(value, torch.cat([p[key] for p in parts]))


def test_validation_has_the_same_goals_each_time(store):
    mask = np.array([False, True, False, False])
    held_out = WindowLoader(store, spec(STATE), batch_size=16, episodes=~mask).subset(mask, 16, 1000)
    first, second = list(held_out.batches()), list(held_out.batches())
    assert len(first) > 1
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a["goal.observation.state"], b["goal.observation.state"])


def test_streamed_images_leave_states_as_goals(store):
    budget = 2 * 30 * 16 * 16 * 3
    (batch,) = batches(store, spec(STATE), 1, memory_budget=budget)
    assert (batch["goal.observation.state"][:, 1] >= batch["observation.state"][:, -1, 1]).all()
    with pytest.raises(UserError, match="'observation.image.top' is a goal(.|\n)*Raise data.memory_budget_mb"):
        batches(store, spec(CAMERA), 1, memory_budget=budget)
