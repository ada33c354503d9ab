"""``robopolicy data quality | plan | augment``: what demonstrations are worth, which to collect, more out of few."""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import Any

from robopolicy.errors import UserError
from robopolicy.simulator import task_id

_QUALITY = """\
How well demonstrations can be imitated: are the actions alike in similar states (action divergence), how random is the
next state (transition diversity), how wide are the states spread (state entropy); which episodes stand out. Several
datasets of one task are measured on one scale and compared side by side.

examples:
  robopolicy data quality demos.zarr
  robopolicy data quality alice.zarr bob.zarr --out pictures
  robopolicy data quality demos.zarr --keys observation.environment_state --json | jq '.[0].measures'
"""
_PLAN = """\
Which data to collect next. Train policies with different amounts of the demonstrations that vary one factor (camera,
light, ...), everything else unchanged, and evaluate each on the conditions that count. A table holds one policy a line:

  factor,n_demos,successes,n
  camera,0,9,50
  camera,25,21,50
  camera,50,30,50
  light,25,36,50
  light,50,41,50

A curve is fitted to each factor and continued; the budget is divided so that success rises most.

examples:
  robopolicy data plan --results curves.csv --budget 100
  robopolicy data plan --results curves.csv --budget 100 --out pictures
"""
_AUGMENT = """\
Moved copies of the demonstrations: each is rotated, mirrored, shifted or played at another pace, replayed in the
simulator, and kept only where it still succeeds. Then join them:  robopolicy data merge all.zarr demos.zarr more.zarr

examples:
  robopolicy data augment demos.zarr more.zarr --task push_puck --transforms rotate,mirror --copies 5
  robopolicy data augment demos.zarr more.zarr --task lift --centre 0.5,0 --max-angle 30 --transforms rotate,shift
"""


def add_verbs(verbs: Any) -> None:
    """Add the sub-verbs to ``robopolicy data``."""
    quality = _verb(verbs, "quality", "consistency and coverage, episodes that stand out", _QUALITY, _quality)
    quality.add_argument("paths", type=Path, nargs="+", metavar="PATH", help="dataset folder or .zarr.zip file")
    quality.add_argument(
        "--keys", default="", metavar="A,B", help="arrays that describe the state (default all states)"
    )
    quality.add_argument("--json", action="store_true", help="print JSON instead of a table")
    quality.add_argument("--out", type=Path, metavar="DIR", help="also write a picture to this folder")

    plan = _verb(verbs, "plan", "which factor to collect next, how much of each", _PLAN, _plan)
    plan.add_argument("--results", type=Path, required=True, metavar="CSV", help="factor, n_demos, successes, n")
    plan.add_argument("--budget", type=int, required=True, metavar="N", help="demonstrations to collect")
    plan.add_argument("--json", action="store_true", help="print JSON instead of a table")
    plan.add_argument("--out", type=Path, metavar="DIR", help="also write a picture to this folder")

    augment = _verb(verbs, "augment", "moved copies that the simulator confirms", _AUGMENT, _augment)
    augment.add_argument("path", type=Path, metavar="PATH", help="dataset recorded in this task")
    augment.add_argument("out", type=Path, metavar="OUT", help="new dataset with the copies")
    augment.add_argument("--task", required=True, help="short name, e.g. push_puck, or a Gymnasium id")
    augment.add_argument("--transforms", default="rotate,mirror", metavar="A,B", help="rotate, mirror, shift, pace")
    augment.add_argument("--copies", type=int, default=5, metavar="N", help="copies to try per episode (default 5)")
    augment.add_argument("--centre", default="0,0", metavar="X,Y", help="of rotations and mirroring, m (default 0,0)")
    augment.add_argument("--max-angle", type=float, default=180, metavar="DEG", help="of rotations (default 180)")
    augment.add_argument("--max-shift", type=float, default=0.05, metavar="M", help="of shifts (default 0.05)")
    augment.add_argument("--max-pace", type=float, default=1.25, metavar="F", help="1/F to F times as fast (1.25)")
    augment.add_argument("--seed", type=int, default=0, help="of the draws (default 0)")


def _verb(verbs: Any, name: str, text: str, description: str, run: Any) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = verbs.add_parser(
        name, help=text, description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.set_defaults(run=run)
    return parser


def _quality(args: argparse.Namespace) -> int:
    from robopolicy.data.quality import assess, quality_table

    qualities = assess(args.paths, [key for key in args.keys.split(",") if key])
    print(json.dumps([q.to_dict() for q in qualities], indent=2) if args.json else quality_table(qualities))
    if args.out is not None:
        from robopolicy.data.quality_pictures import write_quality_picture

        _wrote(write_quality_picture(qualities, args.out), args.json)
    return 0


def _plan(args: argparse.Namespace) -> int:
    from robopolicy.evaluation.scaling_curves import plan_collection, plan_table, read_trials

    plan = plan_collection(read_trials(args.results), args.budget)
    print(json.dumps(plan.to_dict(), indent=2) if args.json else plan_table(plan))
    if args.out is not None:
        from robopolicy.evaluation.scaling_curve_picture import write_plan_picture

        _wrote(write_plan_picture(plan, args.out), args.json)
    return 0


def _augment(args: argparse.Namespace) -> int:
    from robopolicy.data.guided_augmentation import Guidance, augment_demonstrations

    guidance = Guidance(
        transforms=tuple(name for name in args.transforms.split(",") if name),
        centre=_point(args.centre),
        max_angle=math.radians(args.max_angle),
        max_shift=args.max_shift,
        max_pace=args.max_pace,
    )
    report = augment_demonstrations(
        args.path, args.out, task_id(args.task), guidance, copies=args.copies, seed=args.seed
    )
    print(
        f"{report.sources} demonstrations, {report.tried} copies tried: {report.kept} kept, {report.failed} did not "
        f"succeed, {report.impossible} start or reach outside what the task allows."
    )
    if report.reproduced < 0.8 * report.sources:
        print(
            f"Only {report.reproduced} of {report.sources} demonstrations succeed when they are replayed unchanged: "
            "their actions are not all that moved the robot (recorded with --noise, or with other settings)."
        )
    if report.path is None:
        print("Nothing was written. Try smaller ranges or fewer transforms.")
        return 1
    print(f"wrote {report.path} ({report.kept} episodes)")
    return 0


def _wrote(path: Path, quiet: bool) -> None:
    if not quiet:
        print(f"\nwrote {path}")


def _point(text: str) -> tuple[float, float]:
    try:
        x, y = (float(part) for part in text.split(","))
    except ValueError:
        raise UserError(f"--centre: found '{text}', wanted two numbers in metres such as 0.5,0.") from None
    return x, y
