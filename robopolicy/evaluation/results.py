"""What an evaluation is and found: protocol, episodes, numbers with intervals; saved as JSON that people can read.

A results folder holds ``protocol.json`` (what was done, with hashes), ``episodes.jsonl`` (one row per episode) and
``summary.json`` (every number beside its definition, its n and its 95 % interval; derived from the other two).
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from robopolicy.errors import UserError
from robopolicy.evaluation.environments import Environment, described_options
from robopolicy.evaluation.episode import EpisodeResult
from robopolicy.evaluation.statistics import Interval, bootstrap_mean, wilson
from robopolicy.spec import checked_fields

FORMAT = 1


@dataclass(frozen=True)
class Protocol:
    """How an evaluation was done.

    Attributes:
        task: all that must be equal for two results to be comparable: environment, seeds, definitions, limits and
            versions of the simulator.
        policy: all that may differ: bundle fingerprint, sampler, chunk lengths, torch.
    """

    task: Mapping[str, Any]
    policy: Mapping[str, Any]

    @property
    def task_hash(self) -> str:
        return _hash(self.task)

    @property
    def hash(self) -> str:
        return _hash({"task": self.task, "policy": self.policy})

    def save(self, path: Path) -> None:
        """Write it with its hashes as JSON."""
        hashes = {"task_hash": self.task_hash, "hash": self.hash}
        write_json(path, {"format": FORMAT, **asdict(self), **hashes})

    @classmethod
    def load(cls, path: Path) -> Protocol:
        """Read what `save` wrote.

        Raises:
            UserError: the file is missing, damaged, of another format, or was changed after the evaluation.
        """
        values = read_text(path, json.loads)
        if not isinstance(values, dict) or values.get("format") != FORMAT:
            found = values.get("format") if isinstance(values, dict) else type(values).__name__
            raise UserError(f"{path}: found format {found}, wanted {FORMAT}; evaluate again with this version.")
        try:
            protocol = cls(values["task"], values["policy"])
            intact = (protocol.task_hash, protocol.hash) == (values["task_hash"], values["hash"])
        except KeyError as error:
            raise UserError(f"{path}: the entry {error} is missing; evaluate again.") from None
        if not intact:
            raise UserError(f"{path}: its content does not fit its hash: it was changed after the evaluation.")
        return protocol


def task_of(environment: Environment, seeds: Sequence[int]) -> dict[str, Any]:
    """The comparable half of the protocol; files among the environment's options enter with the hash of their bytes."""
    options = {"options": described_options(environment.options)} if environment.options else {}
    return {
        "environment": environment.name,
        **options,
        "max_steps": environment.max_steps,
        "fps": environment.fps,
        "score": environment.score,
        "success": environment.success,
        "reset": environment.reset,
        "seeds": sorted(seeds),
        "versions": environment.versions(),
    }


@dataclass(frozen=True)
class Metric:
    """One number as it is reported; ``low`` and ``high`` are the ends of its 95 % interval."""

    name: str
    label: str
    definition: str
    interval: str
    value: float
    low: float
    high: float
    n: int


@dataclass(frozen=True)
class EvaluationResult:
    """Protocol and episodes of one evaluation; ``wall_s`` is the duration of the rollouts."""

    protocol: Protocol
    episodes: tuple[EpisodeResult, ...]
    wall_s: float

    @cached_property
    def metrics(self) -> tuple[Metric, ...]:
        """Every reported number, the headline first."""
        episodes, task = self.episodes, self.protocol.task
        solved = [e.steps for e in episodes if e.success]

        def mean(name: str, label: str, definition: str, values: Sequence[float]) -> Metric:
            return _metric(name, label, definition, "percentile bootstrap", bootstrap_mean(values), len(values))

        return (
            mean("mean_score", "Mean score", f"Mean over episodes of: {task['score']}.", [e.score for e in episodes]),
            _rate(
                "success_rate",
                "Success rate",
                f"Share of episodes in which {task['success']}.",
                [e.success for e in episodes],
            ),
            mean("mean_steps", "Mean steps", "Mean control steps per episode.", [e.steps for e in episodes]),
            mean("steps_to_success", "Steps to success", "Mean control steps of the successful episodes.", solved),
            mean(
                "mean_return",
                "Mean return",
                "Mean over episodes of the sum of rewards.",
                [e.episode_return for e in episodes],
            ),
        )

    @cached_property
    def stages(self) -> tuple[Metric, ...]:
        """Share of the episodes that reached each stage of the task, in the environment's order; may be empty."""
        names = dict.fromkeys(name for e in self.episodes for name in e.stages)
        return tuple(
            _rate(name, name.replace("_", " "), f"Share of episodes that reached the stage '{name}'.", reached)
            for name in names
            if (reached := [e.stages.get(name, False) for e in self.episodes])
        )

    @cached_property
    def instructions(self) -> tuple[Metric, ...]:
        """Success rate by instruction, where the episodes had several; else empty."""
        groups: dict[str, list[bool]] = {}
        for episode in self.episodes:
            groups.setdefault(episode.instruction, []).append(episode.success)
        if len(groups) < 2:
            return ()
        return tuple(
            _rate(text, text or "no instruction", "Success rate of its episodes.", groups[text])
            for text in sorted(groups)
        )

    def metric(self, name: str) -> Metric:
        """The metric called ``name``, e.g. ``mean_score``.

        Raises:
            KeyError: there is none.
        """
        return {metric.name: metric for metric in self.metrics}[name]

    @property
    def throughput(self) -> dict[str, float]:
        """Simulated control steps and episodes per second of wall time, policy included."""
        steps = sum(e.steps for e in self.episodes)
        return {
            "wall_s": self.wall_s,
            "steps": steps,
            "steps_per_s": steps / self.wall_s,
            "episodes_per_s": len(self.episodes) / self.wall_s,
        }

    def save(self, folder: Path) -> None:
        """Write ``protocol.json``, ``episodes.jsonl`` and ``summary.json`` into ``folder``, which is made."""
        folder.mkdir(parents=True, exist_ok=True)
        self.protocol.save(folder / "protocol.json")
        rows = [{f.name: getattr(e, f.name) for f in fields(_Row)} for e in self.episodes]
        (folder / "episodes.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        summary = {
            "protocol_hash": self.protocol.hash,
            "metrics": {m.name: asdict(m) for m in self.metrics},
            "stages": {m.name: asdict(m) for m in self.stages},
            "instructions": {m.name: asdict(m) for m in self.instructions},
            "throughput": self.throughput,
        }
        write_json(folder / "summary.json", summary)

    @classmethod
    def load(cls, folder: Path) -> EvaluationResult:
        """Read what `save` wrote; the actions of the episodes are not stored and come back empty.

        Raises:
            UserError: a file is missing or damaged, or the protocol was changed after the evaluation.
        """
        protocol = Protocol.load(folder / "protocol.json")
        episodes = _load_episodes(folder / "episodes.jsonl")
        if sorted(e.seed for e in episodes) != protocol.task.get("seeds"):
            raise UserError(f"{folder / 'episodes.jsonl'}: its seeds are not those of protocol.json; evaluate again.")
        summary = read_text(folder / "summary.json", json.loads)
        try:
            wall_s = float(summary["throughput"]["wall_s"])
        except (KeyError, TypeError, ValueError):
            raise UserError(f"{folder / 'summary.json'}: throughput.wall_s is missing; evaluate again.") from None
        return cls(protocol, episodes, wall_s)


def _metric(name: str, label: str, definition: str, method: str, interval: Interval, n: int) -> Metric:
    return Metric(name, label, definition, method, interval.value, interval.low, interval.high, n)


def _rate(name: str, label: str, definition: str, successes: Sequence[bool]) -> Metric:
    interval = wilson(sum(successes), len(successes))
    return _metric(name, label, definition, "Wilson score", interval, len(successes))


def _hash(values: Any) -> str:
    text = json.dumps(values, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def write_json(path: Path, values: Any) -> None:
    """Write indented JSON; numbers that are not defined become null, because JSON has no NaN."""

    def plain(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {k: plain(v) for k, v in value.items()}
        if isinstance(value, list | tuple):
            return [plain(v) for v in value]
        return None if isinstance(value, float) and math.isnan(value) else value

    path.write_text(json.dumps(plain(values), indent=2, allow_nan=False) + "\n")


def read_text(path: Path, parse: Callable[[str], Any]) -> Any:
    """Read and parse a file of a results folder.

    Raises:
        UserError: it is missing, or ``parse`` found it damaged.
    """
    try:
        return parse(path.read_text())
    except FileNotFoundError:
        raise UserError(f"{path} is not there; wanted the folder that an evaluation wrote.") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is damaged ({error}); evaluate again.") from None


def _load_episodes(path: Path) -> tuple[EpisodeResult, ...]:
    rows = read_text(path, lambda text: [json.loads(line) for line in text.splitlines()])
    nothing = np.zeros((0, 0), np.float32)
    episodes = tuple(
        EpisodeResult(actions=nothing, **checked_fields(_Row, row, f"{path} line {i}")) for i, row in enumerate(rows, 1)
    )
    for episode in episodes:
        # A report holds the bytes of its videos: a folder from elsewhere must not make it hold other files.
        if episode.video and not (path.parent / episode.video).resolve().is_relative_to(path.parent.resolve()):
            raise UserError(f"{path}: the video '{episode.video}' of seed {episode.seed} lies outside the folder.")
    return episodes


@dataclass(frozen=True)
class _Row:
    """The fields of one line of ``episodes.jsonl``."""

    seed: int
    score: float
    success: bool
    steps: int
    episode_return: float
    wall_s: float
    video: str = ""
    instruction: str = ""
    stages: dict[str, bool] = field(default_factory=dict)
    variation: dict[str, Any] = field(default_factory=dict)
