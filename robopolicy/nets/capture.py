"""Whether a network is being captured as a graph, in which nothing may depend on values or on the device."""

from __future__ import annotations

import torch


def capturing() -> bool:
    """True inside `torch.export`, both of torch's ONNX exporters and `torch.jit.trace`."""
    return torch.compiler.is_exporting() or torch.onnx.is_in_onnx_export() or torch.jit.is_tracing()
