"""Tables of success rates: one rate and its number of trials per policy, from CSV, JSON or results folders."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from robopolicy.errors import UserError, did_you_mean
from robopolicy.evaluation.compare import differences
from robopolicy.evaluation.results import EvaluationResult, Protocol
from robopolicy.evaluation.suite_results import SuiteResult, is_suite

COLUMNS = ("policy", "rate", "n", "successes")
FORMS = "a .csv file with the columns policy and rate (n, successes), a .json file, or NAME=RESULTS_FOLDER …"


@dataclass(frozen=True)
class SuccessRates:
    """Success rates of several policies on one task.

    Attributes:
        source: where the table comes from, for messages.
        policies: names, all different.
        rates: (policies,) float64 in [0, 1].
        trials: (policies,) int64; 0 where the number of trials is not known.
    """

    source: str
    policies: tuple[str, ...]
    rates: np.ndarray
    trials: np.ndarray

    def __post_init__(self) -> None:
        twice = sorted({name for name in self.policies if self.policies.count(name) > 1})
        if twice:
            raise UserError(f"{self.source}: '{twice[0]}' is there more than once; give each policy one row.")
        for name, rate, n in zip(self.policies, self.rates, self.trials, strict=True):
            if not 0 <= rate <= 1:
                percent = f" Is it in percent? Write {rate / 100:g}." if 1 < rate <= 100 else ""
                raise UserError(f"{self.source}: the rate of '{name}' is {rate:g}, wanted a share in [0, 1].{percent}")
            if n < 0:
                raise UserError(f"{self.source}: '{name}' has n={n}; wanted the number of trials, at least 1.")

    @property
    def successes(self) -> np.ndarray:
        """(policies,) int64 successful trials, ``rate * n`` rounded: published rates are rounded themselves."""
        return np.rint(self.rates * self.trials).astype(np.int64)

    @property
    def counted(self) -> bool:
        """The number of trials of every policy is known."""
        return bool((self.trials > 0).all())

    def of(self, policies: Sequence[str]) -> SuccessRates:
        """The same table with these rows in this order."""
        rows = [self.policies.index(name) for name in policies]
        return SuccessRates(self.source, tuple(policies), self.rates[rows], self.trials[rows])


def paired(*, real: SuccessRates, simulated: SuccessRates) -> tuple[SuccessRates, SuccessRates]:
    """Both tables with their rows in the order of the real one.

    Raises:
        UserError: a policy is in one table only; names every such policy and the table that lacks it.
    """
    problems = [
        f"{lacking.source} lacks '{name}', which {other.source} has.{did_you_mean(name, lacking.policies)}"
        for lacking, other in ((simulated, real), (real, simulated))
        for name in other.policies
        if name not in lacking.policies
    ]
    if problems:
        raise UserError("Both tables must hold the same policies:\n  " + "\n  ".join(problems))
    return real, simulated.of(real.policies)


def load_rates(sources: Sequence[str]) -> SuccessRates:
    """Read a table as the command line names it: one file, or one or more ``NAME=RESULTS_FOLDER``.

    Raises:
        UserError: neither of both, or a table that cannot be used; names file, row and key.
    """
    pairs = [word.partition("=") for word in sources]
    if pairs and all(equals for _, equals, _ in pairs):
        return rates_of_results([(name, Path(folder)) for name, _, folder in pairs])
    if len(sources) != 1:
        raise UserError(f"Cannot read success rates from {' '.join(sources)!r}; wanted {FORMS}.")
    return read_rates(Path(sources[0]))


def read_rates(path: Path) -> SuccessRates:
    """Read a table from a file.

    CSV has a header line with ``policy`` and ``rate``, optionally ``n``; or ``successes`` and ``n`` instead of
    ``rate``. Other columns are left alone. JSON is ``{policy: rate}`` or ``{policy: {"rate": …, "n": …}}``.

    Raises:
        UserError: the file is missing or is no such table, a number is impossible, or a policy is there twice.
    """
    readers = {".csv": _csv_rows, ".json": _json_rows}
    if path.suffix not in readers:
        raise UserError(f"{path}: cannot read success rates from it; wanted {FORMS}.")
    try:
        rows = readers[path.suffix](path)
    except FileNotFoundError:
        raise UserError(f"{path} is not there; wanted a table of success rates.") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}.") from None
    except (UnicodeDecodeError, csv.Error, json.JSONDecodeError) as error:
        raise UserError(f"{path} is damaged: {error}.") from None
    return _table(str(path), rows)


def rates_of_results(folders: Sequence[tuple[str, Path]]) -> SuccessRates:
    """Success rates of evaluations that ``robopolicy eval`` wrote, each of one environment or of one suite.

    Of a suite the rate is its aggregate. Its settings share their seeds, so they are no independent trials: n is the
    number of seeds, which cannot make an interval too narrow.

    Args:
        folders: name of the policy and results folder.

    Raises:
        UserError: a folder is missing or damaged, or the policies were evaluated on different tasks.
    """
    protocols = [Protocol.load(folder / "protocol.json") for _, folder in folders]
    for (_, folder), protocol in zip(folders[1:], protocols[1:], strict=True):
        if _task(protocol) != _task(protocols[0]):
            first = str(folders[0][1])
            raise UserError(
                "The policies were not evaluated on one task; evaluate them in the same way:\n  "
                + "\n  ".join(differences(_task(protocols[0]), _task(protocol), first, str(folder)))
            )
    rates = [_rate(folder, protocol) for (_, folder), protocol in zip(folders, protocols, strict=True)]
    return SuccessRates(
        source="results of " + ", ".join(str(folder) for _, folder in folders),
        policies=tuple(name for name, _ in folders),
        rates=np.array([rate for rate, _ in rates]),
        trials=np.array([n for _, n in rates]),
    )


def _task(protocol: Protocol) -> dict[str, Any]:
    """What must be equal for success rates to belong in one table: everything but seeds and versions."""
    task = {key: value for key, value in protocol.task.items() if key not in ("seeds", "versions")}
    if "settings" in task:
        task["settings"] = [{k: v for k, v in s.items() if k != "task_hash"} for s in task["settings"]]
    return task


def _rate(folder: Path, protocol: Protocol) -> tuple[float, int]:
    """Success rate and number of independent trials."""
    if is_suite(protocol):
        suite = SuiteResult.load(folder)
        return suite.aggregate.value, suite.successes.shape[1]
    metric = EvaluationResult.load(folder).metric("success_rate")
    return metric.value, metric.n


def _csv_rows(path: Path) -> list[tuple[str, Mapping[str, Any]]]:
    with path.open(newline="", encoding="utf-8-sig") as file:  # spreadsheets write a byte order mark
        reader = csv.DictReader(file, skipinitialspace=True)
        header = [name.strip() for name in reader.fieldnames or ()]
        reader.fieldnames = header
        if "policy" not in header or not {"rate", "successes"} & set(header):
            missing = "policy" if "policy" not in header else "rate"
            hint = did_you_mean(missing, header) if header else ""
            raise UserError(f"{path}: the header lacks '{missing}'; found {header}, wanted e.g. policy,rate,n.{hint}")
        rows = [(number, row) for number, row in enumerate(reader, 2) if any(row.values())]
    for number, row in rows:
        if not (row["policy"] or "").strip():
            raise UserError(f"{path} line {number}: the policy has no name.")
    return [(row["policy"].strip(), {k: row.get(k) for k in COLUMNS[1:]}) for _, row in rows]


def _json_rows(path: Path) -> list[tuple[str, Mapping[str, Any]]]:
    class Pairs(list):
        """An object as its pairs: a dictionary would keep only the last of two equal names."""

    content = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=Pairs)
    if not isinstance(content, Pairs):
        raise UserError(f'{path}: wanted {{"policy": rate, …}}, found {type(content).__name__}.')
    return [(name, dict(value) if isinstance(value, Pairs) else {"rate": value}) for name, value in content]


def _table(source: str, rows: Sequence[tuple[str, Mapping[str, Any]]]) -> SuccessRates:
    if not rows:
        raise UserError(f"{source} holds no policy.")
    numbers = [_rate_and_trials(f"{source}: '{name}'", entry) for name, entry in rows]
    return SuccessRates(
        source=source,
        policies=tuple(name for name, _ in rows),
        rates=np.array([rate for rate, _ in numbers], dtype=np.float64),
        trials=np.array([n for _, n in numbers], dtype=np.int64),
    )


def _rate_and_trials(where: str, entry: Mapping[str, Any]) -> tuple[float, int]:
    rate, n, successes = (_number(where, key, entry.get(key)) for key in ("rate", "n", "successes"))
    if n is not None and (n < 1 or n != int(n)):
        raise UserError(f"{where}: n is {n:g}, wanted a whole number of trials, at least 1.")
    if successes is None and rate is not None:
        return rate, int(n or 0)
    if successes is None or n is None:
        raise UserError(f"{where}: wanted a rate, or successes and n; found {dict(entry)}.")
    if not 0 <= successes <= n or successes != int(successes):
        raise UserError(f"{where}: {successes:g} successes of {n:g} trials are impossible.")
    if rate is not None and abs(rate - successes / n) > 0.005:
        raise UserError(f"{where}: rate {rate:g} does not fit {successes:g} of {n:g}; give one of both.")
    return successes / n, int(n)


def _number(where: str, key: str, value: Any) -> float | None:
    if value is None or value == "":
        return None
    try:
        number = float(value)
    except (TypeError, ValueError):
        raise UserError(f"{where}: {key} is {value!r}, wanted a number.") from None
    if not math.isfinite(number):
        raise UserError(f"{where}: {key} is {value!r}, wanted a number.")
    return number
