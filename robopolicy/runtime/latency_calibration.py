"""How late an arm follows its commands and how late a camera sees, from two signals that should be one.

The delay is where the cross-correlation of what was commanded (or shown) and what was measured (or filmed) is largest.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from robopolicy.errors import UserError
from robopolicy.runtime.limits import AxisLimits

GRID = 0.001
"""Seconds between the samples that are correlated."""
LEAST_CORRELATION = 0.8
"""Below this the two signals are not the same motion."""
SHARE = 0.5
"""Part of the limits that a test motion uses."""


@dataclass(frozen=True)
class Delay:
    """A measured delay.

    Attributes:
        seconds: by which the second signal is behind the first.
        correlation: of the two at that delay, at most 1.
        halves: the same from the first and the second half alone; their difference tells how sure it is.
    """

    seconds: float
    correlation: float
    halves: tuple[float, float]


@dataclass(frozen=True)
class Chirp:
    """A motion about a rest position, whose frequency rises from ``low`` to ``high`` [Hz]; at rest at both ends.

    Attributes:
        amplitude: largest distance from the rest position.
        duration: seconds.
    """

    amplitude: float
    low: float = 0.3
    high: float = 2.0
    duration: float = 8.0

    def at(self, time: np.ndarray) -> np.ndarray:
        """Distance from the rest position at times (n,) [s]."""
        s = np.clip(np.asarray(time, float) / self.duration, 0.0, 1.0)
        phase = 2 * np.pi * self.duration * (self.low * s + (self.high - self.low) * s**2 / 2)
        # Rises and falls with zero slope over a quarter of the time each.
        window = np.sin(np.pi / 2 * np.clip(np.minimum(s, 1 - s) / 0.25, 0, 1)) ** 2
        distance: np.ndarray = self.amplitude * window * np.sin(phase)
        return distance


def safe_chirp(axis: AxisLimits, position: float, amplitude: float) -> Chirp:
    """A chirp about a position that uses at most `SHARE` of an axis's limits.

    Args:
        axis: its limits.
        position: where it is.
        amplitude: that is wanted.

    Raises:
        UserError: the axis is at its end.
    """
    chirp = Chirp(1.0)
    time = np.linspace(0, chirp.duration, round(chirp.duration / GRID) + 1)
    velocity = np.gradient(chirp.at(time), GRID)
    acceleration = np.gradient(velocity, GRID)
    room = min(position - axis.lower, axis.upper - position) - axis.margin
    fastest = SHARE * min(
        axis.velocity / float(np.abs(velocity).max()), axis.acceleration / float(np.abs(acceleration).max())
    )
    chosen = min(amplitude, fastest, room)
    if chosen < 0.5 * min(amplitude, fastest):
        raise UserError(
            f"At {position:.3f} the axis has {max(room, 0):.3f} left to its end ({axis.lower:g} to {axis.upper:g}, "
            f"margin {axis.margin:g}): move it towards the middle of its range first."
        )
    return Chirp(chosen)


def measure_delay(
    first_times: np.ndarray,
    first: np.ndarray,
    second_times: np.ndarray,
    second: np.ndarray,
    longest: float = 1.0,
    steps: bool = False,
) -> Delay:
    """By how much the second signal is behind the first.

    Args:
        first_times: (n,) seconds, rising.
        first: (n,) commanded or shown.
        second_times: (m,) seconds on the same clock, rising.
        second: (m,) measured or filmed; any scale and offset.
        longest: largest delay that is looked for [s].
        steps: the first signal keeps each value until the next.

    Raises:
        UserError: too short, constant, not alike, or the delay is as long as ``longest``.
    """
    begin, end = float(first_times[0]), min(float(first_times[-1]), float(second_times[-1]) - longest)
    if end - begin < 2.0 or float(second_times[0]) > begin + longest:
        raise UserError(f"The signals share {max(end - begin, 0):.1f} s, wanted at least 2. Record for longer.")
    grid = np.arange(begin, end, GRID)
    if steps:
        shown = first[np.searchsorted(first_times, grid, side="right") - 1].astype(float)
    else:
        shown = np.interp(grid, first_times, first)
    behind = np.interp(np.arange(begin, end + longest, GRID), second_times, second)
    seconds, correlation = _best_lag(shown, behind)
    if correlation < LEAST_CORRELATION:
        raise UserError(
            f"The two signals are not alike (correlation {correlation:.2f}, wanted {LEAST_CORRELATION}). Did the "
            "arm move freely, does the camera see the screen, is another light blinking?"
        )
    if seconds > longest - 2 * GRID:
        raise UserError(f"The delay is {longest:g} s or more; something queues up. Find that first.")
    middle, extra = len(shown) // 2, round(longest / GRID)
    halves = (
        _best_lag(shown[:middle], behind[: middle + extra])[0],
        _best_lag(shown[middle:], behind[middle : len(shown) + extra])[0],
    )
    return Delay(seconds, correlation, halves)


def _best_lag(shown: np.ndarray, behind: np.ndarray) -> tuple[float, float]:
    """Seconds of the largest normalised correlation (Pearson's), to a part of a grid step, and its value."""
    n, lags = len(shown), len(behind) - len(shown) + 1
    a = shown - shown.mean()
    if not a.any() or not np.ptp(behind) > 0:
        return 0.0, 0.0
    size = 1 << math.ceil(math.log2(n + len(behind)))
    centred = behind - behind.mean()
    products = np.fft.irfft(np.fft.rfft(centred, size) * np.conj(np.fft.rfft(a, size)), size)[:lags]
    sums = np.concatenate([[0.0], np.cumsum(centred)])
    squares = np.concatenate([[0.0], np.cumsum(centred**2)])
    windows = (sums[n:] - sums[:-n])[:lags], (squares[n:] - squares[:-n])[:lags]
    spread = np.sqrt(np.maximum(windows[1] - windows[0] ** 2 / n, 1e-12) * (a @ a))
    correlation = products / spread
    best = int(correlation.argmax())
    fraction = 0.0
    if 0 < best < lags - 1:  # vertex of the parabola through the three highest points
        left, top, right = correlation[best - 1 : best + 2]
        fraction = 0.5 * (left - right) / min(left - 2 * top + right, -1e-12)
    return (best + fraction) * GRID, float(correlation[best])


def blink_times(duration: float, seed: int = 0, shortest: float = 0.15, longest: float = 0.45) -> np.ndarray:
    """When a screen changes between dark and light: irregular, so that only one delay fits. (n,) seconds from 0."""
    rng = np.random.default_rng(seed)
    waits = rng.uniform(shortest, longest, math.ceil(duration / shortest))
    times = np.concatenate([[0.0], np.cumsum(waits)])
    return times[times < duration]


def thumbnail(image: np.ndarray, rows: int = 24, columns: int = 32) -> np.ndarray:
    """Mean brightness of (rows, columns) blocks of an image (height, width, 3)."""
    height, width = image.shape[0] // rows, image.shape[1] // columns
    if height < 1 or width < 1:
        raise UserError(f"Images of {image.shape[0]}x{image.shape[1]} are too small, wanted {rows}x{columns} or more.")
    cut = image[: rows * height, : columns * width].reshape(rows, height, columns, width, -1)
    brightness: np.ndarray = cut.mean(axis=(1, 3, 4))
    return brightness


def screen_brightness(thumbnails: np.ndarray) -> np.ndarray:
    """Brightness (n,) of the part of a film (n, rows, columns) that blinks most: where the screen is."""
    flat = thumbnails.reshape(len(thumbnails), -1)
    spread = flat.std(axis=0)
    blinking = spread >= np.quantile(spread, 0.95)
    brightness: np.ndarray = flat[:, blinking].mean(axis=1)
    return brightness
