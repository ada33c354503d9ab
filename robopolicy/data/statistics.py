"""Exact statistics of dataset arrays: per column, for images per colour channel."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from robopolicy.data.layout import file_steps
from robopolicy.data.store import EpisodeStore

QUANTILES = (0.01, 0.5, 0.99)
_BLOCK_BYTES = 32_000_000
_SAMPLE_VALUES = 2_000_000


@dataclass(frozen=True)
class ArrayStatistics:
    """Statistics over all steps; every field but ``count`` is float64 ``(columns,)``.

    Attributes:
        count: finite values in each column, int64.
        min, max, mean, std: ``std`` is the population standard deviation.
        q01, q50, q99: quantiles with linear interpolation.
        exact_quantiles: False for float images with fractional values, whose quantiles come from a sample of frames.
    """

    count: np.ndarray
    min: np.ndarray
    max: np.ndarray
    mean: np.ndarray
    std: np.ndarray
    q01: np.ndarray
    q50: np.ndarray
    q99: np.ndarray
    exact_quantiles: bool = True

    def to_dict(self) -> dict[str, Any]:
        """Plain lists for JSON; a column without finite values has null entries."""
        entries = {}
        for key, value in asdict(self).items():
            is_array = isinstance(value, np.ndarray)
            entries[key] = [v if np.isfinite(v) else None for v in value.tolist()] if is_array else value
        return entries


def array_statistics(store: EpisodeStore, key: str) -> ArrayStatistics:
    """Statistics of one array, computed in float64 in one pass over the data.

    Values that are not finite are left out. Columns are the flattened entries of one step, for images the channels.
    """
    if store.n_steps == 0:
        return column_statistics(np.empty((0, _columns(store, key))))
    if store.schema.arrays[key].role == "image":
        return _image_statistics(store, key)
    return column_statistics(store.read(key).reshape(store.n_steps, -1))


def blocks(store: EpisodeStore, key: str) -> Iterator[tuple[int, np.ndarray]]:
    """Yield first step and values of consecutive stretches of an array, cut at file borders, about 32 MB each."""
    unit = file_steps(store.array(key))
    frame = max(1, store.schema.arrays[key].frame_bytes)
    steps = max(1, _BLOCK_BYTES // (unit * frame)) * unit
    for start in range(0, store.n_steps, steps):
        yield start, store.read(key, start, start + steps)


def column_statistics(values: np.ndarray) -> ArrayStatistics:
    """Statistics of each column of ``(N, columns)``."""
    table = np.asarray(values, dtype=np.float64)
    columns = [table[np.isfinite(table[:, i]), i] for i in range(table.shape[1])]
    rows = [_one_column(column) for column in columns]
    count = np.array([len(column) for column in columns], dtype=np.int64)
    return ArrayStatistics(count, *np.array(rows, dtype=np.float64).reshape(len(columns), 7).T)


def _one_column(values: np.ndarray) -> tuple[float, ...]:
    if not len(values):
        return (np.nan,) * 7
    q01, q50, q99 = np.quantile(values, QUANTILES).tolist()
    return (values.min(), values.max(), values.mean(), values.std(), q01, q50, q99)


def _image_statistics(store: EpisodeStore, key: str) -> ArrayStatistics:
    """Histograms of the 256 grey levels give every statistic exactly, unless a float image has values between."""
    channels = _columns(store, key)
    histogram = np.zeros((channels, 256), dtype=np.int64)
    for _, block in blocks(store, key):
        levels = block.astype(np.uint8, casting="unsafe") if np.isfinite(block).all() else None
        if levels is None or (block.dtype != np.uint8 and not np.array_equal(levels, block)):
            return _fractional_image_statistics(store, key)
        for channel in range(channels):
            histogram[channel] += np.bincount(levels[..., channel].ravel(), minlength=256)
    return _histogram_statistics(histogram)


def _histogram_statistics(histogram: np.ndarray) -> ArrayStatistics:
    """Statistics from counts of the values 0..255, ``(columns, 256)``."""
    values = np.arange(256, dtype=np.float64)
    count = histogram.sum(axis=1)
    mean = histogram @ values / count
    variance = (histogram * (values - mean[:, None]) ** 2).sum(axis=1) / count
    rank = np.cumsum(histogram, axis=1)

    def value_at(position: np.ndarray) -> np.ndarray:
        """The value at a place in sorted order, for each column."""
        return (rank <= position[:, None]).sum(axis=1).astype(np.float64)

    def quantile(q: float) -> np.ndarray:
        place = q * (count - 1)
        low = np.floor(place)
        below = value_at(low)
        return below + (place - low) * (value_at(np.minimum(low + 1, count - 1)) - below)

    q01, q50, q99 = map(quantile, QUANTILES)
    low, high = value_at(np.zeros(len(count))), value_at(count - 1)
    return ArrayStatistics(count, low, high, mean, np.sqrt(variance), q01, q50, q99)


def _fractional_image_statistics(store: EpisodeStore, key: str) -> ArrayStatistics:
    """Exact moments by merging blocks (Chan, Golub, LeVeque 1983); quantiles from evenly spaced frames."""
    channels = _columns(store, key)
    count, mean, squares = np.zeros(channels), np.zeros(channels), np.zeros(channels)
    low, high = np.full(channels, np.inf), np.full(channels, -np.inf)
    stride = max(1, store.n_steps * store.schema.arrays[key].frame_bytes // (4 * _SAMPLE_VALUES))
    sample = []
    for start, block in blocks(store, key):
        pixels = block.reshape(-1, channels).astype(np.float64)
        for channel in range(channels):
            values = pixels[np.isfinite(pixels[:, channel]), channel]
            if not len(values):
                continue
            total = count[channel] + len(values)
            shift = values.mean() - mean[channel]
            squares[channel] += values.var() * len(values) + shift**2 * count[channel] * len(values) / total
            mean[channel] += shift * len(values) / total
            count[channel] = total
            low[channel], high[channel] = min(low[channel], values.min()), max(high[channel], values.max())
        sample.append(block[-start % stride :: stride].reshape(-1, channels))
    sampled = column_statistics(np.concatenate(sample))
    found = np.maximum(count, 1)
    return ArrayStatistics(
        count.astype(np.int64),
        low,
        high,
        mean,
        np.sqrt(squares / found),
        sampled.q01,
        sampled.q50,
        sampled.q99,
        exact_quantiles=False,
    )


def _columns(store: EpisodeStore, key: str) -> int:
    spec = store.schema.arrays[key]
    return spec.shape[-1] if spec.role == "image" else int(np.prod(spec.shape, dtype=np.int64))
