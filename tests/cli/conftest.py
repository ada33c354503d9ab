"""A tiny dataset and a tiny bundle, and `fails`: run a command that must end in one clear message."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from robopolicy.cli.main import main
from robopolicy.data.normalize import Normalizer, fit_normalizer
from robopolicy.data.schema import ArraySpec
from robopolicy.data.store import EpisodeStore
from robopolicy.policies.bundle import save_bundle
from robopolicy.policies.registry import build_policy
from robopolicy.spec import KeySpec, PolicySpec

ARRAYS = (
    ArraySpec("observation.state", (2,), "float32", "state", unit="m"),
    ArraySpec("observation.image.top", (16, 12, 3), "uint8", "image"),
    ArraySpec("action", (2,), "float32", "action", unit="m"),
)
TINY = [
    "task=push_puck",
    "task.environment=",
    "task.horizon=8",
    "task.n_action_steps=4",
    "policy=diffusion_unet_small",
    "policy.config.down_dims=[16,32]",
    "policy.config.step_embed_dim=16",
    "data.val_ratio=0",
    "train.batch_size=8",
    "train.threads=1",
    "train.optim.warmup_steps=1",
    "train.tensorboard=false",
    "train.checkpoint_every=1",
    "train.steps=2",
]


def write_walks(path: Path, broken_step: int | None = None) -> Path:
    """Three random walks of 20 steps; entry 1 of the state is NaN at ``broken_step`` of the dataset."""
    rng = np.random.default_rng(0)
    state = np.cumsum(rng.normal(size=(3, 20, 2)), axis=1).astype(np.float32)
    if broken_step is not None:
        state.reshape(-1, 2)[broken_step, 1] = np.nan
    with EpisodeStore.create(path, ARRAYS, fps=10, image_codec="blosc") as store:
        for steps in state:
            images = np.zeros((20, 16, 12, 3), np.uint8)
            store.append({"observation.state": steps, "observation.image.top": images, "action": np.nan_to_num(steps)})
    return path


@pytest.fixture(scope="session")
def walks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_walks(tmp_path_factory.mktemp("cli") / "walks.zarr")


@pytest.fixture
def train_command(walks: Path, tmp_path: Path) -> list[str]:
    """A training of two steps into ``tmp_path/run``."""
    return ["train", *TINY, f"data.path={walks}", f"out={tmp_path / 'run'}"]


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    """A policy that fits Push-T except for its state, which it wants in metres."""
    torch.manual_seed(0)
    spec = PolicySpec(
        (KeySpec("observation.state", (5,), unit="m", angles=(4,)),),
        KeySpec("action", (2,), role="action", unit="px"),
        fps=10,
        horizon=8,
        n_action_steps=4,
    )
    parts = {k.key: fit_normalizer(np.eye(k.dim) * 500, "minmax", k.angles) for k in (*spec.states, spec.action)}
    config = {"down_dims": [16, 32], "step_embed_dim": 16}
    policy = build_policy("diffusion_unet", config, spec, Normalizer.from_parts(parts))
    return save_bundle(policy, tmp_path / "policy", task={"environment": "pusht"})


@pytest.fixture
def fails(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Run a command; it must print exactly one error and return 2. Returns the message."""

    def run(*words: object) -> str:
        capsys.readouterr()
        code = main([str(word) for word in words])
        text = capsys.readouterr().err
        assert code == 2, text
        assert text.count("error: ") == 1
        assert "Traceback" not in text
        return text[text.index("error: ") + len("error: ") :]

    return run
