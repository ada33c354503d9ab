"""``robopolicy eval``"""

from __future__ import annotations

import argparse
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from robopolicy.cli.compose import compose_config, config_folder
from robopolicy.errors import UserError, did_you_mean

if TYPE_CHECKING:
    from robopolicy.evaluation.results import EvaluationResult, Metric
    from robopolicy.evaluation.statistics import Interval
    from robopolicy.evaluation.suite_results import SuiteResult

HELP = """\
Judge a policy in simulation: every number comes with its definition, n and a 95 % interval.

  robopolicy eval bundle=runs/pusht_state/diffusion_unet-seed42/bundles/last episodes=200
  robopolicy eval bundle=… sampler.name=dpmsolver++ sampler.steps=8 out=results/fast
  robopolicy eval bundle=… workers=2 videos=16
  robopolicy eval bundle=… environment_options='{variation: {lighting: darker}}'
  robopolicy eval bundle=… suite=variant_aggregation out=results/variants

The folder `out` gets report.html (self-contained, with videos), summary.json, episodes.jsonl, protocol.json. Episode i
starts from seed first_seed + i and draws its noise from that seed: the same command gives the same episodes, so that
two policies can be compared pair by pair (robopolicy compare). A suite plays the same seeds in many settings, each
into a folder of its own; the same command goes on with an interrupted one.
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
    launcher: str
    shard_size: int
    threads: int
    ray_address: str
    ray_gpus: float
    environment: str | None = None
    environment_options: dict[str, Any] | None = None
    suite: str | None = None
    out: str | None = None
    sampler: Sampler = field(default_factory=Sampler)


def run(args: argparse.Namespace) -> int:
    from robopolicy.configuration import dataclass_from

    settings = dataclass_from(Settings, compose_config("eval", args.overrides), "")
    from robopolicy.evaluation.environments import absolute_files, environment
    from robopolicy.evaluation.evaluate import evaluate, evaluate_suite
    from robopolicy.evaluation.launch.launcher import player
    from robopolicy.evaluation.suite import load_suite
    from robopolicy.policies.bundle import bundle_fingerprint, load_bundle
    from robopolicy.training.distributed import join_processes
    from robopolicy.training.metrics import curve

    path = Path(settings.bundle).resolve()
    policy, manifest = load_bundle(path, join_processes(settings.device).device)
    policy.sampler = replace(policy.sampler, **{k: v for k, v in asdict(settings.sampler).items() if v is not None})
    policy.check_sampler(policy.sampler)  # before any episode
    task = manifest["task"]
    name = settings.environment or task.get("environment")
    if not name:
        raise UserError(f"{path} was trained for a task without an environment; name one with environment=…")
    # Another environment than the task's has other options.
    usual = {} if settings.environment else task.get("environment_options") or {}
    options = usual if settings.environment_options is None else settings.environment_options
    options = absolute_files(options, Path.cwd())
    run_folder = path.parent.parent if path.parent.name == "bundles" else path.parent
    suite = load_suite(suite_path(settings.suite), options) if settings.suite else None
    parts = [path.name, name.rpartition("/")[-1], *([suite.name] if suite else []), str(settings.episodes)]
    out = Path(settings.out or run_folder / "eval" / "-".join(parts))
    launch = {key: getattr(settings, key) for key in ("shard_size", "threads", "ray_address", "ray_gpus")}
    batches = {key: getattr(settings, key) for key in ("batch_size", "shard_size", "threads")}
    common: dict[str, Any] = {
        "policy_info": {
            "fingerprint": bundle_fingerprint(manifest),
            "sampler": asdict(policy.sampler),
            "batches": batches,  # they decide the last digits
        },
        "player": player(settings.launcher, **launch),
        **{key: getattr(settings, key) for key in ("episodes", "first_seed", "batch_size", "workers", "videos")},
    }
    if suite:
        _print_suite(evaluate_suite(policy, name, suite, out, **common))
    else:
        loss = curve(run_folder / "metrics.jsonl", "train/loss") or None
        _print_metrics(evaluate(policy, environment(name, options), out=out, training_curve=loss, **common))
    print(f"report: {out / 'report.html'}")
    return 0


def suite_path(name: str) -> Path:
    """The file of a suite: a name from ``configs/suites``, or the path of a YAML file.

    Raises:
        UserError: there is no suite of this name; names the closest one.
    """
    if name.endswith((".yaml", ".yml")):
        return Path(name)
    known = {file.stem: file for file in (config_folder() / "suites").glob("*.yaml")}
    if name not in known:
        raise UserError(f"There is no suite '{name}'.{did_you_mean(name, known)} A file of your own ends in .yaml.")
    return known[name]


def _print_metrics(result: EvaluationResult) -> None:
    for metric in result.metrics:
        interval = f"[{metric.low:.3f}, {metric.high:.3f}]"
        print(f"{metric.label:<18} {metric.value:8.3f}  95 % {interval}  n={metric.n}  {metric.definition}")


def _print_suite(result: SuiteResult) -> None:
    print(f"{'success rate':<32} {'value':>7}  {'95 %':<16} {'drop':>7}  {'95 %':<16}")
    for s in result.settings:
        note = "" if s.setting.in_aggregate else "  not in the aggregate"
        print(f"{s.setting.name:<32} {_interval(s.rate)} {_interval(s.drop)}  n={s.rate.n}{note}")
    total = result.aggregate
    print(f"{'aggregate':<32} {_interval(total)} {'':25}  n={total.n}  {total.definition}")


def _interval(m: Interval | Metric) -> str:
    return f"{m.value:7.3f}  [{m.low:.3f}, {m.high:.3f}]".ljust(25)
