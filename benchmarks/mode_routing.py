"""One chunk's network calls of MoDE: experts from a table, against a router in every step, against all experts.

All three sides have the same weights. "dense" evaluates all experts in every layer and mixes them, as a network of this
size without a choice would. Steps alternate between the sides, so that a busy machine slows all; a chunk is the sum of
its steps, and times are medians over the rounds. A step's router call is part of its time; the table's single call,
which all chunks of a schedule share, is timed apart. Weights are drawn large enough for the router to have an opinion.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from fresh_process import run_fresh, wait_passively
from results import machine, print_table, save_json
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from robopolicy.diffusion.edm import EdmConfig, EdmProcess
from robopolicy.errors import UserError
from robopolicy.nets.context import Context, ContextSize
from robopolicy.nets.experts import ModeDenoiser, StackedExperts
from robopolicy.nets.transformer import LinearNoiseEmbedding

ACTION, HORIZON, SIZE = 7, 16, ContextSize(n_obs_steps=2, step=64, goal=64)
EXPERTS = 4
Step = Callable[[int], Tensor]


@dataclass(frozen=True)
class Result:
    """What was measured with B rows.

    Attributes:
        rows: B.
        parameters: of the network, all and the active ones.
        difference: largest difference between outputs with the table and with the router, over all steps; the largest
            output is about ``scale``.
        scale: largest output.
        copied: MB of experts' weights that a chunk copies, with the table and with the router.
        seconds: of a chunk, one for each round and side.
        table: seconds to make the table, once for all chunks.
    """

    rows: int
    parameters: tuple[int, int]
    difference: float
    scale: float
    copied: tuple[float, float]
    seconds: dict[str, list[float]]
    table: float

    def ratio(self, side: str) -> float:
        return statistics.median(self.seconds[side]) / statistics.median(self.seconds["table"])


def main() -> None:
    args = parse_arguments()
    about = machine() | {"threads": args.threads}
    wait_passively()
    results: dict[int, list[Result]] = {}
    for dim in args.dims:
        found = results[dim] = []
        for rows in args.rows:
            options = (dim, args.layers, args.top_k, args.steps, args.rounds, args.threads, args.device)
            found.append(run_fresh(measure, rows, *options))
            print(f"dim {dim}, {rows} rows: dense / table {found[-1].ratio('dense'):.2f}", file=sys.stderr, flush=True)
        total, active = found[0].parameters
        print_table(
            f"dim {dim}, {args.layers} layers, {args.top_k} of {EXPERTS} experts: {active / 1e6:.1f} of "
            f"{total / 1e6:.1f} million parameters active ({active / total:.2f}); {args.steps} steps, "
            f"{args.device}, {about['processor']}, {args.threads} threads, torch {about['torch']}",
            ("rows", "max |table - router|", "copied, MB", "table, ms", "router, ms", "dense, ms")
            + ("router / table", "dense / table", "min-max", "making the table, ms"),
            [row(r) for r in found],
        )
    save_json(args.json, {dim: [asdict(r) for r in rows] for dim, rows in results.items()}, about)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="example: python benchmarks/mode_routing.py --dims 512 --rows 1 8 --rounds 3 --threads 1",
    )
    parser.add_argument("--dims", type=int, nargs="+", default=[512, 1024], help="widths (default: 512 1024)")
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 8, 64], help="rows of a batch (default: 1 8 64)")
    parser.add_argument("--layers", type=int, default=8, help="default: %(default)s")
    parser.add_argument("--top-k", type=int, default=2, help="active experts (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=10, help="sampling steps of a chunk (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=5, help="chunks of each side (default: %(default)s)")
    parser.add_argument("--device", default="cpu", help="cpu or cuda (default: %(default)s)")
    parser.add_argument(
        "--threads", type=int, default=torch.get_num_threads(), help="CPU threads of all sides (default: %(default)s)"
    )
    parser.add_argument("--json", metavar="FILE", help="also write all times to this file")
    return parser.parse_args()


def network(dim: int, layers: int, top_k: int) -> ModeDenoiser:
    return ModeDenoiser(
        ACTION,
        HORIZON,
        SIZE,
        dim=dim,
        layers=layers,
        heads=8,
        noise_embedding=LinearNoiseEmbedding(dim),
        experts=EXPERTS,
        top_k=top_k,
        hidden=4 * dim,
    )


@torch.inference_mode()
def measure(rows: int, dim: int, layers: int, top_k: int, steps: int, rounds: int, threads: int, device: str) -> Result:
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    net = network(dim, layers, top_k).to(device).eval()
    net.router.hidden.weight.mul_(10)
    with torch.device("meta"):
        all_experts = network(dim, layers, EXPERTS).eval()
    all_experts.load_state_dict(net.state_dict(), assign=True)  # the same memory

    process = EdmProcess(EdmConfig(sigma_min=0.001, sigma_max=80.0, grid="exponential"))
    levels = process.network_level(process.grid(steps)).to(device)
    x = torch.randn(rows, HORIZON, ACTION, device=device)
    steps_seen = torch.randn(rows, SIZE.n_obs_steps, SIZE.step, device=device)
    cond = net.condition(Context(steps_seen, goal=torch.randn(rows, SIZE.goal, device=device)))
    began = now(device)
    table = net.at_levels(levels)
    making = now(device) - began
    embedded, mixed = net.embed(levels).split(1), all_experts.at_levels(levels)
    sides: dict[str, Step] = {
        "table": lambda i: net(x, table[i], cond),
        "router": lambda i: net(x, embedded[i], cond),
        "dense": lambda i: all_experts(x, mixed[i], cond),
    }
    outputs: dict[str, Tensor] = {}
    copied = []
    for side, step in sides.items():  # warms up, too
        with Copies(net) as copies:
            outputs[side] = torch.stack([step(i) for i in range(steps)])
        copied.append(copies.bytes / 1e6)
    difference = (outputs["table"] - outputs["router"]).abs().max().item()
    scale = outputs["table"].abs().max().item()
    seconds: dict[str, list[float]] = {side: [] for side in sides}
    for _ in range(rounds):
        chunk = dict.fromkeys(sides, 0.0)
        for i in range(steps):
            for side, step in sides.items():
                began = now(device)
                step(i)
                chunk[side] += now(device) - began
        for side, spent in chunk.items():
            seconds[side].append(spent)
    count = (sum(p.numel() for p in net.parameters()), net.active_parameters())
    return Result(rows, count, difference, scale, (copied[0], copied[1]), seconds, making)


def now(device: str) -> float:
    if device != "cpu":
        torch.cuda.synchronize()
    return time.perf_counter()


class Copies(TorchDispatchMode):
    """Adds up the bytes of results that have the shape of experts' weights and do not lie in a parameter's memory."""

    def __init__(self, net: ModeDenoiser) -> None:
        super().__init__()
        self.bytes = 0
        self.parameters = {p.untyped_storage().data_ptr() for p in net.parameters()}
        experts = [m for m in net.modules() if isinstance(m, StackedExperts)]
        self.shapes = {p.shape[1:] for p in (experts[0].up, experts[0].down)}

    def __torch_dispatch__(self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for t in tree_leaves(result):
            new = isinstance(t, Tensor) and t.untyped_storage().data_ptr() not in self.parameters
            if new and t._base is None and t.shape[-2:] in self.shapes:
                self.bytes += t.untyped_storage().nbytes()
        return result


def row(result: Result) -> tuple[str, ...]:
    times = [f"{1e3 * statistics.median(result.seconds[side]):.1f}" for side in ("table", "router", "dense")]
    ratios = [a / b for a, b in zip(result.seconds["dense"], result.seconds["table"], strict=True)]
    return (
        str(result.rows),
        f"{result.difference:.0e} of {result.scale:.1f}",
        f"{result.copied[0]:.0f} / {result.copied[1]:.0f}",
        *times,
        f"{result.ratio('router'):.2f}",
        f"{result.ratio('dense'):.2f}",
        f"{min(ratios):.2f}-{max(ratios):.2f}",
        f"{1e3 * result.table:.1f}",
    )


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
