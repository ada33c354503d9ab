"""Consistency-AC (Ding & Jin, ICLR 2024): offline on a dataset, then online with episodes of its own.

One update: the critics regress the clipped double-Q target at the averaged actor's chunk; the actor minimises
consistency loss + eta * L_Q, where L_Q's gradient goes through critics and sampler. The averaged weights are at once
the consistency target, the actor of the Bellman target, the target critics, and what is evaluated and deployed.
"""

from __future__ import annotations

import json
import logging
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from robopolicy.data.mixture import MixtureDataset
from robopolicy.data.record import Episode
from robopolicy.data.schema import ArraySpec
from robopolicy.data.store import EpisodeStore
from robopolicy.data.transitions import RewardKind, Transitions, store_transitions
from robopolicy.errors import UserError
from robopolicy.policies.base import Draws, Policy
from robopolicy.policies.consistency_ac import ConsistencyAc
from robopolicy.spec import PolicySpec
from robopolicy.training.best import BestBundles
from robopolicy.training.checkpoint import has_checkpoint, write_whole
from robopolicy.training.dataset import TrainingData, open_datasets
from robopolicy.training.distributed import Processes, join_processes
from robopolicy.training.loop import Evaluate, Run, RunConfig
from robopolicy.training.metrics import MetricsLog
from robopolicy.training.step import learning_rate, step_generator
from robopolicy.values.critic import bellman_target, value_bounds

log = logging.getLogger(__name__)

Collect = Callable[[Policy, Sequence[int]], Sequence[Episode]]
"""Plays one episode of the policy for each seed."""
BOTH = 2  # critics


@dataclass(frozen=True)
class OnlineConfig:
    """Going on with episodes of the policy's own.

    Attributes:
        after: updates on the dataset alone before the first collection; None: never collect.
        every: updates between two collections.
        episodes: episodes of one collection, played by the averaged policy.
        share: part of each batch that comes from these episodes.
        first_seed: seed of the first episode; the others follow.
    """

    after: int | None = None
    every: int = 1000
    episodes: int = 10
    share: float = 0.5
    first_seed: int = 400_000

    def __post_init__(self) -> None:
        if (self.after or 0) < 0 or self.every < 1 or self.episodes < 1 or self.first_seed < 0:
            raise UserError(
                f"rl.online: after={self.after} and first_seed={self.first_seed} must be at least 0, "
                f"every={self.every} and episodes={self.episodes} at least 1."
            )
        if not 0 < self.share <= 1:
            raise UserError(f"rl.online.share={self.share} must lie above 0 and up to 1.")

    def episodes_at(self, step: int) -> int:
        """How many episodes there must be before update number ``step`` (from 0)."""
        if self.after is None or step < self.after:
            return 0
        return self.episodes * (1 + (step - self.after) // self.every)


@dataclass(frozen=True)
class ActorCriticConfig:
    """What the actor-critic adds to consistency training.

    Attributes:
        eta: weight of the critics' opinion against the data's; 0 clones the behaviour.
        gamma: discount of one control step; a chunk of n steps is discounted with ``gamma^n``.
        reward: where rewards come from, see `robopolicy.data.transitions.RewardKind`.
        online: collecting.
    """

    eta: float = 1.0
    gamma: float = 0.99
    reward: RewardKind = "success"
    online: OnlineConfig = field(default_factory=OnlineConfig)

    def __post_init__(self) -> None:
        if self.eta < 0 or not 0 <= self.gamma < 1:
            raise UserError(
                f"rl.eta={self.eta} must be at least 0 and rl.gamma={self.gamma} at 0 or above and below 1."
            )


def critic_loss(
    policy: ConsistencyAc,
    averaged: ConsistencyAc,
    batch: Transitions,
    bounds: tuple[float, float],
    generator: torch.Generator,
) -> tuple[Tensor, Tensor]:
    """Squared Bellman error, summed over the two critics.

    Args:
        policy: its critics learn.
        averaged: gives the next chunk and its value.
        batch: transitions.
        bounds: of what values are possible.
        generator: the sampler's randomness.

    Returns:
        The loss, and the values (2, B) of the batch's chunks.
    """
    with torch.no_grad():
        following = averaged.encoder(averaged.normalized(batch.next_observations))
        chunk = averaged.propose(following, generator)
        target = bellman_target(batch.reward, batch.discount, averaged.values(following, chunk), bounds)
    context = policy.encoder(policy.normalized(batch.observations))
    values = policy.values(context, policy.normalizer[policy.spec.action.key].normalize(batch.action))
    return (values - target).square().mean(dim=1).sum(), values.detach()


def value_loss(policy: ConsistencyAc, batch: Transitions, generator: torch.Generator) -> Tensor:
    """L_Q: minus the mean value of the actor's chunks, one critic's in units of the other's mean magnitude."""
    context = policy.encoder(policy.normalized(batch.observations))
    values = policy.values(context, policy.propose(context, generator))
    one = int(torch.randint(0, BOTH, (), generator=generator))
    return -values[one].mean() / values[1 - one].detach().abs().mean().clamp(min=1e-6)


def actor_loss(
    policy: ConsistencyAc,
    averaged: ConsistencyAc,
    batch: Transitions,
    draws: Draws,
    eta: float,
    generator: torch.Generator,
) -> tuple[Tensor, Tensor, Tensor]:
    """``L_consistency + eta L_Q`` (Ding & Jin 2024, eq. 8); the critics get no gradient.

    Returns:
        The sum and its two parts.
    """
    cloned = policy.consistency_loss({**batch.observations, policy.spec.action.key: batch.action}, draws, averaged)
    with _frozen(policy.critic):
        valued = value_loss(policy, batch, generator) if eta else torch.zeros_like(cloned)
    return cloned + eta * valued, cloned.detach(), valued.detach()


@contextmanager
def _frozen(module: nn.Module) -> Iterator[None]:
    module.requires_grad_(False)
    try:
        yield
    finally:
        module.requires_grad_(True)


class OnlineEpisodes:
    """The episodes that the policy played, a dataset in the run's folder.

    A resumed run reads the episodes that are there already instead of playing them again.

    Args:
        path: the dataset.
        spec: the policy's.
        config: rewards, discount and seeds.
        collect: plays episodes.
    """

    def __init__(self, path: Path, spec: PolicySpec, config: ActorCriticConfig, collect: Collect) -> None:
        keys = [replace(key, source="", columns=None) for key in (*spec.states, spec.action)]
        self._spec = replace(spec, observations=tuple(keys[:-1]), action=keys[-1])
        self._config, self._collect = config, collect
        if path.exists():
            self._store = EpisodeStore.open(path, "a")
        else:
            arrays = [ArraySpec(k.key, k.shape, "float32", k.role, unit=k.unit) for k in keys]
            arrays.append(ArraySpec("reward", (), "float32", "reward"))
            self._store = EpisodeStore.create(path, arrays, fps=spec.fps, attributes={"source": "policy"})
        self._parts: list[Transitions] = []
        self._count = 0

    def grow(self, count: int, policy: Policy) -> Transitions | None:
        """Have at least ``count`` episodes; returns the new transitions, None where there are none."""
        if count <= self._count:
            return None
        missing = range(self._store.n_episodes, count)
        if missing:
            seeds = [self._config.online.first_seed + i for i in missing]
            for episode in self._collect(policy, seeds):
                self._store.append(
                    episode.arrays,
                    task=episode.task,
                    success=episode.success,
                    seed=episode.seed,
                    behaviour=episode.behaviour,
                )
        new = range(self._count, count)
        self._count = count
        return store_transitions(self._store, self._spec, new, self._config.reward, self._config.gamma)

    def success_rate(self, last: int) -> float:
        """Of the last episodes that are in use."""
        return float(np.mean([bool(s) for s in self._store.episode_success[max(0, self._count - last) : self._count]]))

    def close(self) -> None:
        self._store.close()


class ActorCriticRun(Run):
    """A training run whose updates are those of the actor-critic.

    Args:
        config: task, data, policy, and how long; of the training episodes every transition is used.
        rl: what is added.
        plain: both as plain values, kept in the bundle.
        processes: one.
        collect: plays episodes; needed to go online.
    """

    policy: ConsistencyAc

    def __init__(
        self,
        config: RunConfig,
        rl: ActorCriticConfig,
        plain: Mapping[str, Any],
        processes: Processes,
        collect: Collect | None = None,
    ) -> None:
        if processes.several:
            raise UserError("train-rl runs in one process; start it without torchrun.")
        if config.policy["name"] != "consistency_ac":
            raise UserError(f"train-rl trains policy=consistency_ac, found policy.name={config.policy['name']!r}.")
        super().__init__(config, plain, processes)
        self.rl, self._collect = rl, collect
        if isinstance(self.data.training, MixtureDataset):
            raise UserError("train-rl learns from one dataset; merge several with robopolicy data merge.")
        (store,) = open_datasets(config.task, config.data)
        with store:
            episodes = np.unique(self.data.training.windows.episode).tolist()
            noise = store.schema.attributes.get("noise", 0)
            found = store_transitions(store, self.data.spec, episodes, rl.reward, rl.gamma)
        if noise:
            log.warning(
                "%s was recorded with noise=%s: the actions that it holds are not those that were executed, which "
                "critics cannot know. Record without noise for reinforcement learning.", config.data.path, noise,
            )  # fmt: skip
        self.offline = found.to(processes.device)
        self._bounds = value_bounds(found.reward, found.discount)
        self.online: Transitions | None = None
        self._episodes: OnlineEpisodes | None = None
        ends = int((found.discount == 0).sum())
        log.info("%d transitions, %d of them end in success", len(found), ends)
        if rl.eta and not ends:
            log.warning("no episode of %s succeeded; critics learn little from it", config.data.path)

    def _fresh(self, data: TrainingData) -> Policy:
        policy = super()._fresh(data)
        assert isinstance(policy, ConsistencyAc)
        policy.critic.requires_grad_(True)  # before the optimiser is built, which takes what has gradients
        return policy

    def improve(self) -> dict[str, Tensor]:
        """Do the next update; returns what is worth logging, on the device."""
        train, device = self.config.train, self.processes.device
        averaged = self.averaged_policy()
        assert isinstance(averaged, ConsistencyAc)
        self._go_online(averaged)
        generator = step_generator(train.seed, self.step)
        batch = self._batch(generator)
        draws = {name: value.to(device) for name, value in self.draws(self.step).items()}
        bellman, values = critic_loss(self.policy, averaged, batch, self._bounds, generator)
        bellman.backward()
        actor, cloned, valued = actor_loss(self.policy, averaged, batch, draws, self.rl.eta, generator)
        actor.backward()
        clip = train.optim.clip_norm
        norms = [
            nn.utils.clip_grad_norm_(part.parameters(), clip) for part in (self.policy.critic, self.policy.denoiser)
        ]
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(train.optim, self.step, train.steps)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.ema.step(self.policy.parameters())
        self.step += 1
        return {
            "critic/loss": bellman.detach(),
            "critic/value": values.mean(),
            "critic/disagreement": (values[0] - values[1]).abs().mean(),
            "critic/grad_norm": norms[0],
            "actor/consistency": cloned,
            "actor/value_loss": valued,
            "actor/grad_norm": norms[1],
        }

    def online_metrics(self) -> dict[str, float]:
        """How the latest collection went; empty before the first."""
        if self._episodes is None:
            return {}
        return {"online/success_rate": self._episodes.success_rate(self.rl.online.episodes)}

    def close(self) -> None:
        if self._episodes is not None:
            self._episodes.close()

    def _go_online(self, averaged: Policy) -> None:
        """Collect what is due before this update."""
        wanted = self.rl.online.episodes_at(self.step)
        if wanted == 0:
            return
        if self._episodes is None:
            if self._collect is None:
                raise UserError("rl.online.after needs a task with an environment; set rl.online.after=null.")
            self._episodes = OnlineEpisodes(self.out / "online.zarr", self.data.spec, self.rl, self._collect)
        new = self._episodes.grow(wanted, averaged)
        if new is not None:
            new = new.to(self.processes.device)
            self.online = new if self.online is None else Transitions.concatenate([self.online, new])
            everything = Transitions.concatenate([self.offline, self.online])
            self._bounds = value_bounds(everything.reward, everything.discount)

    def _batch(self, generator: torch.Generator) -> Transitions:
        """Random rows of the dataset and of the policy's own episodes."""
        size, device = self.config.train.batch_size, self.processes.device
        own = 0 if self.online is None else round(size * self.rl.online.share)
        parts = [_random_rows(self.offline, size - own, generator, device)] if own < size else []
        if self.online is not None:
            parts.append(_random_rows(self.online, own, generator, device))
        return Transitions.concatenate(parts)


def _random_rows(pool: Transitions, count: int, generator: torch.Generator, device: torch.device) -> Transitions:
    return pool.rows(torch.randint(0, len(pool), (count,), generator=generator).to(device))


def train_actor_critic(
    config: RunConfig,
    rl: ActorCriticConfig,
    plain: Mapping[str, Any],
    evaluate: Evaluate | None = None,
    collect: Collect | None = None,
    resume: bool = False,
) -> Path:
    """Train actor and critics.

    Args:
        config: the run; ``config.train.steps`` counts offline and online updates together.
        rl: what the actor-critic adds.
        plain: both as plain values, kept in the bundle.
        evaluate: called every ``train.evaluate_every`` steps.
        collect: plays episodes; needed when ``rl.online.after`` is set.
        resume: continue from the run's last checkpoint.

    Returns:
        The bundle of the last step.
    """
    train = config.train
    if train.threads is not None:
        torch.set_num_threads(train.threads)
    run = ActorCriticRun(config, rl, plain, join_processes(train.device), collect)
    best = BestBundles(run.out / "bundles", train.keep_best)
    bundle = run.out / "bundles" / "last"
    if resume and has_checkpoint(run.out / "checkpoints"):
        run.resume(best)
        if run.step >= train.steps and bundle.exists():
            log.info("the run is complete; train.steps=… above %d goes on", run.step)
            return bundle
    else:
        shutil.rmtree(run.out / "online.zarr", ignore_errors=True)  # of a run that left no checkpoint
    write_whole(run.out / "config.json", json.dumps(run.plain, indent=2))
    metrics: dict[str, float] = {}
    with closing(run), MetricsLog(run.out, train, run.step, run.plain) as written:
        for step, values in _steps(run, best, evaluate):
            metrics |= values
            written.write(step, values)
    return run.save_bundle(bundle, metrics)


def _steps(run: ActorCriticRun, best: BestBundles, evaluate: Evaluate | None) -> Iterator[tuple[int, dict[str, float]]]:
    """Run all remaining updates; yields (step, metrics) whenever there is something to log."""
    train = run.config.train
    bar = tqdm(total=train.steps, initial=run.step, desc="training", unit="step", smoothing=0.05)
    began, counted = time.perf_counter(), run.step
    with bar, logging_redirect_tqdm():
        while run.step < train.steps:
            found = run.improve()
            bar.update()
            last = run.step == train.steps
            values: dict[str, float] = {}
            if run.step % train.log_every == 0 or last:
                values = {name: float(value) for name, value in found.items()} | run.online_metrics()
                values["train/lr"] = float(run.optimizer.param_groups[0]["lr"])
                values["speed/steps_per_s"] = (run.step - counted) / (time.perf_counter() - began)
                bar.set_postfix_str(f"critic {values['critic/loss']:.3g}, value {values['critic/value']:.3g}", False)
                began, counted = time.perf_counter(), run.step
            if evaluate is not None and train.evaluate_every and (run.step % train.evaluate_every == 0 or last):
                scores = dict(evaluate(run.averaged_policy(), run.step))
                values |= scores
                log.info("step %d: %s", run.step, ", ".join(f"{k} {v:.3f}" for k, v in scores.items()))
                best.offer(
                    scores["eval/score"],
                    run.step,
                    lambda path, scores=scores: run.save_bundle(path, scores),  # type: ignore[misc]
                )
                began, counted = time.perf_counter(), run.step
            if values:
                yield run.step, values
            if run.step % train.checkpoint_every == 0 or last:
                run.save(best)
