"""AOTInductor packages: a graph compiled ahead of time to native code for this machine."""

from __future__ import annotations

import os
import tempfile
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from robopolicy.errors import UserError
from robopolicy.export.onnx_graphs import FlatInputs
from robopolicy.export.torch_session import DTYPES, require_compiler
from robopolicy.inference.backends.aot_inductor import ENTRY, PackageDescription, native_target
from robopolicy.inference.session import TensorSpec
from robopolicy.policies.base import ExportGraph

_NAMES = {dtype: name for name, dtype in DTYPES.items()}


def build_package(graph: ExportGraph, path: Path, *, max_rows: int | None = None) -> PackageDescription:
    """Compile a graph for the device on which its example inputs lie; on a CPU for this CPU's instructions.

    Args:
        graph: its example inputs have the number of rows that the package is for.
        path: of the ``.pt2`` file; it appears when it is complete.
        max_rows: the package takes 1 to so many rows instead.

    Returns:
        What the package says about itself.

    Raises:
        UserError: no C++ compiler, or a graph that torch cannot capture or compile.
    """
    require_compiler()
    free = [name for name in graph.names if name not in graph.shared] if max_rows is not None else []
    inputs = tuple(  # the package takes the examples' strides for granted, and sessions give contiguous arrays
        (_two_rows(value) if name in free else value).contiguous()
        for name, value in zip(graph.names, graph.inputs, strict=True)
    )
    device = inputs[0].device.type
    rows = torch.export.Dim("rows", min=1, max=max_rows)
    shapes = tuple({0: rows} if name in free else None for name in graph.names)
    with torch.no_grad():
        example = graph.module(*inputs)
        results = (example,) if isinstance(example, Tensor) else tuple(example)
        description = PackageDescription(
            tuple(_spec(name, value, name in free) for name, value in zip(graph.names, inputs, strict=True)),
            tuple(_spec(name, value, bool(free)) for name, value in zip(graph.outputs, results, strict=True)),
            (1, max_rows) if max_rows is not None else (len(inputs[0]), len(inputs[0])),
            native_target(device),
        )
        settings: dict[str, Any] = {"aot_inductor.metadata": {ENTRY: description.to_json()}}
        if device == "cpu":
            settings["cpp.dynamic_threads"] = True  # else the number of threads is that of this process
        with tempfile.TemporaryDirectory(dir=path.parent) as folder, warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # torch's own, about its tree functions
            partial = Path(folder, path.name)
            try:
                module = FlatInputs(graph.module)
                program = torch.export.export(module, inputs, dynamic_shapes=(shapes,) if free else None)
                torch._inductor.aoti_compile_and_package(program, package_path=str(partial), inductor_configs=settings)
            except Exception as error:  # torch raises all kinds
                raise UserError(
                    f"AOTInductor cannot compile {path.stem}: {str(error).strip().splitlines()[0]}. Use "
                    "backend=onnxruntime or backend=openvino for this policy."
                ) from error
            os.replace(partial, path)
    return description


def _two_rows(value: Tensor) -> Tensor:
    """torch takes a dimension of 1 for a constant."""
    return value if len(value) > 1 else value.repeat(2, *[1] * (value.ndim - 1))


def _spec(name: str, value: Tensor, free: bool) -> TensorSpec:
    if value.dtype not in _NAMES:
        raise UserError(f"'{name}' is {value.dtype}; only {', '.join(DTYPES)} cross a graph's border.")
    return TensorSpec(name, (None if free else len(value), *value.shape[1:]), _NAMES[value.dtype])
