import numpy as np
import pytest
import torch

from robopolicy.data.normalize import Normalizer, fit_normalizer
from robopolicy.policies.registry import build_policy
from robopolicy.spec import KeySpec, PolicySpec

SMALL = {"down_dims": [16, 32], "step_embed_dim": 16, "sampler": {"name": "ddim", "steps": 8}}


@pytest.fixture
def make_policy():
    """Build a small policy for data with the given range of actions, from states or from states and images."""

    def make(low=-1.0, high=1.0, images=False, **config):
        torch.manual_seed(0)
        observations = [KeySpec("observation.state", (2,), unit="m")]
        if images:
            observations.append(KeySpec("observation.image.top", (48, 48, 3), role="image"))
        spec = PolicySpec(tuple(observations), KeySpec("action", (2,), role="action", unit="m"), 10, 2, 8, 4)
        data = np.array([[low, low], [high, high]])
        normalizer = Normalizer.from_parts(
            {"observation.state": fit_normalizer(data, "minmax"), "action": fit_normalizer(data, "minmax")}
        )
        return build_policy("diffusion_unet", SMALL | config, spec, normalizer)

    return make
