"""An engine in the place of its policy: the same seeds give the same noise, so that episodes can be compared."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch

from robopolicy.inference.policy import ExportedPolicy
from robopolicy.spec import PolicySpec


def noise_of(policy: ExportedPolicy, generators: Sequence[torch.Generator]) -> np.ndarray:
    """(B, N, H, A): what `Policy.sample` would draw from one generator for each row, in its order."""
    tensors, *chunk = policy.noise_shape
    drawn = tensors - (policy.candidates is not None)
    noise = np.zeros((len(generators), *policy.noise_shape), np.float32)
    for row, generator in zip(noise, generators, strict=True):
        for i in range(drawn):
            row[i] = torch.randn(chunk, generator=generator).numpy()
        if policy.candidates is not None:  # the choice among them
            row[-1, 0, 0] = torch.randn(1, generator=generator).item()
    return noise


class EnginePolicy:
    """Acts as `Policy.act` does, with an engine.

    Attributes:
        engine: the engine.
    """

    def __init__(self, engine: ExportedPolicy) -> None:
        self.engine = engine

    @property
    def spec(self) -> PolicySpec:
        return self.engine.spec

    @property
    def instruction(self) -> str | None:
        """What the policy does where observations bring no instruction."""
        return self.engine.instruction

    @instruction.setter
    def instruction(self, text: str | None) -> None:
        self.engine.instruction = text

    def check_instruction(self, instruction: str | None) -> None:
        """See `ExportedPolicy.check_instruction`."""
        self.engine.check_instruction(instruction)

    def act(self, observations: Mapping[str, np.ndarray], generators: Sequence[torch.Generator]) -> np.ndarray:
        """See `Policy.act`."""
        return self.engine.act(observations, noise_of(self.engine, generators))
