"""Image encoder: ResNet-18 with group normalisation and spatial softmax (Chi et al. 2023, Mandlekar et al. 2021)."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torchvision.models import resnet18

from robopolicy.errors import UserError


class SpatialSoftmax(nn.Module):
    """Expected image coordinates of learned keypoints (Finn et al. 2016).

    Args:
        channels: channels of the feature map.
        keypoints: K.
        height: rows of the feature map.
        width: columns of the feature map.
    """

    grid: Tensor

    def __init__(self, channels: int, keypoints: int, height: int, width: int) -> None:
        super().__init__()
        self.to_keypoints = nn.Conv2d(channels, keypoints, 1)
        rows, cols = torch.meshgrid(torch.linspace(-1, 1, height), torch.linspace(-1, 1, width), indexing="ij")
        self.register_buffer("grid", torch.stack([cols, rows], dim=-1).view(-1, 2), persistent=False)

    def forward(self, features: Tensor) -> Tensor:
        """Map features (B, C, h, w) to coordinates (B, 2 K): x, y in [-1, 1], right and down positive."""
        heat = self.to_keypoints(features).flatten(2)
        return (heat.softmax(dim=-1) @ self.grid.to(heat.dtype)).flatten(1)


class ResNetKeypointEncoder(nn.Module):
    """(B, H, W, 3) images in [0, 1] to (B, feature_dim) features.

    Batch normalisation is replaced by group normalisation with 16 channels a group: running statistics are not
    averaged by EMA and would differ between the trained and the evaluated network.

    Args:
        height: rows of the (cropped) image.
        width: columns of the (cropped) image.
        keypoints: keypoints of the spatial softmax.
        feature_dim: length of the features.

    Raises:
        UserError: the image is too small for keypoints.
    """

    def __init__(self, height: int, width: int, keypoints: int = 32, feature_dim: int = 64) -> None:
        super().__init__()
        resnet = resnet18(norm_layer=lambda channels: nn.GroupNorm(channels // 16, channels))
        self.trunk = nn.Sequential(*list(resnet.children())[:-2])
        self.trunk.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        with torch.no_grad():
            _, channels, rows, cols = self.trunk(torch.zeros(1, 3, height, width)).shape
        if rows < 2 or cols < 2:
            raise UserError(
                f"Images of {height}x{width} (after the crop) leave a feature map of {rows}x{cols}, on which keypoints "
                "have no place. Use images of at least 33 pixels on each side."
            )
        self.pool = SpatialSoftmax(channels, keypoints, rows, cols)
        self.project = nn.Sequential(nn.Linear(2 * keypoints, feature_dim), nn.ReLU(inplace=True))

    def forward(self, images: Tensor) -> Tensor:
        # HWC memory seen as CHW is exactly the channels-last layout, the faster one on CPUs and GPUs
        return self.project(self.pool(self.trunk(images.permute(0, 3, 1, 2) * 2 - 1)))
