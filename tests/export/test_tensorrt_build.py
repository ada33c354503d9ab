"""Real TensorRT-RTX engines, built here without a GPU; numerics of the same ONNX files in ONNX Runtime."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import nn

from robopolicy.errors import UserError
from robopolicy.export import tensorrt as build
from robopolicy.export.loop import export_loop
from robopolicy.export.onnx_graphs import export_onnx
from robopolicy.export.tensorrt import build_plan, check_targets, keep_in_float32, number_formats
from robopolicy.inference.device_memory import present_gpu
from robopolicy.inference.session import TensorSpec
from robopolicy.policies.base import ExportGraph
from tests.policies.test_contract import FAMILIES, batch_of, make

pytest.importorskip("tensorrt_rtx_bindings")
ort = pytest.importorskip("onnxruntime")

GPUS = ("sm80", "sm89", "sm120")
TOLERANCE = {torch.float32: 1e-4, torch.float16: 2e-2}


def gpu_is_here():
    try:
        present_gpu()
    except UserError:
        return False
    return True


without_gpu = pytest.mark.skipif(gpu_is_here(), reason="this machine has a GPU")


def graphs_of(family, dtype=torch.float32, rows=2, steps=None, **changes):
    policy = make(family, **changes).eval()
    if steps is not None and policy.sampler.name != "consistency":
        policy.sampler = replace(policy.sampler, steps=steps)
    batch = {k: v for k, v in batch_of(policy, rows).items() if k != "action"}
    return policy, policy.export_graphs(batch, dtype)


def random_inputs(graph):
    """Example inputs with noise in the place of the zeros that a chunk starts from."""
    generator = torch.Generator().manual_seed(0)
    return [
        torch.randn(value.shape, generator=generator)
        if value.is_floating_point() and name not in graph.shared
        else value
        for name, value in zip(graph.names, graph.inputs, strict=True)
    ]


def run_onnx(model, feeds):
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    data = model if isinstance(model, bytes) else str(model)
    return ort.InferenceSession(data, options, providers=["CPUExecutionProvider"]).run(None, feeds)


def assert_same_numbers(path, graph, dtype):
    inputs = random_inputs(graph)
    with torch.no_grad():
        wanted = graph.module(*inputs)
    wanted = wanted if isinstance(wanted, tuple) else (wanted,)
    found = run_onnx(path, {n: v.numpy() for n, v in zip(graph.names, inputs, strict=True)})
    for f, w in zip(found, wanted, strict=True):
        scale = max(1.0, float(w.abs().max()))
        np.testing.assert_allclose(f / scale, w.numpy() / scale, atol=TOLERANCE[dtype])


def specs(names, tensors):
    return tuple(TensorSpec(n, tuple(v.shape), str(v.dtype)[6:]) for n, v in zip(names, tensors, strict=True))


def assert_plan_is_of(plan, graph):
    """Borders as in torch, targets as asked for, and room for the weights."""
    with torch.no_grad():
        results = graph.module(*graph.inputs)
    assert plan.inputs == specs(graph.names, graph.inputs)
    assert plan.outputs == specs(graph.outputs, results if isinstance(results, tuple) else (results,))
    assert plan.capabilities == GPUS and plan.layers > 5 and plan.seconds > 0
    assert sum(plan.precisions.values()) > 0.9 * plan.layers  # the ends of a loop have no output


# U-Nets of other processes are the same graph with other numbers
@pytest.mark.parametrize("family", [family for family in FAMILIES if family not in ("unet edm", "unet flow")])
def test_every_family_builds_for_three_gpus_in_one_plan(family, tmp_path):
    sizes = {}
    for dtype, exporter in ((torch.float32, "torchscript"), (torch.float16, "dynamo")):
        _, graphs = graphs_of(family, dtype, steps=2)
        # states are encoded in float32; in half precision experts that are near each other may change places in a chunk
        for name in ("encoder", "sampler") if dtype == torch.float32 else ("denoiser", "sampler"):
            path = tmp_path / f"{name}.onnx"
            export_onnx(graphs[name], path, exporter=exporter)
            plan = build_plan(path, GPUS)
            assert_plan_is_of(plan, graphs[name])
            if dtype == torch.float32 or name == "denoiser":
                assert_same_numbers(path, graphs[name], dtype)
            halves = {k: n for k, n in plan.precisions.items() if k in ("HALF", "BF16", "FP8", "INT8")}
            weights = [w for w in onnx.load(path).graph.initializer if w.data_type in (1, 10)]
            if dtype == torch.float32:
                assert not halves and plan.precisions["FLOAT"] > 0
            else:
                assert set(halves) == {"HALF"} and halves["HALF"] > len(weights) / 2
        sizes[dtype] = len(plan.data)
    assert max(sizes.values()) < 20e6


def test_an_image_encoder_takes_bytes_and_builds_in_float16(tmp_path):
    _, graphs = graphs_of("mlp ddpm", torch.float16, images=True)
    export_onnx(graphs["encoder"], tmp_path / "encoder.onnx")
    plan = build_plan(tmp_path / "encoder.onnx", GPUS)
    assert_plan_is_of(plan, graphs["encoder"])
    assert {spec.dtype for spec in plan.inputs} == {"float32", "uint8"}
    assert plan.precisions["HALF"] > plan.precisions["FLOAT"]


@pytest.mark.parametrize("family", ["unet ddpm", "mode"])
def test_a_sampler_that_loops_builds_in_bfloat16(family, tmp_path):
    """With transposed convolutions and Mish in the loop's body, which TensorRT does not take in bfloat16."""
    policy, graphs = graphs_of(family, torch.bfloat16)
    path = tmp_path / "sampler.onnx"
    export_loop(policy, graphs["sampler"], path, dtype=torch.bfloat16)
    plan = build_plan(path, GPUS)
    assert_plan_is_of(plan, graphs["sampler"])
    assert plan.precisions["BF16"] > 100


def test_an_unrolled_sampler_builds_for_a_range_of_rows(tmp_path):
    _, graphs = graphs_of("consistency actor")
    path = tmp_path / "sampler.onnx"
    export_onnx(graphs["sampler"], path, free_rows=True)
    plan = build_plan(path, GPUS, rows=(1, 4, 16))
    assert {spec.shape[0] for spec in (*plan.inputs, *plan.outputs)} == {None}
    assert_same_numbers(path, graphs["sampler"], torch.float32)


def save_model(path, nodes, inputs, outputs, weights=(), opset=19):
    graph = helper.make_graph(nodes, "test", inputs, outputs, list(weights))
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=10)
    path.write_bytes(model.SerializeToString())
    return path


def relu(path, shape=(1, 4), kind=TensorProto.FLOAT, op="Relu"):
    x, y = (helper.make_tensor_value_info(name, kind, shape) for name in "xy")
    return save_model(path, [helper.make_node(op, ["x"], ["y"], name="the_node")], [x], [y])


@pytest.mark.parametrize(
    ("capability", "board"),
    [("sm87", "Jetson Orin"), ("sm90", "H100"), ("sm100", "B200"), ("sm103", "B300"), ("sm110", "Jetson Thor")],
)
def test_a_gpu_that_tensorrt_rtx_cannot_take_is_refused_before_anything_is_built(capability, board, tmp_path):
    unbuildable = relu(tmp_path / "net.onnx", op="NoSuchOperator")
    with pytest.raises(UserError, match=f"no target for {capability} .*{board}") as error:
        build_plan(unbuildable, ["sm89", capability])
    assert "classic TensorRT" in str(error.value) and "backend=aot_inductor" in str(error.value)


def test_an_unknown_gpu_is_refused(tmp_path):
    with pytest.raises(UserError, match="'sm98' is known.*Did you mean"):
        build_plan(relu(tmp_path / "net.onnx"), ["sm98"])


@without_gpu
def test_without_a_gpu_one_must_say_for_which(tmp_path):
    with pytest.raises(UserError, match=r"No compute capability to build for.*name the GPUs.*sm86"):
        build_plan(relu(tmp_path / "net.onnx"))


@without_gpu
def test_classic_tensorrt_builds_on_a_gpu_alone(tmp_path):
    with pytest.raises(UserError, match=r"only on the GPU that runs the engine.*No usable NVIDIA GPU.*TensorRT-RTX"):
        build_plan(relu(tmp_path / "net.onnx"), ["sm87"], "classic")


def test_a_gpu_that_does_not_compute_in_a_format_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"sm75 \(Turing.*bfloat16, which needs sm80 or newer"):
        check_targets(["sm75"], "rtx", {"float32", "bfloat16"})
    with pytest.raises(UserError, match=r"sm86 .*float8, which needs sm89 or newer"):
        build_plan(float8(tmp_path / "net.onnx"), ["sm89", "sm86"])
    assert check_targets(["sm89", "sm120", "sm89"], "rtx", {"float8"}) == ("sm89", "sm120")


def float8(path):
    """A float8 product, as quantisation writes it."""
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, (16, 16)) for name in "xy")
    scale = numpy_helper.from_array(np.float32(0.1), "scale")
    zero = helper.make_tensor("zero", TensorProto.FLOAT8E4M3FN, [], [0.0])
    weights = numpy_helper.from_array(np.eye(16, dtype=np.float32), "w")
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "scale", "zero"], ["q"]),
        helper.make_node("DequantizeLinear", ["q", "scale", "zero"], ["d"]),
        helper.make_node("MatMul", ["d", "w"], ["y"]),
    ]
    return save_model(path, nodes, [x], [y], [scale, zero, weights])


def test_an_operator_that_tensorrt_does_not_know_is_named(tmp_path):
    with pytest.raises(UserError, match=r"node 'the_node' \(NoSuchOperator\): .*[Pp]lugin"):
        build_plan(relu(tmp_path / "net.onnx", op="NoSuchOperator"), ["sm89"])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kind": TensorProto.FLOAT16}, "'x' is half, and only float32, uint8, int64"),
        ({"shape": (1, "length")}, "only the first dimension"),
    ],
)
def test_borders_are_plain(changes, message, tmp_path):
    with pytest.raises(UserError, match=message):
        build_plan(relu(tmp_path / "net.onnx", **changes), ["sm89"])


def test_a_damaged_file_and_wrong_rows_are_refused(tmp_path):
    (tmp_path / "net.onnx").write_bytes(b"not a graph")
    with pytest.raises(UserError, match="net.onnx is not an ONNX file"):
        build_plan(tmp_path / "net.onnx", ["sm89"])
    with pytest.raises(UserError, match="missing.onnx is not an ONNX file"):
        build_plan(tmp_path / "missing.onnx", ["sm89"])
    with pytest.raises(UserError, match=r"rows: found \(4, 1, 8\)"):
        build_plan(relu(tmp_path / "relu.onnx"), ["sm89"], rows=(4, 1, 8))


class Upsampling(nn.Module):
    """One transposed convolution used twice, between operators that stay in 16 bits."""

    def __init__(self):
        super().__init__()
        self.down, self.up = nn.Conv1d(4, 4, 3, stride=2, padding=1), nn.ConvTranspose1d(4, 4, 4, stride=2, padding=1)

    def forward(self, x):
        x = torch.relu(self.up(self.down(x.to(self.down.weight.dtype))))
        return self.up(self.down(x)).float()


def upsampling(path, dtype):
    torch.manual_seed(0)
    module = Upsampling().to(dtype).eval()
    graph = ExportGraph(module, (torch.randn(2, 4, 16),), ("x",), ("y",))
    export_onnx(graph, path)
    return path, graph


def test_what_fails_in_bfloat16_is_kept_in_float32(tmp_path, monkeypatch):
    path, _ = upsampling(tmp_path / "up.onnx", torch.bfloat16)
    assert number_formats(onnx.load(path)) >= {"bfloat16"}
    plan = build_plan(path, ["sm80"])
    assert plan.precisions["BF16"] > 0 and plan.precisions["FLOAT"] > 0
    monkeypatch.setattr(build, "NOT_IN_BFLOAT16", ())
    with pytest.raises(UserError, match=r"cannot build .*up.onnx for sm80: .*deconv"):
        build_plan(path, ["sm80"])


def test_float32_inside_a_lower_precision_changes_the_numbers_little(tmp_path):
    path, graph = upsampling(tmp_path / "up.onnx", torch.float16)
    model = onnx.load(path)
    wide = keep_in_float32(model, {"ConvTranspose"})
    onnx.checker.check_model(wide, full_check=True)
    kinds = {w.name: w.data_type for w in wide.graph.initializer}
    nodes = [node for node in wide.graph.node if node.op_type == "ConvTranspose"]
    assert len(nodes) == 2 and len({node.input[1] for node in nodes}) == 1  # shared weights are converted once
    assert all(kinds[name] == TensorProto.FLOAT for node in nodes for name in node.input[1:])
    x = np.random.default_rng(0).normal(size=(2, 4, 16)).astype(np.float32)
    (before,), (after,) = (run_onnx(m.SerializeToString(), {"x": x}) for m in (model, wide))
    assert 0 < np.abs(after - before).max() < 5e-3
    assert keep_in_float32(model, {"Gemm"}).graph.node == model.graph.node
