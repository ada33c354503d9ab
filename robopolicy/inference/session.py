"""One graph, loaded and ready to run: what every inference backend offers."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import Self

import numpy as np

from robopolicy.errors import UserError

DTYPES = ("float32", "uint8", "int64")
"""Types of tensors that cross a session's border; lower precisions stay inside."""


@dataclass(frozen=True)
class TensorSpec:
    """An input or output of a graph.

    Attributes:
        name: as in the graph.
        shape: rows first; None where any number of rows is taken.
        dtype: one of `DTYPES`.
    """

    name: str
    shape: tuple[int | None, ...]
    dtype: str = "float32"

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise UserError(f"{self.name}: type '{self.dtype}' cannot cross a graph's border; use {', '.join(DTYPES)}.")
        if None in self.shape[1:]:
            raise UserError(f"{self.name}: shape {self.shape}; only the rows may be free. Export the policy again.")

    def blank(self, rows: int = 1) -> np.ndarray:
        """Zeros of this shape, with so many rows where the number is free."""
        return np.zeros([rows if n is None else n for n in self.shape], self.dtype)


class Session(ABC):
    """A graph on a device. Not thread-safe: one call at a time.

    Attributes:
        name: of the backend.
        inputs, outputs: static descriptions, in the graph's order.
        max_rows: of a call, where their number is free; None: any number.
    """

    name: str
    max_rows: int | None = None
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]

    @abstractmethod
    def run(self, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Compute all outputs from checked, C-contiguous inputs; the arrays returned belong to the caller."""

    def close(self) -> None:  # noqa: B027 - most backends have nothing to release
        """Release the device's memory; the session cannot be used afterwards."""

    def __call__(self, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Run the graph.

        Args:
            inputs: by name; other entries are ignored.

        Returns:
            Outputs by name.

        Raises:
            UserError: an input is missing, or has another shape or type than `inputs` says.
        """
        return self.run({spec.name: _checked(spec, inputs) for spec in self.inputs})

    def warmup(self, runs: int = 3, rows: int = 1) -> None:
        """Run on zeros, so that what a backend does once (allocation, tuning, capture) is done."""
        blank = {spec.name: spec.blank(rows) for spec in self.inputs}
        for _ in range(runs):
            self.run(blank)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


def _checked(spec: TensorSpec, inputs: Mapping[str, np.ndarray]) -> np.ndarray:
    if spec.name not in inputs:
        raise UserError(f"The graph's input '{spec.name}' is missing; found {sorted(inputs)}.")
    value = np.ascontiguousarray(inputs[spec.name])
    fits = len(value.shape) == len(spec.shape) and all(
        want in (None, have) for want, have in zip(spec.shape, value.shape, strict=True)
    )
    if not fits or value.dtype != spec.dtype:
        wanted = ", ".join("rows" if n is None else str(n) for n in spec.shape)
        raise UserError(
            f"The graph's input '{spec.name}': found {value.dtype} {value.shape}, wanted {spec.dtype} ({wanted})."
        )
    return value
