"""How many rows a call has, where an engine takes a range of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from robopolicy.errors import UserError
from robopolicy.inference.session import TensorSpec


def rows_of(specs: Sequence[TensorSpec], inputs: Mapping[str, np.ndarray], limits: tuple[int, int]) -> int:
    """The number of rows of those inputs whose number of rows is free; where none is, the fewest.

    Args:
        specs: of the inputs.
        inputs: by name, as `Session.run` gets them.
        limits: the fewest and most rows that the engine takes.

    Raises:
        UserError: they differ, or are outside the limits.
    """
    found = {spec.name: len(inputs[spec.name]) for spec in specs if None in spec.shape}
    rows = next(iter(found.values()), limits[0])
    if len(set(found.values())) > 1:
        raise UserError(f"The graph's inputs have different numbers of rows: {found}; wanted the same for all.")
    if not limits[0] <= rows <= limits[1]:
        raise UserError(
            f"The engine takes {limits[0]} to {limits[1]} rows, found {rows}. Export the engine for so many rows."
        )
    return rows
