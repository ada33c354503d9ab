"""Graphs of a critic that chooses among a policy's chunks (V-GPS)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from robopolicy.errors import UserError
from robopolicy.inference.engine import Candidates
from robopolicy.policies.base import ExportGraph
from robopolicy.policies.consistency_ac import ConsistencyAc
from robopolicy.policies.denoising import DenoisingPolicy
from robopolicy.policies.graphs import encoder_keys
from robopolicy.spec import TASK, check_keys
from robopolicy.steering.vgps import ChunkValues
from robopolicy.values.bundle import load_critic


class CriticEncoderGraph(nn.Module):
    """The policy's observations, in physical units, to what the critic sees of them, (B, C)."""

    def __init__(self, values: ChunkValues, keys: tuple[str, ...]) -> None:
        super().__init__()
        self.critic, self.values, self.keys = values.critic, values, keys

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.values.features(dict(zip(self.keys, inputs, strict=True)))


class CriticGraph(nn.Module):
    """Features (B, C) and chunks (B, H, A) in physical units to values (B,)."""

    def __init__(self, values: ChunkValues) -> None:
        super().__init__()
        self.critic, self.values = values.critic, values

    def forward(self, features: Tensor, chunk: Tensor) -> Tensor:
        return self.values.score(features, chunk.unsqueeze(1)).squeeze(1)


def critic_graphs(
    policy: DenoisingPolicy, bundle: Path, observations: Mapping[str, Tensor], candidates: int, temperature: float
) -> tuple[Candidates, dict[str, ExportGraph]]:
    """How the critic of a bundle chooses, and its graphs ``critic_encoder`` and ``critic``.

    Raises:
        UserError: it does not fit the policy, or sees more than the policy does.
    """
    critic, _ = load_critic(bundle)
    values = ChunkValues(critic.eval(), policy.spec, f"the critic {bundle}")
    spec = critic.spec
    found = {key.key: key for key in policy.spec.observations}
    check_keys(found, spec.observations, f"The observations of the policy and the critic {bundle}")
    if spec.n_obs_steps > policy.spec.n_obs_steps:
        raise UserError(
            f"The critic {bundle} sees {spec.n_obs_steps} observation steps, the policy {policy.spec.n_obs_steps}. An "
            "engine's critic sees what its policy sees; train one with fewer steps."
        )
    seen = {key.key for key in spec.observations} | ({TASK} if spec.tasks else set())
    keys = tuple(key for key in encoder_keys(policy) if key in seen)
    inputs = tuple(observations[key] for key in keys)
    encoder = CriticEncoderGraph(values, keys)
    with torch.no_grad():
        features = encoder(*inputs)
    chunk = torch.zeros(len(features), policy.spec.horizon, policy.spec.action.dim)
    graphs = {
        "critic_encoder": ExportGraph(encoder, inputs, keys, ("features",)),
        "critic": ExportGraph(CriticGraph(values), (features, chunk), ("features", "chunk"), ("value",)),
    }
    return Candidates(candidates, temperature), graphs


def own_candidates(policy: DenoisingPolicy) -> Candidates | None:
    """How a policy chooses among its chunks with a critic of its own."""
    if not isinstance(policy, ConsistencyAc) or policy.config.candidates == 1:
        return None
    return Candidates(policy.config.candidates, policy.config.temperature)
