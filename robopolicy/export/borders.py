"""What goes in and out of captured graphs, and torch itself as their backend."""

from __future__ import annotations

import torch
from torch import Tensor

from robopolicy.export.torch_session import TorchSession
from robopolicy.inference.session import TensorSpec
from robopolicy.policies.base import ExportGraph

Specs = tuple[TensorSpec, ...]


def borders(graph: ExportGraph, rows: int | None) -> tuple[Specs, Specs]:
    """Inputs and outputs of a graph that takes so many rows; None: any number."""
    with torch.no_grad():
        found = graph.module(*graph.inputs)
    results = (found,) if isinstance(found, Tensor) else found

    def spec(name: str, value: Tensor) -> TensorSpec:
        first = value.shape[0] if name in graph.shared else rows
        return TensorSpec(name, (first, *value.shape[1:]), str(value.dtype).removeprefix("torch."))

    inputs = tuple(spec(name, value) for name, value in zip(graph.names, graph.inputs, strict=True))
    return inputs, tuple(spec(name, value) for name, value in zip(graph.outputs, results, strict=True))


def torch_session(graph: ExportGraph, *, device: str = "cpu", compiled: bool = False, threads: int = 1) -> TorchSession:
    """A graph's own module behind the engines' interface, for any number of rows."""
    inputs, outputs = borders(graph, None)
    return TorchSession(graph.module, inputs, outputs, device=device, compiled=compiled, threads=threads)
