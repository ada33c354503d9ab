"""Chunks whose first actions are known: real-time chunking that is trained (Black et al. 2025, arXiv 2512.05964).

While a robot executes one chunk, the next one is computed; the actions that it executes meanwhile are committed. A
policy that is shown them continues them. Guidance while sampling cannot do that with one or two network calls, since
the rest of a chunk is decided by the first clean estimate.

In the paper committed actions stand in the place of the noised ones, and each action has a noise level of its own, zero
for the committed ones. So they do here, but channels beside the chunk mark them and repeat their values, which one more
linear layer reads: networks whose noise level modulates the whole chunk (FiLM, adaLN of all tokens, sums) then work the
same way as those with a token for each action, and the level's part is still computed once per schedule. The repeated
values let that layer tell them from noise: in a toy, one-call policies keep to the mode of a single known action more
often than with a mark alone. Shown no prefix, a network computes what it would without that layer, so that a policy
that was trained without can be fine-tuned with a prefix.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from robopolicy.spec import PolicySpec


@dataclass(frozen=True)
class Prefix:
    """The known actions of a batch of chunks.

    Attributes:
        actions: (B, H, A) normalised and clean; only known ones are looked at.
        known: (B, H, 1) bool.
    """

    actions: Tensor
    known: Tensor

    def shown(self, x: Tensor) -> Tensor:
        """Scaled noised chunks x (B, H, A) as a network sees them, (B, H, 2 A + 1).

        Known actions are in place, followed by marks: 1 where an action is known, and the known actions again.
        """
        actions = self.actions.to(x.dtype)
        marks = [self.known.to(x.dtype), actions.masked_fill(~self.known, 0.0)]
        return torch.cat([torch.where(self.known, actions, x), *marks], dim=-1)

    def without(self, values: Tensor) -> Tensor:
        """Values (B, H, A) with zeros at the known actions."""
        return values.masked_fill(self.known, 0.0)

    def mean(self, values: Tensor) -> Tensor:
        """Mean (B,) of values (B, H, A) over the actions that are not known."""
        return self.without(values).sum((1, 2)) / (~self.known).sum((1, 2)) / values.shape[2]

    def twice(self) -> Prefix:
        """The rows once more after the last."""
        return Prefix(torch.cat([self.actions, self.actions]), torch.cat([self.known, self.known]))


def known_actions(spec: PolicySpec, steps: Tensor) -> Tensor:
    """(B, H, 1) bool: the first ``steps`` (B,) actions of each chunk from the newest observation on.

    A chunk begins at the oldest observation that conditions it. Its actions before the newest one are past and never
    known: they need not be kept, since nobody executes them; the observations show already what they did, and a policy
    that is told its past actions learns to repeat them (de Haan et al. 2019); and after a start or a take-over by a
    person a robot has none to tell.
    """
    index = torch.arange(spec.horizon, device=steps.device) - (spec.n_obs_steps - 1)
    return ((index >= 0) & (index < steps[:, None])).unsqueeze(-1)


def split_marks(x: Tensor, action_dim: int) -> tuple[Tensor, Tensor | None]:
    """What a network is given, into chunks (B, H, A) and marks (B, H, A + 1); None where it is shown no prefix."""
    if int(x.shape[-1]) == action_dim:
        return x, None
    return x[..., :action_dim], x[..., action_dim:]
