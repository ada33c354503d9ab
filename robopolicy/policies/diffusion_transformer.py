"""Diffusion transformer policy: a DiT (Peebles & Xie 2023) over action chunks, on any noise process."""

from __future__ import annotations

from dataclasses import dataclass

from robopolicy.data.normalize import Normalizer
from robopolicy.errors import UserError
from robopolicy.nets.dit import DiffusionTransformer
from robopolicy.policies.denoising import DenoisingConfig, DenoisingPolicy
from robopolicy.spec import PolicySpec


@dataclass(frozen=True, kw_only=True)
class DiffusionTransformerConfig(DenoisingConfig):
    """Architecture and sampling of `DiffusionTransformerPolicy`.

    Attributes:
        dim: length of a token.
        layers: number of blocks.
        heads: attention heads of a block, divides ``dim``.
        mlp_ratio: hidden units of the perceptrons, as a multiple of ``dim``.
    """

    dim: int = 384
    layers: int = 8
    heads: int = 6
    mlp_ratio: int = 4

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.mlp_ratio < 1:
            raise UserError(f"mlp_ratio={self.mlp_ratio} must be at least 1.")


class DiffusionTransformerPolicy(DenoisingPolicy):
    """Denoises action chunks with a transformer that sees each observation step, the goal and the task as a token.

    Args:
        config: architecture.
        spec: keys and horizons.
        normalizer: fitted normalisers of the states and the action.

    Raises:
        UserError: impossible sizes.
    """

    def __init__(self, config: DiffusionTransformerConfig, spec: PolicySpec, normalizer: Normalizer) -> None:
        super().__init__(config, spec, normalizer)
        self.denoiser = DiffusionTransformer(
            spec.action.dim,
            spec.horizon,
            self.encoder.size,
            dim=config.dim,
            layers=config.layers,
            heads=config.heads,
            hidden=config.mlp_ratio * config.dim,
            prefix=config.prefix_steps > 0,
        )
