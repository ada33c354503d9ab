"""Diffusion Policy with a conditional 1-D U-Net (Chi et al., RSS 2023), on any noise process."""

from __future__ import annotations

from dataclasses import dataclass

from robopolicy.data.normalize import Normalizer
from robopolicy.errors import UserError
from robopolicy.nets.unet1d import ConditionalUnet1d
from robopolicy.policies.denoising import DenoisingConfig, DenoisingPolicy
from robopolicy.spec import PolicySpec


@dataclass(frozen=True, kw_only=True)
class DiffusionUnetConfig(DenoisingConfig):
    """Architecture and sampling of `DiffusionUnet`.

    Attributes:
        down_dims: channels of the levels; the paper has (512, 1024, 2048) for images, (256, 512, 1024) for states.
        kernel_size: kernel of its convolutions.
        n_groups: groups of its normalisation.
        step_embed_dim: length of the noise-level embedding.
    """

    down_dims: tuple[int, ...] = (256, 512, 1024)
    kernel_size: int = 5
    n_groups: int = 8
    step_embed_dim: int = 256


class DiffusionUnet(DenoisingPolicy):
    """Denoises action chunks with a U-Net conditioned on the encoded observation history.

    Args:
        config: architecture.
        spec: keys and horizons.
        normalizer: fitted normalisers of the states and the action.

    Raises:
        UserError: the horizon cannot be halved often enough for the number of levels.
    """

    def __init__(self, config: DiffusionUnetConfig, spec: PolicySpec, normalizer: Normalizer) -> None:
        check_unet(config, spec.horizon)
        super().__init__(config, spec, normalizer)
        self.denoiser = ConditionalUnet1d(
            spec.action.dim,
            self.encoder.size.flat,
            config.down_dims,
            config.kernel_size,
            config.n_groups,
            config.step_embed_dim,
            config.prefix_steps > 0,
        )


def check_unet(config: DiffusionUnetConfig, horizon: int) -> None:
    """Raise a `UserError` if a U-Net cannot be built so for chunks of this length."""
    if not config.down_dims:
        raise UserError("down_dims is empty; the U-Net needs at least one level, e.g. [256,512,1024].")
    halvings = len(config.down_dims) - 1
    if horizon % 2**halvings:
        raise UserError(
            f"horizon={horizon} must be a multiple of {2**halvings} for {len(config.down_dims)} U-Net levels."
        )
    if config.n_groups < 1 or any(dim % config.n_groups for dim in config.down_dims):
        raise UserError(f"down_dims={config.down_dims} must be multiples of n_groups={config.n_groups}.")
    if config.kernel_size < 1 or config.kernel_size % 2 == 0:
        raise UserError(f"kernel_size={config.kernel_size} must be odd.")
    if config.step_embed_dim < 4 or config.step_embed_dim % 2:
        raise UserError(f"step_embed_dim={config.step_embed_dim} must be even and at least 4.")
