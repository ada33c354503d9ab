"""Optimisation steps per second of robopolicy's DiffusionUnet against LeRobot's DiffusionPolicy, in one run.

Both sides train the same network (equal numbers of parameters are checked) on the same batch, which lies in memory.
A step is all of an update: normalisation, forward, backward, clipping, optimiser, and for robopolicy also the moving
average of the weights, which LeRobot 0.4.4 does not have. Blocks of steps alternate between the sides, so that a busy
machine slows both; the rate is the median over the blocks. Each case runs in a process of its own.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass

import numpy as np
import torch
from diffusers.training_utils import EMAModel
from fresh_process import run_fresh, wait_passively
from results import machine, print_table, save_json
from torch import Tensor, nn

from robopolicy.data.augment import AugmentConfig
from robopolicy.data.normalize import Normalizer, fit_normalizer
from robopolicy.errors import UserError, require_extra
from robopolicy.policies.diffusion_unet import DiffusionUnet, DiffusionUnetConfig
from robopolicy.spec import KeySpec, PolicySpec
from robopolicy.training.config import TrainConfig
from robopolicy.training.step import LossModule, build_optimizer, learning_rate, step_generator, train_step

Batch = dict[str, Tensor]
Step = Callable[[], object]
CROP = 84
SMALL, WIDE = (32, 64, 128), (256, 512, 1024)


@dataclass(frozen=True)
class Case:
    """One row of the table.

    Attributes:
        observations: ``state`` (agent, block position and angle) or ``image`` (96x96 camera and agent position).
        down_dims: channels of the U-Net's levels.
        batch: windows of a step.
        precision: fp32, or bf16 autocast on both sides.
    """

    observations: str
    down_dims: tuple[int, ...]
    batch: int
    precision: str

    @property
    def name(self) -> str:
        return f"{self.observations} {'-'.join(map(str, self.down_dims))} batch {self.batch} {self.precision}"


CASES = [
    Case(observations, dims, batch, precision)
    for precision in ("fp32", "bf16")
    for observations, dims, batch in [
        ("state", SMALL, 64),
        ("state", SMALL, 128),
        ("state", SMALL, 256),
        ("state", WIDE, 16),
        ("image", SMALL, 16),
        ("image", SMALL, 64),
    ]
]


@dataclass(frozen=True)
class Result:
    """Rates are steps per second, one for each block."""

    case: Case
    parameters: int
    ours: list[float]
    lerobot: list[float]

    @property
    def ratio(self) -> float:
        return statistics.median(self.ours) / statistics.median(self.lerobot)


def main() -> None:
    args = parse_arguments()
    require_extra("lerobot", "lerobot")
    about = machine() | {"threads": args.threads}
    wait_passively()
    cases = [c for c in CASES if args.only in c.name]
    if not cases:
        raise UserError(f"--only '{args.only}' matches no case; cases: {', '.join(c.name for c in CASES)}.")
    results = []
    for case in cases:
        results.append(run_fresh(measure, case, args.blocks, args.seconds, args.threads))
        print(f"{case.name}: {results[-1].ratio:.2f} times LeRobot", file=sys.stderr, flush=True)
    print(f"{about['processor']}, {args.threads} threads, torch {about['torch']}; the median of {args.blocks} blocks")
    print_table(
        "Training steps per second",
        ("case", "parameters", "robopolicy", "LeRobot 0.4.4", "ratio", "min-max of blocks"),
        [row(r) for r in results],
    )
    save_json(args.json, [asdict(r) | {"ratio": r.ratio} for r in results], about)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="example: python benchmarks/train_step.py --only 'state 32-64-128 batch 128 fp32' --blocks 9",
    )
    parser.add_argument("--blocks", type=int, default=7, help="blocks of each side and case (default: %(default)s)")
    parser.add_argument("--seconds", type=float, default=1.5, help="least length of a block (default: %(default)s)")
    parser.add_argument(
        "--threads", type=int, default=torch.get_num_threads(), help="CPU threads of both sides (default: %(default)s)"
    )
    parser.add_argument("--only", default="", help="run only the cases whose name contains this text")
    parser.add_argument("--json", metavar="FILE", help="also write all block rates to this file")
    return parser.parse_args()


def measure(case: Case, blocks: int, seconds: float, threads: int) -> Result:
    """Time both sides in alternating blocks.

    Raises:
        UserError: the two networks differ in size, so that the comparison would be worth nothing.
    """
    torch.set_num_threads(threads)
    ours, our_parameters = our_side(case)
    lerobot, lerobot_parameters = lerobot_side(case)
    if our_parameters != lerobot_parameters:
        raise UserError(f"{case.name}: {our_parameters} parameters against LeRobot's {lerobot_parameters}.")
    rates: dict[Step, list[float]] = {ours: [], lerobot: []}
    for step in rates:
        step()
        step()
    for _ in range(blocks):
        for step, measured in rates.items():
            measured.append(block_rate(step, seconds))
    return Result(case, our_parameters, rates[ours], rates[lerobot])


def block_rate(step: Step, seconds: float) -> float:
    began, steps = time.perf_counter(), 0
    while time.perf_counter() - began < seconds:
        step()
        steps += 1
    return steps / (time.perf_counter() - began)


def our_side(case: Case) -> tuple[Step, int]:
    """Robopolicy's update with the defaults of its training loop, and the number of parameters."""
    torch.manual_seed(0)
    batch, spec = our_batch(case), our_spec(case)
    policy = DiffusionUnet(
        DiffusionUnetConfig(down_dims=case.down_dims, step_embed_dim=128, augmentation=AugmentConfig(crop=CROP / 96)),
        spec,
        normalizer_of(spec, batch),
    )
    config = TrainConfig()
    optimizer = build_optimizer(policy, config.optim)
    ema = EMAModel(
        policy.parameters(), decay=config.ema.max_decay, use_ema_warmup=True, power=config.ema.power, foreach=True
    )
    loss_module = LossModule(policy)
    done = 0

    def step() -> None:
        nonlocal done
        loss, _ = train_step(
            loss_module,
            optimizer,
            batch,
            policy.draw(case.batch, step_generator(config.seed, done)),
            lr=learning_rate(config.optim, done, config.steps),
            clip_norm=config.optim.clip_norm,
            bf16=case.precision == "bf16",
        )
        ema.step(policy.parameters())
        loss.item()
        done += 1

    return step, parameter_count(policy)


def lerobot_side(case: Case) -> tuple[Step, int]:
    """LeRobot's update, and the number of parameters."""
    from peers.lerobot_policy import build_lerobot_policy, lerobot_training_step

    torch.manual_seed(0)
    batch = lerobot_batch(case)
    crop = {"crop_shape": (CROP, CROP)} if case.observations == "image" else {}
    policy = build_lerobot_policy(batch, down_dims=case.down_dims, **crop)
    update = lerobot_training_step(policy, batch, case.precision == "bf16")
    return lambda: update(batch), parameter_count(policy)


def our_spec(case: Case) -> PolicySpec:
    observations = {
        "state": (KeySpec("observation.state", (5,), "state", unit="px", source="state", angles=(4,)),),
        "image": (
            KeySpec("observation.agent_pos", (2,), "state", unit="px", source="state", columns=(0, 1)),
            KeySpec("observation.image.top", (96, 96, 3), "image", source="img"),
        ),
    }
    action = KeySpec("action", (2,), "action", unit="px", source="action")
    return PolicySpec(observations[case.observations], action, fps=10.0)


def our_batch(case: Case) -> Batch:
    """A batch as `WindowLoader` yields it, of random numbers in Push-T's ranges."""
    random = torch.Generator().manual_seed(0)
    spec, rows = our_spec(case), case.batch
    batch = {k.key: 512 * torch.rand(rows, spec.n_obs_steps, k.dim, generator=random) for k in spec.states}
    batch["action"] = 512 * torch.rand(rows, spec.horizon, spec.action.dim, generator=random)
    for key in spec.images:
        shape = (rows, spec.n_obs_steps, *key.shape)
        batch[key.key] = torch.randint(0, 256, shape, generator=random, dtype=torch.uint8)
    return batch


def lerobot_batch(case: Case) -> Batch:
    """The same batch as LeRobot's dataset delivers it: images as floats (3, H, W), the angle as sine and cosine."""
    ours = our_batch(case)
    batch = {"action": ours["action"], "action_is_pad": torch.zeros(ours["action"].shape[:2], dtype=torch.bool)}
    if case.observations == "image":
        images = ours["observation.image.top"].permute(0, 1, 4, 2, 3).contiguous()
        return batch | {"observation.state": ours["observation.agent_pos"], "observation.image": images.float() / 255}
    state = ours["observation.state"]
    block = torch.cat([state[..., 2:4], state[..., 4:].sin(), state[..., 4:].cos()], dim=-1)
    return batch | {"observation.state": state[..., :2], "observation.environment_state": block}


def normalizer_of(spec: PolicySpec, batch: Batch) -> Normalizer:
    keys = (*spec.states, spec.action)
    flat = {k.key: batch[k.key].flatten(0, 1).numpy().astype(np.float64) for k in keys}
    return Normalizer.from_parts({k.key: fit_normalizer(flat[k.key], "minmax", k.angles) for k in keys})


def parameter_count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def row(result: Result) -> tuple[str, ...]:
    ratios = [a / b for a, b in zip(result.ours, result.lerobot, strict=True)]
    return (
        result.case.name,
        f"{result.parameters:,}",
        f"{statistics.median(result.ours):.2f}",
        f"{statistics.median(result.lerobot):.2f}",
        f"{result.ratio:.2f}",
        f"{min(ratios):.2f}-{max(ratios):.2f}",
    )


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
