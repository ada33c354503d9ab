"""Sampling with real-time chunking as published, which needs gradients and therefore torch.

Exported samplers project their clean estimates instead; see `robopolicy.policies.graphs`.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from robopolicy.diffusion.guidance import Denoising
from robopolicy.diffusion.rtc_guidance import RtcGuide
from robopolicy.diffusion.step_table import COLUMNS
from robopolicy.errors import UserError
from robopolicy.export.borders import torch_session
from robopolicy.export.critic import own_candidates
from robopolicy.export.observations import made_up
from robopolicy.export.rtc_config import GUIDED_ENGINE, RtcConfig
from robopolicy.inference.policy import ExportedPolicy
from robopolicy.policies.denoising import DenoisingPolicy
from robopolicy.policies.graphs import RowActions, SamplerGraph


def rtc_policy(
    policy: DenoisingPolicy,
    config: RtcConfig | None = None,
    *,
    device: str = "cpu",
    threads: int = 1,
    fingerprint: str = "",
) -> ExportedPolicy:
    """A policy behind the interface of engines, its chunks guided towards the one before.

    Args:
        policy: in evaluation mode, on ``device``.
        config: strength and start; None: the defaults.
        device: of torch.
        threads: CPU threads.
        fingerprint: of the bundle.

    Raises:
        UserError: see `RtcSampler`.
    """
    batch = {key: value.to(policy.device) for key, value in made_up(policy, 1, seed=0).items()}
    graphs = policy.export_graphs(batch)
    sampler = RtcSampler(policy, config or RtcConfig())
    graphs["sampler"] = replace(graphs["sampler"], module=sampler)
    sessions = {
        name: torch_session(graph, device=device, threads=threads)
        for name, graph in graphs.items()
        if name != "denoiser"
    }
    noises = sampler.table.noises
    return ExportedPolicy(GUIDED_ENGINE, policy.spec, sessions, noises, own_candidates(policy), fingerprint)


class RtcSampler(SamplerGraph):
    """A sampler with the inputs and the output of `SamplerGraph`, for torch alone.

    Where the mask is zero for all rows, chunks are sampled freely, as `SamplerGraph` does.

    Args:
        policy: in evaluation mode.
        config: strength and start.

    Attributes:
        config: the argument.

    Raises:
        UserError: the sampler cannot leave out so many calls.
    """

    def __init__(self, policy: DenoisingPolicy, config: RtcConfig) -> None:
        super().__init__(policy)
        self.config = config
        self._sigma_data = policy.process.sigma_data
        signal, noise = policy.process.signal_and_noise(self.table.levels)
        self._signal, self._noise = signal.flatten().tolist(), noise.flatten().tolist()
        calls, first = len(self.table), config.warm_start
        if not 0 <= first < calls:
            raise UserError(
                f"scheduler.warm_start={first} must lie in 0..{calls - 1}: this sampler makes {calls} network calls."
            )
        remembered = [COLUMNS.index("previous_x"), COLUMNS.index("previous_clean")]
        if first and self.table.rows[first, remembered].any():
            raise UserError(
                f"scheduler.warm_start={first}: this sampler's call {first} needs the one before. Use a first-order "
                "sampler, sampler.name=ddim or euler."
            )

    def forward(self, noise: Tensor, previous: Tensor, mask: Tensor, *found: Tensor) -> Tensor:
        if not mask.any():
            return super().forward(noise, previous, mask, *found)
        with torch.inference_mode(False), torch.enable_grad():
            # tensors that were made in inference mode take no part in graphs, their copies do
            return self._guided(*(value.clone() for value in (noise, previous, mask, *found))).detach()

    def _guided(self, noise: Tensor, previous: Tensor, mask: Tensor, *found: Tensor) -> Tensor:
        cond, action = self.action_map(found)
        target = action.normalize(previous)
        guide = RtcGuide(target, mask.unsqueeze(-1), self.config.beta)
        first = self.config.warm_start if mask.any(dim=1).all() else 0  # without a mask there is no chunk before
        x = noise[:, 0] * self.table.start
        if first:
            x = self._signal[first] * target + self._noise[first] * noise[:, 0]
        before = (x, x)
        for i in range(first, len(self.table)):
            scale, skip, out, *steps = self._rows[i]
            x = x.detach().requires_grad_()
            network_clean = skip * x + out * self.step._predict(scale * x, self._level(i), cond)
            clean = self._pulled(guide, i, x, network_clean, action)
            parts = [c * part for c, part in zip(steps, (x, clean, *before), strict=False) if c != 0]
            if drawn := self.table.draws[i]:
                parts.append(steps[4] * noise[:, drawn])
            x, before = sum(parts[1:], start=parts[0]).detach(), (x.detach(), clean)
        return action.unnormalize(x)

    def _pulled(self, guide: RtcGuide, i: int, x: Tensor, network_clean: Tensor, action: RowActions) -> Tensor:
        signal, noise = (x.new_full((1, 1, 1), levels[i]) for levels in (self._signal, self._noise))
        clean = network_clean.detach().clamp(*action.bounds)
        at = Denoising(x, clean, signal, noise, i, len(self.table), self._sigma_data, network_clean)
        return guide(at).clamp(*action.bounds)
