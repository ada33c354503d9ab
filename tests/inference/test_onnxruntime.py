"""ONNX Runtime sessions: real graphs of policies, against torch."""

from __future__ import annotations

import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch

onnx = pytest.importorskip("onnx", reason="needs onnx: pip install 'robopolicy[onnxruntime]'")
onnxruntime = pytest.importorskip("onnxruntime", reason="needs ONNX Runtime: pip install 'robopolicy[onnxruntime]'")

from onnx import TensorProto, helper  # noqa: E402

from robopolicy.errors import UserError  # noqa: E402
from robopolicy.inference.backends.onnxruntime import DeviceBuffers, OnnxRuntimeSession  # noqa: E402
from robopolicy.inference.session import TensorSpec  # noqa: E402
from tests.policies.test_contract import batch_of, make  # noqa: E402

Case = tuple[Path, torch.nn.Module]


def export(family, graph, path, free=False, **options):
    """A policy's graph as an ONNX file, and the module it is of."""
    policy = make(family, **options).eval()
    found = policy.export_graphs({k: v for k, v in batch_of(policy, 2).items() if k != "action"})[graph]
    rows = [name for name in (*found.names, *found.outputs) if name not in found.shared]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            found.module.eval(),
            found.inputs,
            path,
            dynamo=graph == "encoder" or family == "mode",  # the other exporter is faster, but cannot follow these
            input_names=list(found.names),
            output_names=list(found.outputs),
            dynamic_axes={name: {0: "rows"} for name in rows} if free else None,
            verbose=False,
            external_data=False,
        )
    return path, found.module


def numbers(session, rows=2, seed=0):
    """Random inputs for a session."""
    rng = np.random.default_rng(seed)
    draws = {"float32": rng.standard_normal, "uint8": lambda shape: rng.integers(0, 256, shape)}
    filled = {}
    for spec in session.inputs:
        shape = spec.blank(rows).shape
        filled[spec.name] = draws.get(spec.dtype, np.zeros)(shape).astype(spec.dtype)
    return filled


def from_torch(module, inputs):
    with torch.no_grad():
        return module(*(torch.from_numpy(value) for value in inputs.values()))


def graph_file(path, nodes, inputs, outputs, weights=()):
    """Save a graph built by hand."""
    info = [[helper.make_tensor_value_info(*tensor) for tensor in tensors] for tensors in (inputs, outputs)]
    graph = helper.make_graph(nodes, "graph", *info, list(weights))
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    path.write_bytes(model.SerializeToString())
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("graphs")


@pytest.fixture(scope="module")
def unet(folder) -> Case:
    return export("unet ddpm", "denoiser", folder / "denoiser.onnx")


@pytest.fixture(scope="module")
def free_unet(folder) -> Case:
    return export("unet ddpm", "denoiser", folder / "free.onnx", free=True)


@pytest.fixture(scope="module")
def encoder(folder) -> Case:
    return export("mlp ddpm", "encoder", folder / "encoder.onnx", images=True)


def test_describes_its_tensors(unet, encoder):
    with OnnxRuntimeSession(unet[0]) as session:
        assert session.inputs == (
            TensorSpec("x", (2, 8, 2)),
            TensorSpec("t", (1,), "int64"),
            TensorSpec("cond_0", (2, 768)),
        )
        assert session.outputs == (TensorSpec("clean", (2, 8, 2)),)
    with OnnxRuntimeSession(encoder[0]) as session:
        assert session.inputs[1] == TensorSpec("observation.image.top", (2, 2, 40, 40, 3), "uint8")


@pytest.mark.parametrize("case", ["unet", "encoder"])
@pytest.mark.parametrize("threads", [1, 2])
def test_computes_what_torch_does(case, threads, request):
    path, module = request.getfixturevalue(case)
    with OnnxRuntimeSession(path, threads=threads) as session:
        inputs = numbers(session)
        found = session(inputs)[session.outputs[0].name]
    wanted = from_torch(module, inputs)
    np.testing.assert_allclose(found, wanted[0] if isinstance(wanted, tuple) else wanted, rtol=1e-4, atol=1e-4)


def test_takes_any_number_of_rows(free_unet):
    path, module = free_unet
    with OnnxRuntimeSession(path) as session:
        assert any(spec.shape[0] is None for spec in session.inputs) and session.outputs[0].shape == (None, 8, 2)
        for rows in (1, 5, 2):
            inputs = numbers(session, rows)
            np.testing.assert_allclose(session(inputs)["clean"], from_torch(module, inputs), rtol=1e-4, atol=1e-5)


def test_what_it_returned_stays_as_it_was(unet):
    with OnnxRuntimeSession(unet[0]) as session:
        first = session(numbers(session))["clean"]
        kept = first.copy()
        session(numbers(session, seed=1))
        np.testing.assert_array_equal(first, kept)
        first += 1


def test_buffers_of_a_device_give_the_same(free_unet):
    """As on a GPU, with the CPU as the device."""
    with OnnxRuntimeSession(free_unet[0]) as session:
        buffers = DeviceBuffers(session._session, session.inputs, session.outputs, "cpu")
        for rows, seed in ((2, 0), (2, 1), (5, 2)):
            inputs = numbers(session, rows, seed)
            found = buffers.run(inputs)["clean"]
            np.testing.assert_array_equal(found, session(inputs)["clean"])
            kept = found.copy()
            buffers.run(numbers(session, rows, seed + 10))
            np.testing.assert_array_equal(found, kept)


def test_inputs_that_do_not_fit_are_refused(unet):
    with OnnxRuntimeSession(unet[0]) as session:
        good = numbers(session)
        for changes, message in (
            ({"x": good["x"][:1]}, r"'x'.*found float32 \(1, 8, 2\), wanted float32 \(2, 8, 2\)"),
            ({"x": good["x"].astype(np.float64)}, "'x'.*float64"),
            ({"cond_0": good["cond_0"][:, :3]}, r"'cond_0'.*\(2, 3\)"),
        ):
            with pytest.raises(UserError, match=message):
                session(good | changes)


@pytest.mark.parametrize("content", [b"", b"no graph", None], ids=["empty", "text", "cut"])
def test_a_damaged_file_is_named(content, unet, tmp_path):
    path = tmp_path / "sampler.onnx"
    path.write_bytes(unet[0].read_bytes()[:50_000] if content is None else content)
    with pytest.raises(UserError, match=r"sampler.onnx.*cannot load it.*Export the policy again"):
        OnnxRuntimeSession(path)
    with pytest.raises(UserError, match="missing.onnx"):
        OnnxRuntimeSession(tmp_path / "missing.onnx")


@pytest.mark.parametrize("location", ["../secret.bin", "{}/secret.bin"])
def test_weights_outside_the_folder_are_not_read(location, tmp_path):
    (tmp_path / "secret.bin").write_bytes(np.ones(4, "f").tobytes())
    (tmp_path / "engine").mkdir()
    weight = TensorProto(name="w", data_type=TensorProto.FLOAT, dims=[4], data_location=TensorProto.EXTERNAL)
    weight.external_data.add(key="location", value=location.format(tmp_path))
    shape = (TensorProto.FLOAT, [4])
    add = helper.make_node("Add", ["x", "w"], ["y"])
    path = graph_file(tmp_path / "engine" / "a.onnx", [add], [("x", *shape)], [("y", *shape)], [weight])
    with pytest.raises(UserError, match="a.onnx"):
        OnnxRuntimeSession(path)


def test_half_precision_at_the_border_is_refused(tmp_path):
    shape = (TensorProto.FLOAT16, [4])
    path = graph_file(tmp_path / "a.onnx", [helper.make_node("Neg", ["x"], ["y"])], [("x", *shape)], [("y", *shape)])
    with pytest.raises(UserError, match=r"x: type 'tensor\(float16\)'"):
        OnnxRuntimeSession(path)


def test_settings_that_cannot_be_used_are_refused(unet):
    with pytest.raises(UserError, match="threads=0"):
        OnnxRuntimeSession(unet[0], threads=0)
    with pytest.raises(UserError, match="'tpu' of ONNX Runtime is unknown; use cpu or cuda"):
        OnnxRuntimeSession(unet[0], provider="tpu")
    if "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
        with pytest.raises(UserError, match="pip install onnxruntime-gpu"):
            OnnxRuntimeSession(unet[0], provider="cuda")


@pytest.mark.parametrize("backend", ["onnxruntime", "openvino"])
def test_torch_is_not_imported(backend, unet):
    pytest.importorskip(backend)
    made = {"onnxruntime": "OnnxRuntimeSession(path)", "openvino": "OpenVinoSession(path, precision='f32')"}[backend]
    program = f"""
import pathlib, sys
from robopolicy.inference.backends.{backend} import *
path = pathlib.Path({str(unet[0])!r})
session = {made}
session.warmup(1)
assert "torch" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", program], check=True)


@pytest.mark.skipif(
    "CUDAExecutionProvider" not in onnxruntime.get_available_providers(), reason="needs onnxruntime-gpu and a GPU"
)
def test_a_gpu_computes_what_torch_does(free_unet):
    path, module = free_unet
    with OnnxRuntimeSession(path, provider="cuda") as session:
        for rows in (1, 5, 5):
            inputs = numbers(session, rows)
            np.testing.assert_allclose(session(inputs)["clean"], from_torch(module, inputs), rtol=1e-4, atol=1e-4)
