"""``robopolicy eval``"""

from __future__ import annotations

import argparse
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from robopolicy.cli.compose import compose_config
from robopolicy.errors import UserError

HELP = """\
Judge a policy in simulation: every number comes with its definition, n and a 95 % interval.

  robopolicy eval bundle=runs/pusht_state/diffusion_unet-seed42/bundles/last episodes=200
  robopolicy eval bundle=… sampler.name=dpmsolver++ sampler.steps=8 out=results/fast
  robopolicy eval bundle=… workers=2 videos=16

The folder `out` gets report.html (self-contained, with videos), summary.json, episodes.jsonl, protocol.json. Episode i
starts from seed first_seed + i and draws its noise from that seed: the same command gives the same episodes, so that
two policies can be compared pair by pair (robopolicy compare).
"""


def add_parser(verbs: Any) -> None:
    parser = verbs.add_parser(
        "eval",
        help="judge a policy in simulation",
        description=HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="see above and configs/eval.yaml")
    parser.set_defaults(run=run)


@dataclass(frozen=True)
class Sampler:
    """Overrides of the bundle's sampler; None keeps its value."""

    name: str | None = None
    steps: int | None = None


@dataclass(frozen=True)
class Settings:
    """The entries of ``configs/eval.yaml``, explained there."""

    bundle: str
    episodes: int
    first_seed: int
    batch_size: int
    workers: int
    videos: int
    device: str
    environment: str | None = None
    out: str | None = None
    sampler: Sampler = field(default_factory=Sampler)


def run(args: argparse.Namespace) -> int:
    from robopolicy.configuration import dataclass_from

    settings = dataclass_from(Settings, compose_config("eval", args.overrides), "")
    from robopolicy.evaluation.evaluate import evaluate
    from robopolicy.policies.bundle import bundle_fingerprint, load_bundle
    from robopolicy.training.distributed import join_processes
    from robopolicy.training.metrics import curve

    path = Path(settings.bundle).resolve()
    policy, manifest = load_bundle(path, join_processes(settings.device).device)
    policy.sampler = replace(policy.sampler, **{k: v for k, v in asdict(settings.sampler).items() if v is not None})
    policy.check_sampler(policy.sampler)  # before any episode
    environment = settings.environment or manifest["task"].get("environment")
    if not environment:
        raise UserError(f"{path} was trained for a task without an environment; name one with environment=…")
    run_folder = path.parent.parent if path.parent.name == "bundles" else path.parent
    out = Path(settings.out or run_folder / "eval" / f"{path.name}-{environment}-{settings.episodes}")
    result = evaluate(
        policy,
        environment,
        out=out,
        policy_info={"fingerprint": bundle_fingerprint(manifest), "sampler": asdict(policy.sampler)},
        training_curve=curve(run_folder / "metrics.jsonl", "train/loss") or None,
        **{name: getattr(settings, name) for name in ("episodes", "first_seed", "batch_size", "workers", "videos")},
    )
    for metric in result.metrics:
        interval = f"[{metric.low:.3f}, {metric.high:.3f}]"
        print(f"{metric.label:<18} {metric.value:8.3f}  95 % {interval}  n={metric.n}  {metric.definition}")
    print(f"report: {out / 'report.html'}")
    return 0
