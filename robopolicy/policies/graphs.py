"""The parts of a denoising policy that an inference engine runs, as modules of tensors without random numbers.

The encoder runs once per observation, preprocessing included. The sampler is the whole way from noise to a chunk in
physical units, with the solver's steps as constants; `SamplerStep` is one of its network calls, for graphs that loop.
The denoiser alone is for guidance from outside. Soft-mask real-time chunking is part of the sampler: every clean
estimate becomes ``(1 - mask) clean + mask previous``, the projection that real-time chunking (Black et al. 2025) with
an identity Jacobian amounts to; a mask of zeros samples freely. Policies that were trained with a prefix are shown the
actions whose mask is exactly 1, as far as they have learned to continue them (`robopolicy.nets.prefix`), and give every
action whose mask is exactly 1 back as it is.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from robopolicy.diffusion.step_table import step_table
from robopolicy.errors import UserError
from robopolicy.nets.denoiser import Conditioning, Denoiser
from robopolicy.nets.experts import RoutedNoise
from robopolicy.nets.prefix import Prefix, known_actions
from robopolicy.spec import TASK

if TYPE_CHECKING:
    from robopolicy.policies.denoising import DenoisingPolicy


class EncoderGraph(nn.Module):
    """Observations in physical units to what a sampler needs of them, rows first.

    The conditioning of the denoiser; with classifier-free guidance the conditioning that is told nothing, too; where
    datasets were normalised apart, each row's action normaliser and bounds, (B, 4, A).

    Args:
        policy: in evaluation mode.
        keys: of the inputs, in order.
        dtype: in which the image encoders compute; everything else is float32.
    """

    def __init__(self, policy: DenoisingPolicy, keys: Sequence[str], dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        if dtype != torch.float32:
            policy = copy.deepcopy(policy)
            for encoder in policy.encoder.image_encoders.values():
                encoder.to(dtype)
                encoder.register_forward_pre_hook(lambda _, inputs: tuple(x.to(dtype) for x in inputs))
                encoder.register_forward_hook(lambda _, inputs, features: features.float())
        self.policy, self.keys = policy, list(keys)

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        policy = self.policy
        observations = dict(zip(self.keys, inputs, strict=True))
        context = policy.encoder(policy.normalized(observations))
        found = policy.denoiser.condition(context)
        if policy.sampler.guidance != 1:
            found = (*found, *policy.denoiser.condition(policy.encoder.untold(context)))
        if policy.spec.domains > 1:
            domain = policy.domain(observations)
            action = policy.normalizer[policy.spec.action.key]
            low, high = (bound.squeeze(1) for bound in action.bounds(domain))
            found = (*found, torch.stack([action.scale[domain], action.offset[domain], low, high], dim=1))
        return tuple(part.clone() if any(part is given for given in inputs) else part for part in found)


class Network(nn.Module):
    """A denoiser that computes in another precision; levels are embedded in float32.

    Args:
        denoiser: in float32.
        dtype: of weights and activations.
    """

    def __init__(self, denoiser: Denoiser, dtype: torch.dtype) -> None:
        super().__init__()
        self.denoiser = denoiser if dtype == torch.float32 else copy.deepcopy(denoiser).to(dtype)
        self.dtype = dtype

    def forward(self, x: Tensor, noise: Any, cond: Conditioning) -> Tensor:
        cast = tuple(c.to(self.dtype) if c.is_floating_point() else c for c in cond)
        return self.denoiser(x.to(self.dtype), self._cast(noise), cast).float()

    def _cast(self, noise: Any) -> Any:
        if isinstance(noise, RoutedNoise):  # its experts are chosen already
            return replace(noise, embedding=noise.embedding.to(self.dtype))
        return noise.to(self.dtype)


class SamplerStep(nn.Module):
    """One network call of a sampler and the solver's step after it; every number of the step is an input.

    Args:
        policy: in evaluation mode.
        dtype: in which the denoiser computes; the steps are float32.
    """

    may_know: Tensor

    def __init__(self, policy: DenoisingPolicy, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        if (policy.sampler.guidance_threshold or 2.0) <= 1:
            raise UserError(
                "Adaptive guidance decides while it samples, which a graph cannot. Set sampler.guidance_threshold=2, "
                "which is never reached."
            )
        self.network = Network(policy.denoiser, dtype)
        self.guidance = policy.sampler.guidance
        self.prefix_steps = policy.config.prefix_steps
        longest = known_actions(policy.spec, torch.tensor([self.prefix_steps], device=policy.device))
        self.register_buffer("may_know", longest, persistent=False)

    def forward(
        self,
        x: Tensor,
        before: tuple[Tensor, Tensor],
        z: Tensor | None,
        row: Sequence[Any],
        noise: Any,
        target: tuple[Tensor, Tensor],
        bounds: tuple[Tensor, Tensor],
        cond: Conditioning,
    ) -> tuple[Tensor, Tensor]:
        """The next x and this call's clean estimate, (B, H, A) each.

        Args:
            x: (B, H, A).
            before: x and the clean estimate of the call before.
            z: (B, H, A) standard normal, where the step adds noise.
            row: of `StepTable`, numbers or tensors.
            noise: the embedded level.
            target: the previous chunk (B, H, A), normalised, and the mask (B, H, 1).
            bounds: smallest and largest normalised action.
            cond: the conditioning, twice as long with guidance.
        """
        scale, skip, out, *steps = row
        previous, mask = target
        seen = scale * x
        if self.prefix_steps:
            seen = Prefix(previous, (mask == 1) & self.may_know).shown(seen)
        estimate = skip * x + out * self._predict(seen, noise, cond)
        clean = estimate.clamp(*bounds)
        clean = clean + mask * (previous - clean)
        terms = [(steps[0], x), (steps[1], clean), (steps[2], before[0]), (steps[3], before[1])]
        if z is not None:
            terms.append((steps[4], z))
        parts = [c * part for c, part in terms if isinstance(c, Tensor) or c != 0]
        return sum(parts[1:], start=parts[0]), clean

    def _predict(self, x: Tensor, noise: Any, cond: Conditioning) -> Tensor:
        if self.guidance == 1:
            return self.network(x, noise, cond)
        # estimates are affine in the prediction, so that mixing predictions mixes estimates
        half = len(cond) // 2
        both = tuple(torch.cat([a, b]) for a, b in zip(cond[:half], cond[half:], strict=True))
        told, untold = self.network(torch.cat([x, x]), noise, both).chunk(2)
        return untold + self.guidance * (told - untold)


class SamplerGraph(nn.Module):
    """Noise (B, N, H, A) to chunks (B, H, A) in physical units, all network calls unrolled.

    Where experts are chosen by the noise level, each unrolled call has its own as constants.

    Args:
        policy: in evaluation mode, with the sampler to capture.
        dtype: in which the denoiser computes; solver and normaliser are float32.
    """

    def __init__(self, policy: DenoisingPolicy, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.step = SamplerStep(policy, dtype)
        self.action_map = ActionMap(policy)
        self.table = step_table(policy.process, policy.process.solver(policy.sampler))
        with torch.no_grad():
            levels = policy.process.network_level(self.table.levels.to(policy.device))
            self._chosen = policy.denoiser.at_levels(levels)
        self._rows = self.table.rows.tolist()
        for i, level in enumerate(self._chosen):  # buffers move with the module, and compilers keep them whole
            embedding = level.embedding if isinstance(level, RoutedNoise) else level
            self.register_buffer(f"level_{i}", embedding.clone(), persistent=False)

    def _level(self, i: int) -> Any:
        chosen, embedding = self._chosen[i], self.get_buffer(f"level_{i}")
        return replace(chosen, embedding=embedding) if isinstance(chosen, RoutedNoise) else embedding

    def forward(self, noise: Tensor, previous: Tensor, mask: Tensor, *found: Tensor) -> Tensor:
        """Sample.

        Args:
            noise: (B, N, H, A) standard normal.
            previous: (B, H, A) the chunk to agree with, physical units.
            mask: (B, H) how far each action must agree, in [0, 1].
            found: from `EncoderGraph`.
        """
        cond, action = self.action_map(found)
        target = action.normalize(previous), mask.unsqueeze(-1)
        x = noise[:, 0] * self.table.start
        before = (x, x)
        for i, (row, drawn) in enumerate(zip(self._rows, self.table.draws, strict=True)):
            z = noise[:, drawn] if drawn else None
            after, clean = self.step(x, before, z, row, self._level(i), target, action.bounds, cond)
            x, before = after, (x, clean)
        chunk = action.unnormalize(x)
        return torch.where(mask.unsqueeze(-1) == 1, previous, chunk) if self.step.prefix_steps else chunk


class LoopedStep(nn.Module):
    """One step of `SamplerGraph` with all that differs between the steps as inputs, for a graph that loops.

    Experts are chosen inside, since a graph's loop has no constants of its own for each round.

    Args:
        policy: in evaluation mode, with the sampler to capture.
        dtype: in which the denoiser computes.

    Attributes:
        levels: (N, ...) embedded levels, the input ``level`` of each step.
    """

    def __init__(self, policy: DenoisingPolicy, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.step, self.action_map = SamplerStep(policy, dtype), ActionMap(policy)
        self.table = step_table(policy.process, policy.process.solver(policy.sampler))
        with torch.no_grad():
            self.levels = policy.denoiser.embed(policy.process.network_level(self.table.levels.to(policy.device)))

    def forward(
        self,
        x: Tensor,
        previous_x: Tensor,
        previous_clean: Tensor,
        z: Tensor,
        row: Tensor,
        level: Tensor,
        previous: Tensor,
        mask: Tensor,
        *found: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """The next x and this call's clean estimate, (B, H, A) each; row (8,), level (1, ...), others as there."""
        cond, action = self.action_map(found)
        target = action.normalize(previous), mask.unsqueeze(-1)
        return self.step(x, (previous_x, previous_clean), z, row.unbind(0), level, target, action.bounds, cond)


class RowActions:
    """The affine map of the actions and their bounds, for all rows or for each."""

    def __init__(self, scale: Tensor, offset: Tensor, low: Tensor, high: Tensor) -> None:
        self.scale, self.offset, self.bounds = scale, offset, (low, high)

    def normalize(self, x: Tensor) -> Tensor:
        return x * self.scale + self.offset

    def unnormalize(self, x: Tensor) -> Tensor:
        return (x - self.offset) / self.scale


class ActionMap(nn.Module):
    """Splits what `EncoderGraph` gives into the conditioning and the action's normaliser."""

    scale: Tensor
    offset: Tensor
    low: Tensor
    high: Tensor

    def __init__(self, policy: DenoisingPolicy) -> None:
        super().__init__()
        action = policy.normalizer[policy.spec.action.key]
        self.domains = policy.spec.domains
        if self.domains == 1:
            low, high = action.bounds()
            for name, value in (("scale", action.scale), ("offset", action.offset), ("low", low), ("high", high)):
                self.register_buffer(name, value.detach().clone(), persistent=False)

    def forward(self, found: tuple[Tensor, ...]) -> tuple[Conditioning, RowActions]:
        if self.domains == 1:
            return found, RowActions(self.scale, self.offset, self.low, self.high)
        *cond, rows = found
        scale, offset, low, high = rows.unsqueeze(2).unbind(1)  # (B, 1, A) each
        return tuple(cond), RowActions(scale, offset, low, high)


class DenoiserGraph(nn.Module):
    """x (B, H, A), its level t (1,) and the conditioning to the clean-sample estimate (B, H, A), not clipped."""

    def __init__(self, policy: DenoisingPolicy, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.policy = policy
        self.network = Network(policy.denoiser, dtype)

    def forward(self, x: Tensor, t: Tensor, *cond: Tensor) -> Tensor:
        process = self.policy.process
        noise = self.policy.denoiser.embed(process.network_level(t))
        prediction = self.network(process.network_input(x, t), noise, cond)
        return process.clean_estimate(prediction, x, t)


def encoder_outputs(policy: DenoisingPolicy, count: int) -> tuple[str, ...]:
    """Names of what `EncoderGraph` returns, ``count`` tensors."""
    count -= policy.spec.domains > 1
    told = count if policy.sampler.guidance == 1 else count // 2
    names = [f"cond_{i}" for i in range(told)] + [f"untold_{i}" for i in range(count - told)]
    return (*names, "action_map") if policy.spec.domains > 1 else tuple(names)


def encoder_keys(policy: DenoisingPolicy) -> tuple[str, ...]:
    """Names of the encoder's inputs."""
    spec = policy.spec
    keys = [key.key for key in spec.observations] + [f"goal.{key.key}" for key in spec.goals]
    return (*keys, TASK) if spec.tasks else tuple(keys)
