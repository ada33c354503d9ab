"""What every policy family shares: the public call in physical units, and the loss as a pure function of its draws."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from robopolicy.data.augment import AugmentConfig
from robopolicy.data.normalize import Normalizer
from robopolicy.diffusion.ddpm import SamplerConfig
from robopolicy.diffusion.sampling import Generators
from robopolicy.errors import UserError
from robopolicy.spec import PolicySpec

Draws = dict[str, Tensor]


class Policy(nn.Module, ABC):
    """An observation history goes in, an action chunk comes out, both in physical units.

    Attributes:
        spec: keys, shapes, units and horizons.
        normalizer: the affine maps between physical units and what networks see.
        config: the architecture's dataclass, saved in bundles.
        augmentation: changes to images while training; the crop's size applies at inference too.
        sampler: how chunks are sampled; may be replaced after training.
    """

    config: Any
    augmentation: AugmentConfig
    sampler: SamplerConfig

    def __init__(self, spec: PolicySpec, normalizer: Normalizer) -> None:
        super().__init__()
        self.spec = spec
        self.normalizer = normalizer

    @abstractmethod
    def draw(self, batch_size: int, generator: torch.Generator) -> Draws:
        """Draw all randomness of one training batch, on the CPU; the first dimension is the batch."""

    @abstractmethod
    def loss(self, batch: Mapping[str, Tensor], draws: Draws) -> Tensor:
        """Mean training loss of a batch of windows in physical units; a pure function of its arguments."""

    @abstractmethod
    def check_sampler(self, sampler: SamplerConfig) -> None:
        """Raise a `UserError` if this policy cannot be sampled so."""

    @abstractmethod
    def sample(self, observations: Mapping[str, Tensor], generators: Generators) -> Tensor:
        """Sample chunks.

        Args:
            observations: by key, (B, n_obs_steps, *shape), physical units; images uint8.
            generators: one generator for the batch, or one for each row.

        Returns:
            (B, horizon, A) actions in physical units; entry ``n_obs_steps - 1`` belongs to the newest observation.
        """

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    def normalized(self, observations: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Normalise the states; images pass unchanged."""
        return {
            k.key: observations[k.key] if k.role == "image" else self.normalizer[k.key].normalize(observations[k.key])
            for k in self.spec.observations
        }

    @torch.inference_mode()
    def act(self, observations: Mapping[str, np.ndarray], generators: Sequence[torch.Generator]) -> np.ndarray:
        """The executed part of a chunk for each row.

        Args:
            observations: by key, (B, n_obs_steps, *shape), physical units; images uint8.
            generators: one for each row; a row's chunk depends on its own generator and observation only.

        Returns:
            (B, n_action_steps, A) float32, physical units.

        Raises:
            UserError: a key is missing or has a wrong shape.
        """
        batch = {k: torch.as_tensor(v) for k, v in self._checked(observations).items()}
        chunk = self.sample({k: v.to(self.device) for k, v in batch.items()}, generators)
        return chunk[:, self.spec.executed].float().cpu().numpy()

    def _checked(self, observations: Mapping[str, np.ndarray]) -> dict[str, Any]:
        checked = {}
        for key in self.spec.observations:
            if key.key not in observations:
                raise UserError(f"The observation lacks '{key.key}'; found {sorted(observations)}.")
            value = np.asarray(observations[key.key], dtype=np.uint8 if key.role == "image" else np.float32)
            wanted = (self.spec.n_obs_steps, *key.shape)
            if value.shape[1:] != wanted:
                raise UserError(f"{key.key}: found shape {value.shape}, wanted (batch, {', '.join(map(str, wanted))}).")
            checked[key.key] = value
        return checked
