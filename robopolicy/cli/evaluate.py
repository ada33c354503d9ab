"""``robopolicy eval``"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from robopolicy.cli.compose import compose_with_texts, config_folder
from robopolicy.errors import UserError, did_you_mean

if TYPE_CHECKING:
    from robopolicy.evaluation.results import EvaluationResult, Metric
    from robopolicy.evaluation.statistics import Interval
    from robopolicy.evaluation.suite_results import SuiteResult
    from robopolicy.evaluation.tasks import TaskPlace, TasksResult
    from robopolicy.export.engine_policy import EnginePolicy
    from robopolicy.policies.base import Policy
    from robopolicy.steering.policy import SteeredPolicy

HELP = """\
Judge a policy in simulation: every number comes with its definition, n and a 95 % interval.

  robopolicy eval bundle=runs/pusht_state/diffusion_unet-seed42/bundles/last episodes=200
  robopolicy eval bundle=… sampler.name=dpmsolver++ sampler.steps=8 out=results/fast
  robopolicy eval bundle=… workers=2 videos=16
  robopolicy eval bundle=… environment_options='{variation: {lighting: darker}}'
  robopolicy eval bundle=… suite=variant_aggregation out=results/variants
  robopolicy eval bundle=… environment=drawer_open instruction='open the left drawer'
  robopolicy eval bundle=… goal=demos.zarr#7@120
  robopolicy eval bundle=… engine=openvino-fp32
  robopolicy eval bundle=… steering=vgps steering.vgps.critic=runs/critic/bundles/last steering.vgps.candidates=30

The folder `out` gets report.html (self-contained, with videos), summary.json, episodes.jsonl, protocol.json. Episode i
starts from seed first_seed + i and draws its noise from that seed: the same command gives the same episodes, so that
two policies can be compared pair by pair (robopolicy compare). A suite plays the same seeds in many settings, each
into a folder of its own; the same command goes on with an interrupted one.

A multi-task policy does what its environment asks for, or the instruction; one that was trained for several
environments is judged in each, unless one is named. A goal-conditioned policy pursues the goal: a step of an episode
of a dataset, both counted from 0, by default the last step.

steering=[…] steers the policy while it acts, with one or several ways in the given order (configs/steering/): vgps,
dynaguide, cfg, compose, cost, barrier. What each adds to the latency is printed before the first episode.
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
    guidance: float | None = None
    guidance_threshold: float | None = None


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
    instruction: str | None = None
    goal: str | None = None
    out: str | None = None
    engine: str | None = None
    allow_native_code: bool = False
    sampler: Sampler = field(default_factory=Sampler)
    steering: dict[str, Any] = field(default_factory=dict)


def run(args: argparse.Namespace) -> int:
    from robopolicy.configuration import dataclass_from

    settings = dataclass_from(Settings, compose_with_texts("eval", args.overrides, ("instruction", "goal")), "")
    from robopolicy.data.goal_file import given_goal
    from robopolicy.evaluation.evaluate import evaluate, evaluate_suite
    from robopolicy.evaluation.launch.launcher import player
    from robopolicy.evaluation.suite import load_suite
    from robopolicy.evaluation.tasks import evaluate_tasks
    from robopolicy.manifest import bundle_fingerprint
    from robopolicy.policies.bundle import load_bundle
    from robopolicy.training.distributed import join_processes
    from robopolicy.training.metrics import curve

    path = Path(settings.bundle).resolve()
    policy, manifest = load_bundle(path, join_processes(settings.device).device)
    override_sampler(policy, settings.sampler)
    places = judged_in(settings, manifest["task"])
    pursued = given_goal(settings.goal, policy.spec.goals)
    if pursued is not None:
        policy.goal = pursued.values
    place = places[0] if len(places) == 1 else None
    if place and place.instruction:
        policy.check_instruction(place.instruction)
        policy.instruction = place.instruction
    run_folder = path.parent.parent if path.parent.name == "bundles" else path.parent
    suite = load_suite(suite_path(settings.suite), place.environment_options) if settings.suite and place else None
    where = place.environment.rpartition("/")[-1] if place else "tasks"
    parts = [path.name, where, *([suite.name] if suite else []), str(settings.episodes)]
    out = Path(settings.out or run_folder / "eval" / "-".join(parts))
    steered = with_engine(policy, settings, path) if settings.engine else steer(policy, settings)
    launch = {key: getattr(settings, key) for key in ("shard_size", "threads", "ray_address", "ray_gpus")}
    batches = {key: getattr(settings, key) for key in ("batch_size", "shard_size", "threads")}
    common: dict[str, Any] = {
        "policy_info": {
            "fingerprint": bundle_fingerprint(manifest),
            "sampler": asdict(policy.sampler),
            "batches": batches,  # they decide the last digits
            **({"goal": pursued.description} if pursued else {}),
            **engine_entry(settings, path),
            **steering_entry(settings.steering),
        },
        "player": player(settings.launcher, **launch),
        **{key: getattr(settings, key) for key in ("episodes", "first_seed", "batch_size", "workers", "videos")},
    }
    if place is None:
        _print_tasks(evaluate_tasks(steered, places, out, **common))
        print(f"results: {out}")
        return 0
    if suite:
        _print_suite(evaluate_suite(steered, place.environment, suite, out, **common))
    else:
        loss = curve(run_folder / "metrics.jsonl", "train/loss") or None
        _print_metrics(evaluate(steered, place.world(), out=out, training_curve=loss, **common))
    print(f"report: {out / 'report.html'}")
    return 0


def with_engine(policy: Policy, settings: Settings, bundle: Path) -> EnginePolicy:
    """An engine of the bundle in the place of its policy.

    Raises:
        UserError: it cannot be opened; or the settings ask for what is fixed in an engine.
    """
    from robopolicy.export.engine_policy import EnginePolicy
    from robopolicy.export.open import open_policy

    if settings.steering or any(value is not None for value in asdict(settings.sampler).values()):
        raise UserError("An engine samples as it was exported; leave steering and sampler out, or export another one.")
    if settings.launcher != "local":
        raise UserError(f"launcher={settings.launcher} plays policies in torch only; use launcher=local.")
    device = None if settings.device in ("auto", "cpu") else settings.device
    engine = open_policy(
        bundle,
        settings.engine,
        threads=settings.threads,
        device=device,
        allow_native_code=settings.allow_native_code,
    )
    engine.instruction, engine.goal = policy.instruction, policy.goal
    return EnginePolicy(engine)


def engine_entry(settings: Settings, bundle: Path) -> dict[str, Any]:
    """What the protocol says of an engine: what it is, and how it samples in the policy's place."""
    from robopolicy.inference.engine import engine_names, read_engine

    if settings.engine not in engine_names(bundle):
        return {"engine": settings.engine} if settings.engine else {}
    manifest, _ = read_engine(bundle, settings.engine)
    graphs = {name: graph.sha256[:16] for name, graph in manifest.graphs.items()}
    about = {"name": manifest.name, "backend": manifest.backend, "precision": manifest.precision, "graphs": graphs}
    return {"engine": about, "sampler": manifest.sampler}


def steer(policy: Policy, settings: Settings) -> Policy | SteeredPolicy:
    """The policy, steered where the settings ask for it; prints what each way adds to the latency.

    Raises:
        UserError: see `build_steering`; also a launcher that cannot carry steered policies.
    """
    if not settings.steering:
        return policy
    from robopolicy.policies.denoising import DenoisingPolicy
    from robopolicy.steering.latency import added_latency, blank_robot, latency_lines
    from robopolicy.steering.policy import SteeredPolicy
    from robopolicy.steering.registry import build_steering

    if settings.launcher != "local":
        raise UserError(f"launcher={settings.launcher} plays policies without steering only; use launcher=local.")
    ways = build_steering(settings.steering, policy)
    assert isinstance(policy, DenoisingPolicy)  # checked by build_steering
    steered = SteeredPolicy(policy, ways)
    print("\n".join(latency_lines(added_latency(policy, ways, blank_robot(steered)))))
    return steered


def steering_entry(plain: Mapping[str, Any]) -> dict[str, Any]:
    """What the protocol says of the steering: its settings, and the fingerprint of each bundle that they name."""
    from robopolicy.manifest import bundle_fingerprint, read_manifest

    def bundles(value: Any) -> Iterator[str]:
        if isinstance(value, (Mapping, list, tuple)):
            for entry in value.values() if isinstance(value, Mapping) else value:
                yield from bundles(entry)
        elif isinstance(value, str) and (Path(value) / "bundle.yaml").is_file():
            yield value

    if not plain:
        return {}
    found = {path: bundle_fingerprint(read_manifest(Path(path), None)) for path in sorted(set(bundles(plain)))}
    return {"steering": dict(plain), **({"steered_with": found} if found else {})}


def override_sampler(policy: Policy, sampler: Sampler) -> None:
    """Replace what ``sampler`` names in the policy's sampler.

    Raises:
        UserError: the policy cannot be sampled so.
    """
    policy.sampler = replace(policy.sampler, **{k: v for k, v in asdict(sampler).items() if v is not None})
    policy.check_sampler(policy.sampler)


def judged_in(settings: Settings, task: Mapping[str, Any]) -> list[TaskPlace]:
    """The environments to judge the policy in, and what it is asked to do there.

    Args:
        task: the bundle's.

    Raises:
        UserError: the bundle names no environment, or several where the settings want one.
    """
    from robopolicy.evaluation.environments import absolute_files
    from robopolicy.evaluation.tasks import TaskPlace, task_places

    instruction, options = settings.instruction or "", settings.environment_options
    # another environment than the task's has other options
    places = [TaskPlace(settings.environment)] if settings.environment else task_places(task)
    if not places:
        raise UserError(f"{settings.bundle} was trained for a task without an environment; name one with environment=…")
    if instruction and len(places) > 1:
        known = [place.instruction for place in places]
        places = [place for place in places if place.instruction == instruction]
        if not places:
            raise UserError(
                f"The policy was trained for several environments, none with the instruction '{instruction}'; name "
                f"one with environment=….{did_you_mean(instruction, filter(None, known))}"
            )
    for key in ("suite", "environment_options", "goal"):
        if len(places) > 1 and getattr(settings, key):
            names = ", ".join(dict.fromkeys(place.environment for place in places))
            raise UserError(f"{key}=… is for one environment, the policy was trained for {names}; name one of them.")
    if len(places) == 1:
        (place,) = places
        usual = place.environment_options
        places = [TaskPlace(place.environment, usual if options is None else options, instruction or place.instruction)]
    return [replace(p, environment_options=absolute_files(p.environment_options, Path.cwd())) for p in places]


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


def _print_tasks(result: TasksResult) -> None:
    rows = {name: found.metric("success_rate") for name, found in result.results.items()} | {"mean": result.mean}
    width = max(map(len, (*rows, "success rate")))
    print(f"{'success rate':<{width}} {'value':>7}  {'95 %':<16}")
    for name, rate in rows.items():
        note = result.results[name].protocol.task["environment"] if name in result.results else rate.definition
        print(f"{name:<{width}} {_interval(rate)} n={rate.n}  {note}")


def _print_suite(result: SuiteResult) -> None:
    print(f"{'success rate':<32} {'value':>7}  {'95 %':<16} {'drop':>7}  {'95 %':<16}")
    for s in result.settings:
        note = "" if s.setting.in_aggregate else "  not in the aggregate"
        print(f"{s.setting.name:<32} {_interval(s.rate)} {_interval(s.drop)}  n={s.rate.n}{note}")
    total = result.aggregate
    print(f"{'aggregate':<32} {_interval(total)} {'':25}  n={total.n}  {total.definition}")


def _interval(m: Interval | Metric) -> str:
    return f"{m.value:7.3f}  [{m.low:.3f}, {m.high:.3f}]".ljust(25)
