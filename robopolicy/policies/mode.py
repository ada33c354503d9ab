"""MoDE: mixture of denoising experts (Reuss et al., ICLR 2025), on any noise process.

A causal transformer whose feed-forward parts are experts, chosen by the noise level. Differences to the release: a
block adds to its token stream and does not forget it; goals are dropped per sample, not per entry; the load-balancing
loss is Switch's, on the router's own probabilities; normalisation is LayerNorm.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from robopolicy.data.normalize import Normalizer
from robopolicy.diffusion.edm import EdmConfig
from robopolicy.diffusion.process import SamplerConfig
from robopolicy.diffusion.processes import ProcessConfig
from robopolicy.errors import UserError
from robopolicy.nets.experts import ModeDenoiser, RoutedNoise, draw_gumbel
from robopolicy.nets.transformer import LinearNoiseEmbedding, SinusoidalNoiseEmbedding, draw_dropout
from robopolicy.policies.base import Draws
from robopolicy.policies.denoising import DenoisingConfig, DenoisingPolicy
from robopolicy.spec import PolicySpec


@dataclass(frozen=True, kw_only=True)
class ModeConfig(DenoisingConfig):
    """Architecture and sampling of `Mode`.

    Attributes:
        dim: length of a token; the paper has 1024.
        layers: number of blocks; the paper has 8.
        heads: attention heads of a block, divides ``dim``; the paper has 8.
        experts: in each block; the paper finds 4 best.
        top_k: experts that a token takes.
        expert_hidden: hidden units of an expert (SwiGLU); the paper has 4 times ``dim``.
        shared_expert: one of the experts is always taken, so that ``top_k - 1`` of the others are chosen.
        route_on_goal: goal and instruction take part in the choice. Then each row of a batch has its own experts, and
            sampling routes in every step instead of once for all.
        load_balance: weight of the load-balancing loss.
        dropout: share of the residual branches' channels that is dropped in training.
    """

    process: ProcessConfig = field(
        default_factory=lambda: EdmConfig(sigma_min=0.001, sigma_max=80.0, levels="loglogistic", grid="exponential")
    )
    sampler: SamplerConfig = field(default_factory=lambda: SamplerConfig("euler", steps=10))
    goal_dropout: float = 0.1
    dim: int = 512
    layers: int = 8
    heads: int = 8
    experts: int = 4
    top_k: int = 2
    expert_hidden: int = 2048
    shared_expert: bool = False
    route_on_goal: bool = False
    load_balance: float = 0.01
    dropout: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.load_balance < 0:
            raise UserError(f"load_balance={self.load_balance} must lie at 0 or above.")
        if not 0 <= self.dropout < 1:
            raise UserError(f"dropout={self.dropout} must lie at 0 or above and below 1.")


class Mode(DenoisingPolicy):
    """Denoises action chunks with experts for different noise levels.

    Args:
        config: architecture.
        spec: keys and horizons.
        normalizer: fitted normalisers of the states and the action.

    Raises:
        UserError: impossible sizes.
    """

    config: ModeConfig
    denoiser: ModeDenoiser

    def __init__(self, config: ModeConfig, spec: PolicySpec, normalizer: Normalizer) -> None:
        super().__init__(config, spec, normalizer)
        # ln(sigma) is a good scale as it is; a level of another process is not
        embedding = LinearNoiseEmbedding if isinstance(config.process, EdmConfig) else SinusoidalNoiseEmbedding
        self.denoiser = ModeDenoiser(
            spec.action.dim,
            spec.horizon,
            self.encoder.size,
            dim=config.dim,
            layers=config.layers,
            heads=config.heads,
            noise_embedding=embedding(config.dim),
            experts=config.experts,
            top_k=config.top_k,
            hidden=config.expert_hidden,
            shared_expert=config.shared_expert,
            route_on_goal=config.route_on_goal,
            prefix=config.prefix_steps > 0,
        )

    def draw(self, batch_size: int, generator: torch.Generator) -> Draws:
        draws = super().draw(batch_size, generator)
        draws["gumbel"] = draw_gumbel(batch_size, self.denoiser.router, generator)
        if self.config.dropout > 0:
            config = self.config
            draws["kept"] = draw_dropout(batch_size, config.layers, config.dim, config.dropout, generator)
        return draws

    def loss(self, batch: Mapping[str, Tensor], draws: Draws) -> Tensor:
        """Denoising error; in training with sampled experts, and with the load-balancing loss."""
        if not self.training:
            return super().loss(batch, draws)
        seen = self.noised(batch, draws)
        cond = (*seen.cond, draws["kept"]) if "kept" in draws else seen.cond
        embedding = self.denoiser.embed(seen.level)
        routes = self.denoiser.route(embedding, cond, draws["gumbel"])
        prediction = self.denoiser(seen.x, RoutedNoise(embedding, routes.by_layer()), cond)
        return seen.error(prediction) + self.config.load_balance * routes.load_balance()
