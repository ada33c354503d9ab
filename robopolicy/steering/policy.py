"""A frozen policy that is steered at run time; it takes the place of the policy wherever one acts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from robopolicy.diffusion.sampling import repeated_generators
from robopolicy.errors import UserError
from robopolicy.inference.observations import checked_array
from robopolicy.policies.denoising import DenoisingPolicy
from robopolicy.spec import KeySpec, PolicySpec
from robopolicy.steering.base import Scene, Steering, take


class SteeredPolicy:
    """Samples K candidates with all guides at work, lets every way choose in turn, and corrects what is left.

    Args:
        policy: is frozen: its weights get no gradients any more.
        ways: by name, in the order in which they act.

    Attributes:
        spec: the policy's, with the observations that the ways need beside it.

    Raises:
        UserError: two want different observations under one name.
    """

    def __init__(self, policy: DenoisingPolicy, ways: Mapping[str, Steering]) -> None:
        self.policy = policy.requires_grad_(False)
        self.ways = dict(ways)
        self.spec = steered_spec(policy.spec, ways)
        self.candidates = max((way.candidates for way in ways.values()), default=1)
        self.recurrence = max((way.recurrence for way in ways.values()), default=1)

    @property
    def instruction(self) -> str | None:
        """What the policy does where observations bring no instruction."""
        return self.policy.instruction

    @instruction.setter
    def instruction(self, text: str | None) -> None:
        self.policy.instruction = text

    def check_instruction(self, instruction: str | None) -> None:
        """See `Policy.check_instruction`."""
        self.policy.check_instruction(instruction)

    @torch.no_grad()
    def act(self, observations: Mapping[str, np.ndarray], generators: Sequence[torch.Generator]) -> np.ndarray:
        """The executed part of a steered chunk for each row; see `Policy.act`.

        Observations have the keys and the history length of this policy's own `spec`.
        """
        policy = self.policy
        steps = policy.spec.n_obs_steps
        own = {key.key for key in policy.spec.observations}
        cut = {k: np.asarray(v)[:, -steps:] if k in own else v for k, v in observations.items()}
        seen = {k: torch.as_tensor(v).to(policy.device) for k, v in policy.checked(cut).items()}
        for key in self.spec.observations:
            shape = (self.spec.n_obs_steps, *key.shape)
            value = torch.as_tensor(checked_array(key.key, key, shape, observations)).to(policy.device)
            seen[key.key] = value
        return self.sample(seen, generators)[:, policy.spec.executed].float().cpu().numpy()

    @torch.no_grad()
    def sample(self, observations: Mapping[str, Tensor], generators: Sequence[torch.Generator]) -> Tensor:
        """Steered chunks (B, horizon, A) in physical units; arguments as for `Policy.sample`, keys as in `spec`."""
        policy, spec = self.policy, self.policy.spec
        cut = {
            **observations,
            **{key.key: observations[key.key][:, -spec.n_obs_steps :] for key in spec.observations},
        }
        domain = policy.domain(cut)
        context = policy.encoder(policy.normalized(cut))
        scene = Scene(policy, observations, domain, self.candidates, generators)
        guides = [guide for way in self.ways.values() if (guide := way.guide(scene)) is not None]
        rows = context.repeated(self.candidates)
        before = policy.sampler
        try:
            for way in self.ways.values():
                policy.sampler = way.sampler(policy.sampler)
            sampled = policy.sample_normalized(
                rows,
                None if domain is None else scene.rows(domain),
                repeated_generators(generators, self.candidates),
                guides,
                self.recurrence,
            )
        finally:
            policy.sampler = before
        chunks = scene.physical(sampled).view(-1, self.candidates, *sampled.shape[1:])
        for way in self.ways.values():
            kept = way.select(replace(scene, candidates=chunks.shape[1]), chunks)
            chunks = chunks if kept is None else take(chunks, kept)
        chosen = chunks[:, 0]
        for way in self.ways.values():
            chosen = way.project(replace(scene, candidates=1), chosen)
        return chosen


def steered_spec(spec: PolicySpec, ways: Mapping[str, Steering]) -> PolicySpec:
    """What an environment or robot must provide for a policy and the ways that steer it.

    Raises:
        UserError: two want different observations under one name.
    """
    keys: dict[str, tuple[str, KeySpec]] = {key.key: ("the policy", key) for key in spec.observations}
    longest = spec.n_obs_steps
    for name, way in ways.items():
        longest = max(longest, way.n_obs_steps)
        for key in way.observations:
            who, before = keys.setdefault(key.key, (name, key))
            for entry in ("shape", "role", "array", "columns", "unit", "rotation"):
                ours, theirs = getattr(before, entry), getattr(key, entry)
                unknown = entry in ("unit", "rotation") and not (ours and theirs)
                if ours != theirs and not unknown:
                    raise UserError(
                        f"{key.key}: {who} has {entry} {_shown(ours)}, {name} has {_shown(theirs)}. One name must mean "
                        "one thing; train one of them with another key name."
                    )
    more = longest - spec.n_obs_steps
    return replace(
        spec,
        observations=tuple(key for _, key in keys.values()),
        n_obs_steps=longest,
        horizon=spec.horizon + more,
    )


def _shown(value: Any) -> str:
    return "all" if value is None else str(value)
