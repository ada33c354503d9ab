"""The best bundles of a run, by evaluation score."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

from robopolicy.errors import UserError


class BestBundles:
    """Keeps at most ``keep`` bundles under ``folder``; their names hold step and score.

    The score they are ranked by is optimistic for the winner: report a final number on other seeds.
    """

    def __init__(self, folder: Path, keep: int) -> None:
        self.folder, self.keep = folder, keep
        self._kept: list[tuple[float, int]] = []

    def offer(self, score: float, step: int, save: Callable[[Path], object]) -> None:
        """Save a bundle if it is among the best; on equal scores the later step wins."""
        if self.keep == 0:
            return
        ranked = sorted([*self._kept, (score, step)], reverse=True)
        if (score, step) in ranked[: self.keep]:
            save(self.folder / _name(score, step))
        for loser in ranked[self.keep :]:
            shutil.rmtree(self.folder / _name(*loser), ignore_errors=True)
        self._kept = ranked[: self.keep]

    @property
    def best(self) -> Path:
        """The bundle with the highest score.

        Raises:
            UserError: the run has not been evaluated.
        """
        if not self._kept:
            raise UserError(f"{self.folder}: no bundle was evaluated; use bundles/last, or set train.evaluate_every.")
        return self.folder / _name(*self._kept[0])

    def state(self) -> list[tuple[float, int]]:
        return list(self._kept)

    def restore(self, state: list[list[float]]) -> None:
        self._kept = [(float(score), int(step)) for score, step in state]


def _name(score: float, step: int) -> str:
    return f"step_{step:07d}_score_{score:.3f}"
