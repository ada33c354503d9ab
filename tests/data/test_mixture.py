"""Batches from several datasets: exact shares, the same batch for the same number, shared among processes."""

import itertools

import numpy as np
import pytest
import torch

from robopolicy.data.loader import WindowLoader
from robopolicy.data.mixture import MixtureDataset, MixturePart, divide_memory, mixture_fingerprint, rows_before, shares
from robopolicy.data.schema import ArraySpec
from robopolicy.data.store import EpisodeStore
from robopolicy.errors import UserError
from robopolicy.spec import KeySpec, PolicySpec, TaskSpec

LENGTHS = ([40, 23, 30], [12, 17], [60, 50, 41, 30])
FRAME = 16 * 16 * 3
STATE = KeySpec("observation.state", (2,))
CAMERA = KeySpec("observation.image.top", (16, 16, 3), role="image")
TASKS = ("push left", "push right", "lift", "stack")


def spec(*observations, tasks=True, goals=()):
    return PolicySpec(
        observations,
        KeySpec("action", (1,), role="action"),
        10, 2, 8, 4,
        goals=goals,
        tasks=tuple(TaskSpec(text) for text in TASKS) if tasks else (),
    )  # fmt: skip


@pytest.fixture(scope="module")
def stores(tmp_path_factory):
    """Three datasets whose states tell dataset and step; the first has two tasks, in turn."""
    arrays = [
        ArraySpec("observation.state", (2,), "float32", "state"),
        ArraySpec("observation.image.top", (16, 16, 3), "uint8", "image"),
        ArraySpec("action", (1,), "float32", "action"),
    ]
    folder = tmp_path_factory.mktemp("mixture")
    for i, lengths in enumerate(LENGTHS):
        first = 0
        with EpisodeStore.create(folder / f"{i}.zarr", arrays, fps=10, image_codec="blosc") as writer:
            for episode, length in enumerate(lengths):
                steps = np.arange(first, first + length)
                state = np.stack([np.full(length, i), steps], 1).astype(np.float32)
                camera = np.broadcast_to((steps % 256)[:, None, None, None], (length, 16, 16, 3)).astype(np.uint8)
                values = {"observation.state": state, "observation.image.top": camera}
                task = TASKS[episode % 2] if i == 0 else TASKS[i + 1]
                writer.append(values | {"action": steps[:, None].astype(np.float32)}, task=task)
                first += length
    return [EpisodeStore.open(folder / f"{i}.zarr") for i in range(len(LENGTHS))]


def mixture(stores, weights=(1, 2, 0.5), observations=(STATE,), goals=(), **options):
    parts = [
        MixturePart(store, weight, np.ones(store.n_episodes, bool), store.tasks)
        for store, weight in zip(stores, weights, strict=True)
    ]
    return MixtureDataset(parts, spec(*observations, goals=goals), **{"batch_size": 16, "seed": 1, **options})


def served(data, count, start=0):
    return list(itertools.islice(data.batches(start), count))


def datasets_of(batch):
    return batch["observation.state"][:, 0, 0].long().numpy()


STREAMED = {"observations": (STATE, CAMERA), "memory_budget": 120 * FRAME}
KINDS = pytest.mark.parametrize("kind", [{}, STREAMED], ids=["memory", "streamed"])


@pytest.mark.parametrize("weights", [[1, 1], [1, 2, 0.5], [5, 1, 1, 0.01], np.arange(1, 40), [1]])
def test_rows_come_in_the_order_of_their_times(weights):
    """The one-step count against a full sort of all times."""
    share = shares(weights)
    times = np.concatenate([(np.arange(3000 * s + 2) + 0.5) / s for s in share])
    dataset = np.repeat(np.arange(len(share)), [len(np.arange(3000 * s + 2)) for s in share])
    order = dataset[np.argsort(times, kind="stable")]
    for total in (0, 1, 2, 3, 17, 64, 1000, 2345):
        assert rows_before(share, total).tolist() == np.bincount(order[:total], minlength=len(share)).tolist()


def test_shares_are_exact_in_any_stretch_of_rows():
    share = shares([1, 2, 0.5, 0.003])
    counts = np.array([rows_before(share, total) for total in range(0, 4000)])
    assert (counts.sum(axis=1) == np.arange(4000)).all()
    assert np.abs(counts - np.arange(4000)[:, None] * share).max() < 1
    assert set(np.diff(counts, axis=0).ravel()) == {0, 1}
    assert rows_before(share, 10**12).sum() == 10**12  # at no cost that grows


@KINDS
def test_batches_hold_the_datasets_in_their_shares(stores, kind):
    data = mixture(stores, **kind)
    assert data.streaming == bool(kind)
    for n, batch in enumerate(served(data, 20)):
        found = np.bincount(datasets_of(batch), minlength=3)
        wanted = rows_before(data.shares, 16 * (n + 1)) - rows_before(data.shares, 16 * n)
        assert found.tolist() == wanted.tolist()
        assert np.abs(found - 16 * data.shares).max() < 2


@KINDS
def test_each_dataset_is_walked_through_without_repetition(stores, kind):
    rows = torch.cat([torch.cat([b["observation.state"][:, 0, :1], b["action"][..., 0]], 1)
                      for b in served(mixture(stores, **kind), 60)])  # fmt: skip
    for i, store in enumerate(stores):
        alone = WindowLoader(store, spec(STATE), batch_size=1)
        windows = alone.windows.steps(np.arange(len(alone.windows)), 8).tolist()
        mine = rows[rows[:, 0] == i, 1:].long().tolist()
        for first in range(0, len(mine) - len(windows), len(windows)):
            assert sorted(mine[first : first + len(windows)]) == sorted(windows)
        assert mine[: len(windows)] != windows[: len(mine)]


@KINDS
def test_starting_at_a_batch_continues_the_same_order(stores, kind):
    whole = served(mixture(stores, goals=(STATE,), **kind), 30)
    for start in (1, 13, 27):
        again = served(mixture(stores, goals=(STATE,), **kind), 3, start)
        for a, b in zip(again, whole[start:], strict=False):
            assert a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


@KINDS
def test_processes_share_the_global_batch(stores, kind):
    goals = (STATE,)
    (whole,) = served(mixture(stores, goals=goals, **kind), 1, 5)
    parts = [served(mixture(stores, goals=goals, rank=r, world=4, **kind), 1, 5)[0] for r in range(4)]
    for key, value in whole.items():
        assert torch.equal(value, torch.cat([p[key] for p in parts]))


def test_every_process_sees_every_dataset(stores):
    for rank in range(2):
        for batch in served(mixture(stores, weights=(1, 1, 1), rank=rank, world=2), 10):
            assert np.bincount(datasets_of(batch), minlength=3).min() >= 2  # of 8 rows


def test_rows_carry_images_goals_and_tasks_of_their_own_episode(stores):
    ends = [torch.from_numpy(store.episode_ends) for store in stores]
    for batch in served(mixture(stores, observations=(STATE, CAMERA), goals=(STATE, CAMERA)), 10):
        state, goal = batch["observation.state"], batch["goal.observation.state"]
        assert torch.equal(batch["observation.image.top"][:, :, 0, 0, 0].float(), state[..., 1] % 256)
        assert torch.equal(batch["goal.observation.image.top"][:, 5, 5, 1].float(), goal[:, 1] % 256)
        assert torch.equal(state[:, -1, 0], goal[:, 0])
        for row, task in enumerate(batch["task"].tolist()):
            dataset, step = int(state[row, -1, 0]), state[row, -1, 1]
            episode = int(torch.searchsorted(ends[dataset], step, right=True))
            assert TASKS[task] == stores[dataset].tasks[episode]
            assert step <= goal[row, 1] < ends[dataset][episode]


def test_datasets_are_shuffled_apart(stores):
    rows = torch.cat([b["action"][:, 3, 0] for b in served(mixture([stores[0]] * 2, weights=(1, 1)), 5)])
    assert not torch.equal(rows[0::2], rows[1::2])


def test_memory_goes_to_the_small_datasets_first():
    assert divide_memory([10, 100, 30], 1000) == [10, 100, 30]
    assert divide_memory([10, 1000, 2000], 500) == [10, 245, 245]
    assert divide_memory([0, 0], 5) == [0, 0]


def test_small_datasets_stay_in_memory_while_large_ones_are_streamed(stores):
    data = mixture(stores, **STREAMED)
    assert [loader.streaming for loader in data.loaders] == [True, False, True]


def test_the_fingerprint_tells_contents_weights_and_tasks_apart(stores):
    parts = [MixturePart(s, 1.0, np.ones(s.n_episodes, bool), s.tasks) for s in stores]
    heavier = [MixturePart(s, 2.0, np.ones(s.n_episodes, bool), s.tasks) for s in stores]
    renamed = [MixturePart(s, 1.0, np.ones(s.n_episodes, bool), ["x"] * s.n_episodes) for s in stores]
    prints = {mixture_fingerprint(p, True) for p in (parts, parts[::-1], parts[:2], heavier, renamed)}
    assert len(prints) == 5
    assert mixture_fingerprint(parts, False) == mixture_fingerprint(renamed, False)


@pytest.mark.parametrize("weight", [0, -1, float("nan"), float("inf")])
def test_a_weight_must_be_above_zero(stores, weight):
    with pytest.raises(UserError, match=r"data.mixture\[1\].weight=.* must be a number above 0"):
        mixture(stores, weights=(1, weight, 1))


def test_an_instruction_that_is_no_task_is_named(stores):
    with pytest.raises(
        UserError, match="episode 0, 'push lef', is none of the policy's tasks. Did you mean 'push left'"
    ):
        WindowLoader(stores[0], spec(STATE), batch_size=4, instructions=["push lef", "lift", "lift"])
