"""Engines of policies that continue a prefix: they are shown it as the policy is, and give it back as it is."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from robopolicy.export.borders import torch_session
from robopolicy.export.build import ExportConfig, build_engine
from robopolicy.export.observations import find_observations
from robopolicy.inference.policy import open_engine
from robopolicy.policies.bundle import load_bundle, save_bundle
from tests.export.test_families import SMALL, exported, inputs_of, onnx_sessions, opinionated, short
from tests.policies.test_contract import FAMILIES, TOLD, batch_of, make, observations_of

KNOWN = 3


def prepared(family, **changes):
    """A policy of any weights, in units whose rounding would be seen."""
    return short(opinionated(make(family, low=10.0, high=30.0, prefix_steps=KNOWN, **changes)))


ROWS = 16


def asked(policy, engine, rows=ROWS):
    """Noise, a previous chunk, and masks: free, a prefix, a longer one than trained with a soft end, a soft one."""
    noise = engine.draw_noise(rows, np.random.default_rng(0))
    previous = np.random.default_rng(1).uniform(12, 28, (rows, 8, 2)).astype(np.float32)
    mask = np.zeros((rows, 8), np.float32)
    mask[1::4, 1:3] = 1
    mask[2::4, :5], mask[2::4, 5:] = 1, [0.7, 0.4, 0.1]
    mask[3::4] = 0.9
    return observations_of(policy, batch_of(policy, rows)), noise, previous, mask


def torch_engine(policy, rows, dtype=torch.float32):
    graphs = policy.export_graphs(inputs_of(policy, rows), dtype)
    return exported(policy, {name: torch_session(graph) for name, graph in graphs.items()})


def same_as_torch(policy, engine):
    reference = torch_engine(policy, ROWS)
    given = asked(policy, engine)
    _, _, previous, mask = given
    found, wanted = engine.sample(*given), reference.sample(*given)
    np.testing.assert_allclose(found, wanted, atol=2e-3)
    assert (found[mask == 1] == previous[mask == 1]).all()
    reference.sessions["sampler"]._module.step.prefix_steps = 0  # a graph that shows and keeps nothing
    blind = reference.sample(*given)
    for unmarked in (0, 3):
        np.testing.assert_allclose(found[unmarked::4], blind[unmarked::4], atol=2e-3)
    assert np.abs(found[1::4, 3:] - blind[1::4, 3:]).max() > 0.02


@pytest.mark.parametrize("family", FAMILIES)
def test_engines_show_the_prefix_as_the_policy_does(family, tmp_path):
    policy = prepared(family, tasks=2 if family in TOLD else 0)
    same_as_torch(policy, exported(policy, onnx_sessions(policy, tmp_path)))


@pytest.mark.parametrize("family", SMALL)
def test_so_do_loops(family, tmp_path):
    policy = prepared(family, tasks=2)
    same_as_torch(policy, exported(policy, onnx_sessions(policy, tmp_path, loop=True)))


@pytest.mark.parametrize("loop", [False, True], ids=["unrolled", "loop"])
def test_so_do_those_of_the_other_exporter(loop, tmp_path):
    policy = prepared("mlp ddpm")
    sessions = onnx_sessions(policy, tmp_path, loop=loop, exporter="dynamo", free_rows=False)
    same_as_torch(policy, exported(policy, sessions))  # row by row


def test_borders_are_those_of_other_policies(tmp_path):
    policy, plain = prepared("mlp ddpm"), short(opinionated(make("mlp ddpm", low=10.0, high=30.0)))
    engines = [exported(p, onnx_sessions(p, tmp_path)) for p in (policy, plain)]
    for name in ("encoder", "sampler"):
        assert engines[0].sessions[name].inputs == engines[1].sessions[name].inputs
        assert engines[0].sessions[name].outputs == engines[1].sessions[name].outputs


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_lower_precision_keeps_the_prefix_exactly(dtype):
    policy = prepared("unet edm")
    engine = torch_engine(policy, ROWS, dtype)
    given = asked(policy, engine)
    _, _, previous, mask = given
    found = engine.sample(*given)
    assert (found[mask == 1] == previous[mask == 1]).all()
    error = np.abs(found - torch_engine(policy, ROWS).sample(*given)).mean()
    assert 0 < error < (0.05 if dtype == torch.float16 else 0.4)


def test_guidance_shows_the_prefix_to_both_branches(tmp_path):
    policy = prepared("beso", goals=True, goal_dropout=0.2)
    policy.sampler = type(policy.sampler)("euler", steps=2, guidance=2.0)
    same_as_torch(policy, exported(policy, onnx_sessions(policy, tmp_path)))


@pytest.mark.parametrize("backend", ["onnxruntime", "openvino"])
def test_an_engine_is_built_and_opened(backend, tmp_path):
    """Parity compares rows with a prefix, too; the golden chunks are checked when it is opened."""
    path = tmp_path / "last"
    save_bundle(prepared("mlp ddpm"), path)
    policy, about = load_bundle(path)
    config = ExportConfig(backend=backend, exporter="torchscript", observations=8)
    built = build_engine(policy, about, path, config, find_observations(policy, about, 16), "robopolicy export")
    assert 0 < built.manifest.parity.max_share < 1e-4
    same_as_torch(policy, open_engine(path, f"{backend}-fp32"))
