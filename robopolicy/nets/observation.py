"""From a normalised observation history to one feature vector."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from robopolicy.data.augment import AugmentConfig, augment
from robopolicy.nets.images import ResNetKeypointEncoder
from robopolicy.spec import PolicySpec


@dataclass(frozen=True)
class ImageEncoderConfig:
    """How camera images become features.

    Attributes:
        keypoints: keypoints of the spatial softmax.
        feature_dim: features of each camera and frame.
        shared: one encoder for all cameras (their images must have one size) instead of one for each.
    """

    keypoints: int = 32
    feature_dim: int = 64
    shared: bool = False


class ObservationEncoder(nn.Module):
    """Concatenates state features and image features of all observation steps.

    Args:
        spec: the observation keys and ``n_obs_steps``.
        images: the image encoder's configuration.
        augmentation: crop and colour changes; the crop's size applies at inference too.
    """

    def __init__(self, spec: PolicySpec, images: ImageEncoderConfig, augmentation: AugmentConfig) -> None:
        super().__init__()
        self.spec, self.augmentation, self.shared = spec, augmentation, images.shared
        encoders = {}
        for key in spec.images[:1] if images.shared else spec.images:
            height, width = (round(side * augmentation.crop) for side in key.shape[:2])
            encoders[_module_name(key.key)] = ResNetKeypointEncoder(height, width, images.keypoints, images.feature_dim)
        self.image_encoders = nn.ModuleDict(encoders)
        per_step = sum(k.feature_dim for k in spec.states) + images.feature_dim * len(spec.images)
        self.feature_dim = spec.n_obs_steps * per_step

    def forward(self, observations: Mapping[str, Tensor], augmentation_draws: Tensor | None = None) -> Tensor:
        """Encode a batch.

        Args:
            observations: states (B, n_obs_steps, D) normalised, images (B, n_obs_steps, H, W, 3) uint8.
            augmentation_draws: (B, 5) while training, None at inference.

        Returns:
            (B, feature_dim).
        """
        parts = [angle_features(observations[k.key], k.angles).flatten(1) for k in self.spec.states]
        for key in self.spec.images:
            pixels = augment(observations[key.key], self.augmentation, augmentation_draws)
            encoder = self.image_encoders[_module_name(self.spec.images[0].key if self.shared else key.key)]
            parts.append(encoder(pixels.flatten(0, 1)).view(len(pixels), -1))
        return torch.cat(parts, dim=1)


def angle_features(x: Tensor, angles: tuple[int, ...]) -> Tensor:
    """Replace angles in (..., D) by their sine and cosine: (..., D + len(angles))."""
    if not angles:
        return x
    others = [i for i in range(x.shape[-1]) if i not in angles]
    angle = x[..., list(angles)]
    return torch.cat([x[..., others], angle.sin(), angle.cos()], dim=-1)


def _module_name(key: str) -> str:
    return key.replace(".", "/")
