"""Embeddings of instructions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from torch import Tensor, nn

from robopolicy.errors import UserError


@dataclass(frozen=True)
class LanguageConfig:
    """How instructions become vectors.

    Attributes:
        encoder: ``table`` learns one vector for each task of the training data.
        dim: length of the vectors that networks see.
    """

    encoder: Literal["table"] = "table"
    dim: int = 64

    def __post_init__(self) -> None:
        if self.dim < 1:
            raise UserError(f"language.dim={self.dim} must be at least 1.")


class InstructionEncoder(nn.Module):
    """Maps task indices to vectors.

    Args:
        instructions: of the tasks.
        config: how.
    """

    def __init__(self, instructions: Sequence[str], config: LanguageConfig) -> None:
        super().__init__()
        self.table = nn.Embedding(len(instructions), config.dim)

    def forward(self, task: Tensor) -> Tensor:
        """(B,) task indices to (B, dim)."""
        return self.table(task)
