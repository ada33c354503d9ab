"""Alignment: a trained policy learns what a frozen critic values, offline, so that nothing has to steer it later.

EDP (Kang et al. 2023, Efficient Diffusion Policies) adds the value of the clean estimate to the cloning loss: one
network call instead of a whole chain (`EdpLoss`). EDA (Chen et al. 2024, Efficient Diffusion Alignment) raises the
density of those of the policy's own chunks that the critic prefers (`EdaLoss`).
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from robopolicy.configuration import dataclass_from
from robopolicy.diffusion.consistency import ConsistencyProcess
from robopolicy.diffusion.sampling import repeated_generators
from robopolicy.errors import UserError
from robopolicy.nets.context import Context
from robopolicy.policies.base import Draws, Policy
from robopolicy.policies.consistency_ac import ConsistencyAc
from robopolicy.policies.denoising import DenoisingPolicy
from robopolicy.spec import check_keys
from robopolicy.steering.vgps import ChunkValues
from robopolicy.training.dataset import TrainingData
from robopolicy.training.finetune import FinetuneConfig, initial_policy
from robopolicy.training.loop import Run
from robopolicy.training.step import step_generator
from robopolicy.values.bundle import load_critic
from robopolicy.values.model import Critic

SEEDS = "candidate_seeds"
"""Draw: the randomness (B,) of each row's candidates."""
_STREAM = 2**40
"""Keeps those seeds apart from the randomness of the updates."""


@dataclass(frozen=True, kw_only=True)
class EdpConfig:
    """Settings of EDP.

    Attributes:
        eta: weight of the values beside cloning; 0 only clones.
    """

    eta: float = 1.0

    def __post_init__(self) -> None:
        if self.eta < 0:
            raise UserError(f"edp.eta={self.eta:g} must be at least 0.")


@dataclass(frozen=True, kw_only=True)
class EdaConfig:
    """Settings of EDA.

    Attributes:
        candidates: chunks K of the pretrained policy that are compared in each context.
        temperature: of the labels softmax(value / temperature), in units of the critic's values.
        beta: inverse scale of the log ratio to the pretrained policy; the larger, the closer to it the policy stays.
    """

    candidates: int = 8
    temperature: float = 1.0
    beta: float = 1.0

    def __post_init__(self) -> None:
        if self.candidates < 2:
            raise UserError(f"eda.candidates={self.candidates} must be at least 2, to be compared.")
        if self.temperature <= 0 or self.beta <= 0:
            raise UserError(f"eda: temperature={self.temperature:g} and beta={self.beta:g} must be above 0.")


@dataclass(frozen=True, kw_only=True)
class AlignConfig:
    """What is aligned with what, and how.

    Attributes:
        bundle: the policy to start from.
        critic: a bundle of ``robopolicy train-critic``, frozen.
        method: ``edp`` or ``eda``.
        edp, eda: settings of the method.
    """

    bundle: str
    critic: str
    method: Literal["edp", "eda"] = "edp"
    edp: EdpConfig = field(default_factory=EdpConfig)
    eda: EdaConfig = field(default_factory=EdaConfig)


class Judge:
    """What a frozen critic thinks of a policy's chunks in the windows of a training batch.

    Args:
        critic: of any dataset, with other normalisers and possibly another unit of length or angle.
        policy: whose chunks are valued.
        where: names the critic in errors.

    Attributes:
        values: see `ChunkValues`; its observations are a batch of windows.

    Raises:
        UserError: the critic acts in another space, sees what the policy's data does not hold, or does not know one of
            its tasks.
    """

    def __init__(self, critic: Critic, policy: DenoisingPolicy, where: str) -> None:
        spec = critic.spec
        check_keys({key.key: key for key in policy.spec.observations}, spec.observations, f"{where} and the policy")
        if spec.n_obs_steps > policy.spec.n_obs_steps:
            raise UserError(
                f"{where} sees {spec.n_obs_steps} observations, the policy's windows hold {policy.spec.n_obs_steps}. "
                f"Train it with task.n_obs_steps={policy.spec.n_obs_steps}."
            )
        self.values = ChunkValues(critic.requires_grad_(False).eval(), policy.spec, where)


def value_loss(values: Tensor) -> Tensor:
    """L_Q: minus the mean value (B,), in units of its mean magnitude, so that eta means the same for every critic."""
    return -values.mean() / values.detach().abs().mean().clamp(min=1e-6)


class EdpLoss(nn.Module):
    """``L_cloning + eta L_Q(a0)``, with a0 the clean estimate of the network call that the cloning loss makes.

    The paper's action approximation: the gradient of a value passes one network call and no chain of sampling steps.
    Losses that an architecture adds to the denoising error, e.g. for its experts' balance, are left out.

    Args:
        policy: is trained.
        judge: values chunks.
        config: settings.
    """

    def __init__(self, policy: DenoisingPolicy, judge: Judge, config: EdpConfig) -> None:
        super().__init__()
        self.policy, self.judge, self.config = policy, judge, config

    def forward(self, batch: Mapping[str, Tensor], draws: Draws) -> Tensor:
        policy, t = self.policy, draws["t"]
        seen = policy.noised(batch, draws)
        prediction = policy.denoiser(seen.x, policy.denoiser.embed(seen.level), seen.cond).float()
        cloned = seen.error(prediction)
        if self.config.eta == 0:
            return cloned
        action, domain = policy.normalizer[policy.spec.action.key], policy.domain(batch)
        x = policy.process.add_noise(action.normalize(batch[policy.spec.action.key], domain), draws["noise"], t)
        estimate = policy.process.clean_estimate(prediction, x, t).clamp(*action.bounds(domain))
        if seen.prefix is not None:
            estimate = torch.where(seen.prefix.known, seen.prefix.actions, estimate)
        values = self.judge.values(batch, action.unnormalize(estimate, domain)[:, None])
        return cloned + self.config.eta * value_loss(values[:, 0])


class EdaLoss(nn.Module):
    """Cross entropy between softmax(value / temperature) and softmax(log ratio) over K chunks of the pretrained policy.

    In the paper a policy is the gradient of a scalar network, the bottleneck diffusion model, whose output is the log
    density of noised actions; the log ratio is that of two such networks. Denoisers here predict chunks directly. Their
    log ratio is approximated as in Diffusion-DPO (Wallace et al. 2023): ``beta`` times the difference of the squared
    errors, summed over the chunk, of the pretrained and of the aligned network, at the same noised chunk. All
    candidates of a context share level and noise (in the paper, the level), which takes variance out of the comparison.
    Candidates are sampled anew for each update; the paper samples them once for the whole dataset.

    Args:
        policy: is trained; a copy of it as it is now is the pretrained one.
        judge: values chunks.
        config: settings.
    """

    def __init__(self, policy: DenoisingPolicy, judge: Judge, config: EdaConfig) -> None:
        super().__init__()
        self.policy, self.judge, self.config = policy, judge, config
        # in a tuple: no module of this one, so that it is neither trained nor part of the gradient's norm
        self._pretrained = (copy.deepcopy(policy).requires_grad_(False).eval(),)

    def forward(self, batch: Mapping[str, Tensor], draws: Draws) -> Tensor:
        policy, pretrained, count = self.policy, self._pretrained[0], self.config.candidates
        domain = policy.domain(batch)
        rows = None if domain is None else domain.repeat_interleave(count)
        # all candidates of a context share its noise
        t, noise = (draws[name].repeat_interleave(count, dim=0) for name in ("t", "noise"))
        with torch.no_grad():
            context = _context(pretrained, batch, draws, count)
            generators = [torch.Generator().manual_seed(seed) for seed in draws[SEEDS].tolist()]
            chunks = pretrained.sample_normalized(context, rows, repeated_generators(generators, count))
            physical = policy.normalizer[policy.spec.action.key].unnormalize(chunks, rows)
            values = self.judge.values(batch, physical.view(-1, count, *chunks.shape[1:]))
            labels = (values / self.config.temperature).softmax(dim=1)
            before = _squared_error(pretrained, context, chunks, noise, t)
        after = _squared_error(policy, _context(policy, batch, draws, count), chunks, noise, t)
        ratio = self.config.beta * (before - after).view(-1, count)
        return -(labels * ratio.log_softmax(dim=1)).sum(dim=1).mean()


def _context(policy: DenoisingPolicy, batch: Mapping[str, Tensor], draws: Draws, count: int) -> Context:
    """The encoded windows, each ``count`` times in a row."""
    seen = policy.encoder(policy.normalized(batch), draws.get("augmentation"), draws.get("told"))
    return seen.repeated(count)


def _squared_error(policy: DenoisingPolicy, context: Context, clean: Tensor, noise: Tensor, t: Tensor) -> Tensor:
    """Squared error (R,) of the network's prediction, summed over the normalised chunk (R, H, A)."""
    process, denoiser = policy.process, policy.denoiser
    x = process.network_input(process.add_noise(clean, noise, t), t)
    prediction = denoiser(x, denoiser.embed(process.network_level(t)), denoiser.condition(context))
    return (prediction.float() - process.target(clean, noise, t)).square().sum(dim=(1, 2))


class AlignRun(Run):
    """A training run with the loss of an alignment; ``plain`` holds the entries of `AlignConfig`.

    Its bundles are ordinary policies.
    """

    def _wrapped(self) -> nn.Module:
        if self.config.train.compile:
            raise UserError("robopolicy align does not compile its loss; set train.compile=false.")
        config = align_config(self.plain)
        assert isinstance(self.policy, DenoisingPolicy)
        critic, _ = load_critic(Path(config.critic), self.processes.device)
        judge = Judge(critic, self.policy, f"the critic {config.critic}")
        loss: nn.Module = (
            EdpLoss(self.policy, judge, config.edp)
            if config.method == "edp"
            else EdaLoss(self.policy, judge, config.eda)
        )
        return DistributedDataParallel(loss) if self.processes.several else loss

    def draws(self, step: int) -> dict[str, Tensor]:
        train = self.config.train
        generator = step_generator(train.seed, _STREAM + step)
        seeds = torch.randint(2**62, (train.batch_size,), generator=generator)
        return {**super().draws(step), SEEDS: seeds[self.processes.rows(train.batch_size)]}


def align_config(plain: Mapping[str, Any]) -> AlignConfig:
    """The alignment's part of a run's configuration."""
    return dataclass_from(AlignConfig, {name: plain[name] for name in AlignConfig.__dataclass_fields__}, "")


def policy_to_align(bundle: str, architecture: Mapping[str, Any], data: TrainingData) -> Policy:
    """The bundle's policy with its normalisers, ready to be trained on the data.

    Raises:
        UserError: the data does not fit, or the bundle holds no policy with clean estimates to align.
    """
    start = FinetuneConfig(bundle=bundle, mode="full", normalization="keep")
    policy = initial_policy(start, architecture, data)
    if (
        not isinstance(policy, DenoisingPolicy)
        or isinstance(policy.process, ConsistencyProcess)
        or isinstance(policy, ConsistencyAc)
    ):
        raise UserError(
            f"{bundle} holds a '{architecture['name']}', which predicts no clean estimates at every noise level. Align "
            "its teacher and distil that, or train with robopolicy train-rl."
        )
    return policy
