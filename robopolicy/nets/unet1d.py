"""Conditional 1-D U-Net over action chunks (Janner et al. 2022; Chi et al. 2023, with FiLM conditioning)."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from robopolicy.nets.context import Context
from robopolicy.nets.denoiser import Conditioning, Denoiser
from robopolicy.nets.prefix import split_marks
from robopolicy.nets.short_group_norm import ShortGroupNorm


class SinusoidalEmbedding(nn.Module):
    """Sine and cosine features of the noise level (Vaswani et al. 2017), (B,) -> (B, dim)."""

    frequencies: Tensor

    def __init__(self, dim: int) -> None:
        super().__init__()
        half = dim // 2
        frequencies = torch.exp(-math.log(10_000) * torch.arange(half) / (half - 1))
        self.register_buffer("frequencies", frequencies, persistent=False)

    def forward(self, t: Tensor) -> Tensor:
        phase = t.float()[:, None] * self.frequencies
        return torch.cat([phase.sin(), phase.cos()], dim=-1)


class ConvBlock(nn.Sequential):
    """Convolution, group normalisation, Mish: (B, in, T) -> (B, out, T)."""

    def __init__(self, dim_in: int, dim_out: int, kernel_size: int, n_groups: int) -> None:
        super().__init__(
            nn.Conv1d(dim_in, dim_out, kernel_size, padding=kernel_size // 2),
            ShortGroupNorm(n_groups, dim_out),
            nn.Mish(),
        )


class FilmResidualBlock(nn.Module):
    """Two convolution blocks with a scale and bias per channel in between (FiLM, Perez et al. 2018)."""

    def __init__(self, dim_in: int, dim_out: int, kernel_size: int, n_groups: int) -> None:
        super().__init__()
        self.first = ConvBlock(dim_in, dim_out, kernel_size, n_groups)
        self.second = ConvBlock(dim_out, dim_out, kernel_size, n_groups)
        self.skip = nn.Conv1d(dim_in, dim_out, 1) if dim_in != dim_out else nn.Identity()
        self.film_dim = 2 * dim_out

    def forward(self, x: Tensor, film: Tensor) -> Tensor:
        """Map x (B, in, T) with film (B, 2 * out), scale before bias, to (B, out, T)."""
        scale, bias = film.unsqueeze(-1).chunk(2, dim=1)
        return self.second(torch.addcmul(bias, self.first(x), scale)) + self.skip(x)


class BlockPair(nn.Module):
    """The two residual blocks of one level."""

    def __init__(self, first: FilmResidualBlock, second: FilmResidualBlock) -> None:
        super().__init__()
        self.first, self.second = first, second

    def forward(self, x: Tensor, first_film: Tensor, second_film: Tensor, between: Tensor | None = None) -> Tensor:
        h = self.first(x, first_film)
        return self.second(h if between is None else h + between, second_film)


class ConditionalUnet1d(Denoiser):
    """Predicts noise (or another target) for action chunks.

    Every residual block is modulated by one slice of a single vector, the sum of a part that depends on the noise level
    and a part that depends on the observation; each is one matrix product for all blocks together.

    Args:
        action_dim: A.
        cond_dim: length of the flat context.
        down_dims: channels of the levels; the chunk is halved between two levels, so its length must be divisible by
            ``2 ** (len(down_dims) - 1)``.
        kernel_size: kernel of the convolutions, odd.
        n_groups: groups of the normalisation; divides every channel number.
        step_embed_dim: length of the noise-level embedding.
        prefix: it can be shown known actions.
    """

    def __init__(
        self,
        action_dim: int,
        cond_dim: int,
        down_dims: tuple[int, ...] = (256, 512, 1024),
        kernel_size: int = 5,
        n_groups: int = 8,
        step_embed_dim: int = 256,
        prefix: bool = False,
    ) -> None:
        super().__init__()
        self.action_dim = action_dim

        def block(dim_in: int, dim_out: int) -> FilmResidualBlock:
            return FilmResidualBlock(dim_in, dim_out, kernel_size, n_groups)

        self.step_encoder = nn.Sequential(
            SinusoidalEmbedding(step_embed_dim),
            nn.Linear(step_embed_dim, 4 * step_embed_dim),
            nn.Mish(),
            nn.Linear(4 * step_embed_dim, step_embed_dim),
        )
        dims = (action_dim, *down_dims)
        levels = list(zip(dims[:-1], dims[1:], strict=True))
        self.down = nn.ModuleList(BlockPair(block(a, b), block(b, b)) for a, b in levels)
        self.downsample = nn.ModuleList(nn.Conv1d(b, b, 3, stride=2, padding=1) for _, b in levels[:-1])
        self.middle = BlockPair(block(dims[-1], dims[-1]), block(dims[-1], dims[-1]))
        self.up = nn.ModuleList(BlockPair(block(2 * b, a), block(a, a)) for a, b in reversed(levels[1:]))
        self.upsample = nn.ModuleList(nn.ConvTranspose1d(a, a, 4, stride=2, padding=1) for a, _ in reversed(levels[1:]))
        self.head = nn.Sequential(
            ConvBlock(down_dims[0], down_dims[0], kernel_size, n_groups), nn.Conv1d(down_dims[0], action_dim, 1)
        )
        self._film_dims = [m.film_dim for m in self.modules() if isinstance(m, FilmResidualBlock)]
        self.film_step = nn.Sequential(nn.Mish(), nn.Linear(step_embed_dim, sum(self._film_dims)))
        self.film_cond = nn.Sequential(nn.Mish(), nn.Linear(cond_dim, sum(self._film_dims), bias=False))
        channels, padding = action_dim + 1, kernel_size // 2
        self.known = nn.Conv1d(channels, down_dims[0], kernel_size, padding=padding, bias=False) if prefix else None

    def condition(self, context: Context) -> Conditioning:
        """The context's part (B, M) of the modulation of all blocks."""
        return (self.film_cond(context.flat()),)

    def embed(self, level: Tensor) -> Tensor:
        """The noise level's part (N, M) of the modulation of all blocks."""
        return self.film_step(self.step_encoder(level))

    def forward(self, x: Tensor, noise: Tensor, cond: Conditioning) -> Tensor:
        films = iter((cond[0] + noise).split(self._film_dims, dim=1))
        x, marks = split_marks(x, self.action_dim)
        known = None if self.known is None or marks is None else self.known(marks.transpose(1, 2))
        h = x.transpose(1, 2)
        skips = []
        for level, pair in enumerate(self.down):
            h = pair(h, next(films), next(films), known if level == 0 else None)
            skips.append(h)
            if level < len(self.downsample):
                h = self.downsample[level](h)
        h = self.middle(h, next(films), next(films))
        for pair, upsample in zip(self.up, self.upsample, strict=True):
            h = torch.cat([h, skips.pop()], dim=1)
            h = upsample(pair(h, next(films), next(films)))
        return self.head(h).transpose(1, 2)
