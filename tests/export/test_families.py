"""Every family's graphs compute what the policy computes: as modules, and as ONNX by either exporter."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import onnx
import pytest
import torch

from robopolicy.errors import UserError
from robopolicy.export.borders import torch_session
from robopolicy.export.critic import own_candidates
from robopolicy.export.engine_policy import EnginePolicy
from robopolicy.export.loop import export_loop
from robopolicy.export.onnx_graphs import export_onnx
from robopolicy.inference.backends.onnxruntime import OnnxRuntimeSession
from robopolicy.inference.policy import ExportedPolicy
from tests.policies.test_contract import FAMILIES, TOLD, batch_of, generators, make, observations_of

SMALL = ("unet edm", "mode", "sdp", "consistency")  # a network of each kind, where all would take too long


def opinionated(policy):
    """Small random changes to all weights: heads that start at zero would agree whatever their graphs do."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    return policy.eval()


def short(policy, steps=2):
    """The policy with few steps, which export faster."""
    if policy.sampler.name != "consistency":
        policy.sampler = replace(policy.sampler, steps=steps)
    return policy


def inputs_of(policy, rows):
    return {key: value for key, value in batch_of(policy, rows).items() if key != "action"}


def exported(policy, sessions):
    noises = policy.export_graphs(inputs_of(policy, 1))["sampler"].inputs[0].shape[1]
    return ExportedPolicy("test", policy.spec, sessions, noises, own_candidates(policy))


def onnx_sessions(policy, folder, *, rows=1, free_rows=True, exporter="torchscript", loop=False, dtype=torch.float32):
    sessions = {}
    for name, graph in policy.export_graphs(inputs_of(policy, rows), dtype).items():
        if name == "denoiser":  # see test_guidance, which walks with it
            continue
        path = folder / f"{name}.onnx"
        if name == "sampler" and loop:
            export_loop(policy, graph, path, dtype=dtype, exporter=exporter, free_rows=free_rows)
        else:
            export_onnx(graph, path, exporter=exporter, free_rows=free_rows)
        sessions[name] = OnnxRuntimeSession(path)
    return sessions


def same_chunks(policy, sessions, rows=3, atol=2e-5):
    """The engine acts as the policy does, from the same seeds."""
    engine = EnginePolicy(exported(policy, sessions))
    observations = observations_of(policy, batch_of(policy, rows))
    wanted = policy.act(observations, generators(rows))
    assert wanted.std() > 1e-3
    np.testing.assert_allclose(engine.act(observations, generators(rows)), wanted, atol=atol)


@pytest.mark.parametrize("family", FAMILIES)
def test_modules_sample_what_the_policy_samples(family):
    told = family in TOLD
    policy = opinionated(make(family, goals=told, tasks=2 if told else 0))
    graphs = policy.export_graphs(inputs_of(policy, 2))
    same_chunks(policy, {name: torch_session(graph) for name, graph in graphs.items()})


@pytest.mark.parametrize("family", FAMILIES)
def test_onnx_with_any_number_of_rows(family, tmp_path):
    told = family in TOLD
    policy = opinionated(make(family, goals=told, tasks=2 if told else 0))
    sessions = onnx_sessions(policy, tmp_path)
    same_chunks(policy, sessions, rows=1)
    same_chunks(policy, sessions, rows=5)


# processes differ in a table of numbers only, so one U-Net stands for three
@pytest.mark.parametrize("family", [family for family in FAMILIES if family not in ("unet edm", "unet flow")])
def test_onnx_by_the_other_exporter_in_fixed_rows(family, tmp_path):
    policy = short(opinionated(make(family)))
    same_chunks(policy, onnx_sessions(policy, tmp_path, free_rows=False, exporter="dynamo"))  # row by row


@pytest.mark.parametrize("family", SMALL)
def test_free_rows_by_dynamo(family, tmp_path):
    policy = short(opinionated(make(family, tasks=2)))
    same_chunks(policy, onnx_sessions(policy, tmp_path, exporter="dynamo"), rows=3)


@pytest.mark.parametrize(
    ("family", "exporter"), [*((family, "torchscript") for family in SMALL), ("unet edm", "dynamo"), ("mode", "dynamo")]
)
def test_a_loop_is_the_unrolled_sampler(family, exporter, tmp_path):
    policy = opinionated(make(family, tasks=2))
    same_chunks(policy, onnx_sessions(policy, tmp_path, exporter=exporter, loop=True))
    size = (tmp_path / "sampler.onnx").stat().st_size
    if exporter == "torchscript":  # more steps are no larger graph, but for their table of numbers
        onnx_sessions(short(policy, 12), tmp_path, exporter=exporter, loop=True)
        assert (tmp_path / "sampler.onnx").stat().st_size < 1.2 * size + 20_000


@pytest.mark.parametrize("family", SMALL)
def test_images_go_in_as_pixels(family, tmp_path):
    policy = short(opinionated(make(family, images=True, augmentation={"crop": 0.9})))
    same_chunks(policy, onnx_sessions(policy, tmp_path), rows=2, atol=1e-4)


@pytest.mark.parametrize("family", ["unet ddpm", "mode", "beso"])
def test_guidance_is_part_of_the_sampler(family, tmp_path):
    policy = opinionated(make(family, goals=True, goal_dropout=0.2))
    plain = policy.act(observations_of(policy, batch_of(policy, 3)), generators(3))
    policy.sampler = replace(policy.sampler, guidance=2.5)
    guided = policy.act(observations_of(policy, batch_of(policy, 3)), generators(3))
    assert np.abs(plain - guided).max() > 1e-3
    same_chunks(policy, onnx_sessions(policy, tmp_path), atol=1e-4)
    policy.sampler = replace(policy.sampler, guidance_threshold=0.9)
    with pytest.raises(UserError, match="guidance_threshold=2"):
        policy.export_graphs(inputs_of(policy, 1))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    "family", ["unet edm", "dit flow", "beso", "mode", "consistency", "mlp ddpm", "consistency actor"]
)
def test_lower_precision_is_near(family, dtype):
    policy = opinionated(make(family))
    graphs = policy.export_graphs(inputs_of(policy, 2), dtype)
    assert {p.dtype for p in graphs["sampler"].module.step.network.denoiser.parameters()} == {dtype}
    assert {p.dtype for p in policy.parameters()} == {torch.float32}
    sessions = {name: torch_session(graph) for name, graph in graphs.items()}
    observations = observations_of(policy, batch_of(policy, 8))
    wanted = policy.act(observations, generators(8))
    error = np.abs(EnginePolicy(exported(policy, sessions)).act(observations, generators(8)) - wanted)
    assert 0 < error.mean() < (0.004 if dtype == torch.float16 else 0.03)


@pytest.mark.parametrize("family", ["unet edm", "mode"])
def test_half_precision_in_onnx(family, tmp_path):
    policy = short(opinionated(make(family)), 3)
    graphs = policy.export_graphs(inputs_of(policy, 1), torch.float16)
    halves = {name: torch_session(graph) for name, graph in graphs.items()}
    sessions = onnx_sessions(policy, tmp_path, dtype=torch.float16, exporter="dynamo")
    observations = observations_of(policy, batch_of(policy, 4))
    found, wanted = (EnginePolicy(exported(policy, s)).act(observations, generators(4)) for s in (sessions, halves))
    np.testing.assert_allclose(found, wanted, atol=5e-3)
    assert (tmp_path / "sampler.onnx").stat().st_size < 0.75 * sum(4 * p.numel() for p in policy.denoiser.parameters())


@pytest.mark.parametrize("family", FAMILIES)
def test_a_mask_keeps_the_previous_chunk(family, tmp_path):
    """Soft-mask real-time chunking: kept actions come back, the others go on from them, no mask changes nothing."""
    policy = opinionated(make(family, low=10.0, high=30.0))
    engine = exported(policy, onnx_sessions(policy, tmp_path))
    observations = observations_of(policy, batch_of(policy, 2))
    noise = engine.draw_noise(2, np.random.default_rng(0))
    previous = np.random.default_rng(1).uniform(12, 28, (2, 8, 2)).astype(np.float32)
    mask = np.zeros((2, 8), np.float32)
    free = engine.sample(observations, noise)
    np.testing.assert_array_equal(engine.sample(observations, noise, previous, mask), free)
    mask[:, :3] = 1
    kept = engine.sample(observations, noise, previous, mask)
    np.testing.assert_allclose(kept[:, :3], previous[:, :3], atol=1e-3)
    assert np.abs(kept[:, :3] - free[:, :3]).max() > 0.1
    if policy.network_calls > 1:
        assert np.abs(kept[:, 3:] - free[:, 3:]).max() > 1e-4  # later actions saw what was kept
    mask[:, 3] = 0.5
    graphs = policy.export_graphs(inputs_of(policy, 2))
    modules = exported(policy, {name: torch_session(graph) for name, graph in graphs.items()})
    half = engine.sample(observations, noise, previous, mask)
    np.testing.assert_allclose(half, modules.sample(observations, noise, previous, mask), atol=1e-3)
    assert np.abs(half[:, 3] - kept[:, 3]).max() > 1e-3


def test_the_actors_own_critic_chooses(tmp_path):
    policy = opinionated(make("consistency actor", candidates=6, temperature=0.5))
    sessions = onnx_sessions(policy, tmp_path)
    assert set(sessions) == {"encoder", "sampler", "critic_encoder", "critic"}
    same_chunks(policy, sessions, rows=4)


def test_experts_of_unrolled_steps_are_constants(tmp_path):
    """Nothing is routed while an unrolled sampler runs; a loop has to."""
    policy = short(opinionated(make("mode")))
    kinds = {}
    for loop in (False, True):
        onnx_sessions(policy, tmp_path, free_rows=False, loop=loop)
        graph = onnx.load(tmp_path / "sampler.onnx").graph
        bodies = [a.g.node for node in graph.node for a in node.attribute if a.type == onnx.AttributeProto.GRAPH]
        kinds[loop] = {node.op_type for nodes in (graph.node, *bodies) for node in nodes}
    assert "TopK" not in kinds[False] and "TopK" in kinds[True]
