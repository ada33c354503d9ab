"""MoDE's network: a GPT whose feed-forward parts are experts, chosen by the noise level (Reuss et al., ICLR 2025).

Routing sees the noise embedding and not the tokens. While a chunk is sampled all rows have one noise level, so that
the experts of each step and layer are known before the first step: `ModeDenoiser.at_levels` tabulates them as integers
and the experts' weights are used where they lie, as views of one parameter. The published "expert cache" copies the
chosen weights into a wide perceptron instead; the results are the same.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, one_hot, silu

from robopolicy.errors import UserError
from robopolicy.nets.capture import capturing
from robopolicy.nets.context import Context, ContextSize
from robopolicy.nets.denoiser import Conditioning
from robopolicy.nets.transformer import INIT_STD, GptDenoiser

Choice = tuple[tuple[int, float], ...]
"""Experts of one layer and their weights, the same for all rows."""


@dataclass(frozen=True)
class Chosen:
    """The experts of one layer, as tensors.

    Attributes:
        index: (R, k) experts of each row; R = 1 for all rows.
        weight: (R, k) their weights.
    """

    index: Tensor
    weight: Tensor


@dataclass(frozen=True)
class Grouped:
    """The experts of one layer for many rows, in the order of the experts.

    Attributes:
        rows: (B k,) row of each assignment.
        weight: (B k,) its weight.
        counts: (E,) assignments of each expert, on the CPU.
    """

    rows: Tensor
    weight: Tensor
    counts: Tensor


Route = Choice | Chosen | Grouped


class StackedExperts(nn.Module):
    """Experts of one layer, SwiGLU perceptrons (Shazeer 2020) with stacked weights; expert e is the view ``weight[e]``.

    Args:
        dim: length of a token.
        hidden: hidden units of an expert.
        experts: E.
    """

    def __init__(self, dim: int, hidden: int, experts: int) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.empty(experts, 2 * hidden, dim).uniform_(-1, 1) / math.sqrt(dim))
        self.up_bias = nn.Parameter(torch.zeros(experts, 2 * hidden))
        self.down = nn.Parameter(torch.empty(experts, dim, hidden).uniform_(-1, 1) / math.sqrt(hidden))

    def forward(self, tokens: Tensor, route: Route) -> Tensor:
        """The weighted sum of the outputs of the tokens' experts, (B, N, dim) to (B, N, dim)."""
        if isinstance(route, Grouped):
            return self._grouped(tokens, route)
        if isinstance(route, Chosen):
            return self._gathered(tokens, route)
        flat = tokens.flatten(0, 1)
        mixed = flat.new_zeros(())
        for expert, weight in route:
            h = swiglu(linear(flat, self.up[expert], self.up_bias[expert]))
            mixed = torch.addmm(mixed, h, self.down[expert].t(), alpha=weight)
        return mixed.view_as(tokens)

    def _gathered(self, tokens: Tensor, route: Chosen) -> Tensor:
        """Copies the weights of each row's experts: for graphs, where a choice must be a tensor."""
        x = tokens.reshape(route.index.shape[0], 1, -1, tokens.shape[-1])
        h = swiglu(x @ self.up[route.index].transpose(-2, -1) + self.up_bias[route.index].unsqueeze(2))
        out = h @ self.down[route.index].transpose(-2, -1)
        return (out * route.weight[:, :, None, None]).sum(1).reshape(tokens.shape).to(tokens.dtype)

    @torch.compiler.disable  # lengths depend on data
    def _grouped(self, tokens: Tensor, route: Grouped) -> Tensor:
        parts = tokens[route.rows].split(route.counts.tolist())
        # unbind and not weight[e]: its gradient is stacked once instead of added up in E tensors of full size
        experts = zip(parts, self.up.unbind(), self.up_bias.unbind(), self.down.unbind(), strict=True)
        out = torch.cat([linear(swiglu(linear(x, up, bias)), down) for x, up, bias, down in experts])
        out = (out * route.weight[:, None, None]).to(tokens.dtype)
        return torch.zeros_like(tokens).index_add(0, route.rows, out)


def swiglu(x: Tensor) -> Tensor:
    """(..., 2 hidden), values then gates, to (..., hidden)."""
    value, gate = x.chunk(2, dim=-1)
    return value * silu(gate)


@dataclass(frozen=True)
class Routes:
    """What a router chose for R rows (or one for all) in L layers.

    Attributes:
        probabilities: (R, L, E) of all experts that the router chooses from.
        index: (R, L, k) the chosen ones.
        weight: (R, L, k) their probabilities, renormalised to sum 1.
        shared: there is one more expert, which every token takes with weight 1. It is the first of the stack, so that
            the chosen ones lie one place further.
    """

    probabilities: Tensor
    index: Tensor
    weight: Tensor
    shared: bool = False

    def load_balance(self) -> Tensor:
        """``E sum_e f_e P_e`` (Fedus et al. 2022, eq. 4), mean over the layers.

        f is the share of the assignments that an expert has, P its mean probability; the gradient goes through P.
        1 if all experts are used alike, for every k; E if one expert has all (k = 1).
        """
        experts, k = self.probabilities.shape[-1], self.index.shape[-1]
        share = one_hot(self.index, experts).sum(2).float().mean(0) / k
        return experts * (share * self.probabilities.mean(0)).sum(-1).mean()

    def by_layer(self) -> list[Route]:
        """What each layer's `StackedExperts` is told; weights get gradients."""
        index, weight, experts = self._of_stack()
        rows, _, k = index.shape
        if rows == 1 or capturing():
            return [Chosen(i, w) for i, w in zip(index.unbind(1), weight.unbind(1), strict=True)]
        assigned = index.transpose(0, 1).flatten(1)
        counts = one_hot(assigned, experts).sum(1).cpu()  # the only wait for the device, for all layers together
        order = assigned.argsort(dim=1, stable=True)
        weight = weight.transpose(0, 1).flatten(1).gather(1, order)
        return [Grouped(*layer) for layer in zip(order // k, weight, counts, strict=True)]

    def choices(self) -> list[list[Choice]]:
        """For each row, for each layer, the choice as numbers."""
        index, weight, _ = self._of_stack()
        return [
            [tuple(zip(i, w, strict=True)) for i, w in zip(*row, strict=True)]
            for row in zip(index.tolist(), weight.tolist(), strict=True)
        ]

    def _of_stack(self) -> tuple[Tensor, Tensor, int]:
        """Indices and weights with the shared expert's, and the number of experts in the stack."""
        experts = self.probabilities.shape[-1]
        if not self.shared:
            return self.index, self.weight, experts
        first = self.weight.new_ones(*self.weight.shape[:2], 1)
        index = torch.cat([torch.zeros_like(first, dtype=torch.long), self.index + 1], dim=2)
        return index, torch.cat([first, self.weight], dim=2), experts + 1


class NoiseRouter(nn.Module):
    """Chooses the experts of all layers at once from a noise embedding: one two-layer perceptron for each layer.

    Args:
        dim: length of the embedding; the perceptrons have twice as many hidden units.
        layers: L.
        experts: that there are in a layer.
        top_k: experts that a token takes, the shared one included.
        shared: the first expert is not chosen but always taken.
    """

    def __init__(self, dim: int, layers: int, experts: int, top_k: int, shared: bool = False) -> None:
        super().__init__()
        self.layers, self.experts, self.top_k, self.shared = layers, experts - shared, top_k - shared, shared
        self.hidden = nn.Linear(dim, layers * 2 * dim)
        nn.init.normal_(self.hidden.weight, std=INIT_STD)
        nn.init.zeros_(self.hidden.bias)
        self.out = nn.Parameter(INIT_STD * torch.randn(layers, self.experts, 2 * dim))
        self.out_bias = nn.Parameter(torch.zeros(layers, self.experts))
        self.activation = nn.GELU()

    def forward(self, embedding: Tensor, gumbel: Tensor | None = None) -> Routes:
        """Choose.

        Args:
            embedding: (R, dim).
            gumbel: (R, L, experts to choose from) standard Gumbel noise, see `draw_gumbel`: the top k of the noised
                logits are k draws without replacement from the softmax (Kool et al. 2019). None: the k most probable.
        """
        hidden = self.activation(self.hidden(embedding)).unflatten(-1, (self.layers, -1))
        logits = torch.einsum("rlh,leh->rle", hidden, self.out).float() + self.out_bias
        index = (logits if gumbel is None else logits + gumbel).topk(self.top_k).indices
        return Routes(logits.softmax(-1), index, logits.gather(-1, index).softmax(-1), self.shared)


def draw_gumbel(rows: int, router: NoiseRouter, generator: torch.Generator) -> Tensor:
    """Draw what `NoiseRouter` samples experts with, on the CPU."""
    return -torch.empty(rows, router.layers, router.experts).exponential_(generator=generator).log()


@dataclass(frozen=True)
class RoutedNoise:
    """Noise levels as `ModeDenoiser` uses them.

    Attributes:
        embedding: (B, dim), or (1, dim) for all rows.
        routes: for each layer.
    """

    embedding: Tensor
    routes: Sequence[Route]


class ModeDenoiser(GptDenoiser):
    """Causal, noise-conditioned GPT with a mixture of experts in every block.

    Args:
        action_dim: A.
        horizon: H.
        size: lengths of the context's vectors.
        dim: length of a token.
        layers: number of blocks.
        heads: attention heads, divides ``dim``.
        noise_embedding: maps levels (N,) to (N, dim).
        experts: in each layer.
        top_k: experts that a token takes.
        hidden: hidden units of an expert.
        shared_expert: one of the experts is taken by every token with weight 1, so that ``top_k - 1`` of the others
            are chosen.
        route_on_goal: the router sees goal and instruction, too. Rows then have experts of their own, and nothing can
            be tabulated: sampling runs the router in every step.
        prefix: it can be shown known actions.

    Raises:
        UserError: impossible sizes, or nothing to route on.
    """

    def __init__(
        self,
        action_dim: int,
        horizon: int,
        size: ContextSize,
        *,
        dim: int,
        layers: int,
        heads: int,
        noise_embedding: nn.Module,
        experts: int,
        top_k: int,
        hidden: int,
        shared_expert: bool = False,
        route_on_goal: bool = False,
        prefix: bool = False,
    ) -> None:
        check_experts(experts, top_k, hidden, shared_expert)
        super().__init__(
            action_dim,
            horizon,
            size,
            dim=dim,
            layers=layers,
            heads=heads,
            feed_forward=lambda: StackedExperts(dim, hidden, experts),
            noise_embedding=noise_embedding,
            noise_conditioned=True,
            prefix=prefix,
        )
        self.router = NoiseRouter(dim, layers, experts, top_k, shared_expert)
        self.idle_experts = experts - top_k
        if route_on_goal and not size.goal + size.task:
            raise UserError("route_on_goal=true needs goals or instructions; this policy has none.")
        self.asked = nn.Linear(size.goal + size.task, dim) if route_on_goal else None
        self._table: tuple[_TableKey, list[list[Choice]]] | None = None

    def active_parameters(self) -> int:
        """All parameters but those of the experts that a token does not take."""
        idle = sum(
            p[0].numel() * self.idle_experts
            for module in self.modules()
            if isinstance(module, StackedExperts)
            for p in module.parameters()
        )
        return super().active_parameters() - idle

    def condition(self, context: Context) -> Conditioning:
        """The context's tokens (B, count, dim); with ``route_on_goal`` also what the router sees of it, (B, dim)."""
        if self.asked is None:
            return super().condition(context)
        asked = [part for part in (context.goal, context.task) if part is not None]
        return (*super().condition(context), self.asked(torch.cat(asked, dim=1)))

    def route(self, embedding: Tensor, cond: Conditioning, gumbel: Tensor | None = None) -> Routes:
        """Choose experts for embedded levels (B, dim), or (1, dim) for all rows; see `NoiseRouter`."""
        return self.router(embedding if self.asked is None else embedding + cond[1], gumbel)

    def at_levels(self, level: Tensor) -> Sequence[RoutedNoise] | Sequence[Tensor]:
        embedding = self.embed(level)
        if self.asked is not None:
            return embedding.split(1)
        table = self._tabulated(level, embedding)
        return [RoutedNoise(*entry) for entry in zip(embedding.split(1), table, strict=True)]

    def _tabulated(self, level: Tensor, embedding: Tensor) -> list[list[Choice]]:
        """For each level, each layer's choice; kept until levels or weights change."""
        key = _TableKey.of(level, embedding, self.router)
        if self._table is None or not self._table[0].equals(key):
            self._table = key, self.router(embedding).choices()
        return self._table[1]

    def forward(self, x: Tensor, noise: Tensor | RoutedNoise, cond: Conditioning) -> Tensor:
        if isinstance(noise, Tensor):
            noise = RoutedNoise(noise, self.route(noise, cond).by_layer())
        trunk = cond if self.asked is None else (cond[0], *cond[2:])
        return self.denoise(x, noise.embedding, noise.routes, trunk)


@dataclass(frozen=True)
class _TableKey:
    """When a table of choices is still right.

    Versions of the weights do not tell all: a write through ``parameter.data``, which is how averaged weights are
    copied, does not count. So the embedded levels and the router's last weights are compared as values, too.
    """

    versions: tuple[tuple[int, int], ...]
    values: Tensor

    @classmethod
    def of(cls, level: Tensor, embedding: Tensor, router: NoiseRouter) -> _TableKey:
        weights = [p.detach() for p in router.parameters()]
        versions = tuple((p.data_ptr(), 0 if p.is_inference() else p._version) for p in weights)
        values = [part.detach().flatten().float() for part in (level, embedding, router.out, router.out_bias)]
        return cls(versions, torch.cat(values))

    def equals(self, other: _TableKey) -> bool:
        return self.versions == other.versions and torch.equal(self.values, other.values)


def check_experts(experts: int, top_k: int, hidden: int, shared_expert: bool) -> None:
    """Raise a `UserError` if no mixture can be built so."""
    fewest = 1 + shared_expert
    if not fewest <= top_k <= experts:
        why = " (one is shared)" if shared_expert else ""
        raise UserError(f"top_k={top_k} must lie in {fewest}..experts={experts}{why}.")
    if hidden < 1:
        raise UserError(f"expert_hidden={hidden} must be at least 1.")
