"""``robopolicy align``"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from robopolicy.cli.compose import compose_config, override_plain
from robopolicy.cli.train import SECTIONS, evaluation_of, started_with
from robopolicy.errors import UserError

FINGERPRINTS = ("aligned_fingerprint", "critic_fingerprint")
"""Entries of a run's configuration: which policy and which critic it started with."""
LATE = ("policy.", "task.", "critic=")
"""Overrides of what the bundle gives; and ``critic``, which Hydra would take for a choice among configs/critic."""
HELP = """\
Fine-tune a diffusion policy so that it does what a critic values.

  robopolicy align bundle=runs/push_puck/…/bundles/last critic=runs/push_puck/critic-…/bundles/last data.path=mixed.zarr
  robopolicy align bundle=… critic=… data.path=… edp.eta=0.3                    less weight for the values
  robopolicy align bundle=… critic=… data.path=… method=eda eda.temperature=2   compare the policy's own chunks
  robopolicy align --resume runs/push_puck/diffusion_unet-edp-seed42            go on after a crash

method=edp (Efficient Diffusion Policies) adds the critic's value of what the network predicts in one call to the
cloning loss; an update costs little more than one of robopolicy train. method=eda (Efficient Diffusion Alignment)
samples chunks of the policy and raises the density of those that the critic prefers; an update costs candidates times
as many network calls as the sampler makes, and the data's actions are not used.

The bundle is an ordinary policy: nothing steers it, and it costs what it did before. The run's folder is that of
robopolicy train, and so are the options; see configs/align.yaml.
"""


def add_parser(verbs: Any) -> None:
    parser = verbs.add_parser(
        "align",
        help="fine-tune a policy towards what a critic values",
        description=HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="choices and overrides, see above")
    parser.add_argument("--resume", type=Path, metavar="RUN", help="continue the run in this folder")
    parser.add_argument("--config-dir", type=Path, help="folder with your own train/ YAML files")
    parser.add_argument("--print-config", action="store_true", help="print the composed configuration and stop")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    if args.resume is not None:
        plain = override_plain(started_with(args.resume), args.overrides) | {"out": str(args.resume)}
        if FINGERPRINTS[0] not in plain:
            raise UserError(f"{args.resume} was not started by align. Continue it with: robopolicy train --resume")
    else:
        plain = compose(args.overrides, args.config_dir)
    if args.print_config:
        print(json.dumps(plain, indent=2))
        return 0
    align(plain, resume=args.resume is not None)
    return 0


def compose(overrides: Sequence[str], config_dir: Path | None = None) -> dict[str, Any]:
    """The configuration: ``align.yaml`` with the bundle's architecture and task, then the overrides of these.

    Raises:
        UserError: see `compose_config`; also where no critic is given.
    """
    from robopolicy.configuration import dataclass_from
    from robopolicy.data.store import EpisodeStore
    from robopolicy.manifest import read_manifest
    from robopolicy.training.config import DataConfig
    from robopolicy.training.finetune import task_of_bundle

    plain = compose_config("align", [o for o in overrides if not o.startswith(LATE)], config_dir)
    manifest = read_manifest(Path(plain["bundle"]))
    first = dataclass_from(DataConfig, plain["data"], "data").datasets[0]
    plain |= {"policy": manifest["architecture"], "task_before": manifest["task"]}
    plain["task"] = task_of_bundle(manifest, EpisodeStore.open(first.path).fps)
    plain = override_plain(plain, [o for o in overrides if o.startswith(LATE)])
    if not plain["critic"]:
        raise UserError("Please give critic=…, a bundle of robopolicy train-critic.")
    name = f"{plain['policy']['name']}-{plain['method']}-seed{plain['train']['seed']}"
    plain["out"] = plain["out"] or f"runs/{plain['task']['name']}/{name}"
    return plain | fingerprints(plain)


def fingerprints(plain: Mapping[str, Any]) -> dict[str, str]:
    """Those of the policy and of the critic, as they are now."""
    from robopolicy.manifest import bundle_fingerprint, read_manifest

    manifests = read_manifest(Path(plain["bundle"])), read_manifest(Path(plain["critic"]), "critic")
    return {name: bundle_fingerprint(found) for name, found in zip(FINGERPRINTS, manifests, strict=True)}


def align(plain: Mapping[str, Any], resume: bool) -> None:
    """Align with a composed configuration.

    Raises:
        UserError: also where a run is resumed and one of its bundles is another one now.
    """
    from robopolicy.configuration import dataclass_from
    from robopolicy.training.align import AlignRun, align_config, policy_to_align
    from robopolicy.training.checkpoint import has_checkpoint
    from robopolicy.training.loop import RunConfig, train

    start = align_config(plain)
    for name, found in fingerprints(plain).items():
        if found != plain[name]:
            raise UserError(
                f"The run started with {name}={plain[name]}; it is {found} now. Restore {start.bundle} and "
                f"{start.critic}, or start a new run with out=…"
            )
    config = dataclass_from(RunConfig, {name: plain[name] for name in SECTIONS}, "")
    if not resume and has_checkpoint(Path(config.out) / "checkpoints"):
        raise UserError(
            f"{config.out} already holds a training run. Continue it with --resume {config.out}, or choose another "
            "folder with out=…"
        )
    evaluate = evaluation_of(config, plain) if config.train.evaluate_every else None
    bundle = train(
        config,
        plain,
        evaluate,
        resume,
        build=lambda data: policy_to_align(start.bundle, plain["policy"], data),
        make_run=AlignRun,
    )
    print(f"bundle: {bundle}\njudge it with: robopolicy eval bundle={bundle}")
