"""SDP's network: a transformer decoder whose feed-forward parts are experts, chosen by task (Wang et al., CoRL 2024).

The decoder is Diffusion Policy's (Chi et al., RSS 2023): causal self-attention over the actions, cross-attention to a
memory of noise level, goal and observations. All tasks share one pool of experts in each layer, and every task has a
router of its own, which sees the token. A router knows only the experts that existed when it was made: experts and
routers can be added later, and what the earlier tasks compute does not change by a single bit.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import one_hot, pad, scaled_dot_product_attention

from robopolicy.errors import UserError
from robopolicy.nets.capture import capturing
from robopolicy.nets.context import Context, ContextSize
from robopolicy.nets.denoiser import Conditioning, Denoiser
from robopolicy.nets.transformer import INIT_STD, ActionTokens, ContextTokens, Mlp, check_transformer
from robopolicy.nets.unet1d import SinusoidalEmbedding

PROBABILITY_FLOOR = 1e-4
"""Added to every probability of a router, as released: the logarithms of their means stay finite."""
WARM_UP = 100
"""Batches of a task whose plain average starts its running mean; from then on its momentum is 0.99."""


class Router(nn.Module):
    """One task's perceptron from tokens (..., dim) to a probability for each expert that the task knows.

    Args:
        dim: length of a token.
        experts: number of experts that the task knows, the first of the layer's.
    """

    def __init__(self, dim: int, experts: int) -> None:
        super().__init__()
        self.hidden = nn.Linear(dim, dim // 4)
        self.activation = nn.GELU()
        self.out = nn.Linear(dim // 4, experts)

    def forward(self, tokens: Tensor) -> Tensor:
        """Softmax over the experts plus `PROBABILITY_FLOOR`, (..., experts) float32."""
        return self.out(self.activation(self.hidden(tokens))).float().softmax(-1) + PROBABILITY_FLOOR


class TaskExperts(nn.Module):
    """The feed-forward part of a block: each token goes to the ``top_k`` experts that its task's router prefers.

    The experts' outputs are weighted with the router's probabilities, which are not renormalised, and summed; no expert
    has a limit, no token is dropped.

    Args:
        dim: length of a token.
        hidden: hidden units of an expert.
        experts: E.
        router_experts: for each task, how many of the experts its router knows.
        top_k: experts of a token.
    """

    def __init__(self, dim: int, hidden: int, experts: int, router_experts: Sequence[int], top_k: int) -> None:
        super().__init__()
        self.top_k = top_k
        # a module each, no stacked weights: where new ones are added, the old stay the same tensors and can be frozen
        self.experts = nn.ModuleList(Mlp(dim, hidden) for _ in range(experts))
        self.routers = nn.ModuleList(Router(dim, count) for count in router_experts)

    def forward(self, tokens: Tensor, tasks: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Map tokens (B, N, dim) of rows that are sorted by task.

        Args:
            tokens: (B, N, dim).
            tasks: number of rows (T,) of each task, on the CPU.

        Returns:
            (B, N, dim), and for each task t its router's probabilities (rows * N, E_t).
        """
        flat = tokens.flatten(0, 1)
        out, probabilities = self._dispatched(flat, (tasks * tokens.shape[1]).tolist())
        return out.view_as(tokens), probabilities

    @torch.compiler.disable  # lengths depend on data
    def _dispatched(self, flat: Tensor, counts: list[int]) -> tuple[Tensor, list[Tensor]]:
        probabilities = [
            router(part) if _needed(part) else part.new_zeros(0, router.out.out_features)
            for router, part in zip(self._routers, flat.split(counts), strict=True)
        ]
        chosen = [p.topk(self.top_k) for p in probabilities]
        index = torch.cat([c.indices for c in chosen]).flatten()
        gate = torch.cat([c.values for c in chosen]).flatten()
        order = index.argsort(stable=True)
        parts = flat[order // self.top_k].split(torch.bincount(index, minlength=len(self.experts)).tolist())
        outputs = [expert(part) for expert, part in zip(self.experts, parts, strict=True) if _needed(part)]
        weighted = torch.cat(outputs) * gate[order, None]
        # back by a permutation: adding up at indices would be in no fixed order on a GPU
        return weighted[order.argsort()].unflatten(0, (-1, self.top_k)).sum(1).to(flat.dtype), probabilities

    def dense(self, tokens: Tensor, task: Tensor) -> Tensor:
        """The same for rows of the tasks (B,) in any order, all experts computed: for graphs of fixed shapes."""
        known = [router(tokens) for router in self._routers]
        of_tasks = torch.stack([pad(p, (0, len(self.experts) - p.shape[-1])) for p in known])
        chosen = of_tasks[task, torch.arange(task.shape[0], device=task.device)].topk(self.top_k)
        gates = torch.zeros_like(of_tasks[0]).scatter(-1, chosen.indices, chosen.values)
        outputs = torch.stack([expert(tokens) for expert in self.experts], dim=-1)
        return (outputs * gates[:, :, None]).sum(-1).to(tokens.dtype)

    @property
    def _routers(self) -> list[Router]:
        return [router for router in self.routers if isinstance(router, Router)]


def _needed(part: Tensor) -> bool:
    """There are tokens; or gradients are wanted, which every process of a distributed training must have."""
    return len(part) > 0 or torch.is_grad_enabled()


class ExpertUsage(nn.Module):
    """Running means of the routers' probabilities, and the loss that raises the mutual information I(task; expert).

    Tasks count alike, so that ``P(t, e) = P(e | t) / T``, and row t of `running` estimates ``P(e | t)`` from the
    batches that hold task t.

    Args:
        layers: L.
        experts: E.
        router_experts: for each task, how many of the experts its router knows.
    """

    running: Tensor
    batches: Tensor
    known: Tensor

    def __init__(self, layers: int, experts: int, router_experts: Sequence[int]) -> None:
        super().__init__()
        tasks = len(router_experts)
        self.register_buffer("running", torch.zeros(layers, tasks, experts))
        self.register_buffer("batches", torch.zeros(tasks, dtype=torch.long))
        known = torch.arange(experts) < torch.tensor(router_experts)[:, None]
        self.register_buffer("known", known, persistent=False)

    @torch.no_grad()
    def update(self, usage: Tensor, present: Tensor) -> None:
        """Take in a batch: mean probabilities (L, T, E) and which tasks (T,) it holds."""
        self.batches += present
        weight = present / self.batches.clamp(1, WARM_UP)
        self.running.lerp_(usage, weight[:, None].expand_as(usage))

    def information_loss(self, usage: Tensor, present: Tensor) -> Tensor:
        """Minus the first-order change of I(task; expert), summed over the layers (SDP; Mod-Squad, Chen et al. 2023).

        ``-sum_t,e q(t, e) [log P(t, e) - log P(e)]`` over the tasks of the batch that have passed `WARM_UP` batches,
        with ``q(t, e)`` this batch's mean probability over T; the gradient goes through q alone. It is minimised where
        each task uses few experts and all tasks together use all of them alike.

        Args:
            usage: (L, T, E) the batch's mean probabilities.
            present: (T,) bool, the tasks that it holds.
        """
        tasks = len(self.batches)
        joint = self.running / tasks
        counted = (present & (self.batches > WARM_UP))[:, None] & self.known
        information = torch.where(counted, joint.log() - joint.sum(1, keepdim=True).log(), 0)
        return -(usage / tasks * information).sum()

    def continue_from(self, other: ExpertUsage) -> None:
        """Take over what another, with fewer tasks and experts, has seen."""
        _, tasks, experts = other.running.shape
        self.running[:, :tasks, :experts] = other.running
        self.batches[:tasks] = other.batches


def mean_usage(probabilities: Sequence[Sequence[Tensor]], experts: int) -> Tensor:
    """Means (L, T, E) of `TaskExperts`' probabilities, for each layer and task; 0 where there is no token or expert."""
    return torch.stack(
        [
            torch.stack([pad(p.sum(0) / max(1, len(p)), (0, experts - p.shape[1])) for p in of_tasks])
            for of_tasks in probabilities
        ]
    )


class DecoderBlock(nn.Module):
    """Pre-norm transformer decoder block with task experts.

    Args:
        dim: length of a token.
        heads: of both attentions.
        experts: the feed-forward part.
    """

    def __init__(self, dim: int, heads: int, experts: TaskExperts) -> None:
        super().__init__()
        self.heads = heads
        self.self_norm, self.cross_norm, self.experts_norm = (nn.LayerNorm(dim) for _ in range(3))
        self.qkv = nn.Linear(dim, 3 * dim)
        self.self_out = nn.Linear(dim, dim)
        self.query = nn.Linear(dim, dim)
        self.cross_out = nn.Linear(dim, dim)
        self.experts = experts

    def attended(self, x: Tensor, memory: Tensor, visible: Tensor, kept: Tensor | None) -> Tensor:
        """Both attentions.

        Args:
            x: (B, H, dim) actions.
            memory: (B, M, 2 * dim) keys and values of the memory.
            visible: (H, H + M) bool: which actions, then which entries of the memory, an action sees.
            kept: (B, heads, H, H + M) dropout factors of the attention weights; None: no dropout.
        """
        own, seen = visible.split((x.shape[1], memory.shape[1]), dim=-1)
        own_kept, seen_kept = (None, None) if kept is None else kept.split((own.shape[1], seen.shape[1]), dim=-1)
        query, key, value = self.qkv(self.self_norm(x)).chunk(3, dim=-1)
        x = x + self.self_out(attention(query, key, value, self.heads, own, own_kept))
        key, value = memory.chunk(2, dim=-1)
        return x + self.cross_out(attention(self.query(self.cross_norm(x)), key, value, self.heads, seen, seen_kept))


def attention(q: Tensor, k: Tensor, v: Tensor, heads: int, visible: Tensor, kept: Tensor | None = None) -> Tensor:
    """Multi-head attention (Vaswani et al. 2017).

    Args:
        q: (B, N, dim).
        k: (B, M, dim).
        v: (B, M, dim).
        heads: divides ``dim``.
        visible: (N, M) bool.
        kept: (B, heads, N, M) factors of the weights; None: all 1.

    Returns:
        (B, N, dim).
    """
    q, k, v = (part.unflatten(-1, (heads, -1)).transpose(1, 2) for part in (q, k, v))
    if kept is None:
        mixed = scaled_dot_product_attention(q, k, v, attn_mask=visible)
    else:
        scores = q @ k.mT / q.shape[-1] ** 0.5
        mixed = (scores.masked_fill(~visible, -torch.inf).softmax(-1) * kept) @ v
    return mixed.transpose(1, 2).flatten(2)


class SdpDenoiser(Denoiser):
    """Transformer decoder with task experts; the memory is [noise | goal | observations].

    Action t sees the actions up to t, noise and goal, and the observations up to its own step. Observations and goal,
    and the noise level, each become keys and values for all layers before the first denoising step.

    Args:
        action_dim: A.
        horizon: H.
        size: lengths of the context's vectors; instructions are not used, only the task's index.
        dim: length of a token.
        layers: number of blocks.
        heads: attention heads, divides ``dim``.
        hidden: hidden units of an expert.
        experts: in each layer.
        router_experts: for each task, how many of the experts its router knows.
        top_k: experts of a token.
        prefix: it can be shown known actions.

    Raises:
        UserError: impossible sizes.
    """

    visible: Tensor

    def __init__(
        self,
        action_dim: int,
        horizon: int,
        size: ContextSize,
        *,
        dim: int,
        layers: int,
        heads: int,
        hidden: int,
        experts: int,
        router_experts: Sequence[int],
        top_k: int,
        prefix: bool = False,
    ) -> None:
        super().__init__()
        check_transformer(dim, layers, heads)
        check_task_experts(experts, router_experts, top_k)
        self.layers, self.heads, self.experts = layers, heads, experts
        self.context_tokens = ContextTokens(size, dim)
        self.action_tokens = ActionTokens(action_dim, horizon, dim, prefix)
        self.noise_embedding = SinusoidalEmbedding(dim)
        self.noise_position = nn.Parameter(INIT_STD * torch.randn(dim))
        self.memory = nn.Sequential(nn.Linear(dim, 4 * dim), nn.Mish(), nn.Linear(4 * dim, dim))
        self.keys_and_values = nn.Linear(dim, layers * 2 * dim)
        self.blocks = nn.ModuleList(
            DecoderBlock(dim, heads, TaskExperts(dim, hidden, experts, router_experts, top_k)) for _ in range(layers)
        )
        self.head = nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, action_dim))
        self.apply(_init)
        self.usage = ExpertUsage(layers, experts, router_experts)
        self.register_buffer(
            "visible", _visible(horizon, self.context_tokens.count, size.n_obs_steps), persistent=False
        )

    def active_parameters(self) -> int:
        """All parameters but those of the experts that a token does not take, and of other tasks' routers."""
        idle = 0
        for block in self._blocks:
            sizes = [sum(p.numel() for p in expert.parameters()) for expert in block.experts.experts]
            routers = [sum(p.numel() for p in router.parameters()) for router in block.experts.routers]
            idle += sum(sizes[block.experts.top_k :]) + sum(routers) - max(routers)
        return super().active_parameters() - idle

    def condition(self, context: Context) -> Conditioning:
        """Keys and values of all layers (B, M - 1, layers * 2 * dim), and the index of the task (B,)."""
        tokens = self.context_tokens(context)
        task = context.task_index
        if task is None:
            task = torch.zeros(tokens.shape[0], dtype=torch.long, device=tokens.device)
        return self.keys_and_values(self.memory(tokens)), task

    def embed(self, level: Tensor) -> Tensor:
        """Keys and values of all layers for the levels (N,), (N, layers * 2 * dim)."""
        return self.keys_and_values(self.memory(self.noise_embedding(level) + self.noise_position))

    @torch.no_grad()
    def prefer(self, task: int, expert: int, logit: float) -> None:
        """Set the bias of a task's routers for an expert, in all layers."""
        for block in self._blocks:
            router = block.experts.routers[task]
            assert isinstance(router, Router)
            router.out.bias[expert] = logit

    def draw_dropout(self, rows: int, rate: float, generator: torch.Generator) -> Tensor:
        """Draw factors (rows, layers, heads, H, H + M), 0 or 1 / (1 - rate), of the attention weights, on the CPU."""
        kept = torch.empty(rows, self.layers, self.heads, *self.visible.shape)
        return kept.bernoulli_(1 - rate, generator=generator).div_(1 - rate)

    def forward(self, x: Tensor, noise: Tensor, cond: Conditioning) -> Tensor:
        if not capturing():
            return self.denoise(x, noise, cond)[0]
        memory, task = self._memory(x, noise, cond), cond[1]
        h = self.action_tokens(x)
        for block, of_layer in zip(self._blocks, memory, strict=True):
            h = block.attended(h, of_layer, self.visible, None)
            h = h + block.experts.dense(block.experts_norm(h), task)
        return self.head(h)

    def denoise(self, x: Tensor, noise: Tensor, cond: Conditioning) -> tuple[Tensor, list[list[Tensor]]]:
        """Predict the target, and say how it was routed.

        Args:
            x, noise: see `Denoiser.forward`.
            cond: from `condition`; in training possibly followed by the factors of `draw_dropout`.

        Returns:
            (B, H, A), and for each layer and task the router's probabilities, see `TaskExperts.forward`.
        """
        _, task, *kept = cond
        order = task.argsort(stable=True)
        counts = one_hot(task, len(self.usage.batches)).sum(0).cpu()
        memory = [part[order] for part in self._memory(x, noise, cond)]
        dropped = kept[0][order].unbind(1) if kept else [None] * self.layers
        h, routed = self.action_tokens(x[order]), []
        for block, of_layer, factors in zip(self._blocks, memory, dropped, strict=True):
            h = block.attended(h, of_layer, self.visible, factors)
            out, probabilities = block.experts(block.experts_norm(h), counts)
            h = h + out
            routed.append(probabilities)
        return self.head(h)[order.argsort()], routed

    def _memory(self, x: Tensor, noise: Tensor, cond: Conditioning) -> tuple[Tensor, ...]:
        """Keys and values of each layer, (B, M, 2 * dim)."""
        level = noise[:, None].expand(x.shape[0], -1, -1)
        return torch.cat([level, cond[0]], dim=1).chunk(self.layers, dim=-1)

    @property
    def _blocks(self) -> list[DecoderBlock]:
        return [block for block in self.blocks if isinstance(block, DecoderBlock)]


def _visible(horizon: int, context_tokens: int, n_obs_steps: int) -> Tensor:
    """(H, H + 1 + context_tokens): actions and observations up to an action's own step, noise and goal always."""
    step = torch.arange(horizon)[:, None]
    always = torch.ones(horizon, 1 + context_tokens - n_obs_steps, dtype=torch.bool)
    return torch.cat([step >= torch.arange(horizon), always, step >= torch.arange(n_obs_steps)], dim=1)


def _init(module: nn.Module) -> None:
    """The published standard deviation, 0.02 at width 512, kept in proportion for other widths; experts are uniform.

    A fixed 0.02 makes signals fade in narrow networks, which then hardly see observations and tasks.
    """
    if isinstance(module, nn.Linear):
        nn.init.normal_(module.weight, std=INIT_STD * math.sqrt(512 / module.in_features))
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    if isinstance(module, Mlp):
        for layer in (module.up, module.down):
            layer.reset_parameters()


def check_task_experts(experts: int, router_experts: Sequence[int], top_k: int) -> None:
    """Raise a `UserError` if no mixture can be built so."""
    if not 1 <= top_k <= experts:
        raise UserError(f"top_k={top_k} must lie in 1..experts={experts}.")
    for task, known in enumerate(router_experts):
        if not top_k <= known <= experts:
            raise UserError(f"router_experts[{task}]={known} must lie in top_k={top_k}..experts={experts}.")
