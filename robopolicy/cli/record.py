"""``robopolicy record``"""

from __future__ import annotations

import argparse
import os
from typing import Any

from robopolicy.simulator import task_id

HELP = """\
Record demonstrations of a simulated task with its scripted expert.

  robopolicy record --task push_puck --episodes 200 --out data/push_puck.zarr
  robopolicy record --task push_puck --episodes 200 --out data/push_puck.zarr --noise 0.035
  robopolicy record --task push_puck --episodes 100 --out data/push_puck_images.zarr --cameras scene,top
  robopolicy record --task push_puck --episodes 100 --out data/push_puck.zarr --append --seed 200
  robopolicy record --task my_package/MyTask-v0 --episodes 50 --out data/mine.zarr   any environment with make_expert

Episode i starts from seed SEED + i, so the same command gives the same dataset for any number of workers. Seeds from
100000 on are kept for evaluation. --noise disturbs what is executed, not what is stored: the data then show how to
get back on track, which a policy needs as soon as it errs. Failed episodes are counted and left out.

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
        noise=args.noise,
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
