"""OpenVINO sessions: real graphs of policies, against torch, in a precision that is always said."""

from __future__ import annotations

import os

import numpy as np
import pytest

pytest.importorskip("onnx", reason="needs onnx: pip install 'robopolicy[openvino]'")
openvino = pytest.importorskip("openvino", reason="needs OpenVINO: pip install 'robopolicy[openvino]'")
pytest.importorskip("onnxruntime", reason="graphs are made as for ONNX Runtime: pip install 'robopolicy[onnxruntime]'")

from onnx import TensorProto, helper, numpy_helper  # noqa: E402

from robopolicy.errors import UserError  # noqa: E402
from robopolicy.inference.backends.openvino import OpenVinoSession  # noqa: E402
from robopolicy.inference.session import TensorSpec  # noqa: E402

from .test_onnxruntime import encoder, export, folder, free_unet, from_torch, graph_file, numbers, unet  # noqa: E402, F401

CAN = openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")


def test_describes_its_tensors(unet, encoder):  # noqa: F811
    with OpenVinoSession(unet[0], precision="f32") as session:
        assert session.inputs == (
            TensorSpec("x", (2, 8, 2)),
            TensorSpec("t", (1,), "int64"),
            TensorSpec("cond_0", (2, 768)),
        )
        assert session.outputs == (TensorSpec("clean", (2, 8, 2)),)
    with OpenVinoSession(encoder[0], precision="f32") as session:
        assert session.inputs[1] == TensorSpec("observation.image.top", (2, 2, 40, 40, 3), "uint8")


@pytest.mark.parametrize("case", ["unet", "encoder"])
@pytest.mark.parametrize("threads", [1, 2])
def test_computes_what_torch_does(case, threads, request):
    path, module = request.getfixturevalue(case)
    with OpenVinoSession(path, precision="f32", threads=threads) as session:
        inputs = numbers(session)
        found = session(inputs)[session.outputs[0].name]
    wanted = from_torch(module, inputs)
    np.testing.assert_allclose(found, wanted[0] if isinstance(wanted, tuple) else wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", ["dit flow", "mode", "sdp", "unet edm"])
def test_every_kind_of_network_loads(family, tmp_path):
    path, module = export(family, "denoiser", tmp_path / "denoiser.onnx")
    with OpenVinoSession(path, precision="f32") as session:
        inputs = numbers(session)
        if inputs["t"].dtype == np.float32:
            inputs["t"] = np.full(1, 0.5, np.float32)
        np.testing.assert_allclose(session(inputs)["clean"], from_torch(module, inputs), rtol=1e-3, atol=1e-4)


def test_takes_any_number_of_rows(free_unet):  # noqa: F811
    path, module = free_unet
    with OpenVinoSession(path, precision="f32") as session:
        assert any(spec.shape[0] is None for spec in session.inputs) and session.outputs[0].shape == (None, 8, 2)
        for rows in (1, 5, 2):
            inputs = numbers(session, rows)
            np.testing.assert_allclose(session(inputs)["clean"], from_torch(module, inputs), rtol=1e-4, atol=1e-4)


def test_what_it_returned_stays_as_it_was_and_inputs_too(unet):  # noqa: F811
    with OpenVinoSession(unet[0], precision="f32") as session:
        inputs = numbers(session)
        before = {name: value.copy() for name, value in inputs.items()}
        first = session(inputs)["clean"]
        kept = first.copy()
        session(numbers(session, seed=1))
        np.testing.assert_array_equal(first, kept)
        first += 1
        for name, value in inputs.items():
            np.testing.assert_array_equal(value, before[name])
            value.setflags(write=False)
        np.testing.assert_array_equal(session(inputs)["clean"], kept)


def test_inputs_that_do_not_fit_are_refused(unet):  # noqa: F811
    with OpenVinoSession(unet[0], precision="f32") as session:
        good = numbers(session)
        with pytest.raises(UserError, match=r"'x'.*found float32 \(1, 8, 2\), wanted float32 \(2, 8, 2\)"):
            session(good | {"x": good["x"][:1]})
        with pytest.raises(UserError, match="'x'.*float64"):
            session(good | {"x": good["x"].astype(np.float64)})


@pytest.mark.parametrize("precision", ["f32", "bf16", "f16"])
def test_computes_in_the_precision_asked_or_not_at_all(precision, unet):  # noqa: F811
    path, module = unet
    if {"f32": "FP32", "bf16": "BF16", "f16": "FP16"}[precision] not in CAN:
        with pytest.raises(UserError, match=f"cannot compute in {precision}; use precision=.*f32"):
            OpenVinoSession(path, precision=precision)
        return
    with OpenVinoSession(path, precision=precision) as session:
        assert session._compiled.get_property("INFERENCE_PRECISION_HINT").to_string() == precision
        inputs = numbers(session)
        error = np.abs(session(inputs)["clean"] - from_torch(module, inputs).numpy()).max()
    low, high = {"f32": (0, 1e-4), "bf16": (1e-4, 0.1), "f16": (1e-5, 0.02)}[precision]
    assert low <= error <= high


@pytest.mark.parametrize("content", [b"", b"no graph", None], ids=["empty", "text", "cut"])
@pytest.mark.parametrize("cached", [False, True], ids=["", "cached"])
def test_a_damaged_file_is_named(content, cached, unet, tmp_path):  # noqa: F811
    path, cache = tmp_path / "sampler.onnx", tmp_path / "cache" if cached else None
    path.write_bytes(unet[0].read_bytes()[:50_000] if content is None else content)
    with pytest.raises(UserError, match=r"sampler.onnx.*cannot load it.*Export the policy again"):
        OpenVinoSession(path, precision="f32", cache=cache)
    with pytest.raises(UserError, match="missing.onnx"):
        OpenVinoSession(tmp_path / "missing.onnx", precision="f32", cache=cache)


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
        OpenVinoSession(path, precision="f32")


def test_settings_that_cannot_be_used_are_refused(unet):  # noqa: F811
    with pytest.raises(UserError, match="threads=0"):
        OpenVinoSession(unet[0], precision="f32", threads=0)
    with pytest.raises(UserError, match="precision 'int4' of OpenVINO is unknown; use f32, bf16, f16"):
        OpenVinoSession(unet[0], precision="int4")
    with pytest.raises(UserError, match="no device 'GPU.7' here; found CPU"):
        OpenVinoSession(unet[0], precision="f32", device="GPU.7")


def scaled(path, weight):
    """y = weight * x, always in the same number of bytes."""
    shape = (TensorProto.FLOAT, [4])
    weights = [numpy_helper.from_array(np.full(4, weight, np.float32), "w")]
    return graph_file(path, [helper.make_node("Mul", ["x", "w"], ["y"])], [("x", *shape)], [("y", *shape)], weights)


def test_a_cached_graph_is_of_this_very_file(tmp_path):
    path, ones = tmp_path / "sampler.onnx", {"x": np.ones(4, np.float32)}
    found = []
    for weight, from_cache in ((1.0, False), (1.0, True), (2.0, False), (1.0, True)):
        scaled(path, weight)
        os.utime(path, (0, 0))  # as files of a reproducible archive: size, time and path say nothing
        with OpenVinoSession(path, precision="f32", cache=tmp_path / "cache") as session:
            found.append(session(ones)["y"][0])
            assert session._compiled.get_property("LOADED_FROM_CACHE") is from_cache
    assert found == [1, 1, 2, 1]


def test_a_cache_that_others_may_write_to_is_refused(unet, tmp_path):  # noqa: F811
    with OpenVinoSession(unet[0], precision="f32", cache=tmp_path / "deep" / "cache"):
        assert (tmp_path / "deep" / "cache").stat().st_mode & 0o777 == 0o700
    (tmp_path / "shared").mkdir()
    (tmp_path / "shared").chmod(0o777)
    with pytest.raises(UserError, match="shared: other users may write"):
        OpenVinoSession(unet[0], precision="f32", cache=tmp_path / "shared")
