"""Evaluate a multi-task policy: each task in its environment, with its instruction."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np

from robopolicy.configuration import dataclass_from
from robopolicy.errors import UserError
from robopolicy.evaluation.environments import Environment, environment
from robopolicy.evaluation.evaluate import evaluate
from robopolicy.evaluation.results import EvaluationResult, Metric, write_json
from robopolicy.evaluation.statistics import bootstrap_mean
from robopolicy.export.engine_policy import EnginePolicy
from robopolicy.policies.base import Policy
from robopolicy.steering.policy import SteeredPolicy

log = logging.getLogger(__name__)

NAME_LENGTH = 60  # characters of a task's folder
MEAN = "Mean over the tasks of their success rates."
CLUSTERED = "percentile bootstrap over seeds; all tasks of a seed are drawn together"


@dataclass(frozen=True)
class TaskPlace:
    """Where one task of a policy is judged.

    Attributes:
        environment: name of the environment.
        environment_options: its options, see `environments.environment`.
        instruction: what the policy is asked to do; empty: what the environment says.
    """

    environment: str
    environment_options: dict[str, Any] = field(default_factory=dict)
    instruction: str = ""

    def world(self) -> Environment:
        return environment(self.environment, self.environment_options)


@dataclass(frozen=True)
class TasksResult:
    """One result for each task, by the name of its folder, all on the same seeds."""

    results: Mapping[str, EvaluationResult]

    @cached_property
    def mean(self) -> Metric:
        """The success rate over all tasks."""
        successes = np.array(
            [[e.success for e in sorted(r.episodes, key=lambda e: e.seed)] for r in self.results.values()], float
        )
        interval = bootstrap_mean(successes.mean(axis=0))
        values = interval.value, interval.low, interval.high
        return Metric("mean_success_rate", "Mean success rate", MEAN, CLUSTERED, *values, successes.shape[1])

    def save(self, folder: Path) -> None:
        """Write ``summary.json``: the mean, and the success rate of each task."""
        rates = {
            name: {
                "environment": result.protocol.task["environment"],
                "instruction": result.protocol.policy.get("instruction", ""),
                "protocol_hash": result.protocol.hash,
                "success_rate": asdict(result.metric("success_rate")),
            }
            for name, result in self.results.items()
        }
        write_json(folder / "summary.json", {"mean_success_rate": asdict(self.mean), "tasks": rates})


def task_places(task: Mapping[str, Any]) -> list[TaskPlace]:
    """The places that the task entry of a bundle names.

    Args:
        task: ``environments`` lists them, each with the entries of `TaskPlace`; where it is missing, there is one, of
            ``environment`` and ``environment_options``.

    Returns:
        Nothing where the policy was trained without an environment.

    Raises:
        UserError: the entry is damaged.
    """
    alone = {key: task[key] for key in ("environment", "environment_options") if task.get(key)}
    entries = task.get("environments") or ([alone] if "environment" in alone else [])
    if not isinstance(entries, list):
        raise UserError(f"The bundle's task.environments is damaged: expected a list, found {entries!r}.")
    return [dataclass_from(TaskPlace, entry, f"task.environments[{i}]") for i, entry in enumerate(entries)]


def task_names(places: Sequence[TaskPlace]) -> list[str]:
    """A folder's name for each, of its instruction or else its environment: ``Open it!`` becomes ``open-it``."""
    names: list[str] = []
    for place in places:
        text = (place.instruction or place.environment.rpartition("/")[2]).lower()
        name = re.sub(r"[^a-z0-9]+", "-", text).strip("-")[:NAME_LENGTH] or "task"
        again = (f"{name}-{i}" for i in count(2))
        names.append(name if name not in names else next(other for other in again if other not in names))
    return names


def evaluate_tasks(
    policy: Policy | SteeredPolicy | EnginePolicy,
    places: Sequence[TaskPlace],
    out: Path,
    *,
    videos: int = 8,
    **how: Any,
) -> TasksResult:
    """Evaluate a policy on each of its tasks, on the same seeds.

    Before the first episode every environment and instruction is checked.

    Args:
        out: gets a folder for each task, as `evaluate` writes them, and ``summary.json``.
        videos: episodes to film, spread evenly over the tasks and rounded up, failures first.
        how: further arguments of `evaluate`.

    Raises:
        UserError: an environment or an instruction does not fit the policy, or ``out`` holds another kind of results.
    """
    if (out / "protocol.json").exists():
        raise UserError(f"{out} holds the evaluation of one task or of a suite; choose another out=….")
    worlds = [place.world() for place in places]
    for world, place in zip(worlds, places, strict=True):
        world.check(policy.spec)
        if place.instruction:
            policy.check_instruction(place.instruction)
    before = policy.instruction
    results: dict[str, EvaluationResult] = {}
    try:
        for name, world, place in zip(task_names(places), worlds, places, strict=True):
            log.info("task %d/%d: %s", len(results) + 1, len(places), name)
            policy.instruction = place.instruction or None
            results[name] = evaluate(policy, world, out=out / name, videos=-(-videos // len(places)), **how)
    finally:
        policy.instruction = before
    found = TasksResult(results)
    found.save(out)
    return found
