"""Diffusion transformer over action chunks: DiT with adaLN-Zero (Peebles & Xie 2023).

As in the image DiT, where noise level and class modulate the blocks together, here noise level and context do (Dasari
et al. 2024); the context is also there as tokens. Both are added after their last layers, so that the noise level's
part is computed once per schedule and the context's once per chunk.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import layer_norm

from robopolicy.nets.context import Context, ContextSize
from robopolicy.nets.denoiser import Conditioning, Denoiser
from robopolicy.nets.transformer import (
    ActionTokens,
    ContextTokens,
    Mlp,
    SelfAttention,
    SinusoidalNoiseEmbedding,
    check_transformer,
)

MODULATIONS = 6
"""Vectors of a block: shift, scale and gate, for attention and for the perceptron."""


class DitBlock(nn.Module):
    """Transformer block with bidirectional attention, modulated by noise level and context.

    Args:
        dim: length of a token.
        heads: of the attention.
        hidden: of the perceptron.
    """

    def __init__(self, dim: int, heads: int, hidden: int) -> None:
        super().__init__()
        self.attention = SelfAttention(dim, heads, causal=False)
        self.mlp = Mlp(dim, hidden)

    def forward(self, x: Tensor, modulation: tuple[Tensor, ...]) -> Tensor:
        """Map tokens (B, N, dim) with `MODULATIONS` vectors (B, 1, dim)."""
        shift, scale, gate, mlp_shift, mlp_scale, mlp_gate = modulation
        x = torch.addcmul(x, gate, self.attention(modulated(x, shift, scale)))
        return torch.addcmul(x, mlp_gate, self.mlp(modulated(x, mlp_shift, mlp_scale)))


class DiffusionTransformer(Denoiser):
    """Predicts the target for action chunks; tokens are [noise | goal | instruction | observations | actions].

    Noise level and context also modulate the blocks, each through one matrix product for all blocks together. Gates
    and output start at zero: a fresh network predicts zero.

    Args:
        action_dim: A.
        horizon: H.
        size: lengths of the context's vectors.
        dim: length of a token.
        layers: number of blocks.
        heads: attention heads, divides ``dim``.
        hidden: hidden units of the perceptrons.
        prefix: it can be shown known actions.

    Raises:
        UserError: impossible sizes.
    """

    def __init__(
        self,
        action_dim: int,
        horizon: int,
        size: ContextSize,
        *,
        dim: int,
        layers: int,
        heads: int,
        hidden: int,
        prefix: bool = False,
    ) -> None:
        super().__init__()
        check_transformer(dim, layers, heads)
        self.dim, self.horizon = dim, horizon
        self.context_tokens = ContextTokens(size, dim)
        self.action_tokens = ActionTokens(action_dim, horizon, dim, prefix)
        self.blocks = nn.ModuleList(DitBlock(dim, heads, hidden) for _ in range(layers))
        self.head = nn.Linear(dim, action_dim)
        self.apply(_init)
        self.noise_embedding = SinusoidalNoiseEmbedding(dim)
        modulations = (MODULATIONS * layers + 2) * dim
        noise_out, context_out = nn.Linear(dim, modulations), nn.Linear(dim, modulations, bias=False)
        self.noise_modulation = nn.Sequential(nn.SiLU(), noise_out)
        self.context_modulation = nn.Sequential(nn.Linear(size.flat, dim), nn.SiLU(), context_out)
        for parameter in (*noise_out.parameters(), *context_out.parameters(), *self.head.parameters()):
            nn.init.zeros_(parameter)

    def condition(self, context: Context) -> Conditioning:
        """The context's tokens (B, count, dim) and its part (B, `MODULATIONS` * layers + 2, dim) of the modulations."""
        modulation = self.context_modulation(context.flat()).unflatten(1, (-1, self.dim))
        return self.context_tokens(context), modulation

    def embed(self, level: Tensor) -> Tensor:
        """The noise token and the level's part of the modulations, (N, 1 + `MODULATIONS` * layers + 2, dim)."""
        token = self.noise_embedding(level)
        return torch.cat([token, self.noise_modulation(token)], dim=1).unflatten(1, (-1, self.dim))

    def forward(self, x: Tensor, noise: Tensor, cond: Conditioning) -> Tensor:
        tokens, modulation = cond
        h = torch.cat([noise[:, :1].expand(x.shape[0], -1, -1), tokens, self.action_tokens(x)], dim=1)
        modulations = (noise[:, 1:] + modulation).split(1, dim=1)
        for i, block in enumerate(self.blocks):
            h = block(h, modulations[MODULATIONS * i : MODULATIONS * (i + 1)])
        return self.head(modulated(h[:, -self.horizon :], *modulations[-2:]))


def modulated(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """adaLN: normalise tokens (B, N, dim), then scale by 1 + scale and shift, each (B, 1, dim)."""
    return torch.addcmul(shift, layer_norm(x, (int(x.shape[-1]),), eps=1e-6), 1 + scale)


def _init(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
