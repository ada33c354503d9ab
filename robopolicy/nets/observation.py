"""From a normalised observation history, goal and instruction to what a chunk is conditioned on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from robopolicy.data.augment import AugmentConfig, augment
from robopolicy.errors import UserError
from robopolicy.nets.context import Context, ContextSize
from robopolicy.nets.images import ResNetKeypointEncoder
from robopolicy.nets.language import LANGUAGE, InstructionEncoder, LanguageConfig
from robopolicy.spec import GOAL, TASK, KeySpec, PolicySpec


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
    """Encodes the observation history, the goal and the instruction.

    Args:
        spec: observation keys, goals, tasks and ``n_obs_steps``.
        images: the image encoder's configuration; the goal's images go through the encoder of their camera.
        augmentation: crop and colour changes; the crop's size applies at inference too.
        language: how instructions become vectors.

    Raises:
        UserError: a goal's image has no camera of that name among the observations, or shared encoders need images of
            one size.
    """

    def __init__(
        self, spec: PolicySpec, images: ImageEncoderConfig, augmentation: AugmentConfig, language: LanguageConfig
    ) -> None:
        super().__init__()
        self.spec, self.augmentation, self.shared = spec, augmentation, images.shared
        if images.shared and len({key.shape for key in spec.images}) > 1:
            sizes = {key.key: key.shape for key in spec.images}
            raise UserError(f"images.shared=true needs cameras of one size, found {sizes}.")
        encoders = {}
        for key in spec.images[:1] if images.shared else spec.images:
            height, width = (round(side * augmentation.crop) for side in key.shape[:2])
            encoders[_module_name(key.key)] = ResNetKeypointEncoder(height, width, images.keypoints, images.feature_dim)
        self.image_encoders = nn.ModuleDict(encoders)
        for key in spec.goals:
            if key.role == "image" and key.key not in {camera.key for camera in spec.images}:
                raise UserError(f"The goal '{key.key}' is an image; add its camera to the observations.")
        self.size = ContextSize(
            spec.n_obs_steps,
            _feature_dim(spec.observations, images),
            _feature_dim(spec.goals, images),
            language.dim if spec.tasks else 0,
        )
        # what goal and instruction are replaced with where a policy is not told them (classifier-free guidance)
        self.no_goal = nn.Parameter(torch.zeros(self.size.goal)) if spec.goals else None
        self.no_task = nn.Parameter(torch.zeros(self.size.task)) if spec.tasks else None
        self.instructions = InstructionEncoder([t.instruction for t in spec.tasks], language) if spec.tasks else None

    def forward(
        self,
        observations: Mapping[str, Tensor],
        augmentation_draws: Tensor | None = None,
        told: Tensor | None = None,
    ) -> Context:
        """Encode a batch.

        Args:
            observations: states (B, n_obs_steps, D) normalised, images (B, n_obs_steps, H, W, 3) uint8; goals the same
                under ``goal.<key>`` without the second dimension; ``task`` (B,) int64.
            augmentation_draws: (B, 5) while training, None at inference.
            told: (B,) bool, the rows that are told goal and instruction; None: all.
        """
        steps = self.observed(observations, augmentation_draws)
        goal = task = index = None
        if self.spec.goals:
            parts = [
                self._features(k, observations[GOAL + k.key].unsqueeze(1), augmentation_draws) for k in self.spec.goals
            ]
            goal = torch.cat(parts, dim=2).squeeze(1)
        if self.instructions is not None:
            index = observations[TASK]
            task = self.instructions(index, observations.get(LANGUAGE))
        context = Context(steps, goal, task, index)
        return context if told is None else self.untold(context, told)

    def observed(self, observations: Mapping[str, Tensor], augmentation_draws: Tensor | None = None) -> Tensor:
        """Encode the observation history alone, (B, n_obs_steps, F); see `forward`."""
        parts = [self._features(k, observations[k.key], augmentation_draws) for k in self.spec.observations]
        return torch.cat(parts, dim=2)

    def untold(self, context: Context, told: Tensor | None = None) -> Context:
        """Forget goal and instruction, as a whole, in the rows where told (B,) is false; None: in all rows."""

        def replaced(value: Tensor | None, nothing: Tensor | None) -> Tensor | None:
            if value is None or nothing is None:
                return None
            blank = nothing.to(value.dtype).expand_as(value)
            return blank if told is None else torch.where(told[:, None], value, blank)

        goal, task = replaced(context.goal, self.no_goal), replaced(context.task, self.no_task)
        return Context(context.steps, goal, task, context.task_index)

    def _features(self, key: KeySpec, values: Tensor, augmentation_draws: Tensor | None) -> Tensor:
        """(B, T, *shape) to (B, T, F)."""
        if key.role != "image":
            return angle_features(values, key.angles)
        pixels = augment(values, self.augmentation, augmentation_draws)
        encoder = self.image_encoders[_module_name(self.spec.images[0].key if self.shared else key.key)]
        return encoder(pixels.flatten(0, 1)).view(*values.shape[:2], -1)


def _feature_dim(keys: Sequence[KeySpec], images: ImageEncoderConfig) -> int:
    return sum(images.feature_dim if k.role == "image" else k.feature_dim for k in keys)


def angle_features(x: Tensor, angles: tuple[int, ...]) -> Tensor:
    """Replace angles in (..., D) by their sine and cosine: (..., D + len(angles))."""
    if not angles:
        return x
    others = [i for i in range(x.shape[-1]) if i not in angles]
    angle = x[..., list(angles)]
    return torch.cat([x[..., others], angle.sin(), angle.cos()], dim=-1)


def _module_name(key: str) -> str:
    return key.replace(".", "/")
