"""Diffusion Policy with a conditional 1-D U-Net (Chi et al., RSS 2023)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from robopolicy.data.augment import AugmentConfig, draw_augmentation
from robopolicy.data.normalize import Normalizer
from robopolicy.diffusion.ddpm import DdpmConfig, DdpmProcess, SamplerConfig
from robopolicy.diffusion.sampling import Generators, sample_chunks
from robopolicy.errors import UserError
from robopolicy.nets.observation import ImageEncoderConfig, ObservationEncoder
from robopolicy.nets.unet1d import ConditionalUnet1d
from robopolicy.policies.base import Draws, Policy
from robopolicy.spec import PolicySpec


@dataclass(frozen=True)
class DiffusionUnetConfig:
    """Architecture and sampling of `DiffusionUnet`.

    Attributes:
        down_dims: channels of the levels; the paper has (512, 1024, 2048) for images, (256, 512, 1024) for states.
        kernel_size: kernel of its convolutions.
        n_groups: groups of its normalisation.
        step_embed_dim: length of the noise-level embedding.
        process: the noise process.
        sampler: how chunks are sampled; can be changed after training.
        images: the image encoder.
        augmentation: image augmentation; its crop applies at inference too.
    """

    down_dims: tuple[int, ...] = (256, 512, 1024)
    kernel_size: int = 5
    n_groups: int = 8
    step_embed_dim: int = 256
    process: DdpmConfig = field(default_factory=DdpmConfig)
    sampler: SamplerConfig = field(default_factory=SamplerConfig)
    images: ImageEncoderConfig = field(default_factory=ImageEncoderConfig)
    augmentation: AugmentConfig = field(default_factory=AugmentConfig)


class DiffusionUnet(Policy):
    """Denoises action chunks conditioned on the encoded observation history.

    Args:
        config: architecture.
        spec: keys and horizons.
        normalizer: fitted normalisers of the states and the action.

    Raises:
        UserError: the horizon cannot be halved often enough for the number of levels.
    """

    def __init__(self, config: DiffusionUnetConfig, spec: PolicySpec, normalizer: Normalizer) -> None:
        super().__init__(spec, normalizer)
        if not config.down_dims:
            raise UserError("down_dims is empty; the U-Net needs at least one level, e.g. [256,512,1024].")
        halvings = len(config.down_dims) - 1
        if spec.horizon % 2**halvings:
            raise UserError(
                f"horizon={spec.horizon} must be a multiple of {2**halvings} for {len(config.down_dims)} U-Net levels."
            )
        if config.n_groups < 1 or any(dim % config.n_groups for dim in config.down_dims):
            raise UserError(f"down_dims={config.down_dims} must be multiples of n_groups={config.n_groups}.")
        if config.kernel_size < 1 or config.kernel_size % 2 == 0:
            raise UserError(f"kernel_size={config.kernel_size} must be odd.")
        if config.step_embed_dim < 4 or config.step_embed_dim % 2:
            raise UserError(f"step_embed_dim={config.step_embed_dim} must be even and at least 4.")
        if config.images.shared and len({key.shape for key in spec.images}) > 1:
            sizes = {key.key: key.shape for key in spec.images}
            raise UserError(f"images.shared=true needs cameras of one size, found {sizes}.")
        self.config = config
        self.process = DdpmProcess(config.process)
        self.sampler = config.sampler
        self.augmentation = config.augmentation
        self.encoder = ObservationEncoder(spec, config.images, config.augmentation)
        self.denoiser = ConditionalUnet1d(
            spec.action.dim,
            self.encoder.feature_dim,
            config.down_dims,
            config.kernel_size,
            config.n_groups,
            config.step_embed_dim,
        )

    def draw(self, batch_size: int, generator: torch.Generator) -> Draws:
        shape = (batch_size, self.spec.horizon, self.spec.action.dim)
        draws = {
            "noise": torch.randn(shape, generator=generator),
            "t": torch.randint(0, self.config.process.train_steps, (batch_size,), generator=generator),
        }
        if self.spec.images:
            draws["augmentation"] = draw_augmentation(batch_size, generator)
        return draws

    def loss(self, batch: Mapping[str, Tensor], draws: Draws) -> Tensor:
        clean = self.normalizer[self.spec.action.key].normalize(batch[self.spec.action.key])
        cond = self.encoder(self.normalized(batch), draws.get("augmentation"))
        noised = self.process.add_noise(clean, draws["noise"], draws["t"])
        prediction = self.denoiser(noised, draws["t"], self.denoiser.condition(cond))
        return torch.nn.functional.mse_loss(prediction.float(), self.process.target(clean, draws["noise"], draws["t"]))

    def check_sampler(self, sampler: SamplerConfig) -> None:
        self.process.solver(sampler)

    def sample(self, observations: Mapping[str, Tensor], generators: Generators) -> Tensor:
        action = self.normalizer[self.spec.action.key]
        cond = self.denoiser.condition(self.encoder(self.normalized(observations)))
        chunk = sample_chunks(
            self.process,
            self.sampler,
            lambda x, t: self.denoiser(x, t, cond).float(),
            (len(cond), self.spec.horizon, self.spec.action.dim),
            (action.normalize(action.low), action.normalize(action.high)),
            generators,
            self.device,
        )
        return action.unnormalize(chunk)
