"""Guidance on exported graphs: the gradient, the walk call by call, and engines that are guided."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from robopolicy.cli.main import main
from robopolicy.data.normalize import Normalizer, fit_normalizer
from robopolicy.diffusion.process import SamplerConfig
from robopolicy.dynamics.bundle import load_dynamics, save_dynamics
from robopolicy.dynamics.model import OutcomeConfig, OutcomeModel
from robopolicy.errors import UserError
from robopolicy.export.borders import torch_session
from robopolicy.export.build import ExportConfig, build_engine
from robopolicy.export.critic import critic_graphs
from robopolicy.export.engine_policy import EnginePolicy
from robopolicy.export.guidance import PLACES, export_guidance
from robopolicy.export.observations import Observations, made_up
from robopolicy.export.onnx_graphs import export_onnx
from robopolicy.inference.backends.onnxruntime import OnnxRuntimeSession
from robopolicy.inference.backends.openvino import OpenVinoSession
from robopolicy.inference.engine import STEPS, Candidates, engine_names, read_engine
from robopolicy.inference.guided import GUIDED, GuidedPolicy
from robopolicy.inference.policy import open_engine
from robopolicy.policies.bundle import load_bundle, save_bundle
from robopolicy.spec import KeySpec, PolicySpec
from robopolicy.steering.base import Scene
from robopolicy.steering.dynaguide import DynaGuide, DynaGuideConfig
from robopolicy.steering.policy import SteeredPolicy
from robopolicy.steering.vgps import Vgps, VgpsConfig
from robopolicy.values.bundle import save_critic
from robopolicy.values.model import Critic, CriticConfig, ValueMeaning
from tests.export.test_families import exported, inputs_of, opinionated, short
from tests.policies.test_contract import (
    ACTION,
    FAMILIES,
    IMAGE,
    STATE,
    TOLD,
    batch_of,
    generators,
    make,
    observations_of,
)

NEAR, FAR = {STATE.key: [-0.8, 0.1]}, {STATE.key: [0.8, 0.4]}
GOALS = {"positive": (NEAR, {STATE.key: [0.1, -0.5]}), "negative": (FAR,)}
PROCESSES = ("unet ddpm", "unet edm", "unet flow")


def outcome_model(network="mlp", images=False, reach=1.5, **config):
    """An outcome model with random weights, in other units than the policy's, that sees a part of its history."""
    torch.manual_seed(0)
    keys = (STATE, IMAGE) if images else (STATE,)
    spec = PolicySpec(keys, ACTION, 10, 1, 7, 4, goals=keys)
    limits = np.array([[-reach, -reach], [reach, reach]])
    parts = {key: fit_normalizer(limits, "minmax") for key in (STATE.key, ACTION.key)}
    config = OutcomeConfig(**({"network": network, "dim": 16, "layers": 1, "heads": 2} | config))
    return opinionated(OutcomeModel(config, spec, Normalizer.from_parts(parts)))


@pytest.fixture(scope="module")
def dynamics(tmp_path_factory):
    """Folders of outcome models, by network."""
    root = tmp_path_factory.mktemp("dynamics")
    return {name: str(save_dynamics(outcome_model(name), root / name)) for name in ("mlp", "transformer")}


@pytest.fixture(scope="module")
def critic(tmp_path_factory):
    """The folder of a critic with random weights."""
    torch.manual_seed(2)
    limits = np.array([[-1.0, -1.0], [1.0, 1.0]])
    parts = {key: fit_normalizer(limits, "minmax") for key in (STATE.key, ACTION.key)}
    spec = PolicySpec((STATE,), ACTION, 10, 1, 4, 4)
    made = Critic(CriticConfig(width=16), spec, Normalizer.from_parts(parts), ValueMeaning("success", 0.98, 10, -50, 0))
    return str(save_critic(opinionated(made), tmp_path_factory.mktemp("critic") / "critic"))


def guided(policy, config, free_rows=True, candidates=None, more=None):
    """The policy's graphs in torch, guided."""
    batch = made_up(policy, 2, seed=0)
    found = export_guidance(policy, config, batch, free_rows)
    plain = policy.export_graphs(batch)
    graphs = plain | found.graphs
    sessions = {name: torch_session(graphs[name]) for name in GUIDED} | (more or {})
    noises = plain["sampler"].inputs[0].shape[1]
    weight = policy.sampler.guidance
    return GuidedPolicy("test", policy.spec, sessions, noises, found.steps, found.guidance, weight, candidates)


def steered(policy, config, **more):
    ways = {"dynaguide": DynaGuide(config, policy)} | more
    return SteeredPolicy(policy, ways)


def assert_same(engine, wanted, policy, rows=3, atol=1e-4):
    """Both act alike from the same seeds."""
    observations = observations_of(policy, batch_of(policy, rows))
    found = EnginePolicy(engine).act(observations, generators(rows))
    np.testing.assert_allclose(found, wanted.act(observations, generators(rows)), atol=atol)
    return found


def log_weight_of(policy, config, observations):
    """The log weight that steers in torch; ``observations`` are the policy's, for one robot a row."""
    scene = Scene(policy, observations, policy.domain(observations), 1, None)
    return DynaGuide(config, policy).guide(scene).log_weight


def gradient_of(log_weight, chunk, signal, noise):
    point = chunk.clone().requires_grad_()
    value = log_weight(point, signal.view(1, 1, 1), noise.view(1, 1, 1)).sum()
    return torch.autograd.grad(value, point)[0]


@pytest.mark.parametrize("levels", [(0.6, 0.8), (1.0, 0.0), (1.0, 20.0), (0.0, 1.0)])
@pytest.mark.parametrize("sides", [("positive", "negative"), ("positive",), ("negative",)])
def test_the_gradient_is_that_of_the_log_weight(dynamics, sides, levels):
    policy = opinionated(make("mlp ddpm"))
    space = "clean" if levels[1] == 0 else "noisy"
    config = DynaGuideConfig(dynamics=dynamics["mlp"], space=space, **{side: GOALS[side] for side in sides})
    graph = export_guidance(policy, config, made_up(policy, 2, seed=0), True).graphs["guidance"]
    observations = made_up(policy, 5, seed=1)
    chunk, signal, noise = torch.randn(5, 8, 2), torch.tensor([levels[0]]), torch.tensor([levels[1]])
    features = load_dynamics(config.dynamics)[0].encode({STATE.key: observations[STATE.key][:, -1:]})
    values = dict(zip(graph.names, graph.inputs, strict=True))
    values |= {"chunk": chunk, "signal": signal, "noise": noise, "features": features}
    with torch.inference_mode():  # as sessions run: nothing is left of autograd
        found = graph.module(*values.values())
    wanted = gradient_of(log_weight_of(policy, config, observations), chunk, signal, noise)
    assert wanted.abs().max() > 0.05
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("network", ["mlp", "transformer"])
def test_backends_compute_the_gradient(dynamics, network, tmp_path):
    """ONNX Runtime and OpenVINO against torch, and against finite differences of the log weight."""
    policy = opinionated(make("mlp ddpm"))
    config = DynaGuideConfig(dynamics=dynamics[network], temperature=0.5, **GOALS)
    graph = export_guidance(policy, config, made_up(policy, 2, seed=0), True).graphs["guidance"]
    assert {"convolution", "autograd"}.isdisjoint(str(node.target) for node in graph.module.graph.nodes)
    export_onnx(graph, tmp_path / "guidance.onnx", free_rows=True)
    path = tmp_path / "guidance.onnx"
    sessions = [OnnxRuntimeSession(path), OpenVinoSession(path, precision="f32")]
    for rows in (1, 5):
        observations, chunk = made_up(policy, rows, seed=1), torch.randn(rows, 8, 2)
        weight = log_weight_of(policy, config, observations)
        wanted = gradient_of(weight, chunk, torch.tensor(0.8), torch.tensor(0.6))
        features = load_dynamics(config.dynamics)[0].encode({STATE.key: observations[STATE.key][:, -1:]})
        values = {name: value.numpy() for name, value in zip(graph.names, graph.inputs, strict=True)}
        values |= {"chunk": chunk.numpy(), "features": features.numpy()}
        values |= {"signal": np.float32([0.8]), "noise": np.float32([0.6])}
        for session in sessions:
            found = session(values)["gradient"]
            np.testing.assert_allclose(found, wanted.numpy(), atol=1e-4 * wanted.abs().max().item())
            step, at = 1e-2, (rows - 1, 4, 1)
            there, back = (chunk.index_put(tuple(torch.tensor(i) for i in at), chunk[at] + d) for d in (step, -step))
            levels = torch.tensor(0.8).view(1, 1, 1), torch.tensor(0.6).view(1, 1, 1)
            slope = (weight(there, *levels) - weight(back, *levels))[rows - 1] / (2 * step)
            assert found[at] == pytest.approx(slope.item(), rel=0.02, abs=2e-3)


def test_weights_that_the_gradient_transposes_again(tmp_path):
    """In a network of this size, for one row, OpenVINO takes such a weight for its transpose."""
    policy = opinionated(make("mlp ddpm"))
    bundle = str(save_dynamics(outcome_model("transformer", dim=128, heads=4), tmp_path / "dynamics"))
    config = DynaGuideConfig(dynamics=bundle, temperature=1.0, **GOALS)
    graph = export_guidance(policy, config, made_up(policy, 1, seed=0), False).graphs["guidance"]
    export_onnx(graph, tmp_path / "guidance.onnx")
    inputs = (torch.randn(1, 8, 2), *graph.inputs[1:])
    with torch.no_grad():
        wanted = graph.module(*inputs).numpy()
    values = {name: value.numpy() for name, value in zip(graph.names, inputs, strict=True)}
    found = OpenVinoSession(tmp_path / "guidance.onnx", precision="f32")(values)["gradient"]
    np.testing.assert_allclose(found, wanted, atol=1e-3 * np.abs(wanted).max())


@pytest.mark.parametrize("family", FAMILIES)
def test_call_by_call_it_is_the_whole_sampler(dynamics, family):
    """Without a gradient, also with a previous chunk: every family's denoiser and solver, step by step."""
    told = family in TOLD
    policy = opinionated(make(family, goals=told, tasks=2 if told else 0))
    engine = guided(policy, DynaGuideConfig(dynamics=dynamics["mlp"], **GOALS))
    engine.scale = 0.0
    assert_same(engine, policy, policy, atol=1e-5)
    whole = exported(policy, {name: torch_session(g) for name, g in policy.export_graphs(inputs_of(policy, 2)).items()})
    observations, noise = observations_of(policy, batch_of(policy, 3)), engine.draw_noise(3, np.random.default_rng(0))
    previous = np.random.default_rng(1).uniform(-0.5, 0.5, (3, 8, 2))
    mask = np.tile(np.linspace(1, 0, 8), (3, 1))
    found, wanted = (p.sample(observations, noise, previous, mask) for p in (engine, whole))
    np.testing.assert_allclose(found, wanted, atol=1e-5)


@pytest.mark.parametrize("space", ["noisy", "clean"])
@pytest.mark.parametrize("family", PROCESSES)
def test_a_guided_engine_acts_as_the_steered_policy(dynamics, family, space):
    policy = opinionated(make(family))
    config = DynaGuideConfig(dynamics=dynamics["mlp"], space=space, scale=0.5 if space == "noisy" else 5.0, **GOALS)
    engine = guided(policy, config)
    found = assert_same(engine, steered(policy, config), policy)
    plain = policy.act(observations_of(policy, batch_of(policy, 3)), generators(3))
    assert np.abs(found - plain).max() > 0.02, "it is guided"


@pytest.mark.parametrize(
    ("family", "sampler"),
    [("unet ddpm", ("ddpm", 12)), ("unet edm", ("euler_ancestral", 5)), ("unet flow", ("dpmsolver++", 5))],
)
def test_with_noise_on_the_way_and_in_a_part_of_the_calls(dynamics, family, sampler):
    policy = opinionated(make(family))
    policy.sampler = SamplerConfig(*sampler)
    # 7 of 10 calls: a share that has no exact number
    config = DynaGuideConfig(dynamics=dynamics["transformer"], space="clean", scale=5.0, start=0.2, stop=0.7, **GOALS)
    found = assert_same(guided(policy, config), steered(policy, config), policy)
    always = replace(config, start=0.0, stop=1.0)
    assert np.abs(assert_same(guided(policy, always), steered(policy, always), policy) - found).max() > 1e-3


def test_with_classifier_free_guidance_and_a_normaliser_for_each_task(dynamics):
    policy = opinionated(make("unet ddpm", goals=True, tasks=2, goal_dropout=0.2))
    action = policy.normalizer["action"]
    action.scale[1], action.high[1], action.low[1] = action.scale[1] / 2, 2.0, -2.0
    policy.sampler = replace(policy.sampler, guidance=2.5)
    config = DynaGuideConfig(dynamics=dynamics["mlp"], scale=0.5, **GOALS)
    assert_same(guided(policy, config), steered(policy, config), policy, rows=4)


def test_rows_one_by_one(dynamics, tmp_path):
    """Graphs of one row serve any number."""
    policy = short(opinionated(make("mlp ddpm")), 3)
    config = DynaGuideConfig(dynamics=dynamics["mlp"], **GOALS)
    batch = made_up(policy, 1, seed=0)
    found = export_guidance(policy, config, batch, False)
    graphs = policy.export_graphs(batch) | found.graphs
    sessions = {}
    for name in GUIDED:
        export_onnx(graphs[name], tmp_path / f"{name}.onnx", free_rows=False)
        sessions[name] = OnnxRuntimeSession(tmp_path / f"{name}.onnx")
    engine = GuidedPolicy("test", policy.spec, sessions, 1, found.steps, found.guidance)
    assert_same(engine, steered(policy, config), policy)


def test_goals_can_change_at_run_time(dynamics):
    policy = opinionated(make("unet edm"))
    config = DynaGuideConfig(dynamics=dynamics["mlp"], scale=0.5, positive=(NEAR,))
    engine, torch_ = guided(policy, config), steered(policy, config)
    before = assert_same(engine, torch_, policy)
    engine.set_goals(positive=[], negative=[NEAR, FAR])
    torch_.ways["dynaguide"].set_goals((), (NEAR, FAR))
    after = assert_same(engine, torch_, policy)
    assert np.abs(before - after).max() > 0.01
    for wrong, words in (
        ({}, f"found 0 goals, wanted 1 to {PLACES}"),
        ({"positive": [NEAR] * (PLACES + 1)}, f"found {PLACES + 1} goals"),
        ({"positive": [NEAR], "negative": [{STATE.key: [1.0]}]}, r"of goal 1 must have shape \(2,\), found \(1,\)"),
        ({"positive": [{"observation.other": [1.0, 2.0]}]}, "'observation.state' of goal 0 .* found None"),
    ):
        with pytest.raises(UserError, match=words):
            engine.set_goals(**wrong)
    np.testing.assert_array_equal(assert_same(engine, torch_, policy), after)
    many = [{STATE.key: [0.05 * i, 0.1]} for i in range(PLACES + 4)]
    config = replace(config, positive=tuple(many))
    assert_same(guided(policy, config), steered(policy, config), policy)


def test_images_are_resized_as_the_model_does(tmp_path):
    bundle = str(save_dynamics(outcome_model(images=True), tmp_path / "dynamics"))
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 40, 3), dtype=np.uint8)).save(tmp_path / "goal.png")
    goal = {STATE.key: [0.1, 0.2], IMAGE.key: str(tmp_path / "goal.png")}
    policy = short(opinionated(make("unet edm", images=True)), 3)
    config = DynaGuideConfig(dynamics=bundle, positive=(goal,), scale=0.5)
    assert_same(guided(policy, config), steered(policy, config), policy)
    graphs = export_guidance(policy, config, made_up(policy, 2, seed=0), True).graphs
    model = load_dynamics(bundle)[0]
    batch = made_up(policy, 3, seed=1)
    export_onnx(graphs["dynamics_encoder"], tmp_path / "encoder.onnx", free_rows=True)
    found = OnnxRuntimeSession(tmp_path / "encoder.onnx")({key: value.numpy() for key, value in batch.items()})
    wanted = model.encode({key: value[:, -1:] for key, value in batch.items()})
    np.testing.assert_allclose(found["features"], wanted.numpy(), atol=2e-5)


def test_with_a_critic_that_chooses_among_guided_chunks(dynamics, critic):
    policy = opinionated(make("unet edm"))
    config = DynaGuideConfig(dynamics=dynamics["mlp"], scale=0.5, **GOALS)
    for temperature in (0.0, 0.5):
        how, graphs = critic_graphs(policy, critic, made_up(policy, 2, seed=0), 5, temperature)
        assert how == Candidates(5, temperature)
        more = {name: torch_session(graph) for name, graph in graphs.items()}
        vgps = Vgps(VgpsConfig(critic=critic, candidates=5, temperature=temperature), policy)
        engine = guided(policy, config, candidates=how, more=more)
        assert_same(engine, steered(policy, config, vgps=vgps), policy, rows=4)


def build(folder, config, **changes):
    policy, about = load_bundle(folder)
    values = {"backend": "onnxruntime", "exporter": "torchscript", "observations": 8, "dynaguide": config} | changes
    observations = Observations(made_up(policy, 16, seed=0), "made up")
    return build_engine(policy, about, folder, ExportConfig(**values), observations, "robopolicy export again")


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    return save_bundle(short(opinionated(make("unet edm")), 3), tmp_path_factory.mktemp("policy") / "last")


@pytest.mark.parametrize("backend", ["onnxruntime", "openvino"])
def test_an_engine_is_built_with_its_guidance(bundle, dynamics, critic, backend):
    config = DynaGuideConfig(dynamics=dynamics["mlp"], scale=0.5, **GOALS)
    free = {"rows": None, "critic": critic, "candidates": 4} if backend == "onnxruntime" else {}
    made = build(bundle, config, backend=backend, **free)
    assert 0 < made.manifest.parity.max_share < 1e-4
    assert set(made.manifest.graphs) == {*GUIDED, *(["critic_encoder", "critic"] if free else [])}
    manifest, _ = read_engine(bundle, f"{backend}-fp32")
    assert manifest == made.manifest and manifest.guidance.space == "noisy" and manifest.guidance.scale == 0.5
    policy, _ = load_bundle(bundle)
    ways = {"vgps": Vgps(VgpsConfig(critic=critic, candidates=4), policy)} if free else {}
    engine, torch_ = open_engine(bundle, f"{backend}-fp32"), steered(policy, config, **ways)
    engine.warmup(1)
    assert_same(engine, torch_, policy)
    engine.set_goals(negative=[FAR])
    torch_.ways["dynaguide"].set_goals((), (FAR,))
    assert_same(engine, torch_, policy)
    engine.close()
    (made.folder / STEPS).write_bytes((made.folder / STEPS).read_bytes()[:-8])
    with pytest.raises(UserError, match=r"steps.safetensors is truncated or changed.*robopolicy export again"):
        open_engine(bundle, f"{backend}-fp32")


def test_plans_for_gpus(dynamics, tmp_path):
    pytest.importorskip("tensorrt_rtx_bindings")
    folder = save_bundle(short(opinionated(make("mlp ddpm")), 2), tmp_path / "last")
    config = DynaGuideConfig(dynamics=dynamics["transformer"], **GOALS)
    made = build(folder, config, backend="tensorrt_rtx", capabilities=("sm89",), rows=None, max_rows=4)
    assert {graph.file for graph in made.manifest.graphs.values()} == {f"{name}.plan" for name in GUIDED}
    assert made.manifest.parity.max_share < 1e-4 and len(made.reports) == len(GUIDED)


def test_the_command(bundle, dynamics, capsys):
    goals = "positive: [{observation.state: [-0.8, 0.1]}], scale: 0.5, space: clean"
    quick = ["backend=onnxruntime", "exporter=torchscript", "observations=8"]
    command = ["export", f"bundle={bundle}", *quick, "name=left"]
    assert main([*command, f"dynaguide={{dynamics: {dynamics['mlp']}, {goals}}}"]) == 0
    assert "of the action's range" in capsys.readouterr().out
    guidance = read_engine(bundle, "left")[0].guidance
    assert (guidance.scale, guidance.space, guidance.temperature) == (0.5, "clean", 0.1)
    assert main([*command, f"dynaguide={{dynamics: {dynamics['mlp']}, positiv: [a]}}"]) == 2
    assert "positiv" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"space": "denoiser"}, "gradient of a convolution.*noisy or clean, or guide in torch: robopolicy eval"),
        ({"recurrence": 2}, "recurrence=2"),
        ({"scale": 0.0}, "scale=0 changes nothing"),
        ({"positive": (), "negative": ()}, "needs goals"),
        ({"positive": ({STATE.key: [1.0]},)}, "must be 2 numbers"),
    ],
)
def test_what_cannot_be_exported_is_refused(bundle, dynamics, changes, words):
    before = engine_names(bundle)
    with pytest.raises(UserError, match=words):
        build(bundle, DynaGuideConfig(**({"dynamics": dynamics["mlp"]} | GOALS | changes)), name="wrong")
    assert engine_names(bundle) == before and not (bundle / "engines" / ".wrong.partial").exists()


def test_a_model_that_sees_more_than_the_policy_is_refused(bundle, tmp_path):
    force = KeySpec("observation.force", (2,))
    seen = (STATE, force)
    spec = replace(outcome_model().spec, observations=seen, goals=seen)
    limits = np.array([[-1.0, -1.0], [1.0, 1.0]])
    parts = {key.key: fit_normalizer(limits, "minmax") for key in (*seen, ACTION)}
    model = OutcomeModel(OutcomeConfig(dim=16, layers=1), spec, Normalizer.from_parts(parts))
    folder = save_dynamics(model, tmp_path / "dynamics")
    goal = {STATE.key: [0.0, 0.0], force.key: [0.0, 0.0]}
    with pytest.raises(UserError, match="observation.force"):
        build(bundle, DynaGuideConfig(dynamics=str(folder), positive=(goal,)))
    for wrong in ({"loop": True}, {"precision": "int8"}):
        with pytest.raises(UserError, match="call by call"):
            ExportConfig(backend="openvino", dynaguide=DynaGuideConfig(dynamics="d"), **({"precision": "fp32"} | wrong))
