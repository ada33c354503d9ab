"""Multi-layer perceptrons for states and short action chunks."""

from __future__ import annotations

from itertools import pairwise

from torch import Tensor, nn

from robopolicy.nets.context import Context
from robopolicy.nets.denoiser import Conditioning, Denoiser
from robopolicy.nets.prefix import split_marks
from robopolicy.nets.unet1d import SinusoidalEmbedding


def mlp(*dims: int) -> nn.Sequential:
    """Linear layers of these widths, Mish between them, (B, dims[0]) -> (B, dims[-1])."""
    layers: list[nn.Module] = []
    for dim_in, dim_out in pairwise(dims):
        layers += [nn.Linear(dim_in, dim_out), nn.Mish()]
    return nn.Sequential(*layers[:-1])


class ChunkMlp(Denoiser):
    """Predicts a target for noised action chunks with a perceptron over chunk, noise level and context.

    The first layer sums what chunk, level and context contribute, so that the latter two are computed once. The context
    goes through a perceptron of its own: without, noise drowns it, and a consistency model takes several times as many
    updates to find out what the action depends on.

    Args:
        chunk: length H and entries A of a chunk.
        cond_dim: length of the flat context.
        hidden_dims: widths of the hidden layers, at least one.
        step_embed_dim: length of the noise level's embedding.
        prefix: it can be shown known actions.
    """

    def __init__(
        self,
        chunk: tuple[int, int],
        cond_dim: int,
        hidden_dims: tuple[int, ...],
        step_embed_dim: int,
        prefix: bool = False,
    ) -> None:
        super().__init__()
        self.action_dim = chunk[1]
        size = chunk[0] * chunk[1]
        self.from_chunk = nn.Linear(size, hidden_dims[0])
        self.from_context = mlp(cond_dim, *[hidden_dims[0]] * 3)
        self.from_level = nn.Sequential(
            SinusoidalEmbedding(step_embed_dim),
            mlp(step_embed_dim, 2 * step_embed_dim, step_embed_dim),
            nn.Linear(step_embed_dim, hidden_dims[0], bias=False),
        )
        self.rest = nn.Sequential(nn.Mish(), mlp(*hidden_dims, size))
        self.known = nn.Linear(chunk[0] * (chunk[1] + 1), hidden_dims[0], bias=False) if prefix else None

    def condition(self, context: Context) -> Conditioning:
        """The context's part (B, hidden) of the first layer."""
        return (self.from_context(context.flat()),)

    def embed(self, level: Tensor) -> Tensor:
        """The noise level's part (N, hidden) of the first layer."""
        return self.from_level(level)

    def forward(self, x: Tensor, noise: Tensor, cond: Conditioning) -> Tensor:
        x, marks = split_marks(x, self.action_dim)
        hidden = self.from_chunk(x.flatten(1)) + noise + cond[0]
        if self.known is not None and marks is not None:
            hidden = hidden + self.known(marks.flatten(1))
        return self.rest(hidden).view_as(x)


class ChunkResNet(Denoiser):
    """Predicts a target for noised action chunks with residual blocks (IDQL's network, Hansen-Estruch et al. 2023).

    Chunk, noise level and context are summed in the first layer, so that the latter two are computed once; each block
    normalises, widens and adds.

    Args:
        chunk: length H and entries A of a chunk.
        cond_dim: length of the flat context.
        width: of the residual stream.
        blocks: how many.
        expansion: width of a block's hidden layer, in widths.
        step_embed_dim: length of the noise level's embedding.
        prefix: it can be shown known actions.
    """

    def __init__(
        self,
        chunk: tuple[int, int],
        cond_dim: int,
        width: int,
        blocks: int,
        expansion: int,
        step_embed_dim: int,
        prefix: bool = False,
    ) -> None:
        super().__init__()
        self.action_dim = chunk[1]
        size = chunk[0] * chunk[1]
        self.from_chunk = nn.Linear(size, width)
        self.from_context = mlp(cond_dim, width, width)
        self.from_level = nn.Sequential(
            SinusoidalEmbedding(step_embed_dim), mlp(step_embed_dim, 2 * step_embed_dim, width)
        )
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(width), mlp(width, expansion * width, width)) for _ in range(blocks)
        )
        self.head = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, size))
        self.known = nn.Linear(chunk[0] * (chunk[1] + 1), width, bias=False) if prefix else None

    def condition(self, context: Context) -> Conditioning:
        """The context's part (B, width) of the first layer."""
        return (self.from_context(context.flat()),)

    def embed(self, level: Tensor) -> Tensor:
        """The noise level's part (N, width) of the first layer."""
        return self.from_level(level)

    def forward(self, x: Tensor, noise: Tensor, cond: Conditioning) -> Tensor:
        x, marks = split_marks(x, self.action_dim)
        hidden = self.from_chunk(x.flatten(1)) + noise + cond[0]
        if self.known is not None and marks is not None:
            hidden = hidden + self.known(marks.flatten(1))
        for block in self.blocks:
            hidden = hidden + block(hidden)
        return self.head(hidden).view_as(x)
