"""The usual way to load windows: a torch Dataset that builds one window per item, for a DataLoader with workers.

It follows the sampler of diffusion_policy: a table of (first, last, place) per window, a slice of the arrays, and a
padded copy where the slice is shorter than the window. Vectors lie in memory, as there. Images are either cached in
memory as uint8 (diffusion_policy would keep Push-T's as float32, four times as much) or read from the Zarr arrays for
every item.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
import zarr
from torch import Tensor
from torch.utils.data import Dataset


class ItemDataset(Dataset[dict[str, Tensor]]):
    """Push-T windows, one per item.

    Args:
        path: dataset in the Zarr replay-buffer layout.
        columns: observation key -> columns of the array ``state``.
        image_key: key of the camera images; None leaves them out.
        cached: keep the images in memory; otherwise every item reads its frames from disk.
        horizon: steps of actions.
        n_obs: steps of observations.
        n_action: steps that are executed; windows may end ``n_action - 1`` steps after their episode.
    """

    def __init__(
        self,
        path: Path,
        columns: dict[str, list[int]],
        image_key: str | None,
        cached: bool,
        horizon: int = 16,
        n_obs: int = 2,
        n_action: int = 8,
    ) -> None:
        state, self._action = read_array(path, "data/state"), read_array(path, "data/action")
        self._states = {key: np.ascontiguousarray(state[:, chosen]) for key, chosen in columns.items()}
        self._horizon, self._n_obs, self._image_key = horizon, n_obs, image_key
        self._images: np.ndarray | zarr.Array | None = None
        if image_key is not None:
            images = zarr.open_array(str(path), path="data/img", mode="r")
            self._images = read_uint8(images) if cached else images
        self._table = window_table(read_array(path, "meta/episode_ends"), horizon, n_obs - 1, n_action - 1)

    def __len__(self) -> int:
        return len(self._table)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        first, last, place = self._table[index]
        item = {key: self._padded(x, first, last, place, self._n_obs) for key, x in self._states.items()}
        item["action"] = self._padded(self._action, first, last, place, self._horizon)
        if self._image_key is not None and self._images is not None:
            item[self._image_key] = self._padded(self._images, first, last, place, self._n_obs)
        return {key: torch.from_numpy(x) for key, x in item.items()}

    def _padded(self, array: np.ndarray | zarr.Array, first: int, last: int, place: int, length: int) -> np.ndarray:
        """Steps ``first..last`` of an array at ``place`` of a window of ``length`` steps, edges repeated."""
        values = np.asarray(array[first : min(last, first + max(length - place, 1))])
        if values.dtype == np.float32 and values.ndim == 4:
            values = np.rint(values).astype(np.uint8)
        before, after = min(place, length - 1), max(0, length - place - len(values))
        if before == 0 and after == 0:
            return values
        window = np.empty((length, *values.shape[1:]), values.dtype)
        window[:before] = values[0]
        window[before : before + len(values)] = values
        window[before + len(values) :] = values[-1]
        return window


def window_table(ends: np.ndarray, horizon: int, pad_before: int, pad_after: int) -> list[tuple[int, int, int]]:
    """(first step, last step exclusive, place of the first step in the window) of every window."""
    table: list[tuple[int, int, int]] = []
    start = 0
    for end in ends.tolist():
        for offset in range(-pad_before, end - start - horizon + pad_after + 1):
            first, last = max(offset, 0), min(offset + horizon, end - start)
            table.append((start + first, start + last, max(-offset, 0)))
        start = end
    return table


def read_array(path: Path, name: str) -> np.ndarray:
    return np.asarray(zarr.open_array(str(path), path=name, mode="r")[:])


def read_uint8(array: zarr.Array) -> np.ndarray:
    """All frames as uint8, read in runs of whole chunks."""
    images = np.empty(array.shape, np.uint8)
    run = array.chunks[0] * 4
    for start in range(0, len(images), run):
        images[start : start + run] = np.rint(np.asarray(array[start : start + run]))
    return images
