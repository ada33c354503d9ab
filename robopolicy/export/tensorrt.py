"""TensorRT plans from ONNX files, also for GPUs that this machine does not have."""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import onnx
from google.protobuf.message import DecodeError
from onnx import GraphProto, ModelProto, NodeProto, TensorProto, helper, numpy_helper

from robopolicy.errors import UserError
from robopolicy.inference.backends.tensorrt import (
    NAMES,
    Flavour,
    border_spec,
    last_errors,
    replace_file,
    tensorrt_logger,
    tensorrt_module,
)
from robopolicy.inference.device_memory import present_gpu
from robopolicy.inference.gpus import FAMILIES, gpu_families
from robopolicy.inference.session import TensorSpec

log = logging.getLogger(__name__)

_FORMATS = {
    TensorProto.FLOAT: "float32",
    TensorProto.FLOAT16: "float16",
    TensorProto.BFLOAT16: "bfloat16",
    TensorProto.INT8: "int8",
    TensorProto.FLOAT8E4M3FN: "float8",
    TensorProto.FLOAT8E5M2: "float8",
}
_HALVES = (TensorProto.FLOAT16, TensorProto.BFLOAT16)
NOT_IN_BFLOAT16 = ("ConvTranspose", "Mish")
"""Operators that TensorRT takes in float32 and float16 only."""
_PARSER_ERRORS = 3


@dataclass(frozen=True)
class Plan:
    """A built engine, serialised.

    Attributes:
        data: what a plan file holds.
        inputs, outputs: of the network.
        layers: their number before TensorRT fuses them.
        precisions: how many of the layers' outputs are of each type, such as ``{"HALF": 180, "FLOAT": 12}``.
        capabilities: compute capabilities that it runs on.
        version: of TensorRT or TensorRT-RTX; a plan runs with the version that built it.
        seconds: that parsing and building took.
    """

    data: bytes
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    layers: int
    precisions: Mapping[str, int]
    capabilities: tuple[str, ...]
    version: str
    seconds: float


def build_plan(
    onnx_path: Path,
    capabilities: Sequence[str] = (),
    flavour: Flavour = "rtx",
    *,
    rows: tuple[int, int, int] = (1, 1, 1),
    timing_cache: Path | None = None,
) -> Plan:
    """Build a plan whose precisions are the ONNX file's own; float32 stays float32 (no TF32).

    Args:
        onnx_path: the graph; inputs and outputs float32, uint8 or int64.
        capabilities: of the GPUs to build for, such as ``sm89``, all in one plan; empty for the GPU of this machine.
        flavour: TensorRT-RTX builds without a GPU; classic TensorRT for the GPU of this machine alone.
        rows: fewest, usual and most rows of inputs whose number of rows is free.
        timing_cache: file in which classic TensorRT keeps what it measured, so that the next build is shorter;
            TensorRT-RTX measures nothing.

    Raises:
        UserError: a GPU that the package or the precision does not cover (before anything is built), an operator or
            a combination that TensorRT cannot take, a file that is no ONNX graph.
    """
    start = time.perf_counter()
    if not 1 <= rows[0] <= rows[1] <= rows[2]:
        raise UserError(f"rows: found {rows}, wanted the fewest, usual and most rows in rising order, at least 1.")
    formats = number_formats(_read(onnx_path, weights=False))
    targets = check_targets(capabilities, flavour, formats)
    trt, logger = tensorrt_module(flavour), tensorrt_logger(flavour)
    logger.errors.clear()
    builder = trt.Builder(logger)
    network = _network(trt, builder)
    parser = trt.OnnxParser(network, logger)
    if "bfloat16" in formats:
        parsed = parser.parse(keep_in_float32(_read(onnx_path), NOT_IN_BFLOAT16).SerializeToString())
    else:
        parsed = parser.parse_from_file(str(onnx_path))
    if not parsed:
        raise UserError(_parser_message(parser, onnx_path, flavour, trt))
    inputs, outputs = _network_borders(network)
    config = builder.create_builder_config()
    config.clear_flag(trt.BuilderFlag.TF32)
    if flavour == "rtx":
        _target(trt, config, capabilities)
    if any(None in spec.shape for spec in inputs):
        config.add_optimization_profile(_profile(builder, inputs, rows))
    timings = _use_timings(config, timing_cache) if flavour == "classic" and timing_cache else None
    serialized = builder.build_serialized_network(network, config)
    if serialized is None:
        raise UserError(
            f"{NAMES[flavour]} {trt.__version__} cannot build {onnx_path} for {', '.join(targets)}: "
            f"{last_errors(logger)} Export in another precision, or with backend=aot_inductor."
        )
    if timings is not None and timing_cache is not None:
        replace_file(timing_cache, bytes(memoryview(timings.serialize())))
    seconds = time.perf_counter() - start
    log.info("built %s for %s in %.1f s", onnx_path.name, ", ".join(targets), seconds)
    return Plan(
        bytes(memoryview(serialized)),
        inputs,
        outputs,
        network.num_layers,
        _precisions(network),
        targets,
        trt.__version__,
        seconds,
    )


def check_targets(
    capabilities: Sequence[str], flavour: Flavour = "rtx", formats: Collection[str] = ()
) -> tuple[str, ...]:
    """Compute capabilities that a plan will be for; cheap, so that an export can be refused before it starts.

    Args:
        capabilities: as for `build_plan`.
        flavour: of TensorRT.
        formats: number formats of the graph, as `number_formats` gives them.

    Raises:
        UserError: the package has no target for a GPU, the GPU does not compute in a format, or there is no GPU where
            one is needed.
    """
    families = gpu_families(capabilities)
    if flavour == "classic":
        families = gpu_families([_classic_target(capabilities)])
    elif not families:
        families = gpu_families([_present_target()])
    trt = tensorrt_module(flavour)
    for family in families:
        if flavour == "rtx" and family.capability not in rtx_targets(trt):
            raise UserError(
                f"TensorRT-RTX {trt.__version__} has no target for {family}; it builds for "
                f"{', '.join(rtx_targets(trt))}. For this GPU build with classic TensorRT (backend=tensorrt) on the "
                "machine that has it, from the same ONNX files, or use backend=aot_inductor there."
            )
        missing = sorted(set(formats) & set(_FORMATS.values()) - family.formats)
        if missing:
            known = [name for name, other in FAMILIES.items() if set(missing) <= other.formats]
            raise UserError(
                f"{family} does not compute in {' or '.join(missing)}, which needs {known[0]} or newer. Export in "
                "fp16 or fp32 for it."
            )
    return tuple(family.capability for family in families)


def rtx_targets(trt: ModuleType) -> tuple[str, ...]:
    """Compute capabilities that the installed TensorRT-RTX can build for."""
    return tuple(name.lower() for name in trt.ComputeCapability.__members__ if name.startswith("SM"))


def _present_target() -> str:
    try:
        return present_gpu().capability
    except UserError as error:
        raise UserError(
            f"No compute capability to build for. {error} Or name the GPUs that will run the engine, such as sm86 and "
            "sm89; docs/tensorrt.md says which board has which."
        ) from error


def _classic_target(capabilities: Sequence[str]) -> str:
    try:
        present = present_gpu()
    except UserError as error:
        raise UserError(
            f"Classic TensorRT builds only on the GPU that runs the engine. {error} TensorRT-RTX builds without one."
        ) from error
    if set(capabilities) - {present.capability}:
        raise UserError(
            f"Classic TensorRT builds only for the GPU of this machine, {present.name} ({present.capability}); found "
            f"{', '.join(capabilities)}. Build on the machine that runs the engine, or with TensorRT-RTX."
        )
    return present.capability


def _read(path: Path, weights: bool = True) -> ModelProto:
    try:
        return onnx.load(str(path), load_external_data=weights)
    except (OSError, DecodeError, onnx.checker.ValidationError) as error:
        raise UserError(f"{path} is not an ONNX file that can be read: {error}. Export the policy again.") from error


def graphs_of(graph: GraphProto) -> Iterator[GraphProto]:
    """A graph and, inside of it, the bodies of its loops and conditions."""
    yield graph
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.HasField("g"):
                yield from graphs_of(attribute.g)


def number_formats(model: ModelProto) -> frozenset[str]:
    """Formats of the numbers that a model computes with: of its weights, and those it converts to."""
    types = set()
    for graph in graphs_of(model.graph):
        types |= {tensor.data_type for tensor in graph.initializer}
        for node in graph.node:
            for attribute in node.attribute:
                if attribute.HasField("t"):
                    types.add(attribute.t.data_type)
                if attribute.name == "to":
                    types.add(attribute.i)
    return frozenset(_FORMATS[kind] for kind in types if kind in _FORMATS)


def keep_in_float32(model: ModelProto, op_types: Collection[str]) -> ModelProto:
    """Let some operators compute in float32 inside a model of lower precision.

    Their 16-bit weights become float32, their other 16-bit inputs are cast before, their outputs are cast back after.

    Args:
        model: left as it is.
        op_types: ONNX operators, such as ``ConvTranspose``, all of whose inputs and outputs have one type.

    Returns:
        A changed copy.
    """
    changed = ModelProto()
    changed.CopyFrom(onnx.shape_inference.infer_shapes(model))
    types: dict[str, int] = {}
    owners: dict[str, GraphProto] = {}
    for graph in graphs_of(changed.graph):
        types |= {v.name: v.type.tensor_type.elem_type for v in (*graph.value_info, *graph.input, *graph.output)}
        types |= {tensor.name: tensor.data_type for tensor in graph.initializer}
        owners |= {tensor.name: graph for tensor in graph.initializer}
    wide_weights: set[str] = set()
    for graph in graphs_of(changed.graph):
        nodes: list[NodeProto] = []
        for node in graph.node:
            halves = [types[name] for name in node.input if types.get(name) in _HALVES]
            if node.op_type in op_types and halves:
                nodes += _in_float32(node, halves[0], owners, wide_weights)
            else:
                nodes.append(node)
        del graph.node[:]
        graph.node.extend(nodes)
    return changed


def _in_float32(
    node: NodeProto, kind: int, owners: Mapping[str, GraphProto], wide_weights: set[str]
) -> list[NodeProto]:
    """A node between casts from and to a 16-bit type; a weight is converted once, for all nodes that share it."""
    label = node.name or node.output[0]
    before, after = [], []
    wide = NodeProto()
    wide.CopyFrom(node)
    for i, name in enumerate(node.input):
        if name in owners:
            wide.input[i] = f"{name}/float32"
            if name not in wide_weights:
                wide_weights.add(name)
                tensor = next(tensor for tensor in owners[name].initializer if tensor.name == name)
                values = numpy_helper.to_array(tensor).astype("float32")
                owners[name].initializer.append(numpy_helper.from_array(values, wide.input[i]))
        elif name:
            wide.input[i] = f"{label}/{name}/float32"
            before.append(helper.make_node("Cast", [name], [wide.input[i]], to=TensorProto.FLOAT))
    for i, name in enumerate(node.output):
        wide.output[i] = f"{label}/{name}/float32"
        after.append(helper.make_node("Cast", [wide.output[i]], [name], to=kind))
    return [*before, wide, *after]


def _network(trt: ModuleType, builder: Any) -> Any:
    """An empty network whose types are the ONNX file's; newer versions know no other kind and have no flag for it."""
    flag = getattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)
    return builder.create_network(0 if flag is None else 1 << int(flag))


def _parser_message(parser: Any, path: Path, flavour: Flavour, trt: ModuleType) -> str:
    errors = [parser.get_error(i) for i in range(parser.num_errors)]
    told = [f"node '{e.node_name()}' ({e.node_operator()}): {_reason(e.desc())}" for e in errors[:_PARSER_ERRORS]]
    more = f" and {len(errors) - _PARSER_ERRORS} more" if len(errors) > _PARSER_ERRORS else ""
    return (
        f"{NAMES[flavour]} {trt.__version__} cannot take {path}: {'; '.join(told)}{more}. "
        "Use backend=onnxruntime or backend=aot_inductor for this policy."
    )


def _reason(text: str) -> str:
    """The first two lines: what follows repeats the error for every layer behind, and misses a GPU."""
    return " ".join(line for line in text.splitlines()[:2] if "checkMacros" not in line)


def _network_borders(network: Any) -> tuple[tuple[TensorSpec, ...], tuple[TensorSpec, ...]]:
    inputs = [network.get_input(i) for i in range(network.num_inputs)]
    outputs = [network.get_output(i) for i in range(network.num_outputs)]
    first, second = (tuple(border_spec(t.name, tuple(t.shape), t.dtype) for t in each) for each in (inputs, outputs))
    return first, second


def _target(trt: ModuleType, config: Any, capabilities: Sequence[str]) -> None:
    names = [name.upper() for name in dict.fromkeys(capabilities)] or ["CURRENT"]
    config.num_compute_capabilities = len(names)
    for i, name in enumerate(names):
        if not config.set_compute_capability(getattr(trt.ComputeCapability, name), i):
            raise UserError(f"TensorRT-RTX {trt.__version__} refuses {name.lower()} as one of {', '.join(names)}.")


def _profile(builder: Any, inputs: Sequence[TensorSpec], rows: tuple[int, int, int]) -> Any:
    profile = builder.create_optimization_profile()
    for spec in inputs:
        if None in spec.shape:
            low, usual, high = (tuple(n if size is None else size for size in spec.shape) for n in rows)
            profile.set_shape(spec.name, low, usual, high)
    return profile


def _use_timings(config: Any, file: Path) -> Any:
    """Give the builder what an earlier build on this GPU measured."""
    timings = config.create_timing_cache(file.read_bytes() if file.is_file() else b"")
    if not config.set_timing_cache(timings, False):
        log.warning("%s is of another GPU or version; it is written anew.", file)
        timings = config.create_timing_cache(b"")
        config.set_timing_cache(timings, False)
    return timings


def _precisions(network: Any) -> dict[str, int]:
    layers = [network.get_layer(i) for i in range(network.num_layers)]
    counts = Counter(layer.get_output(i).dtype.name for layer in layers for i in range(layer.num_outputs))
    return dict(counts.most_common())
