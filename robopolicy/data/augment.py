"""Image augmentation on whole batches: random crop, shift and colour jitter, one draw per window.

The drawn numbers are arguments, so that the same draws give the same pictures on every device and for every split of
the batch. All frames and cameras of one window share their draw.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from robopolicy.errors import UserError


@dataclass(frozen=True)
class AugmentConfig:
    """What is randomised while training.

    Attributes:
        crop: side of the crop as a share of the image side (84/96 in Diffusion Policy); 1 keeps the whole image.
            Training crops at random, inference crops the centre.
        shift: largest shift in pixels in each direction, edges repeated (DrQ, Kostrikov et al. 2021).
        brightness: largest relative change of brightness.
        contrast: largest relative change of contrast.
        saturation: largest relative change of saturation.
    """

    crop: float = 1.0
    shift: int = 0
    brightness: float = 0.0
    contrast: float = 0.0
    saturation: float = 0.0

    def __post_init__(self) -> None:
        if not 0 < self.crop <= 1:
            raise UserError(f"augmentation.crop={self.crop} must lie above 0 and at most at 1.")
        if min(self.shift, self.brightness, self.contrast, self.saturation) < 0:
            raise UserError(f"augmentation: no value may be negative, found {self}.")


def draw_augmentation(batch: int, generator: torch.Generator) -> Tensor:
    """Draw (B, 5) uniform numbers in [0, 1): vertical and horizontal place, brightness, contrast, saturation."""
    return torch.rand(batch, 5, generator=generator)


def augment(images: Tensor, config: AugmentConfig, draws: Tensor | None) -> Tensor:
    """Crop, shift and jitter.

    Args:
        images: (B, T, H, W, 3) uint8 RGB.
        config: what to randomise.
        draws: (B, 5) from `draw_augmentation`; None (inference) crops the centre and changes nothing else.

    Returns:
        (B, T, round(H * crop), round(W * crop), 3) float32 in [0, 1].
    """
    height, width = int(images.shape[2]), int(images.shape[3])
    out = (round(height * config.crop), round(width * config.crop))
    if draws is None:
        top, left = (height - out[0]) // 2, (width - out[1]) // 2
        return images[:, :, top : top + out[0], left : left + out[1]].float() / 255
    draws = draws.to(images.device)
    pixels = _random_crop(images, out, config.shift, draws[:, :2]).float() / 255
    strength = (config.brightness, config.contrast, config.saturation)
    return _jitter(pixels, strength, draws[:, 2:]) if any(strength) else pixels


def _random_crop(images: Tensor, out: tuple[int, int], shift: int, draws: Tensor) -> Tensor:
    """Cut a window of size ``out`` at a random place; places up to ``shift`` pixels outside repeat the edge."""
    height, width = images.shape[2:4]
    if out == (height, width) and shift == 0:
        return images
    free = torch.tensor([height - out[0], width - out[1]], device=images.device) + 2 * shift
    corner = (draws * (free + 1)).long() - shift  # (B, 2)
    rows = (corner[:, :1] + torch.arange(out[0], device=images.device)).clamp(0, height - 1)
    cols = (corner[:, 1:] + torch.arange(out[1], device=images.device)).clamp(0, width - 1)
    sample = torch.arange(images.shape[0], device=images.device)[:, None, None, None]
    frame = torch.arange(images.shape[1], device=images.device)[None, :, None, None]
    return images[sample, frame, rows[:, None, :, None], cols[:, None, None, :]]


def _jitter(pixels: Tensor, strength: tuple[float, float, float], draws: Tensor) -> Tensor:
    """Scale brightness, then contrast (about the mean grey), then saturation, each by a factor in 1 ± strength."""
    factors = 1 + (2 * draws - 1) * torch.tensor(strength, device=pixels.device)
    brightness, contrast, saturation = (f[:, None, None, None, None] for f in factors.unbind(1))
    pixels = (pixels * brightness).clamp(0, 1)
    pixels = (_luma(pixels).mean(dim=(2, 3, 4), keepdim=True) * (1 - contrast) + pixels * contrast).clamp(0, 1)
    return (_luma(pixels) * (1 - saturation) + pixels * saturation).clamp(0, 1)


def _luma(pixels: Tensor) -> Tensor:
    """Grey value (ITU-R BT.601), (B, T, H, W, 1)."""
    return (pixels * torch.tensor([0.299, 0.587, 0.114], device=pixels.device)).sum(dim=-1, keepdim=True)
