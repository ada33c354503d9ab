"""Comparison of two evaluations on the same episodes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from robopolicy.errors import UserError
from robopolicy.evaluation.results import EvaluationResult
from robopolicy.evaluation.statistics import PairedDifference, paired_difference


@dataclass(frozen=True)
class Comparison:
    """Two results with the paired statistics of ``a`` minus ``b``."""

    a: EvaluationResult
    b: EvaluationResult
    difference: PairedDifference
    label_a: str = "A"
    label_b: str = "B"


def compare(a: EvaluationResult, b: EvaluationResult, *, label_a: str = "A", label_b: str = "B") -> Comparison:
    """Compare two policies episode by episode.

    Raises:
        UserError: the results are not of the same task (environment, seeds, limits, definitions, simulator versions);
            one line for each difference.
    """
    if a.protocol.task_hash != b.protocol.task_hash:
        task_a, task_b = a.protocol.task, b.protocol.task
        lines = [
            f"{name}: {label_a} has {_short(task_a.get(name))}, {label_b} has {_short(task_b.get(name))}."
            for name in sorted({*task_a, *task_b})
            if task_a.get(name) != task_b.get(name)
        ]
        raise UserError(
            "Only evaluations of the same task on the same seeds can be compared; evaluate one of them again:\n  "
            + "\n  ".join(lines)
        )
    rows_a, rows_b = (sorted(result.episodes, key=lambda e: e.seed) for result in (a, b))
    difference = paired_difference(
        [e.score for e in rows_a],
        [e.score for e in rows_b],
        [e.success for e in rows_a],
        [e.success for e in rows_b],
    )
    return Comparison(a, b, difference, label_a, label_b)


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 80 else f"{text[:60]} … ({len(value)} entries)"
