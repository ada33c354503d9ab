"""``robopolicy fidelity``"""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from robopolicy.evaluation.fidelity import Fidelity
    from robopolicy.evaluation.statistics import Interval

HELP = """\
How well a simulation predicts the robot: compare success rates of the same policies on both.

  robopolicy fidelity --real real.csv --sim sim.csv --out fidelity.html
  robopolicy fidelity --real real.csv --sim a=results/a b=results/b c=results/c
  robopolicy fidelity --real real.json --sim sim.csv --out fidelity.json

A table is a CSV file with the columns policy,rate (and n, the number of trials) or policy,successes,n; or a JSON file
{"policy": rate} or {"policy": {"rate": …, "n": …}}; or results folders of robopolicy eval as NAME=FOLDER. Without n
there are no intervals over trials and no tests.

MMRV says how much real success is lost at worst by trusting the simulated ranking; it is not symmetric, so what is
real and what is simulated matters.
"""


def add_parser(verbs: Any) -> None:
    parser = verbs.add_parser(
        "fidelity",
        help="compare real with simulated success rates",
        description=HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--real", required=True, nargs="+", metavar="TABLE", help="rates on the robot")
    parser.add_argument("--sim", required=True, nargs="+", metavar="TABLE", help="rates in simulation")
    parser.add_argument("--out", type=Path, metavar="FILE", help="also write a report (.html) or the numbers (.json)")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    from robopolicy.evaluation.fidelity import fidelity
    from robopolicy.evaluation.fidelity_report import write_fidelity
    from robopolicy.evaluation.rates import load_rates

    found = fidelity(real=load_rates(args.real), simulated=load_rates(args.sim))
    if args.out is not None:
        write_fidelity(found, args.out)
    print_fidelity(found)
    if args.out is not None:
        print(f"written: {args.out}")
    return 0


def print_fidelity(found: Fidelity) -> None:
    """Print the measures with intervals and definitions, then what disagrees."""
    print(f"{len(found.real.policies)} policies; 95 % intervals for new trials of them | for new policies too")
    for a in found.agreements:
        print(f"{a.label:<14} {a.value:6.3f}  {_ends(a.trials)} | {_ends(a.policies)}  {a.definition}")
    width = max(map(len, found.real.policies))
    print(f"\n{'policy':<{width}}  real   simulated  p that both are equal (Kruskal-Wallis)")
    for name, real, simulated, p in zip(
        found.real.policies, found.real.rates, found.simulated.rates, found.kruskal, strict=True
    ):
        print(f"{name:<{width}}  {real:.3f}  {simulated:.3f}      {'n unknown' if math.isnan(p) else f'{p:.3f}'}")
    if not found.wrong_pairs:
        print("\nThe simulation orders all policies as the robot does.")
        return
    print("\nRanked wrongly, the largest real difference first:")
    for pair in found.wrong_pairs:
        test = "" if math.isnan(pair.p_value) else f" (p of the real difference {pair.p_value:.3f})"
        print(f"  {pair.better} over {pair.worse}: real {pair.real:+.3f}, simulated {pair.simulated:+.3f}{test}")


def _ends(interval: Interval) -> str:
    return "  unknown     " if math.isnan(interval.low) else f"[{interval.low:5.3f}, {interval.high:5.3f}]"
