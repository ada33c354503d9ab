"""``robopolicy randomize``"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from robopolicy.cli.record import parse_options
from robopolicy.errors import UserError
from robopolicy.simulator import task_id

if TYPE_CHECKING:
    from robopolicy.evaluation.randomization_search import Play, Round

FIRST_SEED = 300_000  # no demonstration, evaluation or evaluation during training starts there

HELP = """\
Find the widest randomization of a simulated task under which a policy, or the scripted expert, still succeeds.

  robopolicy randomize --bundle runs/lift/bundles/last --factor friction gain action_latency=0:0.2
  robopolicy randomize --task lift --factor friction object_mass=0.5:5 --success 0.95 --out lift.json

Without a range a factor may vary within all its bounds. Episodes are played under Beta distributions, narrow at first;
then these are widened as far as the success rate allows, and so on (DORAEMON, Tiboni et al., ICLR 2024). The widest
distributions that kept the success rate are played once more on other seeds, and printed as an option to record and
evaluate with:

  robopolicy record --task lift --episodes 200 --out data/lift.zarr --option randomization='{friction: …}'
"""


def add_parser(verbs: Any) -> None:
    parser = verbs.add_parser(
        "randomize",
        help="find the widest randomization that a policy copes with",
        description=HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    who = parser.add_mutually_exclusive_group(required=True)
    who.add_argument("--bundle", type=Path, help="the policy, a folder with bundle.yaml")
    who.add_argument("--task", help="play the scripted expert of this task instead")
    parser.add_argument("--factor", required=True, nargs="+", metavar="NAME[=LOW:HIGH]", help="what to randomize")
    parser.add_argument("--quality", default="good", help="of the expert (default good)")
    parser.add_argument("--success", type=float, default=0.9, metavar="RATE", help="rate to keep (default 0.9)")
    parser.add_argument("--step", type=float, default=0.3, metavar="NATS", help="largest KL of a step (default 0.3)")
    parser.add_argument("--rounds", type=int, default=15, metavar="N", help="(default 15)")
    parser.add_argument("--episodes", type=int, default=100, metavar="N", help="in each round (default 100)")
    parser.add_argument(
        "--seed", type=int, default=FIRST_SEED, help=f"seed of the first episode (default {FIRST_SEED})"
    )
    parser.add_argument("--workers", type=int, default=0, metavar="N", help="processes that simulate for a policy")
    parser.add_argument(
        "--option", action="append", default=[], metavar="KEY=VALUE", help="argument of the environment; repeatable"
    )
    parser.add_argument("--device", default="auto", help="device of the policy (default auto)")
    parser.add_argument("--out", type=Path, metavar="JSON", help="also write the numbers")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    from robopolicy.evaluation.doraemon import Betas
    from robopolicy.evaluation.randomization_search import ranges_of, search, widest
    from robopolicy.evaluation.results import write_json

    _check(args)
    ranges = ranges_of(parse_factors(args.factor))
    play = _expert(args) if args.bundle is None else _policy(args)
    rounds = search(
        Betas.around(ranges),
        play,
        rounds=args.rounds,
        episodes=args.episodes,
        first_seed=args.seed,
        min_success=args.success,
        max_divergence=args.step,
        on_round=_print_round,
    )
    best = widest(rounds, args.success)
    if best is None:
        raise UserError(
            f"No round kept a success rate of {args.success:g}; even close to the nominal values it was "
            f"{rounds[0].success_rate:.0%}. Lower --success or give narrower ranges."
        )
    first = args.seed + args.rounds * args.episodes
    _, success = play(best.betas, range(first, first + args.episodes))
    report = _report(best, int(success.sum()), len(success))
    if args.out is not None:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        write_json(args.out, report | {"rounds": [_row(r) for r in rounds]})
        print(f"written: {args.out}")
    return 0


def parse_factors(words: Sequence[str]) -> dict[str, tuple[float, float] | None]:
    """Ranges by factor from ``NAME`` and ``NAME=LOW:HIGH`` words; None where no range was given.

    Raises:
        UserError: a range cannot be read.
    """
    ranges: dict[str, tuple[float, float] | None] = {}
    for word in words:
        name, equals, text = word.partition("=")
        try:
            low, high = (float(end) for end in text.split(":")) if equals else (0.0, 0.0)
        except ValueError:
            raise UserError(f"--factor {word}: wanted NAME or NAME=LOW:HIGH, e.g. friction=0.3:1.5.") from None
        ranges[name] = (low, high) if equals else None
    return ranges


def _check(args: argparse.Namespace) -> None:
    if not 0 < args.success <= 1:
        raise UserError(f"--success is {args.success:g}, wanted above 0, at most 1.")
    if not args.step > 0 or args.rounds < 1 or args.episodes < 10 or args.seed < 0:
        raise UserError("--step must be above 0, --rounds at least 1, --episodes at least 10, --seed at least 0.")


def _expert(args: argparse.Namespace) -> Play:
    from robopolicy.evaluation.randomization_search import play_expert

    return play_expert(task_id(args.task), parse_options(args.option), args.quality)


def _policy(args: argparse.Namespace) -> Play:
    from robopolicy.evaluation.randomization_search import play_policy
    from robopolicy.policies.bundle import load_bundle
    from robopolicy.training.distributed import join_processes

    policy, manifest = load_bundle(args.bundle.resolve(), join_processes(args.device).device)
    name = manifest["task"].get("environment")
    if not name:
        raise UserError(f"{args.bundle} was trained for a task without an environment.")
    options = (manifest["task"].get("environment_options") or {}) | parse_options(args.option)
    return play_policy(policy, name, options, workers=args.workers)


def _row(one: Round) -> dict[str, Any]:
    return {
        "randomization": one.betas.randomization(),
        "entropy": one.betas.entropy(),
        "successes": one.successes,
        "episodes": one.episodes,
    }


def _print_round(one: Round) -> None:
    means = one.betas.mean()
    spread = one.betas.deviation()
    values = ", ".join(
        f"{name} {mean:.3g} ± {deviation:.2g}"
        for name, mean, deviation in zip(one.betas.names, means, spread, strict=True)
    )
    print(f"success {one.success_rate:4.0%}  entropy {one.betas.entropy():6.2f} nats  {values}", flush=True)


def _report(best: Round, successes: int, episodes: int) -> dict[str, Any]:
    """Print the result and return it for the file."""
    from robopolicy.evaluation.statistics import wilson

    rate = wilson(successes, episodes)
    text = yaml.safe_dump(best.betas.randomization(), default_flow_style=True, width=1000, sort_keys=False).strip()
    print(f"randomization: {text}")
    interval = f"(95 % interval {rate.low:.1%} to {rate.high:.1%})"
    print(f"success under it, on {episodes} new seeds: {rate.value:.1%} {interval}")
    print(f"entropy: {best.betas.entropy():.2f} of at most {best.betas.highest_entropy():.2f} nats")
    return {
        "randomization": best.betas.randomization(),
        "success_rate": {"value": rate.value, "low": rate.low, "high": rate.high, "n": episodes},
        "entropy": best.betas.entropy(),
        "highest_entropy": best.betas.highest_entropy(),
    }
