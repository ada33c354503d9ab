"""``robopolicy record``"""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from typing import Any

import yaml

from robopolicy.errors import UserError
from robopolicy.simulator import task_id

HELP = """\
Record demonstrations of a simulated task with its scripted expert.

  robopolicy record --task push_puck --episodes 200 --out data/push_puck.zarr
  robopolicy record --task push_puck --episodes 200 --out data/push_puck.zarr --noise 0.035
  robopolicy record --task push_puck --episodes 100 --out data/push_puck_images.zarr --cameras scene,top
  robopolicy record --task push_puck --episodes 100 --out data/push_puck.zarr --append --seed 200
  robopolicy record --task lift_ur5e --episodes 200 --out data/lift.zarr --option control=ee_delta_target
  robopolicy record --task stack --episodes 300 --out data/mixed.zarr --quality good=0.6,sloppy=0.2,recovering=0.2
  robopolicy record --task reach --episodes 200 --out data/reach.zarr --mode left=0.8,right=0.2
  robopolicy record --task my_package/MyTask-v0 --episodes 50 --out data/mine.zarr   any environment with make_expert

Episode i starts from seed SEED + i, so the same command gives the same dataset for any number of workers. Seeds from
100000 on are kept for evaluation. --noise disturbs what is executed, not what is stored: the data then show how to
get back on track, which a policy needs as soon as it errs. Failed episodes are counted and left out (--keep-failures).

--quality and --mode mix behaviours: an expert is good, sloppy (slow, trembling), recovering (errs once and mends it)
or failing; its modes are the different ways to do a task, e.g. left or right around an obstacle. Every episode is
labelled with both.

Each episode is on disk when the bar counts it: after Ctrl-C go on with --append and the next seed.
Then look at the dataset:  robopolicy data show data/push_puck.zarr
"""


def add_parser(verbs: Any) -> None:
    parser = verbs.add_parser(
        "record",
        help="record demonstrations of a simulated task",
        description=HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--task", required=True, help="short name, e.g. push_puck, or a Gymnasium id")
    parser.add_argument("--out", required=True, metavar="PATH", help="the dataset, a Zarr folder")
    parser.add_argument("--episodes", type=int, default=200, metavar="N", help="episodes to play (default 200)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the first episode (default 0)")
    parser.add_argument("--workers", type=int, metavar="N", help="processes (default: one for each core)")
    parser.add_argument("--cameras", default="", metavar="A,B", help="cameras to record, e.g. scene,top (default none)")
    parser.add_argument("--image-size", type=int, default=96, metavar="PX", help="side of the images (default 96)")
    parser.add_argument(
        "--noise",
        type=float,
        default=0.0,
        metavar="SHARE",
        help="standard deviation of the disturbance, as a share of half the action range (default 0)",
    )
    parser.add_argument("--quality", default="", metavar="NAME=SHARE,…", help="mix of expert qualities (default good)")
    parser.add_argument("--mode", default="", metavar="NAME=SHARE,…", help="mix of modes (default: the seed decides)")
    parser.add_argument(
        "--option",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="argument of the environment, e.g. control=joint_position or variation={lighting: darker}; repeatable",
    )
    parser.add_argument("--append", action="store_true", help="add to an existing dataset")
    parser.add_argument("--keep-failures", action="store_true", help="store failed episodes too, marked as failed")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    from robopolicy.data.record import record_demonstrations

    report = record_demonstrations(
        task_id(args.task),
        args.out,
        episodes=args.episodes,
        seed=args.seed,
        workers=(os.cpu_count() or 1) if args.workers is None else args.workers,
        cameras=tuple(name for name in args.cameras.split(",") if name),
        image_size=args.image_size,
        options=parse_options(args.option),
        noise=args.noise,
        qualities=parse_shares(args.quality),
        modes=parse_shares(args.mode),
        keep_failures=args.keep_failures,
        append=args.append,
    )
    failures = report.attempted - report.succeeded
    fate = "stored, marked as failed" if args.keep_failures else "left out"
    print(
        f"{report.path}: {report.stored} episodes, {report.steps} steps recorded; the expert succeeded in "
        f"{report.succeeded} of {report.attempted}" + (f" ({failures} failed, {fate})" if failures else "") + "; "
        f"the dataset now holds {report.episodes_in_dataset} episodes."
    )
    return 0


def parse_options(words: Sequence[str]) -> dict[str, Any]:
    """Arguments of an environment from ``key=value`` words; values are YAML.

    Raises:
        UserError: a word cannot be read.
    """
    options = {}
    for word in words:
        key, separator, value = word.partition("=")
        try:
            options[key] = yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise UserError(f"--option {word}: the value is no YAML ({error}).") from error
        if not separator or not key:
            raise UserError(f"--option {word}: wanted KEY=VALUE, e.g. --option control=joint_position.")
    return options


def parse_shares(text: str) -> dict[str, float]:
    """Shares by name from ``good=0.7,sloppy=0.3``; a name alone has the share 1.

    Raises:
        UserError: a share is no number.
    """
    shares = {}
    for word in filter(None, text.split(",")):
        name, _, share = word.partition("=")
        try:
            shares[name.strip()] = float(share or 1)
        except ValueError:
            raise UserError(f"'{word}': wanted NAME=SHARE, e.g. good=0.7,sloppy=0.3.") from None
    return shares
