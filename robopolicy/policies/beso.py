"""BESO: goal-conditioned imitation with score-based policies (Reuss et al., RSS 2023).

A causal transformer on the EDM process with few, linearly spaced noise levels from sigma = 1 on, classifier-free
guidance on goals through ``sampler.guidance`` (the paper: 1.5 to 2), and three sampling steps. The paper predicts one
action a call and feeds its past actions back; here the transformer predicts a chunk of ``horizon`` actions after the
observation history. Goals are dropped per sample (the release draws the mask per entry), so that the goal-free branch
of the guidance has been trained.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from robopolicy.data.normalize import Normalizer
from robopolicy.diffusion.edm import EdmConfig
from robopolicy.diffusion.process import SamplerConfig
from robopolicy.diffusion.processes import ProcessConfig
from robopolicy.errors import UserError
from robopolicy.nets.transformer import GptDenoiser, LinearNoiseEmbedding, Mlp, draw_dropout
from robopolicy.policies.base import Draws
from robopolicy.policies.denoising import DenoisingConfig, DenoisingPolicy, Noised
from robopolicy.spec import PolicySpec


@dataclass(frozen=True, kw_only=True)
class BesoConfig(DenoisingConfig):
    """Architecture and sampling of `Beso`.

    Attributes:
        dim: length of a token; the paper has 360 for Franka Kitchen, 240 for Block-Push.
        layers: number of blocks; 6 and 4.
        heads: attention heads of a block, divides ``dim``; 6 and 12.
        mlp_ratio: hidden units of the perceptrons, as a multiple of ``dim``.
        dropout: share of the residual branches' channels that is dropped in training.
    """

    process: ProcessConfig = field(
        default_factory=lambda: EdmConfig(sigma_min=0.005, sigma_max=1.0, levels="loglogistic", grid="linear")
    )
    sampler: SamplerConfig = field(default_factory=lambda: SamplerConfig("euler", steps=3))
    goal_dropout: float = 0.1
    dim: int = 128
    layers: int = 4
    heads: int = 4
    mlp_ratio: int = 2
    dropout: float = 0.05

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.process, EdmConfig):
            raise UserError(f"BESO needs the process 'edm', found '{self.process.name}'. Leave process at its default.")
        if self.mlp_ratio < 1:
            raise UserError(f"mlp_ratio={self.mlp_ratio} must be at least 1.")
        if not 0 <= self.dropout < 1:
            raise UserError(f"dropout={self.dropout} must lie at 0 or above and below 1.")


class Beso(DenoisingPolicy):
    """Denoises action chunks towards a goal; works without goals, too.

    Args:
        config: architecture.
        spec: keys and horizons.
        normalizer: fitted normalisers of the states and the action.

    Raises:
        UserError: impossible sizes.
    """

    config: BesoConfig
    denoiser: GptDenoiser

    def __init__(self, config: BesoConfig, spec: PolicySpec, normalizer: Normalizer) -> None:
        super().__init__(config, spec, normalizer)
        self.denoiser = GptDenoiser(
            spec.action.dim,
            spec.horizon,
            self.encoder.size,
            dim=config.dim,
            layers=config.layers,
            heads=config.heads,
            feed_forward=lambda: Mlp(config.dim, config.mlp_ratio * config.dim),
            noise_embedding=LinearNoiseEmbedding(config.dim),
            prefix=config.prefix_steps > 0,
        )

    def draw(self, batch_size: int, generator: torch.Generator) -> Draws:
        draws = super().draw(batch_size, generator)
        if self.config.dropout > 0:
            config = self.config
            draws["kept"] = draw_dropout(batch_size, config.layers, config.dim, config.dropout, generator)
        return draws

    def noised(self, batch: Mapping[str, Tensor], draws: Draws) -> Noised:
        seen = super().noised(batch, draws)
        if not self.training or "kept" not in draws:
            return seen
        return replace(seen, cond=(*seen.cond, draws["kept"]))
