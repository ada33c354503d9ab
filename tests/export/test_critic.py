"""Engines whose critic chooses among candidates do what V-GPS does in torch."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from robopolicy.data.normalize import Normalizer, fit_normalizer
from robopolicy.errors import UserError
from robopolicy.export.borders import torch_session
from robopolicy.export.build import ExportConfig, build_engine
from robopolicy.export.critic import critic_graphs
from robopolicy.export.engine_policy import EnginePolicy
from robopolicy.export.observations import Observations, made_up
from robopolicy.export.onnx_graphs import export_onnx
from robopolicy.export.open import open_policy
from robopolicy.inference.backends.onnxruntime import OnnxRuntimeSession
from robopolicy.inference.engine import Candidates, engine_names
from robopolicy.inference.policy import ExportedPolicy, open_engine
from robopolicy.policies.bundle import load_bundle, save_bundle
from robopolicy.spec import KeySpec, PolicySpec, TaskSpec
from robopolicy.steering.policy import SteeredPolicy
from robopolicy.steering.vgps import ChunkValues, Vgps, VgpsConfig
from robopolicy.values.bundle import load_critic, save_critic
from robopolicy.values.model import Critic, CriticConfig, ValueMeaning
from tests.export.test_families import opinionated, short
from tests.policies.test_contract import IMAGE, STATE, batch_of, generators, make, observations_of


def make_critic(path, *, unit="mm", n_obs_steps=1, n_action_steps=4, keys=(STATE,), tasks=(), dim=2, **config):
    """The folder of a critic with random weights."""
    torch.manual_seed(3)
    spec = PolicySpec(
        keys,
        KeySpec("action", (dim,), role="action", unit=unit),
        10,
        n_obs_steps,
        n_obs_steps - 1 + n_action_steps,
        n_action_steps,
        tasks=tuple(TaskSpec(text) for text in tasks),
    )
    reach = {"mm": 1.0, "m": 1e-3}[unit]
    parts = {key.key: fit_normalizer(np.array([[-1.0] * key.dim, [1.0] * key.dim]), "minmax") for key in spec.states}
    parts["action"] = fit_normalizer(np.array([[-reach] * dim, [reach] * dim]), "minmax")
    critic = Critic(
        CriticConfig(**({"width": 32} | config)),
        spec,
        Normalizer.from_parts(parts),
        ValueMeaning("success", 0.98, 10, -50, 0),
    )
    return str(save_critic(opinionated(critic), path))


def in_torch(policy, critic, candidates, temperature):
    """The policy's graphs and the critic's, run by torch."""
    batch = made_up(policy, 2, seed=0)
    how, chosen = critic_graphs(policy, critic, batch, candidates, temperature)
    graphs = policy.export_graphs(batch)
    sessions = {name: torch_session(graph) for name, graph in (graphs | chosen).items()}
    return ExportedPolicy("test", policy.spec, sessions, graphs["sampler"].inputs[0].shape[1], how)


def assert_chooses_as_steered(engine, policy, critic, candidates, temperature, rows=6, atol=2e-5):
    """The same chunks from the same seeds; and not simply the first ones."""
    vgps = Vgps(VgpsConfig(critic=critic, candidates=candidates, temperature=temperature), policy)
    wanted = SteeredPolicy(policy, {"vgps": vgps})
    observations = observations_of(policy, batch_of(policy, rows))
    found = EnginePolicy(engine).act(observations, generators(rows))
    np.testing.assert_allclose(found, wanted.act(observations, generators(rows)), atol=atol)
    plain = policy.act(observations, generators(rows))
    moved = np.abs(found - plain).max(axis=(1, 2)) > 1e-3
    assert moved.sum() >= 2, "another one than the first was chosen"
    return found


@pytest.mark.parametrize("temperature", [0.0, 0.05])
@pytest.mark.parametrize("family", ["unet ddpm", "mode", "unet flow", "consistency"])
def test_the_choice_is_that_of_vgps(family, temperature, tmp_path):
    policy = opinionated(make(family))
    critic = make_critic(tmp_path / "critic")
    engine = in_torch(policy, critic, 6, temperature)
    assert engine.candidates == Candidates(6, temperature)
    assert_chooses_as_steered(engine, policy, critic, 6, temperature)


def test_a_temperature_makes_other_choices(tmp_path):
    policy, critic = opinionated(make("unet ddpm")), make_critic(tmp_path / "critic")
    best, drawn = (assert_chooses_as_steered(in_torch(policy, critic, 6, t), policy, critic, 6, t) for t in (0.0, 10.0))
    assert np.abs(best - drawn).max() > 1e-2


@pytest.mark.parametrize(
    "changes",
    [
        {"unit": "m"},
        {"n_obs_steps": 2},
        {"n_action_steps": 1},
        {"values": "hl_gauss", "bins": 21},
        {"backbone": "simba", "heads": 5, "quantile": 0.25},
    ],
)
def test_critics_of_other_units_histories_and_kinds(changes, tmp_path):
    policy = short(opinionated(make("unet edm")), 3)
    critic = make_critic(tmp_path / "critic", **changes)
    assert_chooses_as_steered(in_torch(policy, critic, 6, 0.0), policy, critic, 6, 0.0)


def test_a_unit_is_converted(tmp_path):
    """A critic in metres that was made for the same motions chooses as the one in millimetres."""
    policy = short(opinionated(make("unet edm")), 3)
    observations = observations_of(policy, batch_of(policy, 6))
    chunks = [
        EnginePolicy(in_torch(policy, make_critic(tmp_path / unit, unit=unit), 6, 0.0)).act(observations, generators(6))
        for unit in ("m", "mm")
    ]
    np.testing.assert_array_equal(*chunks)


def test_a_critic_of_several_tasks_is_told_the_policys(tmp_path):
    policy = short(opinionated(make("unet edm", tasks=2)), 3)
    critic = make_critic(tmp_path / "critic", tasks=("another", "task 1", "task 0"))
    engine = in_torch(policy, critic, 6, 0.0)
    assert [spec.name for spec in engine.sessions["critic_encoder"].inputs] == [STATE.key, "task"]
    assert_chooses_as_steered(engine, policy, critic, 6, 0.0)


def test_a_critic_of_a_policy_with_goals_sees_no_goal(tmp_path):
    policy = short(opinionated(make("unet edm", goals=True)), 3)
    critic = make_critic(tmp_path / "critic")
    engine = in_torch(policy, critic, 6, 0.0)
    assert [spec.name for spec in engine.sessions["critic_encoder"].inputs] == [STATE.key]
    assert_chooses_as_steered(engine, policy, critic, 6, 0.0)


@pytest.mark.parametrize("exporter", ["dynamo", "torchscript"])
@pytest.mark.parametrize("config", [{}, {"values": "hl_gauss", "bins": 21}, {"backbone": "simba", "heads": 3}])
def test_both_exporters_write_critics(exporter, config, tmp_path):
    policy = make("mlp ddpm", tasks=2).eval()
    critic = make_critic(tmp_path / "critic", tasks=("task 1", "task 0"), **config)
    _, graphs = critic_graphs(policy, critic, made_up(policy, 2, seed=0), 4, 0.0)
    observations, generator = made_up(policy, 5, seed=1), torch.Generator().manual_seed(0)
    given = {key: value.numpy() for key, value in observations.items()}
    given["chunk"] = torch.randn(5, 8, 2, generator=generator).numpy()
    values = ChunkValues(load_critic(critic)[0], policy.spec, "the critic")
    with torch.no_grad():
        wanted = values(observations, torch.from_numpy(given["chunk"])[:, None])[:, 0]
    for name, graph in graphs.items():
        export_onnx(graph, tmp_path / f"{name}.onnx", exporter=exporter, free_rows=True)
        given |= OnnxRuntimeSession(tmp_path / f"{name}.onnx")(given)
    np.testing.assert_allclose(given["value"], wanted.numpy(), rtol=1e-4, atol=1e-4)


def build(folder, **changes):
    policy, about = load_bundle(folder)
    values = {"backend": "onnxruntime", "exporter": "torchscript", "observations": 8, "rows": None, "candidates": 5}
    observations = Observations(made_up(policy, 8, seed=0), "made up")
    return build_engine(policy, about, folder, ExportConfig(**(values | changes)), observations, "robopolicy export x")


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    return save_bundle(short(opinionated(make("unet flow", tasks=2)), 3), tmp_path_factory.mktemp("policy") / "last")


@pytest.mark.parametrize(("backend", "temperature"), [("onnxruntime", 0.05), ("openvino", 0.0)])
def test_an_engine_is_built_with_its_critic(bundle, backend, temperature, tmp_path):
    critic = make_critic(tmp_path / "critic", tasks=("task 1", "task 0"))
    made = build(bundle, critic=critic, backend=backend, temperature=temperature)
    assert made.manifest.candidates == Candidates(5, temperature) and made.manifest.parity.max_share < 1e-4
    assert {"critic_encoder", "critic"} < set(made.manifest.graphs)
    policy, _ = load_bundle(bundle)
    engine = open_engine(bundle, f"{backend}-fp32")
    engine.warmup(1)
    assert engine.noise_shape == (5 + 1, 8, 2)
    for rows in (1, 6):
        observations = observations_of(policy, batch_of(policy, rows))
        found = EnginePolicy(engine).act(observations, generators(rows))
        vgps = Vgps(VgpsConfig(critic=critic, candidates=5, temperature=temperature), policy)
        wanted = SteeredPolicy(policy, {"vgps": vgps}).act(observations, generators(rows))
        np.testing.assert_allclose(found, wanted, atol=1e-4)
    plain = open_policy(bundle, "torch")
    assert plain.candidates is None and plain.noise_shape == (1, 8, 2)


@pytest.mark.parametrize(
    ("changes", "config", "words"),
    [
        ({"n_obs_steps": 3}, {}, "sees 3 observation steps, the policy 2"),
        ({"keys": (STATE, KeySpec("observation.force", (1,)))}, {}, "observation.force"),
        ({"keys": (STATE, IMAGE)}, {}, "observation.image.top"),
        ({"dim": 3}, {}, "3 action entries, the policy has 2"),
        ({"n_action_steps": 5}, {}, "chunks of 5 actions, the policy executes 4"),
        ({"tasks": ("task 0", "open")}, {}, "does not know the task 'task 1'"),
        ({}, {"rows": 1}, "set rows=null"),
    ],
)
def test_what_does_not_fit_is_refused(bundle, changes, config, words, tmp_path):
    critic = make_critic(tmp_path / "critic", **changes)
    before = engine_names(bundle)
    with pytest.raises(UserError, match=words):
        build(bundle, critic=critic, name="wrong", **config)
    assert engine_names(bundle) == before


def test_one_critic_is_enough(tmp_path):
    """A policy that chooses with critics of its own takes no other one."""
    folder = save_bundle(opinionated(make("consistency actor", candidates=4)), tmp_path / "last")
    with pytest.raises(UserError, match="draws 4 chunks and chooses with its own critic"):
        build(folder, critic=make_critic(tmp_path / "critic"))
