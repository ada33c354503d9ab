import numpy as np
import pytest
import torch

from robopolicy.data.normalize import Normalizer, fit_normalizer
from robopolicy.diffusion.flow import FlowConfig
from robopolicy.diffusion.process import SamplerConfig
from robopolicy.errors import UserError
from robopolicy.policies.diffusion_transformer import DiffusionTransformerConfig, DiffusionTransformerPolicy
from robopolicy.spec import KeySpec, PolicySpec
from robopolicy.training.config import OptimConfig
from robopolicy.training.step import LossModule, build_optimizer, step_generator, train_step

TINY = {"dim": 32, "layers": 2, "heads": 2, "mlp_ratio": 2}


def make(**options):
    torch.manual_seed(0)
    spec = PolicySpec((KeySpec("observation.state", (2,)),), KeySpec("action", (2,), role="action"), 10, 2, 8, 4)
    part = fit_normalizer(np.array([[-1.0, -1.0], [1.0, 1.0]]), "minmax")
    config = DiffusionTransformerConfig(process=FlowConfig(), sampler=SamplerConfig("euler", 8), **(TINY | options))
    return DiffusionTransformerPolicy(config, spec, Normalizer.from_parts({"observation.state": part, "action": part}))


def fit(policy, batch, steps, lr=3e-3):
    optimizer, module = build_optimizer(policy, OptimConfig()), LossModule(policy)
    for step in range(steps):
        draws = policy.draw(len(batch["action"]), step_generator(0, step))
        train_step(module, optimizer, batch, draws, lr=lr * (1 - step / steps), clip_norm=1.0)
    return policy.eval()


def generators(rows):
    return [torch.Generator().manual_seed(i) for i in range(rows)]


def test_tells_the_observation_steps_and_the_actions_apart():
    """The chunk starts where the older observation was and ends where the newer one is."""
    policy = make()
    ends = torch.rand(64, 2, 2, generator=torch.Generator().manual_seed(0)) * 1.6 - 0.8
    ramp = torch.linspace(0, 1, 8)[:, None]
    action = ends[:, :1] * (1 - ramp) + ends[:, 1:] * ramp
    fit(policy, {"observation.state": ends, "action": action}, 250)
    with torch.inference_mode():
        chunk = policy.sample({"observation.state": ends}, generators(64))
    assert (chunk - action).abs().mean() < 0.12


def test_context_and_noise_levels_are_encoded_once_per_chunk():
    policy = make().eval()
    calls = []
    policy.denoiser.context_tokens.register_forward_hook(lambda *_: calls.append("context"))
    policy.denoiser.noise_modulation.register_forward_hook(lambda *_: calls.append("levels"))
    policy.denoiser.head.register_forward_hook(lambda *_: calls.append("step"))
    with torch.inference_mode():
        policy.sample({"observation.state": torch.zeros(3, 2, 2)}, generators(3))
    assert sorted(calls) == ["context", "levels"] + ["step"] * policy.network_calls


def test_impossible_sizes_are_refused():
    with pytest.raises(UserError, match="heads=5 must divide dim=32"):
        make(heads=5)
    with pytest.raises(UserError, match="mlp_ratio=0 must be at least 1"):
        make(mlp_ratio=0)
