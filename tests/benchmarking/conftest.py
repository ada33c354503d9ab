from pathlib import Path

import numpy as np
import pytest
import torch

from robopolicy.data.normalize import Normalizer, fit_normalizer
from robopolicy.policies.bundle import save_bundle
from robopolicy.policies.registry import build_policy
from robopolicy.spec import KeySpec, PolicySpec


@pytest.fixture(scope="session")
def tiny_spec():
    return PolicySpec(
        (KeySpec("observation.state", (3,), unit="m"),), KeySpec("action", (2,), role="action", unit="m"), 10, 2, 8, 4
    )


@pytest.fixture(scope="session")
def tiny_normalizer():
    return Normalizer.from_parts(
        {"observation.state": fit_normalizer(np.eye(3), "minmax"), "action": fit_normalizer(np.eye(2), "minmax")}
    )


@pytest.fixture(scope="session")
def tiny_bundle(tmp_path_factory, tiny_spec, tiny_normalizer) -> Path:
    torch.manual_seed(0)
    config = {"down_dims": [16, 32], "step_embed_dim": 16, "sampler": {"name": "ddim", "steps": 4}}
    policy = build_policy("diffusion_unet", config, tiny_spec, tiny_normalizer)
    return save_bundle(policy, tmp_path_factory.mktemp("bench") / "policy")
