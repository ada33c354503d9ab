"""Several tasks in one policy, and one more task later: experts and task routers against a dense transformer.

Meta-World tasks that one arm does in one scene layout (equal observations and actions, told apart by instruction):

1. Each policy trains on the first tasks together (`data.mixture`), normalised task by task, and is judged in each.
2. A new task arrives. SDP is extended by experts and a router (`robopolicy extend`); the dense policy is fine-tuned on
   the new data alone (`robopolicy finetune`), as one would without. Both are judged in all tasks again: forgetting is
   the success on the old tasks before minus after, on the same seeds.

Every step is a command of robopolicy, printed before it runs, in the folder --work; what is there is not done again.
"""

from __future__ import annotations

import argparse
import json
import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from results import machine, print_table, save_json

from robopolicy.evaluation.statistics import Interval, bootstrap_mean
from robopolicy.policies.bundle import load_bundle

TASKS = ("drawer_close", "window_open", "button_press_topdown", "handle_press")
NEW_TASK = "window_close"
DENSE = "diffusion_transformer_small"
SIZES = {  # of equal active size: two experts of a mixture are one dense perceptron
    DENSE: "policy.config.mlp_ratio=3",
    "mode_small": "",
    "sdp_small": "",
}


@dataclass(frozen=True)
class Judged:
    """A policy's episodes: (seeds, tasks) successes, by task."""

    name: str
    parameters: float
    active: float
    successes: dict[str, list[bool]]

    def rate(self, tasks: tuple[str, ...]) -> Interval:
        return bootstrap_mean(self.table(tasks).mean(axis=1))

    def table(self, tasks: tuple[str, ...]) -> np.ndarray:
        """(seeds, tasks); all tasks of a seed are drawn together."""
        return np.array([self.successes[task] for task in tasks], dtype=float).T


def main() -> None:
    args = parse_arguments()
    work: Path = args.work
    for task in (*TASKS, NEW_TASK):
        step(
            work / f"{task}.zarr",
            f"record --task metaworld_{task} --episodes {args.demonstrations} --workers 1 --out {{}}",
        )
    mixture = ", ".join(f"{{path: {work / task}.zarr, instruction: {words(task)}}}" for task in TASKS)
    together = {}
    for policy in args.policies:
        run = work / policy
        step(
            run / "bundles" / "last",
            f"train task=arm_state task.name=tasks policy={policy} {SIZES[policy]} train=pusht_cpu "
            f"train.steps={args.steps} train.tensorboard=false 'data.mixture=[{mixture}]' out={run}",
        )
        together[policy] = judge(policy, run / "bundles" / "last", args.episodes, TASKS)
    new = f"'data.mixture=[{{path: {work / NEW_TASK}.zarr, instruction: {words(NEW_TASK)}}}]'"
    short = f"train=pusht_cpu train.steps={args.new_steps} train.tensorboard=false {new}"
    later: dict[str, tuple[str, Judged]] = {}
    if "sdp_small" in args.policies:
        run, old = work / "sdp_extended", work / "sdp_small" / "bundles" / "last"
        step(run / "bundles" / "last", f"extend bundle={old} task=arm_state task.name=extended {short} out={run}")
        everything = (*TASKS, NEW_TASK)
        later["sdp_small extended"] = (
            "sdp_small",
            judge("sdp extended", run / "bundles" / "last", args.episodes, everything),
        )
    if DENSE in args.policies:
        run, old = work / f"{DENSE}_finetuned", work / DENSE / "bundles" / "last"
        step(run / "bundles" / "last", f"finetune bundle={old} mode=full {short} out={run}")
        found = judge(f"{DENSE} fine-tuned", run / "bundles" / "last", args.episodes, (*TASKS, NEW_TASK))
        later[f"{DENSE} fine-tuned"] = DENSE, found
    report(args, together, later)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder of datasets, runs and results")
    parser.add_argument("--policies", nargs="+", default=list(SIZES), choices=list(SIZES), help="(default: all)")
    parser.add_argument("--demonstrations", type=int, default=40, help="of each task (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=3000, help="updates on all tasks (default: %(default)s)")
    parser.add_argument("--new-steps", type=int, default=1500, help="updates on the new task (default: %(default)s)")
    parser.add_argument("--episodes", type=int, default=50, help="of each task and policy (default: %(default)s)")
    parser.add_argument("--json", help="also write the numbers to this file")
    return parser.parse_args()


def words(task: str) -> str:
    return task.replace("_", " ")


def step(result: Path, command: str) -> None:
    """Run a verb of robopolicy unless its result is there."""
    if result.exists():
        return
    arguments = shlex.split(command)
    print("robopolicy", shlex.join(arguments), file=sys.stderr, flush=True)
    subprocess.run([sys.executable, "-m", "robopolicy.cli.main", *arguments], check=True)


def judge(name: str, bundle: Path, episodes: int, tasks: tuple[str, ...]) -> Judged:
    """Play all tasks on the same seeds, each with its instruction."""
    policy, _ = load_bundle(bundle)
    successes = {}
    for task in tasks:
        out = bundle.parent.parent / "eval" / task
        asked = shlex.quote(f"instruction={words(task)}")
        what = f"bundle={bundle} environment=metaworld_{task} {asked}"
        step(out / "episodes.jsonl", f"eval {what} episodes={episodes} videos=0 out={out}")
        rows = [json.loads(line) for line in (out / "episodes.jsonl").read_text().splitlines()]
        successes[task] = [row["success"] for row in sorted(rows, key=lambda row: row["seed"])]
    total = sum(p.numel() for p in policy.parameters())
    idle = sum(p.numel() for p in policy.denoiser.parameters()) - policy.denoiser.active_parameters()
    return Judged(name, total / 1e6, (total - idle) / 1e6, successes)


def report(args: argparse.Namespace, together: dict[str, Judged], later: dict[str, tuple[str, Judged]]) -> None:
    about = machine()
    print(f"{about['processor']}; {args.demonstrations} demonstrations, {args.episodes} episodes of each task")
    rows = [
        (name, f"{j.parameters:.2f}", f"{j.active:.2f}", _text(j.rate(TASKS)), *(_share(j, task) for task in TASKS))
        for name, j in together.items()
    ]
    columns = ("policy", "M par.", "M active", "mean success [95 %]", *map(words, TASKS))
    print_table(f"{len(TASKS)} tasks together, {args.steps} updates", columns, rows)
    rows = []
    for name, (before, j) in later.items():
        forgotten = bootstrap_mean(together[before].table(TASKS).mean(axis=1) - j.table(TASKS).mean(axis=1))
        rows.append((name, _text(j.rate((NEW_TASK,))), _text(j.rate(TASKS)), _text(forgotten)))
    columns = ("policy", f"{words(NEW_TASK)} (new)", "old tasks", "forgotten")
    print_table(f"A fifth task later, {args.new_steps} updates", columns, rows)
    everything = [*together.values(), *(j for _, j in later.values())]
    save_json(
        args.json, [{"name": j.name, "parameters_m": j.parameters, "successes": j.successes} for j in everything], about
    )


def _share(judged: Judged, task: str) -> str:
    return f"{np.mean(judged.successes[task]):.2f}"


def _text(interval: Interval) -> str:
    return f"{interval.value:.3f} [{interval.low:.3f}, {interval.high:.3f}]"


if __name__ == "__main__":
    main()
