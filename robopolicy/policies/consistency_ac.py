"""Consistency-AC: a consistency model as the actor of an actor-critic (Ding & Jin, ICLR 2024).

The actor maps noise to a chunk in one or two network calls, so that the critics' gradient can go through the whole
sampler. `ConsistencyAc.loss` alone is consistency training on the data, a behaviour-cloning policy;
`robopolicy.training.actor_critic` adds the critics.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from robopolicy.data.normalize import Normalizer
from robopolicy.diffusion.consistency import multistep_solver
from robopolicy.diffusion.edm import EdmConfig, EdmProcess
from robopolicy.diffusion.guidance import Guide
from robopolicy.diffusion.process import SamplerConfig, Solver
from robopolicy.diffusion.sampling import Generators, Steps, draw_noise, repeated_generators
from robopolicy.errors import UserError
from robopolicy.nets.context import Context
from robopolicy.nets.mlp import ChunkMlp
from robopolicy.nets.prefix import Prefix
from robopolicy.policies.base import Draws, ExportGraph
from robopolicy.policies.denoising import DenoisingConfig, DenoisingPolicy
from robopolicy.spec import PolicySpec
from robopolicy.values.critic import TwinCritic, choose

FIRST_LEVELS = 2
"""Noise levels when training begins (Song et al. 2023, s_0)."""
LOSS_SCALE = 100.0


@dataclass(frozen=True, kw_only=True)
class ConsistencyAcConfig(DenoisingConfig):
    """Architecture and sampling of `ConsistencyAc`; the defaults are the paper's.

    Attributes:
        process: the range and spacing of the noise levels.
        sampler: ``consistency`` with as many steps as ``sampling_levels`` has entries, or fewer.
        sampling_levels: falling noise levels of the sampler's steps.
        levels: noise levels at the end of training, which begins with two.
        hidden_dims: widths of the actor's hidden layers, and of each critic's.
        step_embed_dim: length of the noise-level embedding.
        candidates: chunks that are drawn for each chunk that is returned; above 1 the critics choose.
        temperature: of that choice, softmax(Q / temperature); 0 takes the best.
    """

    process: EdmConfig = field(default_factory=lambda: EdmConfig(sigma_min=0.002, sigma_max=80.0))
    sampler: SamplerConfig = field(default_factory=lambda: SamplerConfig("consistency", steps=2))
    sampling_levels: tuple[float, ...] = (80.0, 2.0)
    levels: int = 150
    hidden_dims: tuple[int, ...] = (256, 256, 256)
    step_embed_dim: int = 16
    candidates: int = 1
    temperature: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.hidden_dims or self.step_embed_dim < 4 or self.step_embed_dim % 2:
            raise UserError(
                f"hidden_dims={self.hidden_dims} must not be empty and step_embed_dim={self.step_embed_dim} must be "
                "even and at least 4."
            )
        if self.levels < FIRST_LEVELS or self.candidates < 1 or self.temperature < 0:
            raise UserError(
                f"levels={self.levels} must be at least {FIRST_LEVELS}, candidates={self.candidates} at least 1 and "
                f"temperature={self.temperature} at least 0."
            )
        low, high = self.process.sigma_min, self.process.sigma_max
        levels = self.sampling_levels
        if list(levels) != sorted(set(levels), reverse=True) or not levels or not low < levels[-1] <= levels[0] <= high:
            raise UserError(f"sampling_levels={levels} must fall, above sigma_min={low} and up to sigma_max={high}.")


class BoundaryProcess(EdmProcess):
    """Variance-exploding noise whose clean estimate is the consistency function f.

    ``f(x, t) = c_skip(t) x + c_out(t) F(x, t)`` with ``f(x, sigma_min) = x`` for every F (Song et al. 2023, app. C). F
    sees t as it is, like the release's, but x divided by EDM's ``sqrt(t^2 + sigma_data^2)``, unlike the release's: a
    network whose input deviates by 80 learns the modes of a toy more slowly.

    Args:
        config: range and spacing of the noise levels.
        sampling_levels: the sampler's levels, falling.
    """

    samplers = ("consistency",)

    def __init__(self, config: EdmConfig, sampling_levels: tuple[float, ...]) -> None:
        super().__init__(config)
        self.sampling_levels = sampling_levels

    @property
    def largest_noise(self) -> float:
        return self.sampling_levels[0]

    def network_level(self, t: Tensor) -> Tensor:
        return t.float()

    def clean_estimate(self, prediction: Tensor, x: Tensor, t: Tensor) -> Tensor:
        sigma, sd = t.float().view(-1, 1, 1), self.sigma_data
        above = sigma - self.config.sigma_min
        skip, out = sd**2 / (above**2 + sd**2), sd * above / (sigma**2 + sd**2).sqrt()
        return skip * x + out * prediction

    def draw_neighbours(
        self, count: int, progress: float, last: int, generator: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        """Draw levels t > u (count,) each, neighbours among N(progress), all pairs as likely.

        N grows from 2 to ``last`` with progress in [0, 1] (Song et al. 2023, app. C; Ding & Jin 2024, sec. 4.1).
        """
        count_now = math.ceil(math.sqrt(progress * (last**2 - FIRST_LEVELS**2) + FIRST_LEVELS**2) - 1) + 1
        sigmas = self.grid(count_now)
        index = torch.randint(0, count_now - 1, (count,), generator=generator)
        return sigmas[index], sigmas[index + 1]

    def make_solver(self, sampler: SamplerConfig) -> Solver:
        if sampler.steps > len(self.sampling_levels):
            raise UserError(
                f"sampler.steps={sampler.steps} must lie in 1..{len(self.sampling_levels)}, the number of "
                "sampling_levels."
            )
        return multistep_solver(torch.tensor(self.sampling_levels[: sampler.steps]), self.config.sigma_min)


class _Bounded(torch.autograd.Function):
    """Clips, but lets those gradients through that lead back inside (Hausknecht & Stone 2016).

    Data often lie at the bounds; an actor that has learned them sits there, and clipping alone would keep it there.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, low: Tensor, high: Tensor) -> Tensor:
        ctx.save_for_backward(x <= low, x >= high)
        return x.clamp(low, high)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        below, above = ctx.saved_tensors
        (gradient,) = gradients
        outward = (below & (gradient > 0)) | (above & (gradient < 0))  # descent goes against the gradient
        return gradient.masked_fill(outward, 0.0), None, None


class ConsistencyAc(DenoisingPolicy):
    """The actor, and the critics that choose among its candidates.

    The critics see the normalised observation history and the normalised executed part of a chunk, as one action.

    Args:
        config: architecture.
        spec: keys and horizons.
        normalizer: fitted normalisers of the states and the action.

    Raises:
        UserError: the spec has images, goals or tasks.
    """

    config: ConsistencyAcConfig
    process: BoundaryProcess

    def __init__(self, config: ConsistencyAcConfig, spec: PolicySpec, normalizer: Normalizer) -> None:
        found = [key.key for key in (*spec.images, *spec.goals)] + [task.instruction for task in spec.tasks]
        if found:
            raise UserError(f"consistency_ac reads states of one task only, without images and goals; found {found}.")
        super().__init__(config, spec, normalizer)
        self.process = BoundaryProcess(config.process, config.sampling_levels)
        context_dim, action_dim = self.encoder.size.flat, spec.action.dim
        chunk, prefix = (spec.horizon, action_dim), config.prefix_steps > 0
        self.denoiser = ChunkMlp(chunk, context_dim, config.hidden_dims, config.step_embed_dim, prefix)
        self.critic = TwinCritic(context_dim, spec.n_action_steps * action_dim, config.hidden_dims)
        self.critic.requires_grad_(False)  # the actor-critic trains it; consistency training alone does not
        self.training_progress = 1.0  # outside of training, losses are taken on the finest levels

    def draw(self, batch_size: int, generator: torch.Generator) -> Draws:
        shape = (batch_size, self.spec.horizon, self.spec.action.dim)
        noise = torch.randn(shape, generator=generator)
        t, u = self.process.draw_neighbours(batch_size, self.training_progress, self.config.levels, generator)
        return {"noise": noise, "t": t, "u": u} | self.draw_prefix(batch_size, generator)

    def loss(self, batch: Mapping[str, Tensor], draws: Draws) -> Tensor:
        """Consistency training (Song et al. 2023, algorithm 3) with the present weights as target (iCT, 2024)."""
        return self.consistency_loss(batch, draws, self)

    def consistency_loss(self, batch: Mapping[str, Tensor], draws: Draws, target: ConsistencyAc) -> Tensor:
        """Mean of ``100 / (t - u) (f(a + t z, t) - f_target(a + u z, u))^2`` over a batch of windows.

        Args:
            batch: windows in physical units.
            draws: noise z and levels t > u of each row.
            target: the policy whose f is the target, without gradient.
        """
        clean = self.normalizer[self.spec.action.key].normalize(batch[self.spec.action.key])
        context, t, u, prefix = self.encoder(self.normalized(batch)), draws["t"], draws["u"], self.prefix(clean, draws)
        estimate = self.clean_at(self.process.add_noise(clean, draws["noise"], t), t, context, prefix)
        with torch.no_grad():
            wanted = target.clean_at(self.process.add_noise(clean, draws["noise"], u), u, context, prefix)
        squared = (estimate - wanted).square()
        squared = squared.mean(dim=(1, 2)) if prefix is None else prefix.mean(squared)
        return (LOSS_SCALE / (t - u) * squared).mean()

    def clean_at(self, x: Tensor, t: Tensor, context: Context, prefix: Prefix | None = None) -> Tensor:
        """f at x (B, H, A) and each row's level t (B,)."""
        noise = self.denoiser.embed(self.process.network_level(t))
        return self.clean(x, t, noise, self.denoiser.condition(context), prefix)

    def propose(
        self, context: Context, generators: Generators, guides: Sequence[Guide] = (), recurrence: int = 1
    ) -> Tensor:
        """One normalised chunk (B, H, A) of the actor for each row, differentiable where no guide steers it."""
        return super().sample_normalized(context, None, generators, guides, recurrence)

    def steps(self, context: Context, domain: Tensor | None) -> Steps:
        steps = super().steps(context, domain)
        return replace(steps, estimate=lambda x, i: _Bounded.apply(steps.estimate(x, i), *self.bounds))

    @property
    def bounds(self) -> tuple[Tensor, Tensor]:
        """Smallest and largest normalised action of the data, (A,) each."""
        return self.normalizer[self.spec.action.key].bounds()

    def values(self, context: Context, chunks: Tensor) -> Tensor:
        """Both critics' values (2, B) of normalised chunks (B, H, A)."""
        return self.critic(context.flat(), chunks[:, self.spec.executed])

    def sample_normalized(
        self,
        context: Context,
        domain: Tensor | None,
        generators: Generators,
        guides: Sequence[Guide] = (),
        recurrence: int = 1,
    ) -> Tensor:
        rows, count = len(context.steps), self.config.candidates
        if count == 1 or guides:  # a guide belongs to the rows that it was made for
            return self.propose(context, generators, guides, recurrence)
        repeated = context.repeated(count)
        chunks = self.propose(repeated, repeated_generators(generators, count))
        values = self.values(repeated, chunks).amin(dim=0).view(rows, count)
        uniform = torch.special.ndtr(draw_noise((rows, 1), generators, values.device))[:, 0]
        chosen = choose(values, self.config.temperature, uniform)
        return chunks.view(rows, count, *chunks.shape[1:])[torch.arange(rows, device=chosen.device), chosen]

    def export_graphs(
        self, observations: Mapping[str, Tensor], dtype: torch.dtype = torch.float32
    ) -> dict[str, ExportGraph]:
        graphs = super().export_graphs(observations, dtype)
        if self.config.candidates > 1:
            keys = tuple(key.key for key in self.spec.observations)
            inputs = tuple(observations[key] for key in keys)
            encoder = _CriticEncoderGraph(self, keys)
            chunk = torch.zeros(len(inputs[0]), self.spec.horizon, self.spec.action.dim, device=self.device)
            with torch.no_grad():
                features = encoder(*inputs)
            graphs["critic_encoder"] = ExportGraph(encoder, inputs, keys, ("features",))
            graphs["critic"] = ExportGraph(_CriticGraph(self), (features, chunk), ("features", "chunk"), ("value",))
        return graphs


class _CriticEncoderGraph(nn.Module):
    """Observations in physical units to what the critics see of them, (B, F)."""

    def __init__(self, policy: ConsistencyAc, keys: tuple[str, ...]) -> None:
        super().__init__()
        self.policy, self.keys = policy, keys

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.policy.encoder(self.policy.normalized(dict(zip(self.keys, inputs, strict=True)))).flat()


class _CriticGraph(nn.Module):
    """Features (B, F) and chunks (B, H, A) in physical units to the smaller value (B,)."""

    def __init__(self, policy: ConsistencyAc) -> None:
        super().__init__()
        self.policy = policy

    def forward(self, features: Tensor, chunk: Tensor) -> Tensor:
        normalized = self.policy.normalizer[self.policy.spec.action.key].normalize(chunk)
        return self.policy.critic(features, normalized[:, self.policy.spec.executed]).amin(dim=0)
