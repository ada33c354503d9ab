"""Where a run's numbers go: metrics.jsonl always, TensorBoard and Weights & Biases when asked for."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from robopolicy.errors import require_extra
from robopolicy.training.checkpoint import write_whole
from robopolicy.training.config import TrainConfig


class MetricsLog:
    """Appends rows ``{"step": …, name: value, …}``.

    Args:
        folder: the run's folder.
        config: which loggers to use.
        resume_step: rows of later steps, written before a crash and repeated by the resumed run, are removed.
        run_config: plain values shown by Weights & Biases.
    """

    def __init__(self, folder: Path, config: TrainConfig, resume_step: int, run_config: Mapping[str, Any]) -> None:
        path = folder / "metrics.jsonl"
        kept = [row for row in read_metrics(path) if row["step"] <= resume_step] if path.exists() else []
        write_whole(path, "".join(json.dumps(row) + "\n" for row in kept))
        self._file = path.open("a", buffering=1)
        self._board: Any = None
        self._wandb: Any = None
        if config.tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self._board = SummaryWriter(str(folder / "tensorboard"), purge_step=resume_step + 1)
        if config.wandb:
            wandb = require_extra("wandb", "wandb")
            identity = hashlib.sha256(str(folder.resolve()).encode()).hexdigest()[:16]  # a resumed run goes on there
            self._wandb = wandb.init(
                project="robopolicy", dir=str(folder), config=dict(run_config), id=identity, resume="allow"
            )

    def write(self, step: int, values: Mapping[str, float]) -> None:
        self._file.write(json.dumps({"step": step, **values}) + "\n")
        if self._board is not None:
            for name, value in values.items():
                self._board.add_scalar(name, value, step)
        if self._wandb is not None:
            self._wandb.log(dict(values), step=step)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()
        if self._board is not None:
            self._board.close()
        if self._wandb is not None:
            self._wandb.finish()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Rows of a metrics.jsonl; a last line cut off by a crash is left out."""
    rows = []
    for line in path.read_text().splitlines():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return rows


def curve(path: Path, name: str) -> list[tuple[int, float]]:
    """The (step, value) pairs of one metric."""
    return [(row["step"], row[name]) for row in read_metrics(path) if name in row] if path.exists() else []
