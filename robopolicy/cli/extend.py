"""``robopolicy extend``"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from robopolicy.cli.compose import compose_config, override_plain
from robopolicy.cli.train import start, started_with
from robopolicy.errors import UserError

HELP = """\
Teach a policy a new task without changing what it does in the ones it knows.

  robopolicy train task=arm_state task.name=lift policy=sdp_small task.multitask=true data.path=lift.zarr
  robopolicy extend bundle=runs/lift/…/bundles/last task=arm_state task.name=stack data.path=stack.zarr \
      instruction="stack the blocks"
  robopolicy extend bundle=… task=… data.path=… new_experts=0         transfer: only a router is trained
  robopolicy extend bundle=… task=… 'data.mixture=[{path: a.zarr}, {path: b.zarr}]'      several tasks at once
  robopolicy extend --resume runs/stack/extended-seed42           go on after a crash

For policies with task routers (policy=sdp) that were trained on tasks. The new data has the same observation and
action keys; it is normalised by its own ranges. In each layer experts are added, and a router for the new task; all
else is frozen, so that the old tasks' actions stay the same bit for bit. The result is an ordinary bundle for all
tasks, which can be extended again. The run's folder is that of robopolicy train.
"""


def add_parser(verbs: Any) -> None:
    parser = verbs.add_parser(
        "extend",
        help="teach a policy a new task, keeping the old ones exactly",
        description=HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="see above and configs/extend.yaml")
    parser.add_argument("--resume", type=Path, metavar="RUN", help="continue the run in this folder")
    parser.add_argument("--config-dir", type=Path, help="folder with your own task/, train/ YAML files")
    parser.add_argument("--print-config", action="store_true", help="print the composed configuration and stop")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    if args.resume is not None:
        plain = override_plain(started_with(args.resume), args.overrides) | {"out": str(args.resume)}
        if "extends" not in plain:
            raise UserError(
                f"{args.resume} is no run of robopolicy extend. Try: robopolicy train --resume {args.resume}"
            )
    else:
        plain = with_tasks(compose_config("extend", args.overrides, args.config_dir))
    if args.print_config:
        print(json.dumps(plain, indent=2))
        return 0
    extend(plain, resume=args.resume is not None)
    return 0


def with_tasks(plain: dict[str, Any]) -> dict[str, Any]:
    """The configuration with the new data's tasks told apart by instruction, or named by ``instruction``.

    Raises:
        UserError: ``instruction`` is given for several datasets.
    """
    data = dict(plain["data"])
    if plain["instruction"]:
        if data["path"] is None:
            raise UserError(
                "instruction=… names the task of data.path=… In a mixture each dataset has its own: "
                "'data.mixture=[{path: a.zarr, instruction: open the drawer}]'."
            )
        data |= {"path": None, "mixture": [{"path": data["path"], "instruction": plain["instruction"]}]}
    return {**plain, "data": data, "task": {**plain["task"], "multitask": True}}


def extend(plain: dict[str, Any], resume: bool) -> None:
    """Extend a bundle with a composed configuration.

    Raises:
        UserError: also where a run is resumed and its bundle is another one now.
    """
    from robopolicy.manifest import bundle_fingerprint
    from robopolicy.policies.bundle import load_bundle
    from robopolicy.training.extend import extend_policy

    old, manifest = load_bundle(Path(plain["bundle"]))
    fingerprint = bundle_fingerprint(manifest)
    if resume and plain["extends"] != fingerprint:
        raise UserError(
            f"{plain['out']} cannot be resumed: the bundle {plain['bundle']} is not the one that it began with. "
            "Restore it, or start a new run with out=…"
        )
    plain = {**plain, "policy": manifest["architecture"], "extends": fingerprint, "task_before": manifest["task"]}
    start(plain, resume, lambda data: extend_policy(old, data.spec, data.normalizer, plain["new_experts"]))
