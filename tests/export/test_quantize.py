"""Int8 graphs: what is rounded, what stays in float, and that the tolerance is kept."""

from __future__ import annotations

import math

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from robopolicy.errors import UserError
from robopolicy.export.onnx_graphs import export_onnx
from robopolicy.export.quantize import QuantizeConfig, find_layers, quantize
from tests.policies.test_contract import batch_of, make

onnxruntime = pytest.importorskip("onnxruntime", reason="needs ONNX Runtime: pip install 'robopolicy[onnxruntime]'")

from robopolicy.inference.backends.onnxruntime import OnnxRuntimeSession  # noqa: E402

FLOAT = TensorProto.FLOAT


def save(path, nodes, weights, x, y):
    tensors = [numpy_helper.from_array(value.astype(np.float32), name) for name, value in weights.items()]
    info = [[helper.make_tensor_value_info(name, FLOAT, shape)] for name, shape in (("x", x), ("y", y))]
    graph = helper.make_graph(nodes, "graph", *info, tensors)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=10)
    onnx.checker.check_model(model)
    path.write_bytes(model.SerializeToString())
    return path


def chain(path, layers=6, outlier=None, size=32):
    """ReLU layers; before layer ``outlier`` one channel is 3000 times as large, which its weights undo."""
    rng = np.random.default_rng(0)
    weights = {f"w{i}": rng.standard_normal((size, size)) * math.sqrt(2 / size) for i in range(layers)}
    if outlier is not None:
        weights[f"w{outlier - 1}"][:, 3] *= 3000
        weights[f"w{outlier}"][3] /= 3000
    nodes = []
    for i in range(layers):
        nodes.append(helper.make_node("MatMul", ["x" if i == 0 else f"a{i}", f"w{i}"], [f"h{i}"]))
        nodes.append(helper.make_node("Relu", [f"h{i}"], ["y" if i == layers - 1 else f"a{i + 1}"]))
    return save(path, nodes, weights, [8, size], [8, size])


def draws(count, shape=(8, 32), seed=0, scale=1.0):
    rng = np.random.default_rng(seed)
    return [{"x": (scale * rng.standard_normal(shape)).astype(np.float32)} for _ in range(count)]


def against(path, data):
    """A judge: largest error of an output relative to the largest output, on data it was not calibrated with."""
    with OnnxRuntimeSession(path) as session:
        name = session.outputs[0].name
        true = [session(inputs)[name] for inputs in data]
    scale = max(np.abs(t).max() for t in true)

    def judge(candidate):
        with OnnxRuntimeSession(candidate) as session:
            found = [session(inputs)[name] for inputs in data]
        return float(max(np.abs(a - b).max() for a, b in zip(found, true, strict=True)) / scale)

    return judge


@pytest.fixture(scope="module")
def sampler(tmp_path_factory):
    """A whole sampler of a U-Net: 8 steps, with inputs to calibrate and to judge with."""
    policy = make("unet ddpm").eval()
    batch = {k: v for k, v in batch_of(policy, 1).items() if k != "action"}
    path = tmp_path_factory.mktemp("graphs") / "sampler.onnx"
    export_onnx(policy.export_graphs(batch)["sampler"], path, exporter="torchscript")
    with OnnxRuntimeSession(path) as session:
        specs = session.inputs
    rng = np.random.default_rng(0)
    data = []
    for _ in range(24):
        inputs = {spec.name: rng.standard_normal(spec.shape).astype(np.float32) for spec in specs}
        data.append(inputs | {"mask": np.zeros_like(inputs["mask"])})
    return path, data[:16], data[16:]


def test_the_layer_that_int8_ruins_stays_in_float(tmp_path):
    path, out = chain(tmp_path / "float.onnx", outlier=3), tmp_path / "int8.onnx"
    judge = against(path, draws(8, seed=1))
    report = quantize(path, out, draws(32), judge=judge, tolerance=0.1)
    assert report.error_all_int8 > 0.3
    assert [layer.name for layer in report.kept] == ["w3"]
    assert report.layers[0].error > 10 * report.layers[1].error
    assert report.error == judge(out) <= 0.1
    assert "float32: w3" in str(report)
    weights = {w.name: w.data_type for w in onnx.load(out).graph.initializer}
    assert weights["w3"] == FLOAT and weights["w2/int8"] == TensorProto.INT8 and "w2" not in weights


def test_nothing_stays_in_float_without_need(tmp_path):
    path = chain(tmp_path / "float.onnx")
    report = quantize(path, tmp_path / "a.onnx", draws(32), judge=against(path, draws(8, seed=1)), tolerance=0.1)
    assert report.judgements == 1 and not report.kept and report.error == report.error_all_int8 <= 0.1


@pytest.mark.parametrize("share", [0.8, 0.5, 0.3])
def test_a_stricter_tolerance_keeps_more_in_float(share, tmp_path):
    path, out = chain(tmp_path / "float.onnx", layers=12), tmp_path / "int8.onnx"
    judge = against(path, draws(8, seed=1))
    all_int8 = quantize(path, out, draws(32), judge=judge, tolerance=1.0).error
    report = quantize(path, out, draws(32), judge=judge, tolerance=share * all_int8)
    assert report.error == judge(out) <= share * all_int8 < report.error_all_int8
    assert 0 < len(report.kept) < 12 and all(layer.float32 for layer in report.layers[: len(report.kept)])
    assert report.judgements <= 2 * math.ceil(math.log2(12)) + 1
    errors = [layer.error for layer in report.layers]
    assert errors == sorted(errors, reverse=True)


def test_out_of_reach_is_said_and_writes_nothing(tmp_path):
    path, out = chain(tmp_path / "float.onnx"), tmp_path / "int8.onnx"
    with pytest.raises(UserError, match=r"least sensitive layer 'w\d' alone in int8, the error is .* 1e-09 is allowed"):
        quantize(path, out, draws(8), judge=against(path, draws(4, seed=1)), tolerance=1e-9)
    assert not out.exists()


def test_ranges_come_from_the_calibration(tmp_path):
    path = chain(tmp_path / "float.onnx")
    judge = against(path, draws(8, seed=1))
    errors = [
        quantize(path, tmp_path / "a.onnx", draws(32, scale=scale), judge=judge, tolerance=9.0).error
        for scale in (1.0, 0.05, 50.0)
    ]
    assert errors[1] > 5 * errors[0] and errors[2] > 5 * errors[0]


@pytest.mark.parametrize("method", ["entropy", "percentile"])
def test_outliers_of_the_calibration_are_cut_off(method, tmp_path):
    path = chain(tmp_path / "float.onnx", layers=2)
    data = draws(64)
    data[5]["x"][0, 0] = 300.0
    judge = against(path, draws(8, seed=1))
    minmax = quantize(path, tmp_path / "a.onnx", data, judge=judge, tolerance=9.0)
    config = QuantizeConfig(method=method, percentile=99.9)
    cut = quantize(path, tmp_path / "a.onnx", data, judge=judge, tolerance=9.0, config=config)
    assert cut.error < 0.5 * minmax.error


def in_float(path):
    """Rounds as the graph says, and multiplies in float: 8 bits overflow in the integer arithmetic of some CPUs."""
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


OPERATORS = {
    "MatMul": ((8, 12), [8, 8], [8, 12], 1, {}),
    "Gemm": ((8, 12), [8, 8], [8, 12], 1, {}),
    "Gemm transposed": ((12, 8), [8, 8], [8, 12], 0, {"transB": 1}),
    "Conv": ((12, 8, 3), [1, 8, 16], [1, 12, 14], 0, {}),
    "ConvTranspose": ((8, 12, 4), [1, 8, 16], [1, 12, 19], 1, {}),
}


@pytest.mark.parametrize("symmetric", [True, False], ids=["int8", "uint8"])
@pytest.mark.parametrize("bits", [7, 8])
@pytest.mark.parametrize("operator", OPERATORS)
def test_every_output_channel_has_its_own_scale(operator, bits, symmetric, tmp_path):
    """Channels whose weights differ by a factor of a million are all good."""
    weight, x, y, axis, attributes = OPERATORS[operator]
    rng = np.random.default_rng(0)
    sizes = np.logspace(-3, 3, 12).reshape([-1 if i == axis else 1 for i in range(len(weight))])
    weights = {"w": rng.standard_normal(weight) * sizes}
    inputs = ["x", "w"]
    if operator != "MatMul":
        weights["b"] = np.zeros(12)
        inputs.append("b")
    node = helper.make_node(operator.split()[0], inputs, ["y"], **attributes)
    path, out = save(tmp_path / "float.onnx", [node], weights, x, y), tmp_path / "int8.onnx"
    config = QuantizeConfig(symmetric=symmetric, weight_bits=bits)
    report = quantize(path, out, draws(16, x), judge=lambda _: 0.0, tolerance=1.0, config=config)
    assert [layer.name for layer in report.layers] == ["w"]
    stored = {w.name: numpy_helper.to_array(w) for w in onnx.load(out).graph.initializer}
    assert stored["w/int8"].dtype == np.int8 and np.abs(stored["w/int8"]).max() == 2 ** (bits - 1) - 1
    assert stored["x/zero"].dtype == (np.int8 if symmetric else np.uint8)
    exact, rounded = in_float(path), in_float(out)
    for inputs in draws(4, x, seed=1, scale=0.7):
        a, b = exact.run(None, inputs)[0], rounded.run(None, inputs)[0]
        others = tuple(i for i in range(a.ndim) if i != 1)
        error = np.sqrt(np.square(a - b).mean(others) / np.square(a).mean(others))
        assert error.max() < 0.12 and error.min() > 1e-4


def test_residual_connections_stay_in_float(tmp_path):
    rng = np.random.default_rng(0)
    nodes = [
        helper.make_node("Relu", ["x"], ["a"]),
        helper.make_node("MatMul", ["a", "w"], ["h"]),
        helper.make_node("Add", ["a", "h"], ["y"]),
    ]
    path = save(tmp_path / "a.onnx", nodes, {"w": 1e-6 * rng.standard_normal((32, 32))}, [8, 32], [8, 32])
    report = quantize(path, tmp_path / "b.onnx", draws(8), judge=against(path, draws(4, seed=1)), tolerance=1.0)
    assert report.error < 1e-5


def test_a_sampler_is_a_quarter_the_size_and_its_steps_share_weights(sampler, tmp_path):
    path, calibration, held_out = sampler
    out = tmp_path / "int8.onnx"
    report = quantize(path, out, calibration, judge=against(path, held_out), tolerance=1.0)
    model = onnx.load(out)
    rounded = [w for w in model.graph.initializer if w.data_type == TensorProto.INT8 and len(w.dims) > 1]
    assert len(rounded) == len(report.layers) > 15 and sum(layer.nodes == 8 for layer in report.layers) > 15
    assert not find_layers(model)
    before = sum(w.data_type == FLOAT and math.prod(w.dims) * 4 for w in onnx.load(path).graph.initializer)
    after = sum(len(w.raw_data) for w in model.graph.initializer)
    assert 0.24 < after / before < 0.32
    assert 0 < report.error < 0.6


def test_a_sampler_keeps_a_tolerance(sampler, tmp_path):
    path, calibration, held_out = sampler
    judge = against(path, held_out)
    report = quantize(path, tmp_path / "int8.onnx", calibration, judge=judge, tolerance=0.01)
    assert report.error_all_int8 > 0.01 >= report.error == judge(tmp_path / "int8.onnx")
    assert 0 < len(report.kept) < len(report.layers) and report.bytes_after < report.bytes_before


def test_openvino_computes_the_same(sampler, tmp_path):
    pytest.importorskip("openvino")
    from robopolicy.inference.backends.openvino import OpenVinoSession

    path, calibration, held_out = sampler
    out, config = tmp_path / "int8.onnx", QuantizeConfig(symmetric=False, weight_bits=7)
    quantize(path, out, calibration, judge=lambda _: 0.0, tolerance=1.0, config=config)
    with OnnxRuntimeSession(out) as wanted, OpenVinoSession(out, precision="f32") as found:
        for inputs in held_out:
            np.testing.assert_allclose(found(inputs)["chunk"], wanted(inputs)["chunk"], atol=0.05)


def test_tensorrt_parses_it(sampler, tmp_path):
    pytest.importorskip("tensorrt_rtx_libs", reason="needs TensorRT-RTX: pip install 'robopolicy[tensorrt]'")
    import tensorrt_rtx_bindings as trt

    path, calibration, _ = sampler
    out = tmp_path / "int8.onnx"
    quantize(path, out, calibration, judge=lambda _: 0.0, tolerance=1.0)
    logger = trt.Logger(trt.Logger.ERROR)
    network = trt.Builder(logger).create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, logger)
    assert parser.parse(out.read_bytes()), [parser.get_error(i).desc() for i in range(parser.num_errors)]
    kinds = [network.get_layer(i).type for i in range(network.num_layers)]
    assert kinds.count(trt.LayerType.QUANTIZE) > 100


def test_what_cannot_be_quantised_is_said(tmp_path):
    path, out = chain(tmp_path / "float.onnx"), tmp_path / "int8.onnx"
    with pytest.raises(UserError, match="no calibration inputs"):
        quantize(path, out, [], judge=lambda _: 0.0, tolerance=1.0)
    with pytest.raises(UserError, match="'x' is not finite"):
        quantize(path, out, draws(2, scale=np.nan), judge=lambda _: 0.0, tolerance=1.0)
    bare = save(tmp_path / "bare.onnx", [helper.make_node("Relu", ["x"], ["y"])], {}, [8, 32], [8, 32])
    with pytest.raises(UserError, match=r"bare.onnx: no layer with float32 weights"):
        quantize(bare, out, draws(2), judge=lambda _: 0.0, tolerance=1.0)
    (tmp_path / "broken.onnx").write_bytes(b"no graph")
    with pytest.raises(UserError, match=r"broken.onnx: ONNX Runtime cannot load it"):
        quantize(tmp_path / "broken.onnx", out, draws(2), judge=lambda _: 0.0, tolerance=1.0)
    assert not out.exists()
    for options, message in (
        ({"method": "max"}, "'max' is unknown; use minmax, entropy, percentile"),
        ({"percentile": 20}, "percentile=20"),
        ({"weight_bits": 4}, "weight_bits=4"),
        ({"samples": 0}, "samples=0"),
    ):
        with pytest.raises(UserError, match=message):
            QuantizeConfig(**options)
