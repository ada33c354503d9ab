"""Windows over episodes, with the sampling convention of Diffusion Policy (Chi et al., RSS 2023).

An episode of length L gives ``L - horizon + 1 + pad_before + pad_after`` windows; steps outside the episode repeat its
first or last step. With ``pad_before = n_obs_steps - 1`` the first window's newest observation is the first step of
the episode, and with ``pad_after = n_action_steps - 1`` the last window's executed part begins at its last steps.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from robopolicy.errors import UserError


@dataclass(frozen=True)
class WindowTable:
    """Every window of the chosen episodes, as three int64 arrays of shape (n_windows,).

    Attributes:
        start: step of the dataset at which the window starts; may lie up to ``pad_before`` before its episode.
        low: first step of the window's episode.
        high: last step (inclusive) of the window's episode.
        episode: index of the window's episode.
    """

    start: np.ndarray
    low: np.ndarray
    high: np.ndarray
    episode: np.ndarray

    def __len__(self) -> int:
        return len(self.start)

    def first(self, count: int) -> WindowTable:
        """The first ``count`` windows."""
        return WindowTable(self.start[:count], self.low[:count], self.high[:count], self.episode[:count])

    def steps(self, windows: np.ndarray, length: int) -> np.ndarray:
        """Steps of the first ``length`` entries of some windows, edges repeated.

        Args:
            windows: (B,) indices into this table.
            length: number of entries, e.g. ``n_obs_steps`` or ``horizon``.

        Returns:
            (B, length) int64 steps of the dataset.
        """
        steps = self.start[windows, None] + np.arange(length)
        return np.clip(steps, self.low[windows, None], self.high[windows, None])


def build_windows(
    episode_ends: np.ndarray,
    horizon: int,
    pad_before: int,
    pad_after: int,
    episodes: np.ndarray | None = None,
) -> WindowTable:
    """List the windows of a dataset.

    Args:
        episode_ends: (E,) exclusive, increasing ends of the episodes.
        horizon: length of a window.
        pad_before: how many steps a window may start before its episode, at most ``horizon - 1``.
        pad_after: how many steps a window may end after its episode, at most ``horizon - 1``.
        episodes: boolean mask (E,) of the episodes to use; None means all.

    Raises:
        UserError: no window is left.
    """
    ends = np.asarray(episode_ends, dtype=np.int64)
    starts = np.concatenate([[0], ends[:-1]]).astype(np.int64)
    lengths = ends - starts
    counts = np.maximum(lengths - horizon + 1 + pad_before + pad_after, 0)
    if episodes is not None:
        counts = np.where(np.asarray(episodes, dtype=bool), counts, 0)
    if counts.sum() == 0:
        chosen = "all" if episodes is None else int(np.sum(episodes))
        raise UserError(
            f"No training window: {chosen} of {len(ends)} episodes chosen, the longest has "
            f"{int(lengths.max(initial=0))} steps, but a window of horizon {horizon} needs at least "
            f"{horizon - pad_before - pad_after}. Use longer episodes or a shorter horizon."
        )
    episode = np.repeat(np.arange(len(ends)), counts)
    first_of_episode = np.repeat(np.cumsum(counts) - counts, counts)
    offset = np.arange(counts.sum()) - first_of_episode - pad_before
    return WindowTable(
        start=starts[episode] + offset,
        low=starts[episode],
        high=ends[episode] - 1,
        episode=episode,
    )


def split_episodes(
    n_episodes: int, val_ratio: float, seed: int, max_train_episodes: int | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Choose validation and training episodes as Diffusion Policy does.

    Args:
        n_episodes: number of episodes E.
        val_ratio: share of episodes held out; at least one and at most E - 1 when above zero.
        seed: seed of both draws.
        max_train_episodes: keep at most this many training episodes, drawn at random.

    Returns:
        Boolean masks (E,) of the training and of the validation episodes.
    """
    validation = np.zeros(n_episodes, dtype=bool)
    if val_ratio > 0 and n_episodes > 1:
        n_val = min(max(1, round(n_episodes * val_ratio)), n_episodes - 1)
        validation[np.random.default_rng(seed).choice(n_episodes, size=n_val, replace=False)] = True
    training = ~validation
    if max_train_episodes is not None and training.sum() > max_train_episodes:
        candidates = np.flatnonzero(training)
        kept = np.random.default_rng(seed).choice(len(candidates), size=int(max_train_episodes), replace=False)
        training = np.zeros(n_episodes, dtype=bool)
        training[candidates[kept]] = True
    return training, validation
