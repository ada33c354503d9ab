"""Small datasets for the tests of this folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from robopolicy.data.schema import ArraySpec
from robopolicy.data.store import EpisodeStore

IMAGE = "observation.image.top"
ARRAYS = (
    ArraySpec(IMAGE, (32, 24, 3), "uint8", "image"),
    ArraySpec("observation.state", (3,), "float32", "state", unit="rad", names=("base", "shoulder", "elbow")),
    ArraySpec("action", (3,), "float32", "action", unit="rad"),
)


def smooth_episode(seed: int, steps: int) -> dict[str, np.ndarray]:
    """Images that move slowly and joints on sine curves, different for each seed."""
    rng = np.random.default_rng(seed)
    row, column = np.mgrid[0:32, 0:24]
    phase = rng.uniform(0, 6) + 0.05 * np.arange(steps)[:, None, None, None]
    waves = np.sin(0.2 * row[..., None] + phase) + np.cos(0.15 * column[..., None] + np.arange(3) + phase)
    time = 0.1 * np.arange(steps)[:, None]
    state = np.sin(time * rng.uniform(0.5, 1.5, 3) + rng.uniform(0, 6, 3))
    return {
        IMAGE: (127 + 60 * waves).astype(np.uint8),
        "observation.state": state.astype(np.float32),
        "action": (state + 0.01).astype(np.float32),
    }


def write_dataset(path: Path, lengths: tuple[int, ...] = (12, 7, 20), **options: Any) -> list[dict[str, np.ndarray]]:
    """Create a dataset with labels; returns the episodes that were written."""
    episodes = [smooth_episode(seed, steps) for seed, steps in enumerate(lengths)]
    options = {"image_codec": "jpegxl-lossless" if options.get("zarr_format", 2) == 2 else "blosc", **options}
    with EpisodeStore.create(path, ARRAYS, fps=10, **options) as store:
        for seed, episode in enumerate(episodes):
            store.append(episode, task=("fold", "push")[seed % 2], success=seed % 2 == 0, seed=100 + seed)
    return episodes


def assert_same(store: EpisodeStore, episodes: list[dict[str, np.ndarray]]) -> None:
    """Every episode of the store equals, bit by bit, the given one."""
    assert store.n_episodes == len(episodes)
    for index, wanted in enumerate(episodes):
        found = store.episode(index)
        assert found.keys() == wanted.keys()
        for key, values in wanted.items():
            assert found[key].dtype == values.dtype
            np.testing.assert_array_equal(found[key], values, err_msg=f"episode {index}, {key}")
