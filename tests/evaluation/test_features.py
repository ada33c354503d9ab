from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from robopolicy.data.normalize import Normalizer, fit_normalizer
from robopolicy.data.schema import ArraySpec
from robopolicy.data.store import EpisodeStore
from robopolicy.errors import UserError
from robopolicy.evaluation.features import encode_dataset
from robopolicy.policies.base import Policy
from robopolicy.policies.registry import build_policy
from robopolicy.spec import KeySpec, PolicySpec

STATE, CAMERA = "observation.state", "observation.image.top"
LENGTHS = (5, 9)


@pytest.fixture
def store(tmp_path: Path):
    """Two episodes without actions; state and pixels count the steps of the dataset."""
    arrays = (ArraySpec(STATE, (2,), "float32", "state", unit="m"), ArraySpec(CAMERA, (48, 48, 3), "uint8", "image"))
    rng, done = np.random.default_rng(0), 0
    with EpisodeStore.create(tmp_path / "real.zarr", arrays, fps=10, image_codec="blosc") as new:
        for length in LENGTHS:
            steps = np.arange(done, done + length)
            images = rng.integers(0, 255, (length, 48, 48, 3), dtype=np.uint8)
            new.append({STATE: np.stack([steps, -steps], axis=1).astype(np.float32), CAMERA: images})
            done += length
    with EpisodeStore.open(tmp_path / "real.zarr") as opened:
        yield opened


def policy_of(*observations: KeySpec, n_obs_steps: int = 2) -> Policy:
    torch.manual_seed(0)
    spec = PolicySpec(observations, KeySpec("action", (2,), role="action"), 10, n_obs_steps, 8, 4)
    parts = {k.key: fit_normalizer(np.array([[-20.0] * 2, [20.0] * 2]), "minmax") for k in (*spec.states, spec.action)}
    policy = build_policy(
        "diffusion_unet", {"down_dims": [16, 32], "step_embed_dim": 16}, spec, Normalizer.from_parts(parts)
    )
    return policy.eval()


def test_a_history_is_what_the_policy_would_see_at_its_step(store: EpisodeStore):
    found = encode_dataset(policy_of(KeySpec(STATE, (2,), unit="m")), store, limit=100)
    assert found.episode.tolist() == [0] * 5 + [1] * 9
    newest = np.arange(14)
    oldest = np.array([0, 0, 1, 2, 3, 5, 5, 6, 7, 8, 9, 10, 11, 12])  # an episode's first observation is repeated
    states = found.features.reshape(14, 2, 2) * 20  # the encoder passes normalised states on
    np.testing.assert_allclose(states[:, 0, 0], oldest, atol=1e-5)
    np.testing.assert_allclose(states[:, 1, 0], newest, atol=1e-5)
    np.testing.assert_allclose(states[:, 1, 1], -newest, atol=1e-5)


def test_the_limit_takes_evenly_spaced_steps(store: EpisodeStore):
    found = encode_dataset(policy_of(KeySpec(STATE, (2,), unit="m"), n_obs_steps=1), store, limit=5)
    np.testing.assert_allclose(found.features[:, 0] * 20, [0, 3, 6, 10, 13], atol=1e-5)


def test_images_are_encoded_as_the_policy_encodes_them(store: EpisodeStore):
    policy = policy_of(KeySpec(CAMERA, (48, 48, 3), role="image"))
    found = encode_dataset(policy, store, limit=100)
    frames = torch.from_numpy(store.read(CAMERA))[None, [8, 9]]
    with torch.inference_mode():
        wanted = policy.encode({CAMERA: frames})
    np.testing.assert_allclose(found.features[9], wanted[0].numpy(), atol=1e-4)


def test_a_dataset_that_does_not_fit_the_policy_is_refused(store: EpisodeStore):
    with pytest.raises(UserError, match="found unit 'm', wanted 'mm'"):
        encode_dataset(policy_of(KeySpec(STATE, (2,), unit="mm")), store, limit=10)
    with pytest.raises(UserError, match="observation.touch: not there"):
        encode_dataset(policy_of(KeySpec("observation.touch", (2,))), store, limit=10)
