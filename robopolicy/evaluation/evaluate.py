"""Evaluate a policy: rollouts, numbers, videos and report in one call."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from robopolicy.evaluation.environments import Environment, environment
from robopolicy.evaluation.episode import EpisodeResult
from robopolicy.evaluation.report import write_report
from robopolicy.evaluation.results import EvaluationResult, Protocol, task_of
from robopolicy.evaluation.rollout import ChunkPolicy, rollout
from robopolicy.evaluation.video import Clip, choose, replay, write_grid, write_video
from robopolicy.spec import PolicySpec

log = logging.getLogger(__name__)


def evaluate(
    policy: ChunkPolicy,
    environment_name: str,
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
) -> EvaluationResult:
    """Roll a policy out and, when ``out`` is given, write everything about it into that folder.

    The folder then holds ``protocol.json``, ``episodes.jsonl``, ``summary.json`` (see `results`), ``videos/`` with one
    mp4 per chosen episode and ``grid.mp4``, and ``report.html``.

    Args:
        environment_name: see `environments.environment`.
        episodes: number of episodes, seeds ``first_seed``, ``first_seed + 1``, …
        videos: episodes to film, failures first; 0 for none.
        batch_size, workers: see `rollout`.
        max_steps: control steps per episode; None for the environment's own limit.
        policy_info: plain values for the protocol, e.g. ``{"fingerprint": …, "sampler": "ddim-16"}``.
        training_curve: (step, metric) pairs for the report.

    Raises:
        UserError: see `rollout`.
    """
    world = environment(environment_name)
    if max_steps is not None:
        world = replace(world, max_steps=max_steps)
    seeds = range(first_seed, first_seed + episodes)
    began = time.perf_counter()
    played = rollout(policy, world, seeds, batch_size=batch_size, workers=workers, progress=progress)
    wall_s = time.perf_counter() - began
    protocol = Protocol(task_of(world, seeds), _policy_entry(policy.spec, policy_info or {}))
    result = EvaluationResult(protocol, tuple(played), wall_s)
    if out is None:
        return result
    result.save(out)  # before anything is rendered: that may fail where there is no graphics driver
    result = EvaluationResult(protocol, _film(played, world, policy.spec, out, videos, progress), wall_s)
    result.save(out)
    write_report(result, out / "report.html", training_curve=training_curve)
    log.info("wrote %s", out / "report.html")
    return result


def _policy_entry(spec: PolicySpec, info: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "observations": [key.key for key in spec.observations],
        "n_obs_steps": spec.n_obs_steps,
        "horizon": spec.horizon,
        "n_action_steps": spec.n_action_steps,
        "torch": torch.__version__,
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
