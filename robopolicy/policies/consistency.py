"""Consistency Policy (Prasad et al., RSS 2024): a U-Net that jumps from noise to an action chunk in one to a few calls.

It is distilled from a diffusion policy as a consistency trajectory model (CTM, Kim et al. 2024), or trained without a
teacher as a consistency model (iCT, Song & Dhariwal 2024; easy consistency tuning, Geng et al. 2024).
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from robopolicy.data.normalize import Normalizer
from robopolicy.diffusion.consistency import ConsistencyProcess, heun_step, pseudo_huber
from robopolicy.diffusion.edm import EdmConfig
from robopolicy.diffusion.process import SamplerConfig
from robopolicy.errors import UserError
from robopolicy.nets.denoiser import Conditioning
from robopolicy.nets.prefix import Prefix
from robopolicy.nets.unet1d import ConditionalUnet1d
from robopolicy.policies.base import Draws
from robopolicy.policies.denoising import DenoisingPolicy
from robopolicy.policies.diffusion_unet import DiffusionUnet, DiffusionUnetConfig, check_unet
from robopolicy.spec import PolicySpec

STOP = "denoiser.film_stop.1.weight"
"""The only weights of a student that its teacher does not have; they start at zero."""


@dataclass(frozen=True, kw_only=True)
class ConsistencyConfig(DiffusionUnetConfig):
    """Architecture, training and sampling of `ConsistencyPolicy`.

    Attributes:
        process: the noise process, for distillation the teacher's; the paper has sigma_min 0.02 and sigma_max 80.
        sampler: ``consistency`` with any number of steps; each is one network call.
        bins: noise levels that distillation jumps between, and that sampling chooses from; without a teacher, how
            close the two levels of a training pair are in the end.
        start_deviation: standard deviation of the noise that sampling starts from; None: sigma_max, the level that the
            network is told. The paper's release starts from 1: its one-step policy is then almost deterministic.
        dsm_weight: weight of denoising score matching beside the distillation loss.
    """

    process: EdmConfig = field(default_factory=EdmConfig)
    sampler: SamplerConfig = field(default_factory=lambda: SamplerConfig("consistency", 3))
    bins: int = 80
    start_deviation: float | None = None
    dsm_weight: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.dsm_weight < 0:
            raise UserError(f"dsm_weight={self.dsm_weight} must be at least 0.")


class TrajectoryUnet1d(ConditionalUnet1d):
    """`ConditionalUnet1d` that is also told the noise level to stop at.

    The stop level passes through the same embedding as the level and adds to the modulation of all blocks through a
    projection that starts at zero: with the weights of a `ConditionalUnet1d` it computes the same, for all stop levels.

    Args:
        lowest: the level that it stops at where none is given.
        step_embed_dim: see `ConditionalUnet1d`, as the others.
    """

    def __init__(self, lowest: float, *, step_embed_dim: int, **network: Any) -> None:
        super().__init__(step_embed_dim=step_embed_dim, **network)
        self.lowest = lowest
        projection = nn.Linear(step_embed_dim, sum(self._film_dims), bias=False)
        nn.init.zeros_(projection.weight)
        self.film_stop = nn.Sequential(nn.Mish(), projection)

    def embed(self, level: Tensor, stop: Tensor | None = None) -> Tensor:
        """The part (N, M) of the modulation that depends on the noise levels (N,) to start from and to stop at."""
        stop = torch.full_like(level, self.lowest) if stop is None else stop
        return super().embed(level) + self.film_stop(self.step_encoder(stop))


class ConsistencyPolicy(DenoisingPolicy):
    """Jumps from noise to action chunks.

    Args:
        config: architecture.
        spec: keys and horizons.
        normalizer: fitted normalisers of the states and the action.

    Raises:
        UserError: the U-Net does not fit the horizon, or the levels are impossible.
    """

    process: ConsistencyProcess
    denoiser: TrajectoryUnet1d

    def __init__(self, config: ConsistencyConfig, spec: PolicySpec, normalizer: Normalizer) -> None:
        check_unet(config, spec.horizon)
        super().__init__(config, spec, normalizer)
        self.process = ConsistencyProcess(config.process, config.bins, config.start_deviation)
        lowest = self.process.network_level(torch.tensor(config.process.sigma_min))
        self.denoiser = TrajectoryUnet1d(
            lowest.item(),
            action_dim=spec.action.dim,
            cond_dim=self.encoder.size.flat,
            down_dims=config.down_dims,
            kernel_size=config.kernel_size,
            n_groups=config.n_groups,
            step_embed_dim=config.step_embed_dim,
            prefix=config.prefix_steps > 0,
        )
        self._teacher: tuple[DiffusionUnet, ...] = ()  # in a tuple: no module of this one, so not trained and not saved

    @classmethod
    def student(cls, teacher: DiffusionUnet, config: ConsistencyConfig) -> ConsistencyPolicy:
        """A policy to distil, with the teacher's weights: before training its network computes the same.

        It keeps a copy of the teacher for `loss`, and its encoder is the teacher's, frozen.

        Raises:
            UserError: network, noise process or what the encoder sees are not the teacher's.
        """
        for name, wanted in vars(teacher.config).items():
            found = getattr(config, name)
            if name not in ("sampler", "goal_dropout") and found != wanted:
                raise UserError(f"A student is built as its teacher: {name} is {found}, the teacher has {wanted}.")
        policy = cls(config, teacher.spec, copy.deepcopy(teacher.normalizer))
        policy.load_state_dict(teacher.state_dict() | {STOP: policy.state_dict()[STOP]})
        policy.encoder.requires_grad_(False)
        policy._teacher = (copy.deepcopy(teacher).requires_grad_(False).eval(),)
        return policy

    @property
    def teacher(self) -> DiffusionUnet | None:
        """Whom `loss` distils; None: `loss` is that of consistency training without a teacher."""
        return self._teacher[0] if self._teacher else None

    def _apply(self, *args: Any, **kwargs: Any) -> ConsistencyPolicy:
        for teacher in self._teacher:
            teacher._apply(*args, **kwargs)  # it goes to every device that this policy goes to
        return super()._apply(*args, **kwargs)

    def draw(self, batch_size: int, generator: torch.Generator) -> Draws:
        draws = super().draw(batch_size, generator)
        if self.teacher is None:
            draws["t"], draws["u"] = self.process.draw_neighbours(batch_size, generator, self.training_progress)
            return draws
        draws["t"], draws["u"], draws["s"] = self.process.draw_jumps(batch_size, generator)
        draws["dsm_t"] = self.process.draw_denoising_levels(batch_size, generator)
        draws["dsm_noise"] = torch.randn(draws["noise"].shape, generator=generator)
        return draws

    def loss(self, batch: Mapping[str, Tensor], draws: Draws) -> Tensor:
        action = self.spec.action.key
        clean = self.normalizer[action].normalize(batch[action], self.domain(batch))
        context = self.encoder(self.normalized(batch), draws.get("augmentation"), draws.get("told"))
        cond = self.denoiser.condition(context)
        if self.teacher is None:
            return self.consistency_loss(clean, cond, draws)
        return self.distillation_loss(clean, cond, self.teacher.denoiser.condition(context), draws)

    def consistency_loss(self, clean: Tensor, cond: Conditioning, draws: Draws) -> Tensor:
        """Two levels of one noise shall jump to the same end: no teacher, the present weights as target (iCT).

        The pseudo-Huber distance has the weight ``t / (t - u)``: within a stage of the schedule all levels count the
        same. With iCT's ``1 / (t - u)`` high levels, where sampling starts, hardly count.
        """
        t, u, noise, prefix = draws["t"], draws["u"], draws["noise"], self.prefix(clean, draws)
        end = torch.full_like(t, self.process.config.sigma_min)
        jumped = self.jump(self.process.add_noise(clean, noise, t), t, end, cond, prefix=prefix)
        with torch.no_grad():
            wanted = self.jump(self.process.add_noise(clean, noise, u), u, end, cond, prefix=prefix)
        return (_distance(jumped, wanted, prefix) * t / (t - u)).mean()

    def distillation_loss(self, clean: Tensor, cond: Conditioning, teacher_cond: Conditioning, draws: Draws) -> Tensor:
        """CTM's loss, and denoising score matching.

        The jump t -> s shall end where one step of the teacher t -> u and the jump u -> s end; both are continued to
        the lowest level and compared there. The target and the continuation use the present weights (target decay 0,
        as in iCT); the gradient passes through the continuation without reaching its weights. Score matching is of
        g(x, t, t), as in CTM: of G(x, t, sigma_min), as the release has it, would draw jumps to the mean of the data.

        All networks, the teacher's too, are shown the same known actions, which count in neither loss. On the way x has
        no meaning there: no network looks at it.
        """
        prefix = self.prefix(clean, draws)
        estimate_at = _shown(self.estimate, prefix and prefix.twice())
        t, u, s, dsm_t = draws["t"], draws["u"], draws["s"], draws["dsm_t"]
        end = torch.full_like(t, self.process.config.sigma_min)
        fixed = tuple(c.detach() for c in cond)
        x = self.process.add_noise(clean, draws["noise"], t)
        noised = self.process.add_noise(clean, draws["dsm_noise"], dsm_t)
        estimates = estimate_at(  # one call for both losses is faster than two
            torch.cat([x, noised]), torch.cat([t, dsm_t]), torch.cat([s, dsm_t]), tuple(c.repeat(2, 1) for c in cond)
        )
        estimate, denoised = estimates.chunk(2)
        jumped = self.jump(self.process.jump(estimate, x, t, s), s, end, fixed, frozen=True, prefix=prefix)
        with torch.no_grad():
            stepped = heun_step(lambda x, t: self._taught(x, t, teacher_cond, prefix), x, t, u)
            wanted = self.jump(self.jump(stepped, u, s, fixed, prefix=prefix), s, end, fixed, prefix=prefix)
        squared = (denoised - clean).square()
        squared = squared.mean((1, 2)) if prefix is None else prefix.mean(squared)
        error = self.process.denoising_weight(dsm_t) * squared
        return (_distance(jumped, wanted, prefix) + self.config.dsm_weight * error).mean()

    def jump(
        self,
        x: Tensor,
        t: Tensor,
        s: Tensor,
        cond: Conditioning,
        frozen: bool = False,
        prefix: Prefix | None = None,
    ) -> Tensor:
        """G(x, t, s): x (B, H, A) at levels t (B,) moved to levels s (B,); see `estimate`."""
        return self.process.jump(_shown(self.estimate, prefix)(x, t, s, cond, frozen), x, t, s)

    def estimate(
        self,
        x: Tensor,
        t: Tensor,
        s: Tensor,
        cond: Conditioning,
        frozen: bool = False,
        prefix: Prefix | None = None,
    ) -> Tensor:
        """g(x, t, s), (B, H, A); frozen: the gradient reaches x, but not the weights."""
        noise = self.denoiser.embed(self.process.network_level(t), self.process.network_level(s))
        seen = self.process.network_input(x, t)
        if prefix is not None:
            seen = prefix.shown(seen)
        if frozen:
            weights = {name: weight.detach() for name, weight in self.denoiser.named_parameters()}
            prediction = functional_call(self.denoiser, weights, (seen, noise.detach(), cond))
        else:
            prediction = self.denoiser(seen, noise, cond)
        return self.process.estimate(prediction.float(), x, t)

    def _taught(self, x: Tensor, t: Tensor, cond: Conditioning, prefix: Prefix | None) -> Tensor:
        """The teacher's clean-sample estimate (B, H, A) at x (B, H, A), t (B,)."""
        teacher = self._teacher[0]
        noise = teacher.denoiser.embed(teacher.process.network_level(t))
        return _shown(teacher.clean, prefix)(x, t, noise, cond)


def _shown(network: Callable[..., Tensor], prefix: Prefix | None) -> Callable[..., Tensor]:
    """The network, which is shown what is known."""
    return network if prefix is None else partial(network, prefix=prefix)


def _distance(a: Tensor, b: Tensor, prefix: Prefix | None) -> Tensor:
    """`pseudo_huber` of chunks (B, H, A) without what is known, (B,)."""
    return pseudo_huber(a, b) if prefix is None else pseudo_huber(prefix.without(a), prefix.without(b))
