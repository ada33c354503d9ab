"""Evaluate a policy, in one environment or in a suite: rollouts, numbers, videos and report in one call."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from robopolicy.errors import UserError
from robopolicy.evaluation.compare import differences
from robopolicy.evaluation.environments import Environment, environment
from robopolicy.evaluation.episode import EpisodeResult
from robopolicy.evaluation.report import write_report
from robopolicy.evaluation.results import EvaluationResult, Protocol, task_of
from robopolicy.evaluation.rollout import ChunkPolicy, Player, rollout
from robopolicy.evaluation.suite import Setting, Suite
from robopolicy.evaluation.suite_report import write_suite_report
from robopolicy.evaluation.suite_results import SuiteResult, setting_folder, suite_protocol
from robopolicy.evaluation.video import Clip, choose, replay, write_grid, write_video
from robopolicy.spec import INSTRUCTION, PolicySpec

log = logging.getLogger(__name__)


def evaluate(
    policy: ChunkPolicy,
    world: Environment | str,
    *,
    episodes: int = 50,
    first_seed: int = 100_000,
    out: Path | None = None,
    videos: int = 8,
    batch_size: int = 50,
    workers: int = 0,
    max_steps: int | None = None,
    policy_info: Mapping[str, Any] | None = None,
    training_curve: Sequence[tuple[float, float]] | None = None,
    progress: bool = True,
    player: Player = rollout,
) -> EvaluationResult:
    """Roll a policy out and, when ``out`` is given, write everything about it into that folder.

    The folder then holds ``protocol.json``, ``episodes.jsonl``, ``summary.json`` (see `results`), ``videos/`` with one
    mp4 per chosen episode and ``grid.mp4``, and ``report.html``.

    Args:
        world: an environment or the name of one, see `environments.environment`.
        episodes: number of episodes, seeds ``first_seed``, ``first_seed + 1``, …
        videos: episodes to film, failures first; 0 for none.
        batch_size, workers: see `rollout`.
        max_steps: control steps per episode; None for the environment's own limit.
        policy_info: plain values for the protocol, e.g. ``{"fingerprint": …, "sampler": "ddim-16"}``.
        training_curve: (step, metric) pairs for the report.
        player: plays the episodes; takes the arguments of `rollout`.

    Raises:
        UserError: see `rollout`; also ``out`` holds a suite.
    """
    if isinstance(world, str):
        world = environment(world)
    if max_steps is not None:
        world = replace(world, max_steps=max_steps)
    if out is not None and (out / "settings").is_dir():
        raise UserError(f"{out} holds a suite; choose another out=….")
    seeds = range(first_seed, first_seed + episodes)
    began = time.perf_counter()
    played = player(policy, world, seeds, batch_size=batch_size, workers=workers, progress=progress)
    wall_s = time.perf_counter() - began
    protocol = Protocol(task_of(world, seeds), _policy_entry(policy, policy_info or {}))
    result = EvaluationResult(protocol, tuple(played), wall_s)
    if out is None:
        return result
    result.save(out)  # before anything is rendered: that may fail where there is no graphics driver
    result = EvaluationResult(protocol, _film(played, world, policy.spec, out, videos, progress), wall_s)
    result.save(out)
    write_report(result, out / "report.html", training_curve=training_curve)
    log.info("wrote %s", out / "report.html")
    return result


def evaluate_suite(
    policy: ChunkPolicy,
    environment_name: str,
    suite: Suite,
    out: Path,
    *,
    episodes: int = 50,
    first_seed: int = 100_000,
    videos: int = 8,
    policy_info: Mapping[str, Any] | None = None,
    **how: Any,
) -> SuiteResult:
    """Evaluate a policy in every setting of a suite, each on the same seeds.

    Before the first episode every setting is opened and checked. A setting whose folder is complete is not played
    again, so that an interrupted suite goes on where it was.

    Args:
        out: gets ``protocol.json``, ``settings/<name>/`` as `evaluate` writes them, ``summary.json``, ``report.html``.
        videos: episodes to film, spread evenly over the settings and rounded up, failures first.
        how: ``batch_size``, ``workers``, ``max_steps``, ``progress``, ``player``, see `evaluate`.

    Raises:
        UserError: a setting does not fit the environment or the policy; or ``out`` holds another evaluation.
    """
    seeds = range(first_seed, first_seed + episodes)
    info = dict(policy_info or {})
    worlds = [_setting_world(environment_name, setting, policy, how.get("max_steps")) for setting in suite.settings]
    policy_entry = _policy_entry(policy, info)
    tasks = [task_of(world, seeds) for world in worlds]
    protocol = suite_protocol(suite, tasks, policy_entry)
    _claim(out, protocol)
    results = []
    for i, (setting, world, task) in enumerate(zip(suite.settings, worlds, tasks, strict=True), 1):
        folder = setting_folder(out, setting.name)
        result = _complete_result(folder, Protocol(task, policy_entry))
        log.info("setting %d/%d: %s%s", i, len(worlds), setting.name, ", complete already" if result else "")
        if result is None:
            result = evaluate(
                policy,
                world,
                episodes=episodes,
                first_seed=first_seed,
                out=folder,
                videos=-(-videos // len(worlds)),
                policy_info=info,
                **how,
            )
        results.append(result)
    found = SuiteResult(protocol, suite, tuple(results))
    found.save(out)
    write_suite_report(found, out / "report.html")
    log.info("wrote %s", out / "report.html")
    return found


def _setting_world(name: str, setting: Setting, policy: ChunkPolicy, max_steps: int | None) -> Environment:
    try:
        world = environment(name, setting.options)
        world.check(policy.spec)
    except UserError as error:
        raise UserError(f"Setting '{setting.name}': {error}") from error
    return world if max_steps is None else replace(world, max_steps=max_steps)


def _claim(out: Path, protocol: Protocol) -> None:
    """Write the protocol before the first episode.

    Raises:
        UserError: the folder holds an evaluation by another protocol.
    """
    path = out / "protocol.json"
    if path.exists():
        there = Protocol.load(path)
        if there.hash != protocol.hash:
            lines = differences({**there.task, **there.policy}, {**protocol.task, **protocol.policy}, "it", "this one")
            raise UserError(f"{out} holds another evaluation; choose another out=…:\n  " + "\n  ".join(lines))
    out.mkdir(parents=True, exist_ok=True)
    protocol.save(path)


def _complete_result(folder: Path, protocol: Protocol) -> EvaluationResult | None:
    """The result in ``folder`` if the evaluation by ``protocol`` came to its end there; the report is written last."""
    if not (folder / "report.html").exists():
        return None
    result = EvaluationResult.load(folder)
    return result if result.protocol.hash == protocol.hash else None


def _policy_entry(policy: ChunkPolicy, info: Mapping[str, Any]) -> dict[str, Any]:
    spec, instruction = policy.spec, getattr(policy, INSTRUCTION, None)
    return {
        "observations": [key.key for key in spec.observations],
        "n_obs_steps": spec.n_obs_steps,
        "horizon": spec.horizon,
        "n_action_steps": spec.n_action_steps,
        "torch": torch.__version__,
        **({INSTRUCTION: instruction} if instruction else {}),
        **info,
    }


def _film(
    played: Sequence[EpisodeResult], world: Environment, spec: PolicySpec, out: Path, count: int, progress: bool
) -> tuple[EpisodeResult, ...]:
    """Write the videos; returns the episodes with the paths of theirs."""
    chosen = choose(played, count)
    if not chosen:
        return tuple(played)
    (out / "videos").mkdir(parents=True, exist_ok=True)
    paths = {e.seed: f"videos/seed_{e.seed}.mp4" for e in chosen}
    for episode in tqdm(chosen, desc="videos", unit="video", disable=not progress):
        write_video(out / paths[episode.seed], replay(world, spec, episode), world.fps)
    clips = [Clip(out / paths[e.seed], e.success) for e in chosen]
    write_grid(out / "videos" / "grid.mp4", clips, world.fps)
    return tuple(replace(e, video=paths.get(e.seed, "")) for e in played)
