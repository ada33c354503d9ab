"""``robopolicy data``: look at datasets, check and mend them, ask how good they are, make new ones out of them."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from robopolicy.cli import data_questions
from robopolicy.errors import UserError

_SHOW = """\
examples:
  robopolicy data show demos.zarr
  robopolicy data show demos.zarr --out pictures     # contact sheets of the cameras, plots of the actions
"""
_DOCTOR = """\
Exit code 0: no errors (warnings are possible); 1: errors found.

examples:
  robopolicy data doctor demos.zarr
  robopolicy data doctor demos.zarr.zip --deep       # decode every frame
  robopolicy data doctor demos.zarr --json | jq '.[] | select(.severity == "error")'
"""
_REPAIR = """\
Removes what a killed writer left after the last complete episode. Complete episodes are never changed.

examples:
  robopolicy data repair demos.zarr
  robopolicy data repair demos.zarr --drop-incomplete   # also remove episodes that lack steps in some array
"""
_STATS = """\
Exact statistics of every column; for images of every colour channel, with every frame decoded.

examples:
  robopolicy data stats demos.zarr
  robopolicy data stats demos.zarr --json > stats.json
"""
_MERGE = """\
Images are copied without decoding them. One input converts between folder and zip file.

examples:
  robopolicy data merge all.zarr monday.zarr tuesday.zarr.zip
  robopolicy data merge demos.zarr.zip demos.zarr
"""
_SPLIT = """\
examples:
  robopolicy data split demos.zarr --train train.zarr --val val.zarr --ratio 0.1 --seed 0
"""
_DROP = """\
examples:
  robopolicy data drop demos.zarr clean.zarr --episodes 3,7-9
"""


def add_parser(subparsers: Any) -> None:
    """Add the verb ``data`` and its sub-verbs to the command line."""
    parser = subparsers.add_parser("data", help="show, check, mend, judge, merge, split datasets", description=__doc__)
    verbs = parser.add_subparsers(dest="data_verb", required=True, metavar="VERB")

    show = _verb(verbs, "show", "what a dataset holds", _SHOW, _show)
    show.add_argument("--out", type=Path, metavar="DIR", help="also write pictures to this folder")

    doctor = _verb(verbs, "doctor", "find problems, with episode and step", _DOCTOR, _doctor)
    doctor.add_argument("--deep", action="store_true", help="decode every frame of compressed images")
    doctor.add_argument("--json", action="store_true", help="print a JSON list instead of text")

    repair = _verb(verbs, "repair", "remove what a killed writer left", _REPAIR, _repair)
    repair.add_argument("--drop-incomplete", action="store_true", help="remove incomplete episodes at the end")

    stats = _verb(verbs, "stats", "exact statistics of every array", _STATS, _stats)
    stats.add_argument("--json", action="store_true", help="print JSON instead of a table")

    merge = _verb(verbs, "merge", "join datasets into a new one", _MERGE, _merge, path=False)
    merge.add_argument("out", type=Path, metavar="OUT", help="new .zarr folder or .zarr.zip file")
    merge.add_argument("inputs", type=Path, nargs="+", metavar="IN")

    split = _verb(verbs, "split", "divide the episodes into two new datasets", _SPLIT, _split)
    split.add_argument("--train", type=Path, required=True, metavar="OUT")
    split.add_argument("--val", type=Path, required=True, metavar="OUT")
    split.add_argument("--ratio", type=float, default=0.1, help="share of the validation episodes (default 0.1)")
    split.add_argument("--seed", type=int, default=0, help="picks the validation episodes (default 0)")

    drop = _verb(verbs, "drop", "a new dataset without some episodes", _DROP, _drop)
    drop.add_argument("out", type=Path, metavar="OUT")
    drop.add_argument("--episodes", required=True, metavar="LIST", help="e.g. 3,7-9 (counted from 0)")

    data_questions.add_verbs(verbs)


def _verb(verbs: Any, name: str, text: str, epilog: str, run: Any, path: bool = True) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = verbs.add_parser(
        name, help=text, description=text, epilog=epilog, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    if path:
        parser.add_argument("path", type=Path, metavar="PATH", help="dataset folder or .zarr.zip file")
    parser.set_defaults(run=run)
    return parser


def _show(args: argparse.Namespace) -> int:
    from robopolicy.data.store import EpisodeStore
    from robopolicy.data.summary import describe

    with EpisodeStore.open(args.path) as store:
        print(describe(store))
        if args.out is not None:
            from robopolicy.data.pictures import write_pictures

            print()
            for picture in write_pictures(store, args.out):
                print(f"wrote {picture}")
    return 0


def _doctor(args: argparse.Namespace) -> int:
    from robopolicy.data.doctor import diagnose

    problems = diagnose(args.path, deep=args.deep)
    errors = sum(problem.severity == "error" for problem in problems)
    if args.json:
        print(json.dumps([asdict(problem) for problem in problems], indent=2))
        return 1 if errors else 0
    for problem in problems:
        place = f" {problem.place}:" if problem.place else ""
        print(f"{problem.severity.upper()} [{problem.check}]{place} {problem.message}\n    {problem.advice}")
    print(f"{args.path}: {errors} errors, {len(problems) - errors} other findings.")
    return 1 if errors else 0


def _repair(args: argparse.Namespace) -> int:
    from robopolicy.data.repair import repair

    done = repair(args.path, drop_incomplete=args.drop_incomplete)
    for line in done:
        print(line)
    print(f"{args.path}: {'repaired' if done else 'nothing to repair'}.")
    return 0


def _stats(args: argparse.Namespace) -> int:
    from robopolicy.data.statistics import array_statistics
    from robopolicy.data.store import EpisodeStore
    from robopolicy.data.summary import statistics_table

    with EpisodeStore.open(args.path) as store:
        statistics = {key: array_statistics(store, key) for key in store.keys}
        if args.json:
            print(json.dumps({key: value.to_dict() for key, value in statistics.items()}, indent=2))
        else:
            print(statistics_table(statistics, {key: spec.columns for key, spec in store.schema.arrays.items()}))
    return 0


def _merge(args: argparse.Namespace) -> int:
    from robopolicy.data.edit import merge

    merge(args.out, args.inputs)
    print(f"wrote {args.out}")
    return 0


def _split(args: argparse.Namespace) -> int:
    from robopolicy.data.edit import split

    train, validation = split(args.path, args.train, args.val, ratio=args.ratio, seed=args.seed)
    print(f"wrote {args.train} ({train} episodes) and {args.val} ({validation} episodes)")
    return 0


def _drop(args: argparse.Namespace) -> int:
    from robopolicy.data.edit import drop

    left = drop(args.path, args.out, parse_episodes(args.episodes))
    print(f"wrote {args.out} ({left} episodes)")
    return 0


def parse_episodes(text: str) -> list[int]:
    """Read a list of episode numbers and ranges, e.g. ``3,7-9``.

    Raises:
        UserError: something else.
    """
    episodes: list[int] = []
    for part in text.split(","):
        first, dash, last = part.strip().partition("-")
        if not first.isdecimal() or (dash and not last.isdecimal()) or (dash and int(last) < int(first)):
            raise UserError(f"--episodes: found '{part}', wanted numbers and ranges such as 3,7-9.")
        episodes += range(int(first), int(last or first) + 1)
    return episodes
