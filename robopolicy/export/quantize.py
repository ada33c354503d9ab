"""Int8 graphs after training, with the layers in float that need it.

Weights are int8 with a scale of their own for every output channel; what enters a layer is int8 with one scale, found
by running the float graph on real inputs. Both are written as QuantizeLinear / DequantizeLinear pairs, which OpenVINO,
TensorRT and, for matrix products, ONNX Runtime turn into integer arithmetic (Jacob et al., CVPR 2018; Nagel et al.,
arXiv:2106.08295).

ONNX Runtime has `quantize_static` for this, but it also rounds what other nodes take from the same tensor: residual
connections, which a sampler's accuracy hangs on, would pass through int8. Its histograms are used here, its rewriting
is not.
"""

from __future__ import annotations

import contextlib
import io
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnx
import onnx_ir
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper
from onnx_ir.passes.common import DeduplicateHashedInitializersPass

from robopolicy.errors import UserError, require_extra

Inputs = Mapping[str, np.ndarray]
METHODS = ("minmax", "entropy", "percentile")


@dataclass(frozen=True, kw_only=True)
class QuantizeConfig:
    """How ranges of activations are chosen.

    Attributes:
        method: ``minmax`` covers all that was seen; ``percentile`` cuts outliers off; ``entropy`` cuts where the
            distribution of rounded values is nearest to the true one (Kullback-Leibler).
        percentile: share of values that ``percentile`` covers, in percent.
        symmetric: int8 around zero, which TensorRT needs; otherwise uint8 from the lowest to the highest value.
        weight_bits: 8, or 7 for processors that add products in 16 bits (x86 without VNNI): two full ones overflow.
        samples: calibration inputs used to compare layers with each other.
    """

    method: Literal["minmax", "entropy", "percentile"] = "minmax"
    percentile: float = 99.99
    symmetric: bool = True
    weight_bits: Literal[7, 8] = 8
    samples: int = 4

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise UserError(f"calibration method '{self.method}' is unknown; use {', '.join(METHODS)}.")
        if not 50 < self.percentile <= 100:
            raise UserError(f"percentile={self.percentile} must be above 50 and at most 100.")
        if self.weight_bits not in (7, 8):
            raise UserError(f"weight_bits={self.weight_bits} must be 7 or 8.")
        if self.samples < 1:
            raise UserError(f"samples={self.samples} must be at least 1.")


@dataclass(frozen=True)
class LayerReport:
    """A weight, and what becomes of it.

    Attributes:
        name: of the weight.
        nodes: how often it is used; an unrolled sampler uses it once or more in every step.
        parameters: how many numbers it holds.
        float32: it was left in float.
        error: of the graph's outputs if this layer alone is int8: root mean square, relative to the float outputs',
            of the worst output. None where layers were not compared, since int8 everywhere was good enough.
    """

    name: str
    nodes: int
    parameters: int
    float32: bool
    error: float | None


@dataclass(frozen=True)
class QuantizationReport:
    """What `quantize` did.

    Attributes:
        error, tolerance: what the judge said of the graph written, and what was allowed.
        error_all_int8: what the judge said of int8 in all layers.
        judgements: how many graphs were judged.
        layers: all weights that can be int8, the most sensitive first.
        bytes_before, bytes_after: size of the files.
    """

    error: float
    tolerance: float
    error_all_int8: float
    judgements: int
    layers: tuple[LayerReport, ...]
    bytes_before: int
    bytes_after: int

    @property
    def kept(self) -> tuple[LayerReport, ...]:
        """Layers left in float."""
        return tuple(layer for layer in self.layers if layer.float32)

    def __str__(self) -> str:
        lines = [
            f"int8 in {len(self.layers) - len(self.kept)} of {len(self.layers)} layers, "
            f"{self.bytes_before / 1e6:.1f} MB -> {self.bytes_after / 1e6:.1f} MB; "
            f"error {self.error:.3g} of {self.tolerance:.3g} allowed (all layers int8: {self.error_all_int8:.3g})"
        ]
        lines += [f"  float32: {layer.name}, alone {layer.error:.2%} of the output" for layer in self.kept]
        return "\n".join(lines)


def quantize(
    model_path: Path,
    out_path: Path,
    calibration: Iterable[Inputs],
    *,
    judge: Callable[[Path], float],
    tolerance: float,
    config: QuantizeConfig | None = None,
) -> QuantizationReport:
    """Write an int8 version of a float32 graph, with as many layers in float as the tolerance demands.

    All layers are tried in int8 first. If that is not good enough, each layer is measured alone, and the most
    sensitive ones stay in float: 1, 2, 4, … until the judge agrees, then fewer by bisection. An unrolled sampler's
    layer is one weight, in all steps.

    Args:
        model_path: a float32 ONNX graph without control flow.
        out_path: where the int8 graph goes.
        calibration: real inputs of the graph, by name, as often as the memory of one run allows: a hundred or so.
        judge: error of a graph; 0 for the float graph itself.
        tolerance: the largest error allowed.

    Raises:
        UserError: there is nothing to calibrate with or to quantise, or not even one layer can be int8.
    """
    config = config or QuantizeConfig()
    data = [dict(inputs) for inputs in calibration]
    if not data:
        raise UserError(f"{model_path}: no calibration inputs; int8 ranges come from real observations.")
    with tempfile.TemporaryDirectory() as folder:
        model = _simplified(model_path, Path(folder))
        ranges = _ranges(model, find_layers(model), data, config, Path(folder))
        layers = [layer for layer in find_layers(model) if all(node.input[0] in ranges for node in layer.nodes)]
        if not layers:
            raise UserError(f"{model_path}: no layer with float32 weights outside control flow; export it unrolled.")
        search = _Search(model, layers, ranges, config, judge, tolerance, out_path)
        all_int8 = search.judged(0)
        errors: dict[str, float] = {}
        kept = 0
        if all_int8 > tolerance:
            errors = _alone(model, layers, ranges, config, data[: config.samples], Path(folder))
            layers.sort(key=lambda layer: -errors[layer.weight])
            kept = search.fewest()
    error = search.judged(kept)
    return QuantizationReport(
        error,
        tolerance,
        all_int8,
        len(search.errors),
        tuple(
            LayerReport(x.weight, len(x.nodes), x.parameters, i < kept, errors.get(x.weight))
            for i, x in enumerate(layers)
        ),
        model_path.stat().st_size,
        out_path.stat().st_size,
    )


@dataclass(frozen=True)
class Layer:
    """A weight and the nodes that multiply by it.

    Attributes:
        weight: name of the initialiser.
        axis: its output channels.
        nodes: Conv, ConvTranspose, MatMul and Gemm nodes, whose second input it is.
    """

    weight: str
    axis: int
    parameters: int
    nodes: tuple[NodeProto, ...]


def find_layers(model: ModelProto) -> list[Layer]:
    """All layers of a graph with constant float32 weights, in the order of their first use."""
    weights = {w.name: w for w in model.graph.initializer if w.data_type == TensorProto.FLOAT and len(w.dims) > 1}
    users: dict[str, list[tuple[NodeProto, int]]] = {}
    for node in model.graph.node:
        if node.op_type in ("Conv", "ConvTranspose", "MatMul", "Gemm") and node.input[1] in weights:
            users.setdefault(node.input[1], []).append((node, _channels(node, len(weights[node.input[1]].dims))))
    # A weight used along two axes would need two scales: rare enough to stay in float.
    return [
        Layer(name, found[0][1], int(np.prod(weights[name].dims)), tuple(node for node, _ in found))
        for name, found in users.items()
        if len({axis for _, axis in found}) == 1
    ]


def _channels(node: NodeProto, dims: int) -> int:
    if node.op_type == "MatMul":
        return dims - 1
    if node.op_type == "Gemm":
        return 0 if any(a.name == "transB" and a.i for a in node.attribute) else 1
    return 0 if node.op_type == "Conv" else 1


def _simplified(path: Path, folder: Path) -> ModelProto:
    """Fold constants, so that weights are initialisers, and keep one copy of each, so that steps share them."""
    ort = require_extra("onnxruntime", "onnxruntime")
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_BASIC
    options.optimized_model_filepath = str(folder / "simple.onnx")
    options.log_severity_level = 3
    try:
        off = ["ConstantSharing"]
        ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"], disabled_optimizers=off)
    except Exception as error:  # its exceptions have no base class of their own
        raise UserError(f"{path}: ONNX Runtime cannot load it ({error}). Export the policy again.") from error
    model = onnx_ir.load(folder / "simple.onnx")
    DeduplicateHashedInitializersPass(size_limit=1 << 34)(model)
    onnx_ir.save(model, folder / "simple.onnx")
    return onnx.load(folder / "simple.onnx")


def _ranges(
    model: ModelProto, layers: Sequence[Layer], data: Sequence[Inputs], config: QuantizeConfig, folder: Path
) -> dict[str, tuple[float, float]]:
    """Lowest and highest value to be kept apart of everything that enters a layer."""
    entering = {node.input[0] for layer in layers for node in layer.nodes}
    entering -= {tensor.name for tensor in model.graph.initializer}
    observed = _observer(model, entering, folder)
    ranges = dict.fromkeys(entering, (0.0, 0.0))
    for inputs in data:
        for name, value in observed(inputs).items():
            if not np.isfinite(value).all():
                raise UserError(f"Calibration: '{name}' is not finite for these inputs; check the observations.")
            low, high = ranges[name]
            ranges[name] = (min(low, float(value.min())), max(high, float(value.max())))
    histograms = _histograms(config)
    if histograms is None:
        return ranges
    with contextlib.redirect_stdout(io.StringIO()):  # it prints what it does
        # Its bins span the first values that it is given.
        histograms.collect({name: np.array([low, 0, high], np.float32) for name, (low, high) in ranges.items()})
        for inputs in data:
            histograms.collect(observed(inputs))
        found = histograms.compute_collection_result()
    cut = {name: (float(found[name][0]), float(found[name][1])) for name in ranges}
    return {name: (max(low, cut[name][0]), min(high, cut[name][1])) for name, (low, high) in ranges.items()}


def _observer(model: ModelProto, names: set[str], folder: Path) -> Callable[[Inputs], dict[str, np.ndarray]]:
    """A function that runs a graph and gives these tensors of it, inputs first."""
    ort = require_extra("onnxruntime", "onnxruntime")
    given = sorted(names & {tensor.name for tensor in model.graph.input})
    inside = sorted(names - set(given))
    seen = ModelProto()
    seen.CopyFrom(model)
    known = {tensor.name for tensor in seen.graph.output}
    seen.graph.output.extend(
        helper.make_tensor_value_info(n, TensorProto.FLOAT, None) for n in inside if n not in known
    )
    onnx.save(seen, folder / "seen.onnx")
    session = ort.InferenceSession(str(folder / "seen.onnx"), providers=["CPUExecutionProvider"])

    def observe(inputs: Inputs) -> dict[str, np.ndarray]:
        found = {name: inputs[name] for name in given}
        return found | dict(zip(inside, session.run(inside, dict(inputs)) if inside else [], strict=True))

    return observe


def _histograms(config: QuantizeConfig) -> Any:
    if config.method == "minmax":
        return None
    from onnxruntime.quantization.calibrate import HistogramCollector

    bins = {"entropy": 512, "percentile": 2048}[config.method]
    return HistogramCollector(config.method, config.symmetric, bins, 128, config.percentile, "same")


def _rewritten(
    model: ModelProto,
    layers: Sequence[Layer],
    ranges: Mapping[str, tuple[float, float]],
    config: QuantizeConfig,
    *,
    switches: bool = False,
) -> ModelProto:
    """A copy of a graph with these layers in int8; with switches, each has an input that says whether it is."""
    out = ModelProto()
    out.CopyFrom(model)
    graph = out.graph
    weights = {tensor.name: tensor for tensor in graph.initializer}
    first: list[NodeProto] = []
    entering: dict[str, list[NodeProto]] = {}
    replaced: dict[tuple[str, ...], tuple[str, str]] = {}
    done: set[str] = set()
    for i, layer in enumerate(layers):
        switch = f"int8/{i}" if switches else ""
        if switches:
            graph.input.append(helper.make_tensor_value_info(switch, TensorProto.BOOL, [1]))
        scale, rounded = _int8(numpy_helper.to_array(weights[layer.weight]), layer.axis, config.weight_bits)
        w = layer.weight
        graph.initializer.extend(
            [numpy_helper.from_array(rounded, f"{w}/int8"), numpy_helper.from_array(scale, f"{w}/scale")]
        )
        first.append(helper.make_node("DequantizeLinear", [f"{w}/int8", f"{w}/scale"], [f"{w}/float"], axis=layer.axis))
        weight = f"{w}/float"
        if switches:
            first.append(helper.make_node("Where", [switch, weight, w], [f"{w}/chosen"]))
            weight = f"{w}/chosen"
        for node in layer.nodes:
            x = node.input[0]
            nodes = entering.setdefault(x, [])
            if x not in done:
                done.add(x)
                scale, zero = _activation(*ranges[x], config)
                graph.initializer.extend(
                    [numpy_helper.from_array(scale, f"{x}/scale"), numpy_helper.from_array(zero, f"{x}/zero")]
                )
                both = [f"{x}/scale", f"{x}/zero"]
                nodes.append(helper.make_node("QuantizeLinear", [x, *both], [f"{x}/int8"]))
                nodes.append(helper.make_node("DequantizeLinear", [f"{x}/int8", *both], [f"{x}/float"]))
            activation = f"{x}/float"
            if switches:
                activation = f"{x}/chosen/{i}"
                if not any(activation in n.output for n in nodes):
                    nodes.append(helper.make_node("Where", [switch, f"{x}/float", x], [activation]))
            replaced[tuple(node.output)] = (activation, weight)
    body = list(first)
    for name in (tensor.name for tensor in graph.input):
        body += entering.pop(name, [])
    for node in graph.node:
        if tuple(node.output) in replaced:
            node.input[0], node.input[1] = replaced[tuple(node.output)]
        body.append(node)
        for name in node.output:
            body += entering.pop(name, [])
    _replace(graph.node, body)
    used = {name for node in body for name in node.input} | {tensor.name for tensor in graph.output}
    _replace(graph.initializer, [tensor for tensor in graph.initializer if tensor.name in used])
    return out


def _replace(repeated: Any, values: list[Any]) -> None:
    copies = [type(value).FromString(value.SerializeToString()) for value in values]
    del repeated[:]
    repeated.extend(copies)


def _int8(weight: np.ndarray, axis: int, bits: int) -> tuple[np.ndarray, np.ndarray]:
    """Scales (channels,) and integers of a weight, symmetric for every output channel."""
    top = 2 ** (bits - 1) - 1
    others = tuple(i for i in range(weight.ndim) if i != axis)
    largest = np.abs(weight).max(others, keepdims=True)
    scale = (np.where(largest > 0, largest, 1) / top).astype(np.float32)
    return scale.reshape(-1), np.clip(np.rint(weight / scale), -top, top).astype(np.int8)


def _activation(low: float, high: float, config: QuantizeConfig) -> tuple[np.ndarray, np.ndarray]:
    """Scale and zero point of an activation; zero stays zero, since convolutions pad with it."""
    low, high = min(low, 0.0), max(high, 0.0)
    if config.symmetric:
        return np.array((max(-low, high) or 1.0) / 127, np.float32), np.array(0, np.int8)
    scale = np.float32((high - low or 1.0) / 255)
    return np.array(scale), np.array(np.clip(np.rint(-low / scale), 0, 255), np.uint8)


def _alone(
    model: ModelProto,
    layers: Sequence[Layer],
    ranges: Mapping[str, tuple[float, float]],
    config: QuantizeConfig,
    data: Sequence[Inputs],
    folder: Path,
) -> dict[str, float]:
    """Error of the outputs with one layer in int8 at a time, by weight.

    One graph with a switch for every layer does it: it is loaded once and run once per layer and input.
    """
    path = folder / "switches.onnx"
    onnx.save(_rewritten(model, layers, ranges, config, switches=True), path)
    ort = require_extra("onnxruntime", "onnxruntime")
    session = ort.InferenceSession(str(path), providers=["CPUExecutionProvider"])

    def outputs(on: int | None) -> list[list[np.ndarray]]:
        flags = {f"int8/{i}": np.array([i == on]) for i in range(len(layers))}
        return [session.run(None, {**inputs, **flags}) for inputs in data]

    true = outputs(None)
    norms = [sum(float(np.square(row[k]).sum()) for row in true) for k in range(len(true[0]))]
    errors = {}
    for i, layer in enumerate(layers):
        found = outputs(i)
        off = [
            sum(float(np.square(a[k] - b[k]).sum()) for a, b in zip(found, true, strict=True))
            for k in range(len(norms))
        ]
        errors[layer.weight] = max(np.sqrt(o / max(norm, 1e-30)) for o, norm in zip(off, norms, strict=True))
    return errors


@dataclass
class _Search:
    """Judges graphs with the first layers in float, and writes the one judged last."""

    model: ModelProto
    layers: list[Layer]
    ranges: Mapping[str, tuple[float, float]]
    config: QuantizeConfig
    judge: Callable[[Path], float]
    tolerance: float
    path: Path

    def __post_init__(self) -> None:
        self.errors: dict[int, float] = {}
        self.written: int | None = None

    def judged(self, kept: int) -> float:
        """The error with so many layers in float; the file holds that graph afterwards."""
        if self.written != kept:
            onnx.save(_rewritten(self.model, self.layers[kept:], self.ranges, self.config), self.path)
            self.written = kept
        if kept not in self.errors:
            self.errors[kept] = self.judge(self.path)
        return self.errors[kept]

    def fewest(self) -> int:
        """The fewest layers in float that keep the tolerance, taken from the front."""
        count = len(self.layers)
        bad, good = 0, 1
        while good < count and self.judged(good) > self.tolerance:
            bad, good = good, 2 * good
        if good >= count:
            good = count - 1
            if good == bad or self.judged(good) > self.tolerance:
                least = self.layers[-1].weight
                self.path.unlink(missing_ok=True)
                raise UserError(
                    f"int8 is out of reach: with the least sensitive layer '{least}' alone in int8, the error is "
                    f"{self.errors[good]:.3g}, and {self.tolerance:.3g} is allowed. Use fp16, or a larger tolerance."
                )
        while good - bad > 1:
            middle = (good + bad) // 2
            if self.judged(middle) > self.tolerance:
                bad = middle
            else:
                good = middle
        return good
