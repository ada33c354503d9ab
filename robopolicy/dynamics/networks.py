"""What predicts the change of the latent state from observation features, an action chunk and its noise level."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from robopolicy.nets.context import Context, ContextSize
from robopolicy.nets.transformer import (
    ActionTokens,
    ContextTokens,
    Mlp,
    SelfAttention,
    SinusoidalNoiseEmbedding,
    check_transformer,
)


@dataclass(frozen=True)
class OutcomeSize:
    """What goes in and out of an outcome network.

    Attributes:
        n_obs_steps: T observation steps.
        step: length F of the features of one step.
        horizon, action: H actions of length A.
        latent: length Z of the latent state.
    """

    n_obs_steps: int
    step: int
    horizon: int
    action: int
    latent: int


class ResidualBlock(nn.Module):
    """``x + W2 gelu(W1 norm(x))``, (B, dim) to (B, dim)."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.mlp = Mlp(dim, 2 * dim)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.mlp(self.norm(x))


class OutcomeMlp(nn.Module):
    """A residual perceptron; for states.

    Args:
        size: what goes in and out.
        dim: width.
        layers: residual blocks.
    """

    def __init__(self, size: OutcomeSize, dim: int, layers: int) -> None:
        super().__init__()
        self.from_steps = nn.Linear(size.n_obs_steps * size.step, dim)
        self.from_chunk = nn.Linear(size.horizon * size.action, dim)
        self.from_level = SinusoidalNoiseEmbedding(dim)
        self.blocks = nn.Sequential(*(ResidualBlock(dim) for _ in range(layers)))
        self.head = _head(dim, size.latent)

    def forward(self, steps: Tensor, chunk: Tensor, level: Tensor) -> Tensor:
        """Predict.

        Args:
            steps: (B, T, F) features of the observation steps.
            chunk: (B, H, A).
            level: (B,) or (1,) noise level, of the order of 0 to 1000.

        Returns:
            (B, Z).
        """
        x = self.from_steps(steps.flatten(1)) + self.from_chunk(chunk.flatten(1)) + self.from_level(level)
        return self.head(self.blocks(x))


class _Block(nn.Module):
    """Pre-norm transformer block without a mask, (B, N, dim) to (B, N, dim)."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.attention_norm, self.mlp_norm = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.attention = SelfAttention(dim, heads, causal=False)
        self.mlp = Mlp(dim, 4 * dim)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.attention_norm(x))
        return x + self.mlp(self.mlp_norm(x))


class OutcomeTransformer(nn.Module):
    """A transformer over [noise level | observation steps | actions] that predicts at the first token.

    DynaGuide has a token for each image patch, where it predicts, and one for the whole chunk; here each observation
    step is a token, and each action too.

    Args:
        size: what goes in and out.
        dim: length of a token.
        layers: number of blocks.
        heads: attention heads, divides ``dim``.

    Raises:
        UserError: impossible sizes.
    """

    def __init__(self, size: OutcomeSize, dim: int, layers: int, heads: int) -> None:
        super().__init__()
        check_transformer(dim, layers, heads)
        self.steps = ContextTokens(ContextSize(size.n_obs_steps, size.step), dim)
        self.actions = ActionTokens(size.action, size.horizon, dim)
        self.level = SinusoidalNoiseEmbedding(dim)
        self.blocks = nn.Sequential(*(_Block(dim, heads) for _ in range(layers)))
        self.head = _head(dim, size.latent)

    def forward(self, steps: Tensor, chunk: Tensor, level: Tensor) -> Tensor:
        """See `OutcomeMlp.forward`."""
        first = self.level(level)[:, None].expand(chunk.shape[0], -1, -1)
        tokens = torch.cat([first, self.steps(Context(steps)), self.actions(chunk)], dim=1)
        return self.head(self.blocks(tokens)[:, 0])


def _head(dim: int, latent: int) -> nn.Sequential:
    """Starts at zero: an unfitted network predicts that nothing changes."""
    last = nn.Linear(dim, latent)
    nn.init.zeros_(last.weight)
    nn.init.zeros_(last.bias)
    return nn.Sequential(nn.LayerNorm(dim), last)
