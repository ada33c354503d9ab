"""Steering towards outcomes, and away from others, by the gradient of a latent dynamics model.

Du & Song, DynaGuide: Steering Diffusion Policies with Active Dynamic Guidance, NeurIPS 2025. The policy's score gets
the gradient of ``logsumexp_i(-|z - z_i+| / sigma) - logsumexp_j(-|z - z_j-| / sigma)``, with z the outcome that the
model predicts for the chunk, z_i+ the outcomes to reach and z_j- those to avoid. Two differences from the paper's
release: goals are embedded as observations, not pushed through the dynamics with a padded action, and a step that is
repeated is noised again first (`robopolicy.diffusion.sampling.sample_chunks`), where the release denoises too far.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from robopolicy.data.goal_file import load_goals
from robopolicy.diffusion.guidance import EnergyGuide, Guide, Space
from robopolicy.dynamics.bundle import load_dynamics
from robopolicy.dynamics.latents import OutcomeKey
from robopolicy.dynamics.model import OutcomeModel
from robopolicy.dynamics.noise_levels import log_snr
from robopolicy.errors import UserError
from robopolicy.policies.denoising import DenoisingPolicy
from robopolicy.spec import PolicySpec, check_keys
from robopolicy.steering.base import Scene, Steering

LARGEST_SPREAD = 2.0
"""By how much the scales of two normalisations may differ among the entries of an action, for noisy chunks."""


@dataclass(frozen=True, kw_only=True)
class DynaGuideConfig:
    """How a dynamics model steers.

    Attributes:
        dynamics: bundle of `robopolicy train-dynamics`.
        positive: goals to reach, any of them. A goal is ``DATASET#EPISODE`` (its last step), ``DATASET#EPISODE@STEP``,
            ``DATASET?behaviour=NAME`` (the last steps of episodes of that behaviour), an image file, or a mapping from
            the outcome's keys to values in physical units or image files.
        negative: goals to stay away from; at least one of the two must have goals.
        scale: strength s; 0 changes nothing.
        temperature: the paper's sigma, in the units of latents: small, only the nearest goal counts and pulls hard.
        space: on what the model is evaluated, see `robopolicy.diffusion.guidance.Space`; the paper's is ``noisy``.
        start, stop: shares of the network calls between which it acts.
        recurrence: how often each denoising step is taken (the paper's M).
        keys: outcome keys, and columns of states, that count; empty: all that the model predicts.
        goals_per_behaviour: at most so many episodes of a behaviour.
    """

    dynamics: str
    positive: tuple[Any, ...] = ()
    negative: tuple[Any, ...] = ()
    scale: float = 1.5
    temperature: float = 0.1
    space: Space = "noisy"
    start: float = 0.0
    stop: float = 1.0
    recurrence: int = 1
    keys: tuple[OutcomeKey, ...] = ()
    goals_per_behaviour: int = 20

    def __post_init__(self) -> None:
        if self.scale < 0:
            raise UserError(f"steering.dynaguide.scale={self.scale} must be at least 0; what to avoid is negative.")
        if self.temperature <= 0:
            raise UserError(f"steering.dynaguide.temperature={self.temperature} must be above 0.")
        if not 0 <= self.start < self.stop <= 1:
            raise UserError(f"steering.dynaguide: 0 <= start < stop <= 1, found start={self.start}, stop={self.stop}.")
        if self.recurrence < 1 or self.goals_per_behaviour < 1:
            raise UserError(
                f"steering.dynaguide: recurrence={self.recurrence} and goals_per_behaviour={self.goals_per_behaviour} "
                "must be at least 1."
            )


class DynaGuide(Steering):
    """DynaGuide for any denoising policy with the model's action.

    Args:
        config: goals and strength.
        policy: the policy that is steered.

    Attributes:
        config: the argument.
        model: the dynamics model.

    Raises:
        UserError: the bundle or a goal cannot be read, or model and policy do not fit.
    """

    def __init__(self, config: DynaGuideConfig, policy: DenoisingPolicy) -> None:
        self.config = config
        self.model, _ = load_dynamics(Path(config.dynamics), policy.device)
        if config.space == "noisy" and not self.model.understands_noise:
            raise UserError(
                f"{config.dynamics} was trained on clean chunks only. Set steering.dynaguide.space=clean, or train it "
                "with dynamics.noise_share above 0."
            )
        self._units = ChunkUnits(self.model, policy, config)
        self._entries = self.model.latent_entries(config.keys, "steering.dynaguide.keys")
        self.observations = self.model.spec.observations
        self.n_obs_steps = self.model.spec.n_obs_steps
        self.recurrence = config.recurrence if config.scale else 1
        self.set_goals(config.positive, config.negative)

    def set_goals(self, positive: Sequence[Any], negative: Sequence[Any]) -> None:
        """Pursue other goals from the next chunk on, for all robots; see `DynaGuideConfig`.

        Raises:
            UserError: there is no goal at all, or one that cannot be read; then the goals before stay.
        """
        if not (positive or negative):
            raise UserError("steering.dynaguide needs goals: positive=[…] to reach, negative=[…] to avoid, or both.")
        self._positive, self._negative = (
            self._latents(positive, "steering.dynaguide.positive"),
            self._latents(negative, "steering.dynaguide.negative"),
        )

    @torch.no_grad()
    def _latents(self, goals: Sequence[Any], where: str) -> Tensor:
        """(N, entries) latents of goals."""
        keys = self.model.spec.goals
        values = [
            goal
            for i, place in enumerate(goals)
            for goal in load_goals(place, keys, self.config.goals_per_behaviour, f"{where}[{i}]")
        ]
        if not values:
            return torch.zeros(0, len(self._entries), device=self.model.device)
        columns = {key.key: torch.stack([torch.tensor(goal[key.key]) for goal in values]) for key in keys}
        latents = self.model.target({key: value.to(self.model.device) for key, value in columns.items()})
        return latents[:, self._entries]

    def guide(self, scene: Scene) -> Guide | None:
        if self.config.scale == 0:
            return None
        with torch.no_grad():
            history = {key.key: scene.history(key.key, self.n_obs_steps) for key in self.observations}
            features = scene.rows(self.model.encode(history))
        domain = None if scene.domain is None else scene.rows(scene.domain)

        def log_weight(chunks: Tensor, signal: Tensor, noise: Tensor) -> Tensor:
            z = self.model.outcome(features, *self._units.network_input(chunks, signal, noise, domain))
            return goal_log_weight(z[:, self._entries], self._positive, self._negative, self.config.temperature)

        config = self.config
        return EnergyGuide(log_weight, config.scale, config.space, config.start, config.stop)


def goal_log_weight(z: Tensor, positive: Tensor, negative: Tensor, temperature: float) -> Tensor:
    """DynaGuide's metric, (R,): larger where the outcome is near a positive and far from every negative goal.

    Args:
        z: (R, Z) predicted outcomes.
        positive, negative: (P, Z) and (N, Z) goals; one of them may be empty.
        temperature: sigma.
    """

    def near(goals: Tensor) -> Tensor:
        distance = torch.linalg.vector_norm(z[:, None] - goals, dim=2)
        return (-distance / temperature).logsumexp(dim=1)

    weight = z.new_zeros(len(z))
    if len(positive):
        weight = weight + near(positive)
    if len(negative):
        weight = weight - near(negative)
    return weight


class ChunkUnits:
    """From a policy's noised chunks to those that an outcome model understands.

    Both normalise actions by affine maps, so that a chunk ``x = a x0 + s n`` of the policy is
    ``alpha x + a beta = a (alpha x0 + beta) + (alpha s) n`` for the model: noised to the same signal level, and to
    ``alpha s``. Where alpha differs among the entries of an action, so does that noise level; their geometric mean
    stands for all. Clean chunks are converted exactly in any case.

    Args:
        model: the outcome model.
        policy: the policy.
        config: where the model is from and on what it is evaluated, for errors.

    Raises:
        UserError: other actions, a chunk of the model that is not part of the policy's, or noise levels that differ too
            much.
    """

    def __init__(self, model: OutcomeModel, policy: DenoisingPolicy, config: DynaGuideConfig) -> None:
        ours, theirs = policy.spec, model.spec
        check_keys({ours.action.key: ours.action}, (theirs.action,), f"The policy and the dynamics {config.dynamics}")
        if abs(theirs.fps - ours.fps) > 0.01 * ours.fps:
            raise UserError(
                f"{config.dynamics} was trained for {theirs.fps:g} control steps per second, the policy acts at "
                f"{ours.fps:g}. Train it on data of the policy's rate."
            )
        self._window = _common_window(ours, theirs, config.dynamics)
        wanted, given = model.normalizer[theirs.action.key], policy.normalizer[ours.action.key]
        self._alpha = wanted.scale / given.scale
        self._beta = wanted.offset - self._alpha * given.offset
        spread = (self._alpha.amax(dim=-1) / self._alpha.amin(dim=-1)).max().item()
        if config.space == "noisy" and spread > LARGEST_SPREAD:
            raise UserError(
                f"{config.dynamics} normalises actions by other ranges than the policy: the ratio differs {spread:.1f}-"
                f"fold among the entries, wanted at most {LARGEST_SPREAD:g}-fold for noisy chunks. Train the dynamics "
                "on the policy's dataset, or set steering.dynaguide.space=clean."
            )

    def network_input(
        self, chunks: Tensor, signal: Tensor, noise: Tensor, domain: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """What `OutcomeModel.outcome` takes.

        Args:
            chunks: (R, H, A) of the policy, normalised, at ``signal`` and ``noise`` (1, 1, 1).
            domain: (R,) which of the policy's normalisers each row uses.

        Returns:
            Variance-preserving chunks (R, H', A) in the model's units, and their log signal-to-noise ratios, (1,) or
            (R,).
        """
        alpha, beta = self._alpha, self._beta
        if domain is not None:
            alpha, beta = alpha[domain, None], beta[domain, None]
        noise = alpha.log().mean(dim=-1, keepdim=True).exp() * noise
        x = alpha * chunks[:, self._window] + signal * beta
        return x * (signal**2 + noise**2).rsqrt(), log_snr(signal, noise).flatten()


def _common_window(policy: PolicySpec, model: PolicySpec, where: str) -> slice:
    """The part of the policy's chunk that the model wants; both count from their oldest conditioning observation."""
    first = policy.n_obs_steps - model.n_obs_steps
    if first < 0 or first + model.horizon > policy.horizon:
        raise UserError(
            f"{where} wants chunks of horizon {model.horizon} from n_obs_steps={model.n_obs_steps}, which the policy's "
            f"of horizon {policy.horizon} from n_obs_steps={policy.n_obs_steps} do not hold. Train the dynamics with "
            f"task.horizon={policy.horizon} task.n_obs_steps={policy.n_obs_steps}."
        )
    return slice(first, first + model.horizon)
