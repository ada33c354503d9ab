"""One self-contained HTML page for the fidelity of a simulation, and the same numbers as JSON."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from robopolicy.errors import UserError
from robopolicy.evaluation.fidelity import Fidelity
from robopolicy.evaluation.page import templates
from robopolicy.evaluation.rates import SuccessRates
from robopolicy.evaluation.results import write_json
from robopolicy.evaluation.statistics import Interval, wilson

SIDE = 420  # pixels that rates from 0 to 1 take in the plot
_TEXT = (6.6, 15)  # pixels that a character takes


@dataclass(frozen=True)
class Mark:
    """One policy in the plot, in pixels; y points down.

    Attributes:
        policy: its name.
        x, y: simulated and real rate.
        across, along: ends of the error bars, (left, right) and (top, bottom); None where n is not known.
        label: left end and base line of the name.
    """

    policy: str
    x: float
    y: float
    across: tuple[float, float] | None
    along: tuple[float, float] | None
    label: tuple[float, float]

    @property
    def far(self) -> bool:
        """The name does not stand right beside the point and needs a line to it."""
        return abs(self.label[1] - self.y) > 2 * _TEXT[1]


def write_fidelity(found: Fidelity, path: Path) -> None:
    """Write the page (``.html``) or the numbers (``.json``).

    Raises:
        UserError: another ending.
    """
    writers = {".html": _write_page, ".json": _write_numbers}
    if path.suffix not in writers:
        raise UserError(f"{path}: cannot write this kind of file; name it .html or .json.")
    path.parent.mkdir(parents=True, exist_ok=True)
    writers[path.suffix](path, found)


def rate_interval(table: SuccessRates, row: int) -> Interval:
    """Rate of one policy with its Wilson interval; NaN ends where the number of trials is not known."""
    interval = wilson(int(table.successes[row]), int(table.trials[row]))
    return Interval(float(table.rates[row]), interval.low, interval.high)


def marks(found: Fidelity) -> list[Mark]:
    """Where the policies, their error bars and their names lie in a plot of real against simulated rates."""
    rows = range(len(found.real.policies))
    simulated, real = ([rate_interval(table, row) for row in rows] for table in (found.simulated, found.real))
    points = [(SIDE * s.value, SIDE * (1 - r.value)) for s, r in zip(simulated, real, strict=True)]
    labels = _labels(points, [len(name) for name in found.real.policies])
    return [
        Mark(
            policy=name,
            x=points[row][0],
            y=points[row][1],
            across=_ends(SIDE * simulated[row].low, SIDE * simulated[row].high),
            along=_ends(SIDE * (1 - real[row].high), SIDE * (1 - real[row].low)),
            label=labels[row],
        )
        for row, name in enumerate(found.real.policies)
    ]


def _ends(first: float, last: float) -> tuple[float, float] | None:
    return None if math.isnan(first) else (first, last)


def _labels(points: Sequence[tuple[float, float]], lengths: Sequence[int]) -> list[tuple[float, float]]:
    """Place each name beside its point where it covers no other name and no point; nearest free place first."""
    width, height = _TEXT
    boxes: list[tuple[float, float, float, float]] = []
    for (x, y), length in zip(points, lengths, strict=True):
        size = width * length
        places = [
            (left, y + shift)
            for rows in range(8)
            for left in (x + 9, x - 9 - size)
            for shift in ((4.0, -9.0, 18.0) if rows == 0 else (-9.0 - height * rows, 18.0 + height * rows))
        ]
        candidates = [(left, base - height + 3, left + size, base + 3) for left, base in places]
        boxes.append(min(candidates, key=lambda box: _cost(box, boxes, points)))
    return [(left, bottom - 3) for left, _, _, bottom in boxes]


def _cost(
    box: tuple[float, float, float, float],
    boxes: Sequence[tuple[float, float, float, float]],
    points: Sequence[tuple[float, float]],
) -> int:
    """How much a name at this place covers or leaves the plot; `min` keeps the first of equally good places."""
    left, top, right, bottom = box
    names = sum(left < r and ll < right and top < b and t < bottom for ll, t, r, b in boxes)
    dots = sum(left - 5 < x < right + 5 and top - 3 < y < bottom + 3 for x, y in points)
    outside = left < -30 or right > SIDE + 60 or top < -18 or bottom > SIDE - 2
    return 3 * names + 2 * dots + 4 * outside


def _write_page(path: Path, found: Fidelity) -> None:
    rows = range(len(found.real.policies))
    page = (
        templates()
        .get_template("fidelity.html")
        .render(
            title="Fidelity of the simulation",
            found=found,
            side=SIDE,
            marks=marks(found),
            ticks=[0, 0.2, 0.4, 0.6, 0.8, 1.0],
            rows=[(rate_interval(found.real, i), rate_interval(found.simulated, i)) for i in rows],
        )
    )
    path.write_text(page, encoding="utf-8")


def _write_numbers(path: Path, found: Fidelity) -> None:
    content = {
        "real": _plain_table(found.real),
        "simulated": _plain_table(found.simulated),
        "agreement": {a.name: asdict(a) for a in found.agreements},
        "kruskal_wallis_p": dict(zip(found.real.policies, found.kruskal.tolist(), strict=True)),
        "wrong_pairs": [asdict(pair) for pair in found.wrong_pairs],
    }
    write_json(path, content)


def _plain_table(table: SuccessRates) -> dict[str, Any]:
    rows = zip(table.policies, table.rates.tolist(), table.trials.tolist(), strict=True)
    return {"source": table.source, "policies": {name: {"rate": rate, "n": n or None} for name, rate, n in rows}}
