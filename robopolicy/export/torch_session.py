"""A policy's own modules behind the engines' interface: eager, or compiled while the program runs."""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from robopolicy.errors import UserError
from robopolicy.inference.session import Session, TensorSpec

log = logging.getLogger(__name__)

DTYPES = {"float32": torch.float32, "uint8": torch.uint8, "int64": torch.int64}


def require_compiler() -> None:
    """Raise a `UserError` if there is no C++ compiler, which torch needs to compile."""
    compiler = os.environ.get("CXX", "g++")
    if shutil.which(compiler) is None:
        raise UserError(
            f"Compiling with torch needs a C++ compiler, and '{compiler}' is not found. Install one (apt install g++, "
            "or name yours in the environment variable CXX), or use an engine that is not compiled here."
        )


class TorchSession(Session):
    """An `nn.Module` with its weights.

    Args:
        module: takes the inputs in order, returns a tensor or a tuple of tensors.
        inputs, outputs: of the module.
        device: where it computes; the module is moved there.
        compiled: with torch.compile: in one graph where the module allows it, on a GPU replayed as CUDA graphs. The
            first calls take up to minutes; warm it up.
        threads: CPU threads; torch has one number for the whole process, which is set here.

    Raises:
        UserError: there is no such device, or no compiler.
    """

    def __init__(
        self,
        module: nn.Module,
        inputs: Sequence[TensorSpec],
        outputs: Sequence[TensorSpec],
        device: str = "cpu",
        compiled: bool = False,
        threads: int = 1,
    ) -> None:
        self.name = "torch-compile" if compiled else "torch"
        self.inputs, self.outputs = tuple(inputs), tuple(outputs)
        self._device = torch.device(device)
        if self._device.type == "cuda" and not torch.cuda.is_available():
            raise UserError(f"device={device}: torch {torch.__version__} sees no GPU here. Use device=cpu.")
        if compiled:
            require_compiler()
        torch.set_num_threads(threads)
        self._module = module.to(self._device).eval()
        self._mode = "reduce-overhead" if self._device.type == "cuda" else "default"
        self._call = torch.compile(self._module, mode=self._mode, fullgraph=True) if compiled else self._module

    def run(self, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        with torch.inference_mode():
            values = [torch.tensor(inputs[spec.name], device=self._device) for spec in self.inputs]
            results = self._compute(values)
            if self._device.type == "cuda":
                torch.cuda.synchronize(self._device)
            return {
                spec.name: value.to("cpu", DTYPES[spec.dtype], copy=True).numpy()
                for spec, value in zip(self.outputs, results, strict=True)
            }

    def _compute(self, values: Sequence[Tensor]) -> tuple[Tensor, ...]:
        try:
            results = self._call(*values)
        except torch._dynamo.exc.Unsupported as error:
            log.warning("%s is compiled in several graphs: %s", type(self._module).__name__, str(error).splitlines()[0])
            self._call = torch.compile(self._module, mode=self._mode)
            results = self._call(*values)
        return (results,) if isinstance(results, Tensor) else tuple(results)
