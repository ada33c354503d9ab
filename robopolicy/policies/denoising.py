"""What every denoising family shares: noise a chunk, regress the target, walk back from noise to a chunk."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from robopolicy.data.augment import AugmentConfig, draw_augmentation
from robopolicy.data.normalize import Normalizer
from robopolicy.diffusion.adaptive import Evaluations, GuidedEstimate
from robopolicy.diffusion.ddpm import DdpmConfig
from robopolicy.diffusion.guidance import Guide
from robopolicy.diffusion.process import SamplerConfig
from robopolicy.diffusion.processes import ProcessConfig, build_process
from robopolicy.diffusion.sampling import Generators, Steps, draw_noise, sample_chunks
from robopolicy.errors import UserError
from robopolicy.nets.context import Context
from robopolicy.nets.denoiser import Conditioning, Denoiser
from robopolicy.nets.language import LanguageConfig
from robopolicy.nets.observation import ImageEncoderConfig, ObservationEncoder
from robopolicy.nets.prefix import Prefix, known_actions
from robopolicy.policies.base import Draws, ExportGraph, Policy
from robopolicy.policies.graphs import DenoiserGraph, EncoderGraph, SamplerGraph, encoder_keys, encoder_outputs
from robopolicy.spec import PolicySpec


@dataclass(frozen=True, kw_only=True)
class DenoisingConfig:
    """What all families can be told.

    Attributes:
        process: the noise process.
        sampler: how chunks are sampled; can be changed after training.
        images: the image encoder.
        language: how instructions become vectors, for multi-task policies.
        augmentation: image augmentation; its crop applies at inference too.
        goal_dropout: share of the training samples that are not told goal and instruction, each sample as a whole;
            above 0 for classifier-free guidance.
        prefix_steps: largest number of committed actions that the policy learns to continue, for real-time chunking,
            in control steps; see `robopolicy.nets.prefix`. In training each sample knows 0 to so many of its actions,
            all as likely, and learns the others. 0: it is never shown any.
    """

    process: ProcessConfig = field(default_factory=DdpmConfig)
    sampler: SamplerConfig = field(default_factory=SamplerConfig)
    images: ImageEncoderConfig = field(default_factory=ImageEncoderConfig)
    language: LanguageConfig = field(default_factory=LanguageConfig)
    augmentation: AugmentConfig = field(default_factory=AugmentConfig)
    goal_dropout: float = 0.0
    prefix_steps: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.goal_dropout < 1:
            raise UserError(f"goal_dropout={self.goal_dropout} must lie at 0 or above and below 1.")
        if self.prefix_steps < 0:
            raise UserError(f"prefix_steps={self.prefix_steps} must be at least 0.")


@dataclass(frozen=True)
class Noised:
    """A training batch at its noise levels, as the network sees it.

    Attributes:
        x: (B, H, A) network input, see `Denoiser.forward`.
        level: (B,) network level.
        cond: the conditioning, B rows.
        target: (B, H, A) what to predict.
        prefix: the actions that are known; None: none are.
    """

    x: Tensor
    level: Tensor
    cond: Conditioning
    target: Tensor
    prefix: Prefix | None = None

    def error(self, prediction: Tensor) -> Tensor:
        """Mean squared error of a prediction (B, H, A); known actions do not count, and all samples count the same."""
        if self.prefix is None:
            return nn.functional.mse_loss(prediction.float(), self.target)
        return self.prefix.mean((prediction.float() - self.target).square()).mean()


class DenoisingPolicy(Policy):
    """A policy that denoises action chunks; a family sets `denoiser`.

    Attributes:
        evaluations: counts what sampling costs.

    Args:
        config: architecture.
        spec: keys and horizons.
        normalizer: fitted normalisers of the states and the action.

    Raises:
        UserError: of the chunk nothing is left after the longest prefix.
    """

    denoiser: Denoiser

    def __init__(self, config: Any, spec: PolicySpec, normalizer: Normalizer) -> None:
        super().__init__(spec, normalizer)
        if config.prefix_steps > (longest := spec.horizon - spec.n_obs_steps):
            raise UserError(
                f"prefix_steps={config.prefix_steps} must lie in 0..{longest} (horizon {spec.horizon} - n_obs_steps "
                f"{spec.n_obs_steps}), so that something is left to predict."
            )
        self.config = config
        self.process = build_process(config.process)
        self.sampler: SamplerConfig = config.sampler
        self.evaluations = Evaluations()
        self.augmentation: AugmentConfig = config.augmentation
        self.encoder = ObservationEncoder(spec, config.images, config.augmentation, config.language)

    @property
    def asked(self) -> bool:
        """The policy is told goals or instructions."""
        return bool(self.spec.goals or self.spec.tasks)

    def told(self, texts: Sequence[str]) -> dict[str, Tensor]:
        """What `sample` needs of instructions, one text for each row.

        Raises:
            UserError: the policy does not know one of them.
        """
        return {key: value.to(self.device) for key, value in self._told(texts).items()}

    def draw(self, batch_size: int, generator: torch.Generator) -> Draws:
        shape = (batch_size, self.spec.horizon, self.spec.action.dim)
        draws = {
            "noise": torch.randn(shape, generator=generator),
            "t": self.process.draw_levels(batch_size, generator),
        }
        if self.spec.images:
            draws["augmentation"] = draw_augmentation(batch_size, generator)
        if self.asked:
            draws["told"] = torch.rand(batch_size, generator=generator) >= self.config.goal_dropout
        return draws | self.draw_prefix(batch_size, generator)

    def draw_prefix(self, batch_size: int, generator: torch.Generator) -> Draws:
        """How many actions each sample knows (B,), for policies with a prefix."""
        if not self.config.prefix_steps:
            return {}
        return {"prefix": torch.randint(0, self.config.prefix_steps + 1, (batch_size,), generator=generator)}

    def prefix(self, clean: Tensor, draws: Draws) -> Prefix | None:
        """What is known of normalised chunks (B, H, A) of the data."""
        return Prefix(clean, known_actions(self.spec, draws["prefix"])) if "prefix" in draws else None

    def noised(self, batch: Mapping[str, Tensor], draws: Draws) -> Noised:
        """Normalise, encode and noise a batch of windows in physical units."""
        clean = self.normalizer[self.spec.action.key].normalize(batch[self.spec.action.key], self.domain(batch))
        context = self.encoder(self.normalized(batch), draws.get("augmentation"), draws.get("told"))
        t, noise, prefix = draws["t"], draws["noise"], self.prefix(clean, draws)
        x = self.process.network_input(self.process.add_noise(clean, noise, t), t)
        return Noised(
            x if prefix is None else prefix.shown(x),
            self.process.network_level(t),
            self.denoiser.condition(context),
            self.process.target(clean, noise, t),
            prefix,
        )

    def loss(self, batch: Mapping[str, Tensor], draws: Draws) -> Tensor:
        seen = self.noised(batch, draws)
        prediction = self.denoiser(seen.x, self.denoiser.embed(seen.level), seen.cond)
        return seen.error(prediction)

    def check_sampler(self, sampler: SamplerConfig) -> None:
        self.process.solver(sampler)
        if sampler.guidance != 1 and not self.asked:
            raise UserError(f"sampler.guidance={sampler.guidance:g} needs a policy with goals or instructions.")
        if sampler.guidance != 1 and self.config.goal_dropout == 0:
            raise UserError(
                f"sampler.guidance={sampler.guidance:g} needs a policy that was trained with goal_dropout above 0; "
                "this one never saw a missing goal."
            )

    @property
    def network_calls(self) -> int:
        return len(self.process.solver(self.sampler))

    def encode(self, observations: Mapping[str, Tensor]) -> Tensor:
        rows = len(observations[self.spec.observations[0].key])
        domain = torch.zeros(rows, dtype=torch.long, device=self.device)
        history = self.normalized_history(observations, domain if self.spec.domains > 1 else None)
        return self.encoder.observed(history).flatten(1)

    def sample(self, observations: Mapping[str, Tensor], generators: Generators) -> Tensor:
        domain = self.domain(observations)
        chunks = self.sample_normalized(self.encoder(self.normalized(observations)), domain, generators)
        return self.normalizer[self.spec.action.key].unnormalize(chunks, domain)

    def sample_normalized(
        self,
        context: Context,
        domain: Tensor | None,
        generators: Generators,
        guides: Sequence[Guide] = (),
        recurrence: int = 1,
    ) -> Tensor:
        """Sample chunks (B, H, A) that the networks see, from an encoded context.

        Args:
            context: of B rows.
            domain: which normaliser each row (B,) uses; None where there is one for all.
            generators: one for all rows, or one for each.
            guides, recurrence: steering, see `robopolicy.diffusion.sampling.sample_chunks`.
        """
        shape = (len(context.steps), self.spec.horizon, self.spec.action.dim)
        start = draw_noise(shape, generators, self.device) * self.process.largest_noise
        return sample_chunks(self.steps(context, domain), start, generators, guides, recurrence)

    def steps(self, context: Context, domain: Tensor | None) -> Steps:
        """The way from noise to chunks in a context; all that does not depend on the noisy chunks is computed here."""
        solver = self.process.solver(self.sampler)
        weight, counts = self.sampler.guidance, self.evaluations
        rows = len(context.steps)
        if weight != 1:  # both branches are rows of one batch
            context = context.followed_by(self.encoder.untold(context))
        cond = self.denoiser.condition(context)
        levels = solver.levels.to(self.device)
        noises = self.denoiser.at_levels(self.process.network_level(levels))
        counts.chunks += rows
        counts.agreement = []

        def network(x: Tensor, i: int, cond: Conditioning) -> Tensor:
            return self.clean(x, levels[i : i + 1], noises[i], cond)

        def plain(x: Tensor, i: int) -> Tensor:
            counts.rows += len(x)
            return network(x, i, cond)

        threshold = self.sampler.guidance_threshold
        guided = GuidedEstimate(network, cond, weight, threshold, self.process, levels, counts)
        estimate = plain if weight == 1 else guided
        return Steps(self.process, solver, estimate, self.normalizer[self.spec.action.key].bounds(domain))

    def clean(self, x: Tensor, t: Tensor, noise: Any, cond: Conditioning, prefix: Prefix | None = None) -> Tensor:
        """The clean-sample estimate at x (B, H, A) and one level t (1,) for all rows; of known actions, anything."""
        seen = self.process.network_input(x, t)
        prediction = self.denoiser(seen if prefix is None else prefix.shown(seen), noise, cond)
        return self.process.clean_estimate(prediction.float(), x, t)

    def export_graphs(
        self, observations: Mapping[str, Tensor], dtype: torch.dtype = torch.float32
    ) -> dict[str, ExportGraph]:
        keys = encoder_keys(self)
        inputs = tuple(observations[key] for key in keys)
        encoder = EncoderGraph(self, keys, dtype)
        with torch.no_grad():
            found = encoder(*inputs)
        names = encoder_outputs(self, len(found))
        sampler = SamplerGraph(self, dtype)
        rows, chunk = len(inputs[0]), (self.spec.horizon, self.spec.action.dim)
        noise = torch.zeros(rows, sampler.table.noises, *chunk, device=self.device)
        x = torch.zeros(rows, *chunk, device=self.device)
        t = sampler.table.levels[:1].to(self.device)
        told = [(name, value) for name, value in zip(names, found, strict=True) if name.startswith("cond_")]
        return {
            "encoder": ExportGraph(encoder, inputs, keys, names),
            "sampler": ExportGraph(
                sampler, (noise, x, x[..., 0].contiguous(), *found), ("noise", "previous", "mask", *names), ("chunk",)
            ),
            "denoiser": ExportGraph(
                DenoiserGraph(self, dtype),
                (x, t, *(value for _, value in told)),
                ("x", "t", *(name for name, _ in told)),
                ("clean",),
                shared=("t",),
            ),
        }
