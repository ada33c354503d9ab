"""Networks of several heads at once: each head has all its weights to itself, and one batched product computes all."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Backbone = Literal["mlp", "simba"]
EXPANSION = 4
"""Width of a SimBa block's hidden layer, relative to the stream's (Lee et al. 2024)."""


class HeadLinear(nn.Module):
    """A linear layer for each head, initialised as `torch.nn.Linear`.

    Args:
        heads: H.
        dim_in: entries that go in.
        dim_out: entries that come out.
        bias: whether there is one.
        fan_in: entries that the weights' scale is made for, where another layer's result is added; 0: ``dim_in``.
    """

    def __init__(self, heads: int, dim_in: int, dim_out: int, *, bias: bool = True, fan_in: int = 0) -> None:
        super().__init__()
        bound = 1 / math.sqrt(fan_in or dim_in)
        self.weight = nn.Parameter(torch.empty(heads, dim_in, dim_out).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.empty(heads, 1, dim_out).uniform_(-bound, bound)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        """Map (H, N, dim_in), or (N, dim_in) for all heads alike, to (H, N, dim_out)."""
        if x.ndim == 2:
            x = x.expand(len(self.weight), -1, -1)
        return torch.bmm(x, self.weight) if self.bias is None else torch.baddbmm(self.bias, x, self.weight)


def _norm(width: int) -> nn.LayerNorm:
    """Without scale and shift, which the linear layer that follows can express, and which cost as much as itself."""
    return nn.LayerNorm(width, elementwise_affine=False)


class SimbaBlock(nn.Module):
    """``x + W_2 relu(W_1 norm(x))`` (Lee et al. 2024, "SimBa", eq. 4), (H, N, width) to the same."""

    def __init__(self, heads: int, width: int) -> None:
        super().__init__()
        self.norm = _norm(width)
        self.widen = HeadLinear(heads, width, EXPANSION * width)
        self.narrow = HeadLinear(heads, EXPANSION * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.narrow(F.relu(self.widen(self.norm(x))))


class HeadNet(nn.Module):
    """Heads that read a context and, unless ``chunk_dim`` is 0, a chunk.

    The first layer sums what context and chunk contribute, so that the context's part is computed once for all chunks
    of a row. Inputs are expected to be normalised; for a fixed dataset its mean and deviation, which the normalisers
    hold, are what SimBa's running statistics converge to.

    Args:
        heads: H.
        context_dim: length C of the context.
        chunk_dim: length D of a flat chunk; 0: values of states.
        out_dim: entries M of each head's output.
        backbone: ``mlp``: hidden layers with SiLU; ``simba``: residual blocks and a last layer normalisation.
        width: of the hidden layers or of the residual stream.
        depth: number of hidden layers, or of blocks.
        layer_norm: normalise before each SiLU of an ``mlp``; ``simba`` always normalises.
    """

    def __init__(
        self,
        heads: int,
        context_dim: int,
        chunk_dim: int,
        out_dim: int,
        *,
        backbone: Backbone,
        width: int,
        depth: int,
        layer_norm: bool,
    ) -> None:
        super().__init__()
        fan_in = context_dim + chunk_dim
        self.from_context = HeadLinear(heads, context_dim, width, fan_in=fan_in)
        self.from_chunk = HeadLinear(heads, chunk_dim, width, bias=False, fan_in=fan_in) if chunk_dim else None
        layers: list[nn.Module] = []
        if backbone == "simba":
            layers += [SimbaBlock(heads, width) for _ in range(depth)]
            layers.append(_norm(width))
        else:
            for i in range(depth):
                layers += [HeadLinear(heads, width, width)] if i else []
                layers += [_norm(width)] if layer_norm else []
                layers.append(nn.SiLU())
        self.body = nn.Sequential(*layers)
        self.out = HeadLinear(heads, width, out_dim)

    def forward(self, context: Tensor, chunks: Tensor | None = None) -> Tensor:
        """Map contexts (B, C) and chunks (B, K, D) to (H, B, K, M); without chunks, K is 1."""
        hidden = self.from_context(context)
        rows, count = context.shape[0], 1
        if self.from_chunk is not None:
            assert chunks is not None
            count = chunks.shape[1]
            from_chunk = self.from_chunk(chunks.reshape(rows * count, -1))
            hidden = from_chunk + (hidden if count == 1 else hidden.repeat_interleave(count, dim=1))
        return self.out(self.body(hidden)).view(hidden.shape[0], rows, count, -1)
