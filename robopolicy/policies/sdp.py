"""SDP, Sparse Diffusion Policy: task routers over a shared pool of experts (Wang et al., CoRL 2024).

One policy for many tasks, to which `robopolicy.training.extend` adds tasks without changing what it does in the old
ones. The task decides which routers are used and by which ranges states and actions are normalised; its embedding is
not an input. The release's mixture of experts in the image encoder is left out: its gates are constant, so that it
routes nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from robopolicy.data.augment import AugmentConfig
from robopolicy.data.normalize import Normalizer
from robopolicy.errors import UserError, did_you_mean
from robopolicy.nets.context import Context
from robopolicy.nets.language import LanguageConfig
from robopolicy.nets.observation import ImageEncoderConfig, ObservationEncoder
from robopolicy.nets.task_experts import SdpDenoiser, mean_usage
from robopolicy.policies.base import Draws
from robopolicy.policies.denoising import DenoisingConfig, DenoisingPolicy, Noised
from robopolicy.spec import TASK, PolicySpec


@dataclass(frozen=True, kw_only=True)
class SdpConfig(DenoisingConfig):
    """Architecture and sampling of `Sdp`; ``language`` stays at its default, since instructions are not embedded.

    Attributes:
        dim: length of a token.
        layers: number of blocks.
        heads: attention heads of a block, divides ``dim``.
        mlp_ratio: hidden units of the dense perceptron in whose place the experts are, as a multiple of ``dim``; an
            expert has half of them, so that two experts cost as much.
        dropout: share of the attention weights that is dropped in training.
        experts: in each layer, those included that were added for later tasks.
        top_k: experts of a token.
        router_experts: for each task, how many of the experts, from the first on, its router knows; empty: all.
        information_weight: weight of the loss that raises the mutual information of task and expert.
    """

    dim: int = 512
    layers: int = 12
    heads: int = 4
    mlp_ratio: int = 4
    dropout: float = 0.3
    experts: int = 8
    top_k: int = 2
    router_experts: tuple[int, ...] = ()
    information_weight: float = 5e-4

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.mlp_ratio < 1:
            raise UserError(f"mlp_ratio={self.mlp_ratio} must be at least 1.")
        if not 0 <= self.dropout < 1:
            raise UserError(f"dropout={self.dropout} must lie at 0 or above and below 1.")
        if self.information_weight < 0:
            raise UserError(f"information_weight={self.information_weight} must be at least 0.")
        if self.language != LanguageConfig():
            raise UserError("SDP tells tasks apart by their routers and embeds no instruction; leave out 'language'.")


class Sdp(DenoisingPolicy):
    """Denoises action chunks with experts that the task's routers choose; works without tasks, too.

    Args:
        config: architecture.
        spec: keys, horizons and tasks.
        normalizer: fitted normalisers of the states and the action.

    Raises:
        UserError: impossible sizes.
    """

    config: SdpConfig
    denoiser: SdpDenoiser

    def __init__(self, config: SdpConfig, spec: PolicySpec, normalizer: Normalizer) -> None:
        super().__init__(config, spec, normalizer)
        self.encoder = TaskIndexEncoder(spec, config.images, config.augmentation)
        tasks = max(1, len(spec.tasks))
        if len(config.router_experts) not in (0, tasks):
            raise UserError(f"router_experts has {len(config.router_experts)} entries, wanted one for each of {tasks}.")
        self.denoiser = SdpDenoiser(
            spec.action.dim,
            spec.horizon,
            self.encoder.size,
            dim=config.dim,
            layers=config.layers,
            heads=config.heads,
            hidden=config.mlp_ratio * config.dim // 2,
            experts=config.experts,
            router_experts=config.router_experts or (config.experts,) * tasks,
            top_k=config.top_k,
            prefix=config.prefix_steps > 0,
        )

    @property
    def asked(self) -> bool:
        """The policy is told goals; the task is no input that could be left out."""
        return bool(self.spec.goals)

    def _told(self, texts: Sequence[str | None]) -> dict[str, Tensor]:
        """``task`` (B,): instructions are names of tasks here, no text that is encoded."""
        known = {task.instruction: i for i, task in enumerate(self.spec.tasks)}
        for text in texts:
            if text is None:
                raise UserError(f"This policy needs an instruction, one of: {', '.join(map(repr, known))}.")
            if text not in known:
                raise UserError(f"The policy was not trained for '{text}'.{did_you_mean(text, known)}")
        return {TASK: torch.tensor([known[str(text)] for text in texts])}

    def draw(self, batch_size: int, generator: torch.Generator) -> Draws:
        draws = super().draw(batch_size, generator)
        if self.config.dropout > 0:
            draws["kept"] = self.denoiser.draw_dropout(batch_size, self.config.dropout, generator)
        return draws

    def noised(self, batch: Mapping[str, Tensor], draws: Draws) -> Noised:
        seen = super().noised(batch, draws)
        if not self.training or "kept" not in draws:
            return seen
        return replace(seen, cond=(*seen.cond, draws["kept"]))

    def loss(self, batch: Mapping[str, Tensor], draws: Draws) -> Tensor:
        """Denoising loss; in training, the weighted information loss is added, and the running usage it needs updated.

        Apart from that usage, a pure function of batch and draws.
        """
        seen = self.noised(batch, draws)
        prediction, routed = self.denoiser.denoise(seen.x, self.denoiser.embed(seen.level), seen.cond)
        loss = seen.error(prediction)
        if not self.training or self.config.information_weight == 0:
            return loss
        usage = mean_usage(routed, self.config.experts)
        present = usage.detach().sum((0, 2)) > 0
        self.denoiser.usage.update(usage.detach(), present)
        return loss + self.config.information_weight * self.denoiser.usage.information_loss(usage, present)


class TaskIndexEncoder(ObservationEncoder):
    """Encodes observations and goal; of the task only the index is kept."""

    def __init__(self, spec: PolicySpec, images: ImageEncoderConfig, augmentation: AugmentConfig) -> None:
        super().__init__(replace(spec, tasks=()), images, augmentation, LanguageConfig())

    def forward(
        self,
        observations: Mapping[str, Tensor],
        augmentation_draws: Tensor | None = None,
        told: Tensor | None = None,
    ) -> Context:
        context = super().forward(observations, augmentation_draws, told)
        return replace(context, task_index=observations.get(TASK))
