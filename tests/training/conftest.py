import json
from pathlib import Path

import numpy as np
import pytest

from robopolicy.cli.compose import compose_config
from robopolicy.data.schema import ArraySpec
from robopolicy.data.store import EpisodeStore

ARRAYS = [
    ArraySpec("observation.state", (2,), "float32", "state", unit="m"),
    ArraySpec("action", (2,), "float32", "action"),
]
OVERRIDES = [
    "task=push_puck",
    "task.environment=",
    "task.horizon=8",
    "task.n_action_steps=4",
    "policy=diffusion_unet_small",
    "policy.config.down_dims=[16,32]",
    "policy.config.step_embed_dim=16",
    "data.val_ratio=0.2",
    "train.batch_size=16",
    "train.threads=1",
    "train.optim.warmup_steps=5",
    "train.tensorboard=false",
    "train.log_every=4",
    "train.validate_every=8",
    "train.validation_windows=24",
    "train.checkpoint_every=4",
    "train.steps=16",
]


@pytest.fixture(scope="session")
def circles(tmp_path_factory) -> Path:
    """Ten episodes in which a point runs round circles and the action is where it goes next."""
    path = tmp_path_factory.mktemp("data") / "circles.zarr"
    rng = np.random.default_rng(0)
    with EpisodeStore.create(path, ARRAYS, fps=10) as store:
        for _ in range(10):
            phase = rng.uniform(0, 6) + 0.2 * np.arange(41)
            points = np.stack([np.cos(phase), np.sin(phase)], axis=1).astype(np.float32)
            store.append({"observation.state": points[:-1], "action": points[1:]})
    return path


@pytest.fixture
def overrides(circles, tmp_path):
    """Overrides of a tiny training run into ``tmp_path/run``."""
    return [*OVERRIDES, f"data.path={circles}", f"out={tmp_path / 'run'}"]


@pytest.fixture
def plain(overrides):
    """The composed configuration of that run."""

    def make(**changes):
        return compose_config("train", [*overrides, *(f"{k}={v}" for k, v in changes.items())])

    return make


def rows(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
