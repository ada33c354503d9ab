"""``robopolicy compare``"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

HELP = """\
Compare two evaluations on the same seeds, episode by episode.

  robopolicy eval bundle=runs/a/bundles/last episodes=200 out=results/a
  robopolicy eval bundle=runs/b/bundles/last episodes=200 out=results/b
  robopolicy compare results/a results/b --out comparison.html

Pairing removes the difficulty of the starts from the comparison: a difference whose interval excludes zero is real
at the 95 % level even where the two separate intervals overlap.
"""


def add_parser(verbs: Any) -> None:
    parser = verbs.add_parser(
        "compare",
        help="compare two evaluations, paired by seed",
        description=HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("a", type=Path, help="results folder of the first policy")
    parser.add_argument("b", type=Path, help="results folder of the second policy")
    parser.add_argument("--out", type=Path, metavar="HTML", help="also write a report")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    from robopolicy.evaluation.compare import compare
    from robopolicy.evaluation.report import write_report
    from robopolicy.evaluation.results import EvaluationResult

    a, b = EvaluationResult.load(args.a), EvaluationResult.load(args.b)
    comparison = compare(a, b, label_a=str(args.a), label_b=str(args.b))
    for label, result in ((args.a, a), (args.b, b)):
        for name in ("mean_score", "success_rate"):
            metric = result.metric(name)
            print(f"{label}: {metric.label} {metric.value:.3f} [{metric.low:.3f}, {metric.high:.3f}] n={metric.n}")
    print(comparison.difference)
    if args.out is not None:
        write_report(a, args.out, comparison=comparison)
        print(f"report: {args.out}")
    return 0
