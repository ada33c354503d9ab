"""What a chunk asks of a machine: multiplications, and bytes that must come from memory; counted, not estimated.

The policy's own torch modules are run once, and every operation is looked at. Engines compute the same graphs, so that
the count holds for all of them, but for the bytes of a weight, which depend on the engine's precision.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from robopolicy.policies.base import Policy


@dataclass(frozen=True)
class Work:
    """What one pass through a graph costs, independent of the machine.

    Attributes:
        flops: two for each multiplication and addition of matrix products, convolutions and attention; products with a
            convolution's padding are left out.
        weights: numbers that are read and were there before: weights, tables, inputs; each counts once.
        activations: numbers that matrix products, convolutions and attention write; engines fuse the element-wise
            operations between them, so that each is written once and read once.
    """

    flops: int
    weights: int
    activations: int


@dataclass(frozen=True)
class ChunkWork:
    """What a chunk costs.

    Attributes:
        encode: observations to conditioning, once for a chunk.
        denoise: one entry for each call of the denoiser, in order; they differ where experts are chosen.
    """

    encode: Work
    denoise: tuple[Work, ...]

    @property
    def flops(self) -> int:
        return self.encode.flops + sum(call.flops for call in self.denoise)


class Ledger(TorchDispatchMode):
    """Adds up what the operations within it compute, read and write, see `Work`."""

    def __init__(self) -> None:
        super().__init__()
        self.flops = self.weights = self.activations = 0
        self._made: set[int] = set()
        self._read: set[tuple[int, int, int]] = set()
        self._kept: list[Tensor] = []

    @property
    def work(self) -> Work:
        return Work(self.flops, self.weights, self.activations)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        count = flop_registry.get(func.overloadpacket)
        if count is None:
            with self:
                parts = func.decompose(*args, **kwargs)
            if parts is not NotImplemented:
                return parts
        results = func(*args, **kwargs)
        if func.is_view:  # moves no data
            return results
        for tensor in _tensors((args, kwargs)):
            self._note(tensor)
        for tensor in _tensors(results):
            self._made.add(self._storage(tensor))
        if count is not None:
            flops = count(*args, **kwargs, out_val=results)
            padded = func.overloadpacket is torch.ops.aten.convolution
            self.flops += round(flops * _inside(results, *args)) if padded else int(flops)
            self.activations += sum(tensor.numel() for tensor in _tensors(results))
        return results

    def _note(self, tensor: Tensor) -> None:
        storage = self._storage(tensor)
        numbers = math.prod(n for n, stride in zip(tensor.shape, tensor.stride(), strict=True) if stride)
        place = storage, int(tensor.storage_offset()), numbers
        if storage not in self._made and place not in self._read:
            self._read.add(place)
            self.weights += numbers

    def _storage(self, tensor: Tensor) -> int:
        self._kept.append(tensor)  # the address of a freed storage would be given to another tensor
        return int(tensor.untyped_storage()._cdata)


def _inside(
    result: Tensor,
    x: Tensor,
    weight: Tensor,
    _bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    transposed: bool,
    *_: Any,
) -> float:
    """The share of a convolution's taps that do not lie in its padding; arguments as of ``aten.convolution``."""
    steps, extent = (x, result) if transposed else (result, x)
    share = 1.0
    for d, taps in enumerate(weight.shape[2:]):
        step, tap = torch.arange(steps.shape[2 + d]), torch.arange(taps)
        place = step[:, None] * stride[d] - padding[d] + tap * dilation[d]
        share *= ((place >= 0) & (place < extent.shape[2 + d])).float().mean().item()
    return share


def _tensors(tree: Any) -> Sequence[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def graph_work(module: nn.Module, inputs: Sequence[Tensor]) -> Work:
    """What one call of a module costs."""
    # the counter knows attention as matrix products, but not the fused kernels of the CPU
    with torch.inference_mode(), sdpa_kernel(SDPBackend.MATH), Ledger() as ledger:
        module(*inputs)
    return ledger.work


@torch.inference_mode()
def chunk_work(policy: Policy, observations: Mapping[str, Tensor]) -> ChunkWork:
    """What a chunk costs with the policy's present sampler.

    What depends on the sampler's noise levels alone is left out: engines hold it as constants.

    Args:
        observations: as for `Policy.sample`, any number of rows.
    """
    graph = policy.export_graphs(observations)["encoder"]
    encode = graph_work(graph.module, graph.inputs)
    calls: list[Work] = []
    open_ledgers: list[Ledger] = []

    def begin(*_: Any) -> None:
        open_ledgers.append(Ledger().__enter__())

    def end(*_: Any) -> None:
        ledger = open_ledgers.pop()
        ledger.__exit__(None, None, None)
        calls.append(ledger.work)

    denoiser = policy.get_submodule("denoiser")
    hooks = [denoiser.register_forward_pre_hook(begin), denoiser.register_forward_hook(end)]
    try:
        with sdpa_kernel(SDPBackend.MATH):
            policy.sample(observations, torch.Generator().manual_seed(0))
    finally:
        for hook in hooks:
            hook.remove()
    return ChunkWork(encode, tuple(calls))
