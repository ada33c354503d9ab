"""Packages of native code: compiled here, described without being loaded, refused on other machines."""

from __future__ import annotations

import json
import shutil
import zipfile

import numpy as np
import pytest
import torch

from robopolicy.errors import UserError
from robopolicy.export.aot_inductor import build_package
from robopolicy.inference.backends.aot_inductor import (
    AotInductorSession,
    cpu_instructions,
    native_target,
    read_description,
    target_mismatch,
)
from robopolicy.policies.base import ExportGraph
from tests.policies.test_contract import batch_of, make


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """A small policy's denoiser for 1 to 4 rows: the graph and its package."""
    policy = make("consistency actor").eval()
    graph = policy.export_graphs({"observation.state": batch_of(policy, 1)["observation.state"]})["denoiser"]
    path = tmp_path_factory.mktemp("engine") / "denoiser.pt2"
    before = torch.get_num_threads()
    build_package(graph, path, max_rows=4)
    yield graph, path
    torch.set_num_threads(before)


def with_description(path, target, change):
    """A copy of a package that says something else about itself."""
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(target, "w") as new:
        for file in old.infolist():
            content = old.read(file)
            if file.filename.endswith("_metadata.json"):
                metadata = json.loads(content)
                ours = json.loads(metadata["robopolicy"])
                change(ours)
                content = json.dumps(metadata | {"robopolicy": json.dumps(ours)}).encode()
            new.writestr(file, content)
    return target


def random_inputs(graph, rows):
    generator = np.random.default_rng(rows)
    return {
        name: value.numpy()
        if name in graph.shared
        else generator.normal(size=(rows, *value.shape[1:])).astype(np.float32)
        for name, value in zip(graph.names, graph.inputs, strict=True)
    }


def test_it_computes_what_the_module_computes(built):
    graph, path = built
    with AotInductorSession(path, allow_native_code=True) as session:
        for rows in (1, 2, 4, 1):
            inputs = random_inputs(graph, rows)
            with torch.no_grad():
                wanted = graph.module(*(torch.from_numpy(inputs[name]) for name in graph.names)).numpy()
            np.testing.assert_allclose(session(inputs)[graph.outputs[0]], wanted, atol=1e-5)
        with pytest.raises(UserError, match="takes 1 to 4 rows, found 5"):
            session(random_inputs(graph, 5))


def test_native_code_needs_the_users_word(built):
    _, path = built
    with pytest.raises(UserError, match=r"holds native code.*allow_native_code=true"):
        AotInductorSession(path)


def test_a_package_describes_itself(built):
    graph, path = built
    found = read_description(path)
    assert tuple(spec.name for spec in found.inputs) == graph.names
    assert tuple(spec.name for spec in found.outputs) == graph.outputs
    free = {spec.name for spec in found.inputs if spec.shape[0] is None}
    assert free == set(graph.names) - set(graph.shared) and found.rows == (1, 4)
    assert found.target == native_target() and list(path.parent.iterdir()) == [path]


def test_another_machine_is_refused(built, tmp_path):
    _, path = built

    def other(ours):
        ours["target"] |= {"torch": "2.7.1", "machine": "aarch64"}

    with pytest.raises(UserError, match=r"wanted machine aarch64, found \w+; torch 2.7.1, found .*again here"):
        AotInductorSession(with_description(path, tmp_path / "other.pt2", other), allow_native_code=True)

    def newer(ours):
        ours["target"]["instructions"] = [*ours["target"]["instructions"], "avx512_of_tomorrow"]

    with pytest.raises(UserError, match="wanted a CPU with avx512_of_tomorrow"):
        AotInductorSession(with_description(path, tmp_path / "newer.pt2", newer), allow_native_code=True)


@pytest.mark.parametrize("damage", ["text", "cut", "empty", "foreign", "types"])
def test_a_damaged_package_is_refused(damage, built, tmp_path):
    _, path = built
    bad = tmp_path / "bad.pt2"
    if damage == "text":
        bad.write_text("not a package")
    elif damage == "cut":
        bad.write_bytes(path.read_bytes()[:5000])
    elif damage == "types":
        with_description(path, bad, lambda ours: ours.update(inputs=[["x", 3, "float32"]]))
    elif damage == "foreign":
        with zipfile.ZipFile(bad, "w") as archive:
            archive.writestr("net/data/aotinductor/model/a_metadata.json", json.dumps({"AOTI_DEVICE_KEY": "cpu"}))
    with pytest.raises(UserError, match=r"bad\.pt2 is not an AOTInductor package of robopolicy"):
        AotInductorSession(bad, allow_native_code=True)


def test_targets_are_compared():
    target = {"device": "cuda", "torch": "2.10.0", "capability": "sm89", "cuda": "12", "instructions": ["avx2"]}
    assert target_mismatch(target, target | {"instructions": ["avx2", "avx512f"]}) == []
    assert target_mismatch(target, target | {"capability": "sm87"}) == ["capability sm89, found sm87"]
    assert target_mismatch(target, target | {"instructions": []}) == ["a CPU with avx2"]
    assert target_mismatch(target, {"instructions": []})[0] == "torch 2.10.0, found None"


def test_instructions_are_read_on_x86_and_arm():
    assert cpu_instructions("vendor_id : X\nflags\t\t: fpu avx2 fma hypervisor sse4_2\n") == ["avx2", "fma", "sse4_2"]
    assert cpu_instructions("processor : 0\nFeatures\t: fp asimd evtstrm sve2\n") == ["asimd", "sve2"]
    assert cpu_instructions("") == []


class Failing(torch.nn.Module):
    def forward(self, x):
        return x if x.sum() > 0 else -x  # which of both depends on the data


def test_what_cannot_be_compiled_is_said_and_leaves_nothing(tmp_path):
    graph = ExportGraph(Failing(), (torch.ones(1, 2),), ("x",), ("y",))
    with pytest.raises(UserError, match=r"AOTInductor cannot compile denoiser: .*backend=onnxruntime"):
        build_package(graph, tmp_path / "denoiser.pt2")
    assert list(tmp_path.iterdir()) == []


def test_a_compiler_is_needed(tmp_path, monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert shutil.which("no-such-compiler") is None
    with pytest.raises(UserError, match="'no-such-compiler' is not found"):
        build_package(ExportGraph(Failing(), (torch.ones(1, 2),), ("x",), ("y",)), tmp_path / "denoiser.pt2")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_it_runs_on_a_gpu(tmp_path):
    policy = make("unet ddpm").to("cuda").eval()
    state = batch_of(policy, 2)["observation.state"].cuda()
    graph = policy.export_graphs({"observation.state": state})["sampler"]
    build_package(graph, tmp_path / "sampler.pt2", max_rows=4)
    with AotInductorSession(tmp_path / "sampler.pt2", allow_native_code=True) as session:
        for rows in (1, 4, 1, 2):
            inputs = random_inputs(graph, rows)
            with torch.no_grad():
                wanted = graph.module(*(torch.from_numpy(inputs[name]).cuda() for name in graph.names)).cpu().numpy()
            for _ in range(3):  # warm-up, capture, replay
                np.testing.assert_allclose(session(inputs)["chunk"], wanted, atol=2e-3)
