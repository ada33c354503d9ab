"""Embeddings of instructions."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from robopolicy.errors import UserError, did_you_mean
from robopolicy.nets.sentences import SENTENCE_DIM, encode_texts

log = logging.getLogger(__name__)

LANGUAGE = "language"
"""Key of sentence vectors (B, 384) in batches, beside the task, where an instruction is not one of the tasks'."""


@dataclass(frozen=True)
class LanguageConfig:
    """How instructions become vectors.

    Attributes:
        encoder: ``table`` learns one vector for each task of the training data; ``sentence`` learns a linear map of
            frozen sentence vectors, so that a policy also takes instructions that are not in its data. Training it, and
            new instructions, need the extra ``language``; the instructions of the data do not.
        dim: length of the vectors that networks see.
    """

    encoder: Literal["table", "sentence"] = "table"
    dim: int = 64

    def __post_init__(self) -> None:
        if self.dim < 1:
            raise UserError(f"language.dim={self.dim} must be at least 1.")


class InstructionEncoder(nn.Module):
    """Maps task indices, or sentence vectors, to the vectors that networks see.

    Args:
        instructions: of the tasks.
        config: how.
    """

    sentences: Tensor

    def __init__(self, instructions: Sequence[str], config: LanguageConfig) -> None:
        super().__init__()
        self.known = {text: i for i, text in enumerate(instructions)}
        self._new: dict[str, tuple[int, Tensor]] = {}  # nearest task and sentence vector of texts that are no task's
        self.table = nn.Embedding(len(instructions), config.dim) if config.encoder == "table" else None
        self.linear = nn.Linear(SENTENCE_DIM, config.dim) if config.encoder == "sentence" else None
        if self.linear is not None:
            # Weights from a bundle fill it, or `encode_instructions`; a policy without either acts and learns NaN.
            self.register_buffer("sentences", torch.full((len(instructions), SENTENCE_DIM), math.nan))

    def forward(self, task: Tensor, language: Tensor | None = None) -> Tensor:
        """Encode a batch, (B, dim).

        Args:
            task: (B,) indices.
            language: sentence vectors (B, 384) to use instead of those of the tasks; only with the sentence encoder.
        """
        if self.linear is None:
            assert self.table is not None and language is None
            return self.table(task)
        vectors = self.sentences[task] if language is None else language
        return self.linear(vectors * math.sqrt(SENTENCE_DIM))  # entries of variance 1, as a linear layer expects

    def understand(self, texts: Sequence[str]) -> tuple[Tensor, Tensor | None]:
        """Find what instructions mean to this policy.

        Returns:
            The task of each text (B,) int64, the nearest one by cosine for texts that are no task's; and where there
            are such texts, the sentence vectors (B, 384) of all.

        Raises:
            UserError: a text is no task's, and the policy has a table or the extra ``language`` is not installed.
        """
        for text in texts:
            if text not in self.known and text not in self._new:
                self._new[text] = self._nearest(text)
        tasks = torch.tensor([self.known[t] if t in self.known else self._new[t][0] for t in texts])
        if all(text in self.known for text in texts):
            return tasks, None
        sentences = self.sentences.float().cpu()
        return tasks, torch.stack([sentences[self.known[t]] if t in self.known else self._new[t][1] for t in texts])

    def _nearest(self, text: str) -> tuple[int, Tensor]:
        unknown = f"The policy was not trained for '{text}'.{did_you_mean(text, self.known)}"
        if self.linear is None:
            raise UserError(unknown)
        try:
            (vector,) = encode_texts([text])
        except UserError as error:
            raise UserError(f"{unknown} It could read new instructions: {error}") from error
        cosines = self.sentences.float().cpu() @ vector
        nearest = int(cosines.argmax())
        log.info(
            "'%s' is new to the policy; the nearest instruction that it was trained for is '%s' (cosine %.2f), whose "
            "normalisation is used",
            text, list(self.known)[nearest], cosines[nearest],
        )  # fmt: skip
        return nearest, vector


def instruction_encoder(module: nn.Module) -> InstructionEncoder | None:
    """The instruction encoder inside a policy; None where it has none."""
    return next((part for part in module.modules() if isinstance(part, InstructionEncoder)), None)


def encode_instructions(module: nn.Module) -> None:
    """Compute the sentence vectors of a fresh policy's instructions; does nothing without a sentence encoder.

    A policy whose weights are loaded has them already, so that it needs no sentence model.

    Raises:
        UserError: the extra ``language`` is not installed.
    """
    encoder = instruction_encoder(module)
    if encoder is not None and encoder.linear is not None:
        encoder.sentences.copy_(encode_texts(list(encoder.known)))
