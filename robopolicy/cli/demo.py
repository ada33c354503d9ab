"""``robopolicy demo``: the whole path on a small example, each step shown as the command that it is."""

from __future__ import annotations

import argparse
import shlex
import shutil
import time
from pathlib import Path
from typing import Any

HELP = """\
Record demonstrations with a scripted expert, train a diffusion policy on them, judge it on starts it has never seen.

  robopolicy demo                      about ten minutes on 2 CPU cores; writes runs/demo/
  robopolicy demo --fresh              do everything again

Each step is an ordinary command and is printed before it runs. Steps whose result is there already are skipped.
"""

TASK = "push_puck"
EPISODES = 250
NOISE = 0.035
TEST_EPISODES = 100


def add_parser(verbs: Any) -> None:
    parser = verbs.add_parser(
        "demo",
        help="the whole path on a small example",
        description=HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--out", type=Path, default=Path("runs/demo"), help="folder for everything (runs/demo)")
    parser.add_argument("--fresh", action="store_true", help="remove earlier results first")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    began = time.monotonic()
    out: Path = args.out
    dataset, training, results = out / "demonstrations.zarr", out / "training", out / "results"
    recording = out / ".recording"  # there while the dataset is ours and incomplete
    if args.fresh:
        for folder in (dataset, training, results):
            shutil.rmtree(folder, ignore_errors=True)
    bundle = training / "bundles" / "last"
    if recording.exists():
        shutil.rmtree(dataset, ignore_errors=True)
    if not dataset.exists():
        out.mkdir(parents=True, exist_ok=True)
        recording.touch()
    _step(
        "1/3 record demonstrations", dataset,
        [*f"record --task {TASK} --episodes {EPISODES} --seed 0 --noise {NOISE} --out".split(), str(dataset)],
    )  # fmt: skip
    recording.unlink(missing_ok=True)
    train = ["task=" + TASK, "policy=diffusion_unet_small", "train=demo", f"data.path={dataset}", f"out={training}"]
    resume = ["--resume", str(training)] if (training / "checkpoints" / "last").exists() else train
    _step("2/3 train a diffusion policy", bundle / "bundle.yaml", ["train", *resume])
    _step(
        "3/3 judge it on unseen starts", results / "report.html",
        ["eval", f"bundle={bundle}", f"episodes={TEST_EPISODES}", "first_seed=100000", f"out={results}"],
    )  # fmt: skip
    print(f"\n== done in {(time.monotonic() - began) / 60:.1f} minutes. Open {(results / 'report.html').resolve()}")
    return 0


def _step(title: str, result: Path, command: list[str]) -> None:
    """Run one verb, unless its result is there."""
    from robopolicy.cli.main import run_verb

    print(f"\n== {title}\n$ robopolicy {shlex.join(command)}", flush=True)
    if result.exists():
        print(f"already done ({result} is there)", flush=True)
        return
    run_verb(command)
