import pytest
import torch
from torch import nn

from robopolicy.benchmarking.work import Work, chunk_work, graph_work
from robopolicy.policies.cost import blank_observations, chunk_flops
from robopolicy.policies.registry import build_policy


def test_linear_layer():
    found = graph_work(nn.Linear(3, 5), [torch.zeros(2, 3)])
    assert found == Work(flops=2 * 2 * 3 * 5, weights=15 + 5 + 6, activations=10)


def test_element_wise_operations_cost_nothing_but_what_they_read():
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.ones(3))

        def forward(self, x):
            return (x * self.scale).relu()

    assert graph_work(Scaled(), [torch.zeros(2, 3)]) == Work(flops=0, weights=3 + 6, activations=0)


def test_a_weight_used_twice_is_read_once():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 4, bias=False)

        def forward(self, x):
            return self.layer(self.layer(x))

    assert graph_work(Twice(), [torch.zeros(1, 4)]) == Work(flops=2 * 2 * 16, weights=16 + 4, activations=8)


def test_only_the_chosen_expert_is_read():
    class Experts(nn.Module):
        def __init__(self):
            super().__init__()
            self.weights = nn.Parameter(torch.zeros(8, 4, 4))

        def forward(self, x):
            return x @ self.weights[2]

    assert graph_work(Experts(), [torch.zeros(1, 4)]) == Work(flops=2 * 16, weights=16 + 4, activations=4)


@pytest.mark.parametrize(
    ("layer", "length", "taps", "out"),
    [
        # 5 taps at 4 places: 3 + 4 + 4 + 3 of 20 lie inside
        (nn.Conv1d(2, 3, 5, padding=2), 4, 14, 4),
        # places 0 and 2 of 4, taps from one before to one after
        (nn.Conv1d(2, 3, 3, stride=2, padding=1), 4, 5, 2),
        (nn.Conv1d(2, 3, 3), 4, 6, 2),
        # 4 inputs write 4 taps each; of 10 places the outer two are cropped
        (nn.ConvTranspose1d(2, 3, 4, stride=2, padding=1), 4, 14, 8),
    ],
)
def test_convolutions_without_their_padding(layer, length, taps, out):
    found = graph_work(layer, [torch.zeros(1, 2, length)])
    assert found == Work(flops=2 * taps * 2 * 3, weights=layer.weight.numel() + 3 + 2 * length, activations=3 * out)


def test_two_dimensional_convolution_without_its_padding():
    found = graph_work(nn.Conv2d(1, 1, 3, padding=1, bias=False), [torch.zeros(1, 1, 2, 4)])
    assert found.flops == 2 * 4 * 10  # 4 of 6 taps inside along 2 rows, 10 of 12 along 4 columns


@pytest.mark.parametrize("family", ["diffusion_mlp", "diffusion_transformer"])
def test_chunk_adds_up_to_what_describe_counts(make_policy_of, family):
    policy = make_policy_of(family)
    found = chunk_work(policy, blank_observations(policy.spec))
    levels = policy.process.network_level(policy.process.solver(policy.sampler).levels)
    once = graph_work(_Levels(policy.denoiser), [levels]).flops  # engines hold these as constants
    assert len(found.denoise) == policy.network_calls == 4
    assert found.flops + once == chunk_flops(policy)
    assert len(set(found.denoise)) == 1


def test_a_network_call_reads_every_weight_that_is_not_for_the_context(make_policy_of):
    policy = make_policy_of("diffusion_unet")
    found = chunk_work(policy, blank_observations(policy.spec))
    unet = policy.denoiser
    elsewhere = sum(
        p.numel() for part in (unet.film_step, unet.step_encoder, unet.film_cond) for p in part.parameters()
    )
    inputs = 8 * 2 + 2 * unet.film_step[1].out_features  # the chunk; both parts of the modulation
    assert found.denoise[0].weights == sum(p.numel() for p in unet.parameters()) - elsewhere + inputs


def test_more_robots_multiply_more_and_read_as_much(make_policy_of):
    policy = make_policy_of("diffusion_unet")
    one, three = (chunk_work(policy, blank_observations(policy.spec, rows)) for rows in (1, 3))
    assert three.flops == 3 * one.flops
    assert three.denoise[0].weights < 1.5 * one.denoise[0].weights


class _Levels(nn.Module):
    def __init__(self, denoiser):
        super().__init__()
        self.denoiser = denoiser

    def forward(self, levels):
        return tuple(self.denoiser.at_levels(levels))


CONFIGS = {
    "diffusion_mlp": {"width": 32, "blocks": 2, "step_embed_dim": 16},
    "diffusion_transformer": {"dim": 32, "layers": 2, "heads": 2},
    "diffusion_unet": {"down_dims": [16, 32], "step_embed_dim": 16},
}


@pytest.fixture
def make_policy_of(tiny_spec, tiny_normalizer):
    def make(family):
        torch.manual_seed(0)
        config = CONFIGS[family] | {"sampler": {"name": "ddim", "steps": 4}}
        return build_policy(family, config, tiny_spec, tiny_normalizer).eval()

    return make
