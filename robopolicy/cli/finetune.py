"""``robopolicy finetune``"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from robopolicy.cli.compose import compose_config, override_plain
from robopolicy.cli.train import start, started_with
from robopolicy.errors import UserError

START = ("bundle", "mode", "normalization", "lora")
FINGERPRINT = "bundle_fingerprint"
HELP = """\
Fine-tune a policy on new data.

  robopolicy finetune bundle=runs/push_puck/…/bundles/last data.path=new.zarr
  robopolicy finetune bundle=… data.path=new.zarr mode=lora lora.rank=8 train.steps=2000 train.optim.lr=1e-3
  robopolicy finetune bundle=… data.path=new.zarr mode=head
  robopolicy finetune bundle=… data.path=arm.zarr task=arm_state task.name=lift     other observations or actions
  robopolicy finetune --resume runs/push_puck/diffusion_unet-lora-seed42            go on after a crash

Architecture, observation and action keys are the bundle's. mode=full trains all weights, mode=head the denoiser's
output layers, mode=lora low-rank adapters (pip install 'robopolicy[lora]'), which are merged into the weights of the
bundles that are saved: these are ordinary ones. Weights are taken over where name and shape agree; what is new, e.g.
for another action space, is trained in every mode and named in the log.

normalization=auto converts with the bundle's normalisers where shape and unit of a key are the same, and fits the
others to the new data; keep and refit decide for all keys.

The run's folder is that of robopolicy train, and so are the options; see configs/finetune.yaml.
"""


def add_parser(verbs: Any) -> None:
    parser = verbs.add_parser(
        "finetune",
        help="fine-tune a policy on new data",
        description=HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="choices and overrides, see above")
    parser.add_argument("--resume", type=Path, metavar="RUN", help="continue the run in this folder")
    parser.add_argument("--config-dir", type=Path, help="folder with your own task/ and train/ YAML files")
    parser.add_argument("--print-config", action="store_true", help="print the composed configuration and stop")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    if args.resume is not None:
        plain = override_plain(started_with(args.resume), args.overrides) | {"out": str(args.resume)}
        if FINGERPRINT not in plain:
            raise UserError(f"{args.resume} was not started by finetune. Continue it with: robopolicy train --resume")
    else:
        plain = compose(args.overrides, args.config_dir)
    if args.print_config:
        print(json.dumps(plain, indent=2))
        return 0
    finetune(plain, resume=args.resume is not None)
    return 0


def compose(overrides: Sequence[str], config_dir: Path | None = None) -> dict[str, Any]:
    """The configuration: ``finetune.yaml`` with the bundle's architecture and task, then the overrides of these."""
    from robopolicy.configuration import dataclass_from
    from robopolicy.data.store import EpisodeStore
    from robopolicy.manifest import bundle_fingerprint, read_manifest
    from robopolicy.training.config import DataConfig
    from robopolicy.training.finetune import task_of_bundle

    own_task = any(o.startswith("task=") for o in overrides)
    late = ("policy.",) if own_task else ("policy.", "task.")
    plain = compose_config("finetune", [o for o in overrides if not o.startswith(late)], config_dir)
    manifest = read_manifest(Path(plain["bundle"]))
    architecture = {**manifest["architecture"]}
    architecture["config"] = {"prefix_steps": 0, **architecture["config"]}  # bundles of before the option lack it
    plain |= {"policy": architecture, FINGERPRINT: bundle_fingerprint(manifest)}
    plain["task_before"] = manifest["task"]
    if not own_task:
        first = dataclass_from(DataConfig, plain["data"], "data").datasets[0]
        plain["task"] = task_of_bundle(manifest, EpisodeStore.open(first.path).fps)
    plain = override_plain(plain, [o for o in overrides if o.startswith(late)])
    name = f"{plain['policy']['name']}-{plain['mode']}-seed{plain['train']['seed']}"
    plain["out"] = plain["out"] or f"runs/{plain['task']['name']}/{name}"
    return plain


def finetune(plain: Mapping[str, Any], resume: bool) -> None:
    """Fine-tune with a composed configuration.

    Raises:
        UserError: also where a run is resumed and its bundle is another one now.
    """
    from robopolicy.configuration import dataclass_from
    from robopolicy.manifest import bundle_fingerprint, read_manifest
    from robopolicy.training.finetune import FinetuneConfig, initial_policy, merge_adapters

    config = dataclass_from(FinetuneConfig, {name: plain[name] for name in START}, "")
    found = bundle_fingerprint(read_manifest(Path(config.bundle)))
    if found != plain[FINGERPRINT]:
        raise UserError(
            f"The run started from a bundle {plain[FINGERPRINT]}; {config.bundle} is {found} now. Restore it, or start "
            "a new run with out=…"
        )
    start(dict(plain), resume, lambda data: initial_policy(config, plain["policy"], data), merge_adapters)
