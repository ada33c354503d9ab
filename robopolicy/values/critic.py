"""Action-value functions: two independent critics, their Bellman target, and the choice among candidate chunks."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from robopolicy.nets.mlp import mlp


class TwinCritic(nn.Module):
    """Two critics that share no layer, so that the smaller of their values is a cautious one (Fujimoto et al. 2018).

    Args:
        context_dim: length of the flat context.
        action_dim: entries of a whole executed chunk, n_action_steps x A.
        hidden_dims: widths of the hidden layers of each.
    """

    def __init__(self, context_dim: int, action_dim: int, hidden_dims: tuple[int, ...]) -> None:
        super().__init__()
        self.critics = nn.ModuleList(mlp(context_dim + action_dim, *hidden_dims, 1) for _ in range(2))

    def forward(self, context: Tensor, chunk: Tensor) -> Tensor:
        """Values (2, B) of chunks (B, n_action_steps, A) in contexts (B, C), both normalised."""
        pair = torch.cat([context, chunk.flatten(1)], dim=1)
        return torch.stack([critic(pair).squeeze(1) for critic in self.critics])


def bellman_target(reward: Tensor, discount: Tensor, next_values: Tensor, bounds: tuple[float, float]) -> Tensor:
    """``r + discount * min(Q_1, Q_2)`` (clipped double Q, Fujimoto et al. 2018, eq. 10), with values that are possible.

    Args:
        reward: (B,) discounted sum over the executed steps.
        discount: (B,) of the next state; 0 where the chunk ended the task.
        next_values: (2, B) the target critics' values of the next state and the policy's chunk there.
        bounds: from `value_bounds`.
    """
    return reward + discount * next_values.amin(dim=0).clamp(*bounds)


def value_bounds(reward: Tensor, discount: Tensor) -> tuple[float, float]:
    """Smallest and largest value that any policy can have, given the rewards and discounts (N,) of its data.

    Without these bounds the actor can drive its critics, and these their own targets, to values without any meaning.
    """
    longest = 1 / (1 - float(discount.max()))
    return min(0.0, float(reward.min())) * longest, max(0.0, float(reward.max())) * longest


def choose(values: Tensor, temperature: float, uniform: Tensor) -> Tensor:
    """Draw one candidate of each row with probability softmax(value / temperature).

    Args:
        values: (B, K).
        temperature: 0 takes the best.
        uniform: (B,) in [0, 1), the randomness.

    Returns:
        (B,) indices.
    """
    if temperature == 0:
        return values.argmax(dim=1)
    cumulated = (values / temperature).softmax(dim=1).cumsum(dim=1)
    drawn = torch.searchsorted(cumulated, uniform[:, None] * cumulated[:, -1:], right=True).squeeze(1)
    return drawn.clamp(max=values.shape[1] - 1)
