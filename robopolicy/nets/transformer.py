"""Transformers over action chunks: tokens, attention, blocks, and the GPT that BESO and MoDE share.

One token sequence for all: noise level, goal, instruction, observation steps, actions; what a policy does not have is
left out. Context first, so that under a causal mask every action sees all of it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from robopolicy.errors import UserError
from robopolicy.nets.context import Context, ContextSize
from robopolicy.nets.denoiser import Conditioning, Denoiser
from robopolicy.nets.prefix import split_marks
from robopolicy.nets.unet1d import SinusoidalEmbedding

INIT_STD = 0.02
"""Standard deviation of fresh weights and positions (GPT-2)."""


class SinusoidalNoiseEmbedding(nn.Sequential):
    """Noise levels (N,) of any process to (N, dim): sinusoids and a two-layer perceptron (Peebles & Xie 2023)."""

    def __init__(self, dim: int) -> None:
        super().__init__(SinusoidalEmbedding(dim), nn.Linear(dim, dim), nn.SiLU(), nn.Linear(dim, dim))


class LinearNoiseEmbedding(nn.Module):
    """Noise levels (N,) to (N, dim) by an affine map; for EDM, whose level / 1000 is ``ln(sigma) / 4`` (BESO)."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.linear = nn.Linear(1, dim)

    def forward(self, level: Tensor) -> Tensor:
        return self.linear(level.float()[:, None] / 1000)


class ContextTokens(nn.Module):
    """A context as tokens with learned positions: goal, instruction, then one token for each observation step.

    Args:
        size: lengths of the context's vectors.
        dim: length of a token.
    """

    def __init__(self, size: ContextSize, dim: int) -> None:
        super().__init__()
        self.goal = nn.Linear(size.goal, dim, bias=False) if size.goal else None
        self.task = nn.Linear(size.task, dim, bias=False) if size.task else None
        self.step = nn.Linear(size.step, dim, bias=False)
        self.count = size.n_obs_steps + (size.goal > 0) + (size.task > 0)
        self.positions = nn.Parameter(INIT_STD * torch.randn(self.count, dim))

    def forward(self, context: Context) -> Tensor:
        """(B, count, dim)."""
        tokens = self.step(context.steps)
        if self.task is not None:
            tokens = torch.cat([self.task(context.task)[:, None], tokens], dim=1)
        if self.goal is not None:
            tokens = torch.cat([self.goal(context.goal)[:, None], tokens], dim=1)
        return tokens + self.positions


class ActionTokens(nn.Module):
    """A chunk as tokens with learned positions, one for each action.

    Args:
        action_dim: A.
        horizon: actions in a chunk, H.
        dim: length of a token.
        prefix: it can be shown known actions.
    """

    def __init__(self, action_dim: int, horizon: int, dim: int, prefix: bool = False) -> None:
        super().__init__()
        self.action_dim = action_dim
        self.action = nn.Linear(action_dim, dim, bias=False)
        self.positions = nn.Parameter(INIT_STD * torch.randn(horizon, dim))
        self.known = nn.Linear(action_dim + 1, dim, bias=False) if prefix else None

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, A), or (B, H, 2 A + 1) with marks, to (B, H, dim)."""
        x, marks = split_marks(x, self.action_dim)
        tokens = self.action(x) + self.positions
        return tokens if self.known is None or marks is None else tokens + self.known(marks)


class SelfAttention(nn.Module):
    """Multi-head self-attention (Vaswani et al. 2017).

    Args:
        dim: length of a token.
        heads: divides ``dim``.
        causal: tokens see themselves and earlier ones only.
    """

    def __init__(self, dim: int, heads: int, causal: bool) -> None:
        super().__init__()
        self.heads, self.causal = heads, causal
        self.qkv = nn.Linear(dim, 3 * dim)
        self.out = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, dim) to (B, N, dim)."""
        # chunks of the last dimension: their gradients are joined faster than those of a leading one
        q, k, v = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in self.qkv(x).chunk(3, dim=-1))
        mixed = scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        return self.out(mixed.transpose(1, 2).flatten(2))


class Mlp(nn.Module):
    """The dense feed-forward part of a block: (B, N, dim) to (B, N, dim); does not use the noise."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.up = nn.Linear(dim, hidden)
        self.activation = nn.GELU()  # the tanh approximation is slower on CPUs
        self.down = nn.Linear(hidden, dim)

    def forward(self, x: Tensor, noise: Any = None) -> Tensor:
        return self.down(self.activation(self.up(x)))


class GptBlock(nn.Module):
    """Causal pre-norm transformer block, whose feed-forward part is given.

    Args:
        dim: length of a token.
        heads: of the attention.
        feed_forward: called with tokens (B, N, dim) and what `GptDenoiser.denoise` is given for this block.
        noise_conditioned: the noise embedding is added to every token before attention (MoDE, Reuss et al. 2025).
    """

    def __init__(self, dim: int, heads: int, feed_forward: nn.Module, *, noise_conditioned: bool = False) -> None:
        super().__init__()
        self.noise_conditioned = noise_conditioned
        self.attention_norm = nn.LayerNorm(dim)
        self.attention = SelfAttention(dim, heads, causal=True)
        self.feed_forward_norm = nn.LayerNorm(dim)
        self.feed_forward = feed_forward

    def forward(self, x: Tensor, noise: Tensor, told: Any, kept: Tensor | None = None) -> Tensor:
        """Map tokens.

        Args:
            x: (B, N, dim).
            noise: (B, dim), or (1, dim) for all rows.
            told: second argument of the feed-forward part.
            kept: (B, 2, dim) dropout factors of the two residual branches, see `draw_dropout`; None: no dropout.
        """
        h = self.attention_norm(x)
        branch = self.attention(h + noise[:, None] if self.noise_conditioned else h)
        x = x + branch if kept is None else torch.addcmul(x, branch, kept[:, :1])
        # the stream itself is the residual; MoDE's release adds to the normalised one and so forgets it in each block
        branch = self.feed_forward(self.feed_forward_norm(x), told)
        return x + branch if kept is None else torch.addcmul(x, branch, kept[:, 1:])


class GptDenoiser(Denoiser):
    """A causal GPT over [noise | goal | instruction | observations | actions] that predicts at the actions.

    Args:
        action_dim: A.
        horizon: H.
        size: lengths of the context's vectors.
        dim: length of a token.
        layers: number of blocks.
        heads: attention heads, divides ``dim``.
        feed_forward: makes the feed-forward part of a block; see `GptBlock`.
        noise_embedding: maps levels (N,) to (N, dim).
        noise_conditioned: see `GptBlock`.
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
        feed_forward: Callable[[], nn.Module],
        noise_embedding: nn.Module,
        noise_conditioned: bool = False,
        prefix: bool = False,
    ) -> None:
        super().__init__()
        check_transformer(dim, layers, heads)
        self.dim, self.layers, self.horizon = dim, layers, horizon
        self.context_tokens = ContextTokens(size, dim)
        self.action_tokens = ActionTokens(action_dim, horizon, dim, prefix)
        self.blocks = nn.ModuleList(
            GptBlock(dim, heads, feed_forward(), noise_conditioned=noise_conditioned) for _ in range(layers)
        )
        self.head = nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, action_dim))
        self.apply(init_gpt)
        self.noise_embedding = noise_embedding  # after the others' init: so small a start would hide the level

    def condition(self, context: Context) -> Conditioning:
        """The context's tokens (B, count, dim)."""
        return (self.context_tokens(context),)

    def embed(self, level: Tensor) -> Tensor:
        """(N,) levels to (N, dim)."""
        return self.noise_embedding(level)

    def forward(self, x: Tensor, noise: Tensor, cond: Conditioning) -> Tensor:
        return self.denoise(x, noise, [noise] * self.layers, cond)

    def denoise(self, x: Tensor, noise: Tensor, told: Sequence[Any], cond: Conditioning) -> Tensor:
        """Predict the target.

        Args:
            x: see `Denoiser.forward`.
            noise: noise embedding (B, dim), or (1, dim) for all rows.
            told: for each block, what its feed-forward part is told besides the tokens.
            cond: from `condition`; in training possibly followed by the factors of `draw_dropout`.

        Returns:
            (B, H, A).
        """
        tokens, *kept = cond
        h = torch.cat([noise[:, None].expand(x.shape[0], -1, -1), tokens, self.action_tokens(x)], dim=1)
        for i, block in enumerate(self.blocks):
            h = block(h, noise, told[i], kept[0][:, i] if kept else None)
        return self.head(h[:, -self.horizon :])


def draw_dropout(rows: int, layers: int, dim: int, rate: float, generator: torch.Generator) -> Tensor:
    """Draw the factors (rows, layers, 2, dim), 0 or 1 / (1 - rate), of a `GptDenoiser`'s residual branches.

    All tokens of a row share their factors (variational dropout, Gal & Ghahramani 2016): so few that they can be drawn
    with the batch, and a loss stays a function of batch and draws.
    """
    kept = torch.empty(rows, layers, 2, dim)
    return kept.bernoulli_(1 - rate, generator=generator).div_(1 - rate)


def init_gpt(module: nn.Module) -> None:
    """GPT-2's initialisation of linear maps."""
    if isinstance(module, nn.Linear):
        nn.init.normal_(module.weight, std=INIT_STD)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def check_transformer(dim: int, layers: int, heads: int) -> None:
    """Raise a `UserError` if no transformer can be built so."""
    if layers < 1:
        raise UserError(f"layers={layers} must be at least 1.")
    if dim < 4 or dim % 2:
        raise UserError(f"dim={dim} must be even and at least 4.")
    if heads < 1 or dim % heads:
        raise UserError(f"heads={heads} must divide dim={dim}.")
