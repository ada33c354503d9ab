"""Comparison of two evaluations on the same episodes, of one environment or of a suite."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from robopolicy.errors import UserError
from robopolicy.evaluation.results import EvaluationResult, Protocol
from robopolicy.evaluation.statistics import Interval, PairedDifference, bootstrap_mean, paired_difference
from robopolicy.evaluation.suite_results import SuiteResult


@dataclass(frozen=True)
class Comparison:
    """Two results with the paired statistics of ``a`` minus ``b``."""

    a: EvaluationResult
    b: EvaluationResult
    difference: PairedDifference
    label_a: str = "A"
    label_b: str = "B"


@dataclass(frozen=True)
class SuiteComparison:
    """Two results of one suite; all differences are ``a`` minus ``b``, paired by seed."""

    a: SuiteResult
    b: SuiteResult
    label_a: str = "A"
    label_b: str = "B"

    @cached_property
    def aggregate(self) -> Interval:
        """Difference of the aggregates, bootstrap over seeds."""
        return bootstrap_mean(self.a.weights @ (self.a.successes - self.b.successes))

    @cached_property
    def settings(self) -> tuple[tuple[str, PairedDifference], ...]:
        """(name, difference) of each setting."""
        pairs = zip(self.a.settings, self.b.results, strict=True)
        return tuple((s.setting.name, _difference(s.result, b)) for s, b in pairs)


def compare(a: EvaluationResult, b: EvaluationResult, *, label_a: str = "A", label_b: str = "B") -> Comparison:
    """Compare two policies episode by episode.

    Raises:
        UserError: the results are not of the same task (environment, seeds, limits, definitions, simulator versions);
            one line for each difference.
    """
    _check_same_task(a.protocol, b.protocol, label_a, label_b)
    return Comparison(a, b, _difference(a, b), label_a, label_b)


def compare_suites(a: SuiteResult, b: SuiteResult, *, label_a: str = "A", label_b: str = "B") -> SuiteComparison:
    """Compare two policies in every setting of a suite, episode by episode.

    Raises:
        UserError: the suites, seeds or simulators differ; one line for each difference.
    """
    _check_same_task(a.protocol, b.protocol, label_a, label_b)
    return SuiteComparison(a, b, label_a, label_b)


def differences(a: Mapping[str, Any], b: Mapping[str, Any], label_a: str, label_b: str) -> list[str]:
    """One line for each entry that differs."""
    a, b = _entries(a), _entries(b)
    return [
        f"{name}: {label_a} has {_short(a.get(name))}, {label_b} has {_short(b.get(name))}."
        for name in sorted({*a, *b})
        if a.get(name) != b.get(name)
    ]


def _entries(values: Mapping[str, Any]) -> dict[str, Any]:
    """The entries of a protocol, with one entry for each setting of a suite."""
    settings = {
        f"setting {s['name']}": {k: v for k, v in s.items() if k not in ("name", "task_hash")}
        for s in values.get("settings", ())
    }
    return {k: v for k, v in values.items() if k != "settings"} | settings


def _check_same_task(a: Protocol, b: Protocol, label_a: str, label_b: str) -> None:
    if a.task_hash != b.task_hash:
        raise UserError(
            "Only evaluations of the same task on the same seeds can be compared; evaluate one of them again:\n  "
            + "\n  ".join(differences(a.task, b.task, label_a, label_b))
        )


def _difference(a: EvaluationResult, b: EvaluationResult) -> PairedDifference:
    rows_a, rows_b = (sorted(result.episodes, key=lambda e: e.seed) for result in (a, b))
    return paired_difference(
        [e.score for e in rows_a],
        [e.score for e in rows_b],
        [e.success for e in rows_a],
        [e.success for e in rows_b],
    )


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 80 else f"{text[:60]} … ({len(value)} entries)"
