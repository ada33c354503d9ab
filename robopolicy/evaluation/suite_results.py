"""What a suite found: a result for each setting, each factor's effect, and the aggregate over settings.

A suite's folder holds ``protocol.json`` (what was done, with hashes), ``settings/<name>/`` (one results folder for each
setting, see `results`) and ``summary.json`` (derived from the others).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from robopolicy.errors import UserError
from robopolicy.evaluation.results import EvaluationResult, Metric, Protocol, write_json
from robopolicy.evaluation.statistics import Interval, bootstrap_mean
from robopolicy.evaluation.suite import BASE, Setting, Suite

CLUSTERED = "percentile bootstrap over seeds; all settings of a seed are drawn together"
AGGREGATE = (
    "Weighted mean of the success rates of the settings that count; with equal weights the plain mean, as in SIMPLER "
    "(Li et al., CoRL 2024)."
)


@dataclass(frozen=True)
class SettingResult:
    """A setting, what it found, and how much the success rate dropped.

    Attributes:
        drop: success rate of the base setting minus this one's, paired by seed.
    """

    setting: Setting
    result: EvaluationResult
    drop: Interval

    @property
    def rate(self) -> Metric:
        return self.result.metric("success_rate")


@dataclass(frozen=True)
class FactorResult:
    """The settings of one factor together.

    Attributes:
        rate: mean of their success rates.
        drop: success rate of the base setting minus ``rate``, paired by seed.
        curve: (level, success rate) of its numeric levels, sorted, that of the base setting included where its level is
            known; empty with less than two.
    """

    factor: str
    settings: tuple[SettingResult, ...]
    rate: Interval
    drop: Interval
    curve: tuple[tuple[float, Metric], ...]
    in_aggregate: bool


@dataclass(frozen=True)
class SuiteResult:
    """Protocol and results of a suite; ``results`` has one entry per setting, in the suite's order."""

    protocol: Protocol
    suite: Suite
    results: tuple[EvaluationResult, ...]

    @cached_property
    def successes(self) -> np.ndarray:
        """(settings, seeds) 1.0 where the episode was a success; seeds ascend."""
        return np.array([[e.success for e in sorted(r.episodes, key=lambda e: e.seed)] for r in self.results], float)

    @cached_property
    def weights(self) -> np.ndarray:
        """(settings,) weights in the aggregate; they sum to 1."""
        weights = np.array([s.weight if s.in_aggregate else 0.0 for s in self.suite.settings])
        return weights / weights.sum()

    @cached_property
    def aggregate(self) -> Metric:
        """The suite's headline."""
        interval = bootstrap_mean(self.weights @ self.successes)
        values = interval.value, interval.low, interval.high
        n_seeds = self.successes.shape[1]  # the settings share them, so they are no further evidence
        return Metric("aggregate", "Aggregate success rate", AGGREGATE, CLUSTERED, *values, n_seeds)

    @cached_property
    def settings(self) -> tuple[SettingResult, ...]:
        return tuple(
            SettingResult(setting, result, self._drop(self.successes[i]))
            for i, (setting, result) in enumerate(zip(self.suite.settings, self.results, strict=True))
        )

    @property
    def base(self) -> SettingResult:
        return next(s for s in self.settings if s.setting.factor == BASE)

    @cached_property
    def factors(self) -> tuple[FactorResult, ...]:
        """Every factor but the base, in the suite's order."""
        names = [s.factor for s in self.suite.settings]
        return tuple(
            self._factor(name, [i for i, n in enumerate(names) if n == name])
            for name in dict.fromkeys(names)
            if name != BASE
        )

    def _factor(self, factor: str, rows: Sequence[int]) -> FactorResult:
        members = tuple(self.settings[i] for i in rows)
        mean = self.successes[rows].mean(axis=0)
        levels = [s.setting.level for s in members]
        numeric = all(isinstance(level, int | float) and not isinstance(level, bool) for level in levels)
        curve = {s.setting.level: s.rate for s in members} if numeric else {}
        if curve and factor in self.suite.at_base:
            curve.setdefault(self.suite.at_base[factor], self.base.rate)
        return FactorResult(
            factor,
            members,
            bootstrap_mean(mean),
            self._drop(mean),
            tuple(sorted(curve.items())) if len(curve) > 1 else (),
            any(s.setting.in_aggregate for s in members),
        )

    def _drop(self, successes: np.ndarray) -> Interval:
        """The base setting's success rate minus that of ``successes`` (seeds,)."""
        return bootstrap_mean(self.successes[self.suite.settings.index(self.suite.base)] - successes)

    @property
    def throughput(self) -> dict[str, float]:
        """Sums over the settings, see `EvaluationResult.throughput`."""
        wall_s = sum(r.wall_s for r in self.results)
        steps, episodes = sum(r.throughput["steps"] for r in self.results), self.successes.size
        return {"wall_s": wall_s, "steps": steps, "steps_per_s": steps / wall_s, "episodes_per_s": episodes / wall_s}

    def save(self, folder: Path) -> None:
        """Write ``protocol.json`` and ``summary.json``; the settings' folders are written by `evaluate`."""
        self.protocol.save(folder / "protocol.json")
        summary = {
            "protocol_hash": self.protocol.hash,
            "aggregate": asdict(self.aggregate),
            "settings": [
                {
                    "name": s.setting.name,
                    "factor": s.setting.factor,
                    "level": s.setting.level,
                    "in_aggregate": s.setting.in_aggregate,
                    "success_rate": asdict(s.rate),
                    "mean_score": asdict(s.result.metric("mean_score")),
                    "drop": asdict(s.drop),
                    "stages": {m.name: asdict(m) for m in s.result.stages},
                }
                for s in self.settings
            ],
            "factors": [
                {
                    "factor": f.factor,
                    "settings": [s.setting.name for s in f.settings],
                    "in_aggregate": f.in_aggregate,
                    "success_rate": asdict(f.rate),
                    "drop": asdict(f.drop),
                    "curve": [{"level": x, "value": m.value, "low": m.low, "high": m.high} for x, m in f.curve],
                }
                for f in self.factors
            ],
            "intervals": {
                "settings": "95 %, Wilson score; scores: percentile bootstrap",
                "factors, drops, aggregate": f"95 %, {CLUSTERED}",
            },
            "throughput": self.throughput,
        }
        write_json(folder / "summary.json", summary)

    @classmethod
    def load(cls, folder: Path) -> SuiteResult:
        """Read a suite's folder.

        Raises:
            UserError: a file is missing or damaged, or a setting's folder is not of this suite.
        """
        protocol = Protocol.load(folder / "protocol.json")
        if not is_suite(protocol):
            raise UserError(f"{folder} holds the evaluation of one setting, wanted a suite's folder.")
        task = protocol.task
        settings = tuple(
            Setting(s["name"], s["factor"], s["level"], s["options"], s["weight"], s["in_aggregate"])
            for s in task["settings"]
        )
        results = []
        for setting, entry in zip(settings, task["settings"], strict=True):
            path = setting_folder(folder, setting.name)
            result = EvaluationResult.load(path)
            if result.protocol.task_hash != entry["task_hash"] or result.protocol.policy != protocol.policy:
                raise UserError(f"{path} is not the setting '{setting.name}' of this suite; evaluate the suite again.")
            results.append(result)
        return cls(protocol, Suite(task["suite"], task["description"], settings, task["at_base"]), tuple(results))


def setting_folder(folder: Path, name: str) -> Path:
    """Where a suite's folder holds the results of a setting."""
    return folder / "settings" / name


def is_suite(protocol: Protocol) -> bool:
    return "suite" in protocol.task


def suite_protocol(suite: Suite, tasks: Sequence[Mapping[str, Any]], policy: Mapping[str, Any]) -> Protocol:
    """The frozen protocol of a suite.

    Args:
        tasks: `results.task_of` for each setting, in the suite's order.
        policy: the part of the protocol that may differ between results that are compared.
    """
    base = dict(tasks[suite.settings.index(suite.base)])
    base.pop("options", None)
    return Protocol(
        {
            "suite": suite.name,
            "description": suite.description,
            **base,
            "aggregate": AGGREGATE,
            "at_base": dict(suite.at_base),
            "settings": [
                {
                    "name": setting.name,
                    "factor": setting.factor,
                    "level": setting.level,
                    "weight": setting.weight,
                    "in_aggregate": setting.in_aggregate,
                    "options": task.get("options", {}),
                    "task_hash": Protocol(task, {}).task_hash,
                }
                for setting, task in zip(suite.settings, tasks, strict=True)
            ],
        },
        policy,
    )
