"""``robopolicy train-rl``"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from robopolicy.cli.compose import compose_config, override_plain
from robopolicy.cli.train import SECTIONS, evaluation_of, started_with
from robopolicy.errors import UserError

if TYPE_CHECKING:
    from robopolicy.training.actor_critic import Collect
    from robopolicy.training.loop import RunConfig

HELP = """\
Train a policy by reinforcement learning: a consistency actor with twin critics (Consistency-AC), from states.

  robopolicy train-rl task=push_puck data.path=data/mixed.zarr                      offline: on a dataset alone
  robopolicy train-rl task=push_puck data.path=data/mixed.zarr rl.online.after=20000 train.steps=40000
                                      then online: half of each batch from episodes that the policy plays
  robopolicy train-rl task=push_puck data.path=… rl.eta=0                           the behaviour, cloned
  robopolicy train-rl --resume runs/push_puck/consistency_ac-rl-seed42              go on after a crash

The dataset may be of mixed quality and should hold failures too (robopolicy record --quality … --keep-failures). A
reward is -1 for each step until success (rl.reward=success) or what the dataset's reward array holds
(rl.reward=dataset). rl.eta weighs the critics against the data: too little changes nothing, too much leaves the data
behind; try 0.1 to 10.

The bundle is an ordinary policy: of several chunks that its actor proposes its critics choose one. The run's folder is
that of robopolicy train; the policy's own episodes are in online.zarr.
"""


def add_parser(verbs: Any) -> None:
    parser = verbs.add_parser(
        "train-rl",
        help="train a policy by reinforcement learning, offline or online",
        description=HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="choices and overrides, see above")
    parser.add_argument("--resume", type=Path, metavar="RUN", help="continue the run in this folder")
    parser.add_argument("--config-dir", type=Path, help="folder with your own task/, policy/ YAML files")
    parser.add_argument("--print-config", action="store_true", help="print the composed configuration and stop")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    if args.resume is not None:
        plain = started_with(args.resume)
        if "rl" not in plain:
            raise UserError(f"{args.resume} is no run of train-rl; continue it with robopolicy train --resume.")
        plain = override_plain(plain, args.overrides) | {"out": str(args.resume)}
    else:
        plain = compose_config("train_rl", args.overrides, args.config_dir)
    if args.print_config:
        print(json.dumps(plain, indent=2))
        return 0
    start(plain, resume=args.resume is not None)
    return 0


def start(plain: dict[str, Any], resume: bool) -> None:
    """Train with a composed configuration."""
    from robopolicy.configuration import dataclass_from
    from robopolicy.training.actor_critic import ActorCriticConfig, train_actor_critic
    from robopolicy.training.checkpoint import has_checkpoint
    from robopolicy.training.loop import RunConfig

    config = dataclass_from(RunConfig, {name: plain[name] for name in SECTIONS}, "")
    rl = dataclass_from(ActorCriticConfig, plain["rl"], "rl")
    out = Path(config.out)
    if not resume and has_checkpoint(out / "checkpoints"):
        raise UserError(
            f"{out} already holds a training run. Continue it with --resume {out}, or choose another folder with out=…"
        )
    evaluate = evaluation_of(config, plain) if config.train.evaluate_every else None
    collect = collection_of(config) if rl.online.after is not None else None
    bundle = train_actor_critic(config, rl, plain, evaluate, collect, resume)
    print(f"bundle: {bundle}\njudge it with: robopolicy eval bundle={bundle}")


def collection_of(config: RunConfig) -> Collect:
    """What plays the policy's own episodes.

    Raises:
        UserError: the task names no environment, none that exists, or one that does not fit the dataset.
    """
    from robopolicy.evaluation.collect import collect_episodes
    from robopolicy.evaluation.environments import environment
    from robopolicy.training.dataset import open_datasets, task_environment, task_spec

    stores = open_datasets(config.task, config.data)
    name, options = task_environment(config.task, stores[0])
    if not name:
        raise UserError("rl.online.after needs a task with an environment; set rl.online.after=null.")
    world = environment(name, options)
    world.check(task_spec(config.task, stores))
    return lambda policy, seeds: collect_episodes(policy, world, seeds)
