"""What a policy costs, against counts by hand."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn.functional import scaled_dot_product_attention

from robopolicy.data.normalize import AffineNormalizer, Normalizer
from robopolicy.diffusion.process import SamplerConfig
from robopolicy.policies.base import Policy
from robopolicy.policies.cost import act_latency, blank_observations, chunk_flops, cost, parameters_by_part
from robopolicy.policies.registry import build_policy
from robopolicy.spec import GOAL, TASK, KeySpec, PolicySpec, TaskSpec

STATE, ACTION = KeySpec("observation.state", (2,)), KeySpec("action", (2,), role="action")
IMAGE = KeySpec("observation.image.top", (40, 40, 3), role="image")
SMALL = {"down_dims": [16, 32], "step_embed_dim": 16}


def normalizer(spec):
    keys = (*spec.states, spec.action)
    return Normalizer.from_parts({k.key: AffineNormalizer(k.dim, spec.domains) for k in keys})


def unet(spec=None, **config):
    torch.manual_seed(0)
    spec = spec or PolicySpec((STATE,), ACTION, 10, 2, 8, 4)
    policy = build_policy("diffusion_unet", SMALL | config, spec, normalizer(spec))
    return policy.eval()


class Calls(Policy):
    """Applies one linear layer, or attention without weights, several times."""

    def __init__(self, calls, attend=False):
        spec = PolicySpec((STATE,), ACTION, 10, 2, 8, 4)
        super().__init__(spec, normalizer(spec))
        self.layer, self.calls, self.attend = nn.Linear(2, 2), calls, attend

    @property
    def network_calls(self):
        return self.calls

    def sample(self, observations, generators):
        x = observations["observation.state"].new_zeros(1, self.spec.horizon, 2)
        for _ in range(self.calls):
            x = scaled_dot_product_attention(x[:, None], x[:, None], x[:, None])[:, 0] if self.attend else self.layer(x)
        return x

    draw = loss = check_sampler = encode = export_graphs = None


@pytest.mark.parametrize("calls", [1, 5])
def test_operations_of_matrix_products_are_two_for_each_entry(calls):
    found = cost(Calls(calls))
    assert found.flops == calls * 2 * 8 * 2 * 2
    assert found.network_calls == calls
    assert found.parameters == {"layer": 6} and found.total_parameters == found.active_parameters == 6


def test_attention_counts_although_its_kernel_is_fused():
    assert chunk_flops(Calls(3, attend=True)) == 3 * 2 * (2 * 8 * 8 * 2)


def test_parameters_are_those_of_the_modules():
    policy = unet(PolicySpec((STATE, IMAGE), ACTION, 10, 2, 8, 4))
    parts = parameters_by_part(policy)
    assert parts == {
        "encoder": sum(p.numel() for p in policy.encoder.parameters()),
        "denoiser": sum(p.numel() for p in policy.denoiser.parameters()),
    }
    assert sum(parts.values()) == sum(p.numel() for p in policy.parameters())


def test_operations_grow_by_the_same_amount_with_every_step():
    policy = unet()
    flops = {}
    for steps in (4, 8, 16):
        policy.sampler = SamplerConfig("ddim", steps)
        flops[steps] = chunk_flops(policy)
    assert flops[16] - flops[8] == 2 * (flops[8] - flops[4]) > 0
    assert 0 <= flops[4] - (flops[8] - flops[4]) < 0.2 * flops[4]  # what is done once per chunk


@pytest.mark.parametrize(("name", "calls"), [("euler", 6), ("heun", 11)])
def test_network_calls_are_the_solvers(name, calls):
    policy = unet(process={"name": "edm"}, sampler={"name": name, "steps": 6})
    called = []
    policy.denoiser.register_forward_hook(lambda *_: called.append(1))
    assert cost(policy).network_calls == calls
    assert len(called) == 2 * calls  # a first chunk, then the counted one


def test_active_parameters_are_what_the_denoiser_says(monkeypatch):
    policy = unet()
    monkeypatch.setattr(policy.denoiser, "active_parameters", lambda: 7)
    assert cost(policy).active_parameters == 7


def test_goals_tasks_and_images_are_part_of_a_chunk():
    tasks = (TaskSpec("a"), TaskSpec("b", domain=1))
    spec = PolicySpec((STATE, IMAGE), ACTION, 10, 2, 8, 4, goals=(STATE,), tasks=tasks)
    blank = blank_observations(spec, rows=3)
    assert {k: (tuple(v.shape), v.dtype) for k, v in blank.items()} == {
        "observation.state": ((3, 2, 2), torch.float32),
        "observation.image.top": ((3, 2, 40, 40, 3), torch.uint8),
        GOAL + "observation.state": ((3, 2), torch.float32),
        TASK: ((3,), torch.int64),
    }
    policy = unet(spec)
    assert cost(policy).flops > chunk_flops(unet())
    measured = act_latency(policy, calls=2)
    assert 0 < measured.median <= measured.slowest and measured.calls == 2
    assert policy.instruction is None


def test_counting_changes_nothing():
    policy = unet()
    before = {k: v.clone() for k, v in policy.state_dict().items()}
    assert chunk_flops(policy) == chunk_flops(policy)
    assert all(torch.equal(v, policy.state_dict()[k]) for k, v in before.items())
