"""Factors of variation."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import mujoco
import numpy as np


class Variations:
    """Fixed levels and random draws of factors."""

    def __init__(self, fixed: Mapping[str, Any], random: Mapping[str, Any]) -> None: ...

    def edit(self, spec: mujoco.MjSpec) -> None: ...

    def bind(self, env: Any) -> None: ...

    def apply(self, env: Any, rng: np.random.Generator) -> dict[str, Any]:
        return {}
