"""``robopolicy distill``"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from robopolicy.cli.compose import compose_config, override_plain
from robopolicy.cli.train import start, started_with
from robopolicy.errors import UserError

FINGERPRINT = "teacher_fingerprint"
HELP = """\
Distil a diffusion policy into a consistency policy that needs one to three network calls for a chunk.

  robopolicy train process=edm task=pusht_state data.path=pusht_cchi_v7_replay.zarr          the teacher
  robopolicy distill teacher=runs/pusht_state/diffusion_unet-seed42/bundles/last data.path=pusht_cchi_v7_replay.zarr
  robopolicy distill teacher=… data.path=… train=pusht_cpu student.bins=20                  fewer updates: fewer bins
  robopolicy distill teacher=… data.path=… student.sampler.steps=1
  robopolicy distill --resume runs/pusht_state/diffusion_unet-seed42-consistency            go on after a crash

The teacher is a U-Net (policy=diffusion_unet) on the EDM process; its bundle holds its averaged weights, and those are
distilled. Task, observation and action keys, units, architecture and noise process are the teacher's. Give the data
that it was trained on. An update costs about four of the teacher's training.

The number of sampling steps can be chosen again at each evaluation: robopolicy eval bundle=… sampler.steps=3
The run's folder is that of robopolicy train, and so are the options; see configs/distill.yaml.
"""


def add_parser(verbs: Any) -> None:
    parser = verbs.add_parser(
        "distill",
        help="make a policy that samples in one to three network calls",
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
        if FINGERPRINT not in plain:
            raise UserError(f"{args.resume} was not started by distill. Continue it with: robopolicy train --resume")
    else:
        plain = compose(args.overrides, args.config_dir)
    if args.print_config:
        print(json.dumps(plain, indent=2))
        return 0
    distill(plain, resume=args.resume is not None)
    return 0


def compose(overrides: Sequence[str], config_dir: Path | None = None) -> dict[str, Any]:
    """The configuration: ``distill.yaml``, with the teacher's task and the student's architecture.

    Raises:
        UserError: see `compose_config` and `robopolicy.training.distill.load_teacher`.
    """
    plain = compose_config("distill", overrides, config_dir)
    from robopolicy.configuration import dataclass_from
    from robopolicy.data.store import EpisodeStore
    from robopolicy.training.config import DataConfig
    from robopolicy.training.distill import load_teacher, student_architecture
    from robopolicy.training.finetune import task_of_bundle

    first = dataclass_from(DataConfig, plain["data"], "data").datasets[0]
    teacher = load_teacher(Path(plain["teacher"]))
    return {
        **{name: value for name, value in plain.items() if name != "student"},
        "teacher": str(teacher.path),
        FINGERPRINT: teacher.fingerprint,
        "out": plain["out"] or str(teacher.run.with_name(f"{teacher.run.name}-consistency")),
        "task": task_of_bundle(teacher.manifest, EpisodeStore.open(first.path).fps),
        "policy": student_architecture(teacher, plain["student"]),
    }


def distill(plain: Mapping[str, Any], resume: bool) -> None:
    """Distil with a composed configuration.

    Raises:
        UserError: also where a run is resumed and its teacher is another one now.
    """
    from robopolicy.training.distill import load_teacher, student_of

    teacher = load_teacher(Path(plain["teacher"]))
    if teacher.fingerprint != plain[FINGERPRINT]:
        raise UserError(
            f"The run started with a teacher {plain[FINGERPRINT]}; {teacher.path} is {teacher.fingerprint} now. "
            "Restore it, or start a new run with out=…"
        )
    start(dict(plain), resume, lambda data: student_of(teacher, plain["policy"], data))
