"""``robopolicy compare``"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from robopolicy.errors import UserError

HELP = """\
Compare two evaluations on the same seeds, episode by episode.

  robopolicy eval bundle=runs/a/bundles/last episodes=200 out=results/a
  robopolicy eval bundle=runs/b/bundles/last episodes=200 out=results/b
  robopolicy compare results/a results/b --out comparison.html

The folders of two suites are compared setting by setting, and by their aggregates.
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
    from robopolicy.evaluation.results import Protocol
    from robopolicy.evaluation.suite_results import is_suite

    suites = [is_suite(Protocol.load(folder / "protocol.json")) for folder in (args.a, args.b)]
    if suites[0] != suites[1]:
        suite, single = (args.a, args.b) if suites[0] else (args.b, args.a)
        raise UserError(
            f"{suite} holds a suite, {single} the evaluation of one setting; compare that with one of the folders in "
            f"{suite}/settings."
        )
    (_compare_suites if suites[0] else _compare_evaluations)(args.a, args.b, args.out)
    if args.out is not None:
        print(f"report: {args.out}")
    return 0


def _compare_evaluations(folder_a: Path, folder_b: Path, out: Path | None) -> None:
    from robopolicy.evaluation.compare import compare
    from robopolicy.evaluation.report import write_report
    from robopolicy.evaluation.results import EvaluationResult

    a, b = EvaluationResult.load(folder_a), EvaluationResult.load(folder_b)
    comparison = compare(a, b, label_a=str(folder_a), label_b=str(folder_b))
    for label, result in ((folder_a, a), (folder_b, b)):
        for name in ("mean_score", "success_rate"):
            metric = result.metric(name)
            print(f"{label}: {metric.label} {metric.value:.3f} [{metric.low:.3f}, {metric.high:.3f}] n={metric.n}")
    print(comparison.difference)
    if out is not None:
        write_report(a, out, comparison=comparison, videos_from=folder_a)


def _compare_suites(folder_a: Path, folder_b: Path, out: Path | None) -> None:
    from robopolicy.evaluation.compare import compare_suites
    from robopolicy.evaluation.suite_report import write_suite_report
    from robopolicy.evaluation.suite_results import SuiteResult

    a, b = SuiteResult.load(folder_a), SuiteResult.load(folder_b)
    comparison = compare_suites(a, b, label_a=str(folder_a), label_b=str(folder_b))
    print(f"success rate of {folder_a} minus {folder_b}, 95 % paired bootstrap over seeds")
    rows = [("aggregate", comparison.aggregate), *((name, d.success) for name, d in comparison.settings)]
    for name, difference in rows:
        print(f"  {name:<28} {difference.value:+7.3f}  [{difference.low:+.3f}, {difference.high:+.3f}]")
    if out is not None:
        write_suite_report(a, out, comparison=comparison, videos_from=folder_a)
