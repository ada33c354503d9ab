"""A sampler as an ONNX ``Loop``: one copy of the network, whatever the number of steps.

TensorRT builds it several times faster than the unrolled graph, and the plan is smaller; an unrolled graph is the safe
choice where an engine is captured as a CUDA graph.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx
import torch
from onnx import GraphProto, NodeProto, TensorProto, ValueInfoProto, helper, numpy_helper

from robopolicy.export.onnx_graphs import OPSET, Exporter, export_onnx
from robopolicy.policies.base import ExportGraph
from robopolicy.policies.denoising import DenoisingPolicy
from robopolicy.policies.graphs import LoopedStep

_STATE = ("x", "previous_x", "previous_clean")


def export_loop(
    policy: DenoisingPolicy,
    sampler: ExportGraph,
    path: Path,
    *,
    dtype: torch.dtype = torch.float32,
    exporter: Exporter = "dynamo",
    free_rows: bool = False,
) -> None:
    """Write a policy's sampler with the inputs and outputs of the unrolled one.

    Args:
        policy: in evaluation mode.
        sampler: the unrolled graph; its names and example inputs are used, not its module.
        path: of the file.
        dtype: in which the denoiser computes.
        exporter, free_rows: see `export_onnx`.
    """
    step = LoopedStep(policy, dtype)
    noise, previous, mask, *found = sampler.inputs
    names = sampler.names[3:]
    table = step.table
    graph = ExportGraph(  # four tensors of their own: the exporter would take one tensor for one input
        step,
        (*(previous.clone() for _ in range(4)), table.rows[0], step.levels[:1], previous, mask, *found),
        (*_STATE, "z", "row", "level", "previous", "mask", *names),
        ("next_x", "clean"),
        shared=("row", "level"),
    )
    with tempfile.TemporaryDirectory() as folder:
        part = Path(folder) / "step.onnx"
        export_onnx(graph, part, exporter=exporter, free_rows=free_rows)
        model = onnx.load(part)
    weights = list(model.graph.initializer)
    body = _body(model.graph, [w.name for w in weights], [i.name for i in model.graph.input], sampler.names)
    for weight in weights:
        weight.name = f"step/{weight.name}"
    tables = {
        "rows": table.rows.numpy(),
        "levels": step.levels.cpu().numpy(),
        "draws": np.array(table.draws, np.int64),
        "start": np.float32(table.start),
        "first": np.int64(0),
        "calls": np.int64(len(table)),
        "go_on": np.bool_(True),
    }
    nodes = [
        helper.make_node("Gather", ["noise", "first"], ["first_noise"], axis=1),
        helper.make_node("Mul", ["first_noise", "start"], ["start_x"]),
        helper.make_node("Loop", ["calls", "go_on", *["start_x"] * 3], ["last_x", "_x", "_clean"], body=body),
    ]
    outside, constants = _physical(policy, step)
    rows = "rows_of_batch" if free_rows else len(previous)
    examples = zip(sampler.names, sampler.inputs, strict=True)
    inputs = [_value(name, value, rows) for name, value in examples]
    whole = helper.make_graph(
        [*nodes, *outside],
        "sampler",
        inputs,
        [_value("chunk", previous, rows)],
        [*weights, *(numpy_helper.from_array(np.asarray(v), k) for k, v in (tables | constants).items())],
    )
    loop = helper.make_model(
        whole, opset_imports=[helper.make_opsetid("", OPSET[exporter])], ir_version=model.ir_version
    )
    onnx.checker.check_model(loop)
    onnx.save(loop, str(path))


def _body(step: GraphProto, weights: Sequence[str], found: Sequence[str], outer: Sequence[str]) -> GraphProto:
    """The loop's body around the nodes of one step; weights, conditioning and tables are seen from outside."""
    inside = {name: f"step/{name}" for name in weights}
    known = {name: name for name in (*outer, "")}

    def renamed(name: str) -> str:
        return known.get(name) or inside.get(name) or (name and f"step/{name}")

    gathers = [
        helper.make_node("Unsqueeze", ["iteration", "first_axis"], ["iteration_1"]),
        helper.make_node("Gather", ["rows", "iteration"], ["step/row"], axis=0),
        helper.make_node("Gather", ["levels", "iteration_1"], ["step/level"], axis=0),
        helper.make_node("Gather", ["draws", "iteration"], ["draw"], axis=0),
        helper.make_node("Gather", ["noise", "draw"], ["step/z"], axis=1),
    ]
    nodes: list[NodeProto] = []
    for node in step.node:
        copy = NodeProto()
        copy.CopyFrom(node)
        copy.name = f"step/{node.name}"
        copy.input[:] = [renamed(name) for name in node.input]
        copy.output[:] = [renamed(name) for name in node.output]
        nodes.append(copy)
    outputs = [
        helper.make_node("Identity", ["go_on_before"], ["go_on_after"]),
        helper.make_node("Identity", ["step/x"], ["x_before"]),
    ]
    first = next(v for v in step.output)
    state = [helper.make_tensor_value_info(f"step/{name}", TensorProto.FLOAT, None) for name in _STATE]
    after = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, None)
        for name in (f"step/{first.name}", "x_before", "step/clean")
    ]
    axis = numpy_helper.from_array(np.array([0], np.int64), "first_axis")
    assert set(_STATE) <= set(found)
    return helper.make_graph(
        [*gathers, *nodes, *outputs],
        "one_step",
        [
            helper.make_tensor_value_info("iteration", TensorProto.INT64, []),
            helper.make_tensor_value_info("go_on_before", TensorProto.BOOL, []),
            *state,
        ],
        [helper.make_tensor_value_info("go_on_after", TensorProto.BOOL, []), *after],
        [axis],
    )


def _physical(policy: DenoisingPolicy, step: LoopedStep) -> tuple[list[NodeProto], dict[str, np.ndarray]]:
    """Nodes from the loop's last x to the chunk in physical units, and their constants."""
    prefix = step.step.prefix_steps > 0
    ends = [
        helper.make_node("Sub", ["last_x", "offset"], ["shifted"]),
        helper.make_node("Div", ["shifted", "scale"], ["sampled" if prefix else "chunk"]),
    ]
    constants: dict[str, np.ndarray] = {}
    if prefix:  # what is committed comes back as it is
        ends += [
            helper.make_node("Unsqueeze", ["mask", "last_axis"], ["mask_of_entries"]),
            helper.make_node("Equal", ["mask_of_entries", "one"], ["committed"]),
            helper.make_node("Where", ["committed", "previous", "sampled"], ["chunk"]),
        ]
        constants |= {"last_axis": np.array([-1]), "one": np.array(1, np.float32)}
    if policy.spec.domains == 1:
        maps = step.action_map
        return ends, constants | {name: getattr(maps, name).cpu().numpy() for name in ("scale", "offset")}
    picks = [helper.make_node("Gather", ["action_map", f"{name}_at"], [name], axis=1) for name in ("scale", "offset")]
    return [*picks, *ends], constants | {"scale_at": np.array([0]), "offset_at": np.array([1])}


def _value(name: str, example: torch.Tensor, rows: int | str) -> ValueInfoProto:
    kind = TensorProto.INT64 if example.dtype == torch.int64 else TensorProto.FLOAT
    return helper.make_tensor_value_info(name, kind, [rows, *example.shape[1:]])
