"""V-GPS, value-guided policy steering (Nakamoto et al., CoRL 2024): a critic chooses among the chunks of any policy."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from robopolicy.diffusion.sampling import draw_noise
from robopolicy.errors import UserError, did_you_mean
from robopolicy.policies.denoising import DenoisingPolicy
from robopolicy.spec import TASK, PolicySpec
from robopolicy.steering.base import Scene, Steering
from robopolicy.steering.units import action_factor
from robopolicy.values.bundle import load_critic
from robopolicy.values.critic import choose
from robopolicy.values.model import Critic

Control = Literal["none", "random"]


@dataclass(frozen=True, kw_only=True)
class VgpsConfig:
    """What V-GPS can be told.

    Attributes:
        critic: a bundle of ``robopolicy train-critic``; of any dataset and for any policy that acts in the same space.
        candidates: chunks K that the policy proposes in one batch.
        temperature: of the choice, softmax(value / temperature); 0 takes the best. In units of the critic's values.
        keep: how many are kept, the best first; above 1 where something else chooses among them afterwards.
        instruction: what a critic of several tasks is told; null: what the policy is told.
        control: ``random`` ignores the values and chooses at random, which must not do better than the policy alone.
    """

    critic: str
    candidates: int = 10
    temperature: float = 0.0
    keep: int = 1
    instruction: str | None = None
    control: Control = "none"

    def __post_init__(self) -> None:
        if not 1 <= self.keep <= self.candidates:
            raise UserError(f"vgps: keep={self.keep} must lie in 1..candidates={self.candidates}.")
        if self.temperature < 0:
            raise UserError(f"vgps: temperature={self.temperature} must be at least 0.")
        if self.keep > 1 and self.temperature:
            raise UserError("vgps: keep above 1 takes the best; set temperature=0.")


class Vgps(Steering):
    """Chooses the candidate with the highest value.

    Values are those of the physical chunk: candidates leave the policy's normalised units
    before they enter the critic's, so that the two may come from different datasets.

    Args:
        config: which critic, how many candidates.
        policy: whose chunks are chosen from.

    Raises:
        UserError: critic and policy do not act in the same space, the critic scores more actions than are executed, or
            it does not know what the policy is told.
    """

    def __init__(self, config: VgpsConfig, policy: DenoisingPolicy) -> None:
        self.config = config
        critic, _ = load_critic(Path(config.critic), policy.device)
        self.values = ChunkValues(critic, policy.spec, f"the critic {config.critic}", config.instruction)
        self.observations = critic.spec.observations
        self.n_obs_steps = critic.spec.n_obs_steps
        self.candidates = config.candidates

    def select(self, scene: Scene, chunks: Tensor) -> Tensor | None:
        rows, count = chunks.shape[:2]
        if count == 1:
            return None
        uniform = torch.special.ndtr(draw_noise((rows, 1), scene.generators, chunks.device))[:, 0]
        if self.config.control == "random":
            return (uniform * count).long().clamp(max=count - 1)[:, None]
        values = self.values(scene.observations, chunks)
        if self.config.keep > 1:
            return values.topk(min(self.config.keep, count), dim=1).indices
        return choose(values, self.config.temperature, uniform)[:, None]


class ChunkValues:
    """A critic's values of a policy's chunks: in the critic's units, and told what the policy is told.

    Args:
        critic: of any dataset, with other normalisers and possibly another unit of length or angle.
        policy: spec of the policy whose chunks are valued.
        who: names the critic in errors.
        instruction: what a critic of several tasks is told; None: what the policy is told.

    Raises:
        UserError: the two do not fit, see `critic_tasks` and `check_actions`.
    """

    def __init__(self, critic: Critic, policy: PolicySpec, who: str, instruction: str | None = None) -> None:
        self.critic, self._executed = critic, policy.executed
        self._tasks = critic_tasks(critic.spec, policy, instruction)
        self._factor = check_actions(critic.spec, policy, who)

    def __call__(self, observations: Mapping[str, Tensor], chunks: Tensor) -> Tensor:
        """Values (B, K) of the executed part of chunks (B, K, H, A), differentiable in these.

        Args:
            observations: by key, (B, T, *shape) with T at least what the critic needs, newest last; ``task`` (B,)
                where the policy has tasks. Physical units, as the chunks.
            chunks: candidates of each row.
        """
        return self.score(self.features(observations), chunks)

    def features(self, observations: Mapping[str, Tensor]) -> Tensor:
        """What the critic sees of observations, (B, C)."""
        spec = self.critic.spec
        seen = {key.key: observations[key.key][:, -spec.n_obs_steps :] for key in spec.observations}
        if spec.tasks:
            first = seen[spec.observations[0].key]
            told = observations[TASK] if TASK in observations else first.new_zeros(first.shape[0]).long()
            seen[TASK] = self._tasks.to(first.device)[told]
        return self.critic.encode(seen)

    def score(self, features: Tensor, chunks: Tensor) -> Tensor:
        """Values (B, K) of the executed part of chunks (B, K, H, A)."""
        scored = chunks[:, :, self._executed][:, :, : self.critic.spec.n_action_steps]
        return self.critic.score(features, self._factor * scored)


def critic_tasks(critic: PolicySpec, policy: PolicySpec, instruction: str | None) -> Tensor:
    """The critic's task index for each of the policy's tasks; one entry for a policy that is not told any.

    Raises:
        UserError: an instruction is none of the critic's.
    """
    if not critic.tasks:
        if instruction is not None:
            raise UserError(f"The critic is not told what to do; leave steering.vgps.instruction='{instruction}' out.")
        return torch.zeros(0, dtype=torch.long)
    known = [task.instruction for task in critic.tasks]
    told = (
        [task.instruction for task in policy.tasks]
        if instruction is None
        else [instruction] * max(1, len(policy.tasks))
    )
    if not told:
        raise UserError(
            f"The critic knows {len(known)} tasks and the policy is told none. To steer, set "
            f"steering.vgps.instruction=…, one of: {', '.join(map(repr, known))}."
        )
    for text in told:
        if text not in known:
            raise UserError(f"The critic does not know the task '{text}'.{did_you_mean(text, known)}")
    return torch.tensor([known.index(text) for text in told])


def check_actions(model: PolicySpec, policy: PolicySpec, who: str) -> float:
    """Factor from the policy's action unit to another model's.

    Raises:
        UserError: the two do not act in the same space at the same rate, or the model wants more actions than the
            policy executes.
    """
    problems = []
    if model.action.dim != policy.action.dim:
        problems.append(f"{model.action.dim} action entries, the policy has {policy.action.dim}")
    if abs(model.fps - policy.fps) > 0.01 * policy.fps:
        problems.append(f"{model.fps:g} control steps per second, the policy has {policy.fps:g}")
    if model.n_action_steps > policy.n_action_steps:
        problems.append(f"chunks of {model.n_action_steps} actions, the policy executes {policy.n_action_steps}")
    if model.action.rotation and policy.action.rotation and model.action.rotation != policy.action.rotation:
        problems.append(f"rotations as '{model.action.rotation}', the policy has '{policy.action.rotation}'")
    if problems:
        raise UserError(f"{who} and the policy do not fit. It was trained for:\n  " + "\n  ".join(problems))
    return action_factor(policy.action.unit, model.action.unit, who)
