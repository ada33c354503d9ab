"""Graphs of a policy as ONNX files, with either of torch's exporters."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnx
import onnx_ir
import torch
from onnx import helper, numpy_helper
from onnx_ir.passes import common as passes
from torch import Tensor, nn

from robopolicy.errors import UserError
from robopolicy.policies.base import ExportGraph

Exporter = Literal["dynamo", "torchscript"]
"""``dynamo``: torch.export's graph, the maintained way. ``torchscript``: the older tracer; faster, larger graphs."""
OPSET = {"dynamo": 18, "torchscript": 17}
_FEW = 1024  # numbers; smaller tensors are biases and constants of the solver
_ROWS = 2  # exporters take a dimension of 1 for a constant


def export_onnx(graph: ExportGraph, path: Path, *, exporter: Exporter = "dynamo", free_rows: bool = False) -> None:
    """Write one graph.

    Args:
        graph: its example inputs have the number of rows that the file is for.
        path: of the file.
        exporter: which of torch's exporters.
        free_rows: the file takes any number of rows.

    Raises:
        UserError: the exporter failed; its message follows.
    """
    examples = zip(graph.names, graph.inputs, strict=True)
    inputs = tuple(_rows(value, name in graph.shared, free_rows) for name, value in examples)
    names: dict[str, Any] = {"input_names": list(graph.names), "output_names": list(graph.outputs)}
    free = [name for name in graph.names if name not in graph.shared] if free_rows else []
    try:
        with _quiet(), torch.no_grad():
            if exporter == "torchscript":
                axes = {name: {0: "rows"} for name in (*free, *(graph.outputs if free_rows else ()))}
                torch.onnx.export(
                    graph.module,
                    inputs,
                    str(path),
                    dynamo=False,
                    opset_version=OPSET[exporter],
                    dynamic_axes=axes,
                    **names,
                )
            else:
                rows = torch.export.Dim("rows", min=1)
                shapes = tuple({0: rows} if name in free else None for name in graph.names)
                program = torch.onnx.export(
                    FlatInputs(graph.module), inputs, dynamo=True, opset_version=OPSET[exporter],
                    dynamic_shapes=(shapes,) if free_rows else None, **names,
                )  # fmt: skip
                assert program is not None
                program.save(str(path), external_data=False)
    except Exception as error:  # exporters raise all kinds
        raise UserError(
            f"The {exporter} exporter cannot write {path.name}: {str(error).strip().splitlines()[0]}. Try exporter="
            f"{'torchscript' if exporter == 'dynamo' else 'dynamo'}."
        ) from error
    with _quiet():
        _tidy(path)
    onnx.checker.check_model(str(path))


def _tidy(path: Path) -> None:
    """Keep one copy of equal weights (unrolled steps fold their transposes), and no traces of our own source code."""
    model = onnx_ir.load(path)
    passes.DeduplicateHashedInitializersPass(size_limit=1 << 34)(model)
    passes.ClearMetadataAndDocStringPass()(model)
    onnx_ir.save(model, path)


def halve_weights(path: Path) -> None:
    """Store the weights of a float32 graph in half precision; they become float32 again when it is loaded.

    For OpenVINO on a CPU, which computes in float32 anyway: 2026.4 crashes on some graphs that are float16 inside.
    """
    model = onnx.load(path)
    casts = []
    for weight in model.graph.initializer:
        if weight.data_type != onnx.TensorProto.FLOAT or np.prod(weight.dims) < _FEW:
            continue
        values = numpy_helper.to_array(weight)
        if np.abs(values).max() > np.finfo(np.float16).max:
            continue
        name = weight.name
        weight.CopyFrom(numpy_helper.from_array(values.astype(np.float16), f"{name}/half"))
        casts.append(helper.make_node("Cast", [f"{name}/half"], [name], to=onnx.TensorProto.FLOAT))
    nodes = list(model.graph.node)
    del model.graph.node[:]
    model.graph.node.extend([*casts, *nodes])
    onnx.checker.check_model(model)
    onnx.save(model, str(path))


class FlatInputs(nn.Module):
    """All inputs as one variadic argument, so that shapes are named the same way for every graph."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, *inputs: Tensor) -> Any:
        return self.module(*inputs)


def _rows(value: Tensor, shared: bool, free_rows: bool) -> Tensor:
    """Example inputs with more than one row where the number of rows is free."""
    return value if shared or not free_rows or len(value) >= _ROWS else value.repeat(_ROWS, *[1] * (value.ndim - 1))


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """The exporters print and warn about their own deprecations."""
    noisy = ("torch.onnx", "onnxscript", "onnx_ir", "torch.export", "torch.fx.experimental")
    loggers = [logging.getLogger(name) for name in noisy]
    before = [logger.level for logger in loggers]
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)  # fused attention has no ONNX form
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
        for logger, level in zip(loggers, before, strict=True):
            logger.setLevel(level)
