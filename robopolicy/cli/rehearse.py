"""``robopolicy rehearse``"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from robopolicy.cli.compose import compose_with_texts
from robopolicy.errors import UserError

if TYPE_CHECKING:
    from robopolicy.data.goal_file import Goal
    from robopolicy.evaluation.realtime import Motion, RealtimeResult

HELP = """\
Rehearse a deployment in simulation: the same runner that drives a robot, with delays, while the world goes on.

  robopolicy rehearse bundle=runs/a/bundles/last delays=[0,0.1,0.2]
  robopolicy rehearse bundle=… schedulers=[synchronous,temporal_ensembling,rtc] delays=[0,0.2] episodes=100
  robopolicy rehearse bundle=… settings='{rtc: {execute: 4}}' engine=openvino-fp32
  robopolicy rehearse bundle=… goal=demos.zarr#7@120

robopolicy eval stops the world during inference; a robot cannot. Here an inference takes as long as you say, commands
go out at command_rate through the safety filter, and chunks are executed by a scheduler (docs/chunking.md). Time is
simulated: the same command gives the same episodes, on any machine.

For each scheduler and delay the table tells the success rate with a 95 % interval, the seconds until success, how long
the robot stood still, and how smooth the commands were (jerk and the jump of the velocity at chunk borders, in shares
of their limits). The folder `out` gets rehearsal.json with every episode.
"""


def add_parser(verbs: Any) -> None:
    parser = verbs.add_parser(
        "rehearse",
        help="judge a policy with the robot's runner and its delays, in simulated real time",
        description=HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="see above and configs/rehearse.yaml")
    parser.set_defaults(run=run)


@dataclass(frozen=True)
class MotionSettings:
    """Limits of every axis of the action."""

    acceleration: float
    jerk: float
    velocity: float | None = None


@dataclass(frozen=True)
class Settings:
    """The entries of ``configs/rehearse.yaml``, explained there."""

    bundle: str
    threads: int
    episodes: int
    first_seed: int
    schedulers: tuple[str, ...]
    delays: tuple[float, ...]
    jitter: float
    command_rate: float
    lookahead: float
    motion: MotionSettings
    settings: dict[str, Any] | None = None
    engine: str | None = None
    allow_native_code: bool = False
    environment: str | None = None
    environment_options: dict[str, Any] | None = None
    goal: str | None = None
    time_limit: float | None = None
    out: str | None = None

    def __post_init__(self) -> None:
        if self.episodes < 1 or not self.schedulers or not self.delays:
            raise UserError("Give at least one episode, one scheduler and one delay.")
        for name in self.settings or {}:
            if name not in self.schedulers:
                raise UserError(f"settings.{name}: this scheduler is not among schedulers={list(self.schedulers)}.")


def run(args: argparse.Namespace) -> int:
    from robopolicy.configuration import dataclass_from

    settings = dataclass_from(Settings, compose_with_texts("rehearse", args.overrides, ("goal",)), "")
    from robopolicy.data.goal_file import given_goal
    from robopolicy.evaluation.realtime import Delays, Motion, evaluate_realtime
    from robopolicy.evaluation.results import write_json
    from robopolicy.export.open import open_policy
    from robopolicy.manifest import read_manifest
    from robopolicy.policies.prefix import prefix_steps
    from robopolicy.runtime.chunk_scheduler import RealTimeChunkingSettings
    from robopolicy.runtime.runner import RunnerSettings
    from robopolicy.runtime.settings import scheduler_settings

    bundle = Path(settings.bundle).resolve()
    manifest = read_manifest(bundle)
    environment, options = _place(settings, manifest["task"])
    schedulers = [scheduler_settings(name, (settings.settings or {}).get(name, {})) for name in settings.schedulers]
    out = Path(settings.out) if settings.out else bundle.parent.parent / "rehearsal"
    chunking = [scheduler for scheduler in schedulers if isinstance(scheduler, RealTimeChunkingSettings)]
    policy = open_policy(
        bundle,
        settings.engine,
        threads=settings.threads,
        allow_native_code=settings.allow_native_code,
        rtc=chunking[0].guidance if chunking else None,
    )
    for scheduler in chunking:
        scheduler.check_engine(policy.name)
    goal = given_goal(settings.goal, policy.spec.goals)
    out.mkdir(parents=True, exist_ok=True)
    motion = Motion(settings.motion.velocity, settings.motion.acceleration, settings.motion.jerk)
    results = [
        evaluate_realtime(
            policy,
            environment,
            options,
            scheduler,
            Delays(delay, settings.jitter),
            range(settings.first_seed, settings.first_seed + settings.episodes),
            command_rate=settings.command_rate,
            motion=motion,
            runner=RunnerSettings(lookahead=settings.lookahead),
            time_limit=settings.time_limit,
            prefix_steps=prefix_steps(manifest),
            goal=goal.values if goal else None,
        )
        for delay in settings.delays
        for scheduler in schedulers
    ]
    policy.close()
    write_json(out / "rehearsal.json", _described(environment, options, motion, goal, settings, results))
    print(
        f"{environment}, {settings.episodes} episodes each, engine {policy.name}, {settings.command_rate:g} commands/s"
    )
    print_results(results)
    print(f"results: {out / 'rehearsal.json'}")
    return 0


def _place(settings: Settings, task: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """Environment and options; the options of the task belong to its environment."""
    from robopolicy.evaluation.tasks import task_places

    if settings.environment:
        return settings.environment, dict(settings.environment_options or {})
    places = task_places(task)
    if len(places) != 1:
        raise UserError(f"{settings.bundle} was trained in {len(places)} environments; name one with environment=…")
    options = places[0].environment_options if settings.environment_options is None else settings.environment_options
    return places[0].environment, dict(options)


def print_results(results: Sequence[RealtimeResult]) -> None:
    """One line for each scheduler and delay."""
    columns = ("delay s", "success", "95 % interval", "seconds", "pause s", "jerk", "seam", "stopped")
    print(f"{'scheduler':<20} " + " ".join(f"{name:>13}" for name in columns))
    for result in results:
        success = result.success
        done = [e.seconds for e in result.episodes if e.success]
        numbers = (
            f"{result.delays.inference:g}",
            f"{success.value:.2f}",
            f"{success.low:.2f} - {success.high:.2f}",
            f"{sum(done) / len(done):.2f}" if done else "-",
            f"{result.mean('pause'):.2f}",
            f"{result.mean('jerk'):.3f}",
            f"{max(e.seam for e in result.episodes):.2f}",
            str(result.faults),
        )
        print(f"{result.scheduler.name:<20} " + " ".join(f"{number:>13}" for number in numbers))
    print("seconds: of successful episodes; jerk: root mean square, and seam: largest, in shares of their limits")


def _described(
    environment: str,
    options: dict[str, Any],
    motion: Motion,
    goal: Goal | None,
    settings: Settings,
    results: Sequence[RealtimeResult],
) -> dict[str, Any]:
    from dataclasses import asdict

    return {
        "bundle": settings.bundle,
        "engine": settings.engine,
        "environment": environment,
        "environment_options": options,
        **({"goal": goal.description} if goal else {}),
        "command_rate": settings.command_rate,
        "lookahead": settings.lookahead,
        "motion": asdict(motion),
        "results": [result.to_dict() for result in results],
    }
