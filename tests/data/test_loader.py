import itertools

import numpy as np
import pytest
import torch

from robopolicy.data.loader import WindowLoader
from robopolicy.data.schema import ArraySpec
from robopolicy.data.store import EpisodeStore
from robopolicy.errors import UserError
from robopolicy.spec import KeySpec, PolicySpec

LENGTHS = [23, 40, 9, 31, 64, 12]
SPEC = PolicySpec(
    observations=(
        KeySpec("observation.state", (2,), source="pose", columns=(2, 0)),
        KeySpec("observation.image.top", (16, 16, 3), role="image", source="camera"),
    ),
    action=KeySpec("action", (2,), role="action"),
    fps=10,
    n_obs_steps=2,
    horizon=8,
    n_action_steps=4,
)


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """Episodes in which every number tells its step: pose and action by value, pixels by two bytes."""
    arrays = [
        ArraySpec("pose", (3,), "float32", "state"),
        ArraySpec("camera", (16, 16, 3), "uint8", "image"),
        ArraySpec("action", (2,), "float32", "action"),
    ]
    path = tmp_path_factory.mktemp("loader") / "steps.zarr"
    first = 0
    with EpisodeStore.create(path, arrays, fps=10, image_codec="jpegxl-lossless") as writer:
        for length in LENGTHS:
            steps = np.arange(first, first + length)
            camera = np.zeros((length, 16, 16, 3), np.uint8)
            camera[:, 4, 5, 0], camera[:, 4, 5, 1] = steps % 256, steps // 256
            writer.append(
                {
                    "pose": np.stack([steps, -steps, steps + 0.5], 1).astype(np.float32),
                    "camera": camera,
                    "action": np.stack([steps, steps * 2], 1).astype(np.float32),
                }
            )
            first += length
    return EpisodeStore.open(path)


def loader(store, **options):
    return WindowLoader(store, SPEC, **{"batch_size": 16, "seed": 1, **options})


def steps_seen(batch):
    """Steps that the pixels, the states and the actions of a batch claim to be at."""
    pixel = batch["observation.image.top"][:, :, 4, 5].int()
    return pixel[..., 0] + 256 * pixel[..., 1], batch["observation.state"], batch["action"]


TINY_BUDGET = 2 * 60 * 16 * 16 * 3  # two pools of 60 of the 179 frames


@pytest.mark.parametrize("budget", [None, TINY_BUDGET], ids=["memory", "streamed"])
def test_batches_hold_the_right_steps(store, budget):
    windows = loader(store, memory_budget=budget)
    assert windows.streaming == (budget is not None)
    allowed = {tuple(row) for row in windows.windows.steps(np.arange(len(windows.windows)), SPEC.horizon)}
    for batch in itertools.islice(windows.batches(), 30):
        image_steps, state, action = steps_seen(batch)
        rows = action[..., 0].long()
        assert all(tuple(row.tolist()) in allowed for row in rows)
        assert torch.equal(image_steps.long(), rows[:, :2])
        assert torch.equal(state[..., 0], rows[:, :2] + 0.5) and torch.equal(state[..., 1], rows[:, :2].float())
        assert torch.equal(action[..., 1], action[..., 0] * 2)


@pytest.mark.parametrize("budget", [None, TINY_BUDGET], ids=["memory", "streamed"])
def test_an_epoch_serves_every_window_once(store, budget):
    windows = loader(store, memory_budget=budget, batch_size=11)
    total = len(windows.windows)
    batches = itertools.islice(windows.batches(), -(-2 * total // 11))
    rows = torch.cat([b["action"][..., 0] for b in batches]).long().tolist()
    expected = sorted(windows.windows.steps(np.arange(total), SPEC.horizon).tolist())
    assert sorted(rows[:total]) == expected
    assert sorted(rows[total : 2 * total]) == expected
    assert rows[:total] != rows[total : 2 * total]
    assert rows[:total] != expected


@pytest.mark.parametrize("budget", [None, TINY_BUDGET], ids=["memory", "streamed"])
def test_starting_at_a_batch_continues_the_same_order(store, budget):
    def run(start, count):
        return [b["action"] for b in itertools.islice(loader(store, memory_budget=budget).batches(start), count)]

    whole = run(0, 40)
    for start in (1, 13, 30):
        assert all(torch.equal(a, b) for a, b in zip(run(start, 10), whole[start:], strict=False))


@pytest.mark.parametrize("budget", [None, TINY_BUDGET], ids=["memory", "streamed"])
def test_processes_share_the_global_batch(store, budget):
    whole = next(loader(store, memory_budget=budget).batches(3))
    parts = [next(loader(store, memory_budget=budget, rank=r, world=4).batches(3)) for r in range(4)]
    for key, value in whole.items():
        assert torch.equal(value, torch.cat([p[key] for p in parts]))


def test_memory_and_stream_agree_without_shuffling(store):
    kept = list(loader(store, shuffle=False).batches())
    streamed = list(loader(store, shuffle=False, memory_budget=TINY_BUDGET).batches())
    assert len(kept) == len(streamed) == -(-len(loader(store).windows) // 16)
    for a, b in zip(kept, streamed, strict=True):
        assert all(torch.equal(a[key], b[key]) for key in a)


def test_streaming_buffers_stay_within_the_budget(store):
    stream = loader(store, memory_budget=TINY_BUDGET)._stream
    buffers = [stream._buffers(), stream._buffers()]
    assert sum(t.numel() for b in buffers for t in b.values()) <= TINY_BUDGET
    pools = list(itertools.islice(stream._pools(0), 100))
    assert len(pools) > 2 and max(pool.frames for pool in pools) <= stream._pool_frames


def test_a_budget_below_two_blocks_says_what_is_needed(store):
    with pytest.raises(UserError, match="needs at least"):
        loader(store, memory_budget=1000)


def test_streamed_order_is_mixed_across_episodes(store):
    windows = loader(store, memory_budget=TINY_BUDGET)
    ends = np.array(store.episode_ends)
    batch = next(windows.batches())
    assert len(set(np.searchsorted(ends, batch["action"][:, 3, 0].numpy(), side="right"))) > 1


def test_subset_walks_through_the_other_episodes_in_order(store):
    mask = np.zeros(len(LENGTHS), bool)
    mask[2] = True
    held_out = loader(store, episodes=~mask).subset(mask, batch_size=4, limit=1000)
    rows = torch.cat([b["action"][..., 0] for b in held_out.batches()]).numpy()
    assert rows.min() == 63 and rows.max() == 71
    assert (np.diff(rows[:, 4]) >= 0).all()


def test_float_images_become_bytes(tmp_path):
    rng = np.random.default_rng(0)
    frames = rng.integers(0, 256, (30, 16, 16, 3))
    for scale in (1.0, 255.0):
        arrays = [ArraySpec("camera", (16, 16, 3), "float32", "image"), ArraySpec("action", (2,), "float32", "action")]
        path = tmp_path / f"{scale}.zarr"
        with EpisodeStore.create(path, arrays, fps=10) as writer:
            writer.append({"camera": (frames / scale).astype(np.float32), "action": np.zeros((30, 2), np.float32)})
        spec = PolicySpec((SPEC.observations[1],), SPEC.action, 10, 2, 8, 4)
        loaded = WindowLoader(EpisodeStore.open(path), spec, batch_size=4, shuffle=False)
        got = next(loaded.batches())["observation.image.top"]
        steps = loaded.windows.steps(np.arange(4), 2)
        np.testing.assert_array_equal(got.numpy(), frames[steps])


def test_wrong_keys_are_named(store):
    wrong = PolicySpec(
        (KeySpec("observation.state", (7,), source="pose"), KeySpec("observation.force", (3,), source="frce")),
        KeySpec("action", (2,), role="action"),
        10, 2, 8, 4,
    )  # fmt: skip
    with pytest.raises(
        UserError, match=r"observation.state: found shape \(3,\), wanted \(7,\)(.|\n)*observation.force"
    ):
        WindowLoader(store, wrong, batch_size=4)


def test_columns_outside_the_array_are_named(store):
    wrong = PolicySpec((KeySpec("o", (1,), source="pose", columns=(5,)),), SPEC.action, 10, 2, 8, 4)
    with pytest.raises(UserError, match=r"columns \(5,\) of 'pose'"):
        WindowLoader(store, wrong, batch_size=4)
