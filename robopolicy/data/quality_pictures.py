"""Quality measures as one picture: whole datasets, the course of an episode, single episodes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from robopolicy.data.quality import PHASES, Measure, Quality

_MOST_LABELS = 5  # episodes named in the picture, for each dataset


def write_quality_picture(qualities: Sequence[Quality], folder: Path) -> Path:
    """Write ``quality.png``: a row for each measure, a colour for each dataset; returns the file."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "quality.png"
    FigureCanvasAgg(quality_figure(qualities)).print_png(path)
    return path


def quality_figure(qualities: Sequence[Quality]) -> Figure:
    """Draw measures (rows) of whole datasets, over an episode, and of each episode from best to worst (columns)."""
    names = list(dict.fromkeys(name for q in qualities for name in q.measures))
    figure = Figure(figsize=(12, 2.6 * len(names) + 0.6), layout="constrained")
    axes = figure.subplots(len(names), 3, squeeze=False, width_ratios=(1.2, 2, 2))
    for name, (whole, course, single) in zip(names, axes, strict=True):
        scale = 1 if name == "state entropy" else 100
        for i, quality in enumerate(qualities):
            if name in quality.measures:
                _draw(quality.measures[name], i, scale, quality.name, whole, course, single)
        whole.set_xticks(range(len(qualities)), [q.name for q in qualities], fontsize=8)
        whole.set_xlim(-0.6, len(qualities) - 0.4)
        whole.set_ylabel(f"{name}\n[{'nats' if scale == 1 else '% of spread'}]", fontsize=9)
        for axis in (whole, course, single):
            axis.grid(alpha=0.3)
            axis.tick_params(labelsize=8)
            if scale == 100:
                axis.set_ylim(bottom=0)
    for axis, title in zip(axes[0], ("all steps, 95 % interval", "over the episode", "each episode"), strict=True):
        axis.set_title(title, fontsize=10)
    axes[-1][1].set_xlabel("share of the episode's duration", fontsize=8)
    axes[-1][2].set_xlabel("share of the episodes, sorted (circles: stand out)", fontsize=8)
    if len(qualities) > 1:
        axes[0][1].legend(fontsize=8)
    return figure


def _draw(measure: Measure, i: int, scale: float, name: str, whole: Axes, course: Axes, single: Axes) -> None:
    color = f"C{i}"
    value, low, high = scale * measure.value, scale * measure.low, scale * measure.high
    # With few episodes the percentile interval of a root mean square may miss the value itself.
    error = [[max(0.0, value - low)], [max(0.0, high - value)]]
    whole.errorbar([i], [value], yerr=error, fmt="o", color=color, capsize=4)
    course.plot((np.arange(PHASES) + 0.5) / PHASES, scale * measure.phases, color=color, label=name)
    order = np.argsort(measure.episodes)
    share = (np.arange(len(order)) + 0.5) / len(order)
    single.plot(share, scale * measure.episodes[order], ".-", color=color, markersize=3, linewidth=0.8)
    places = dict(zip(order.tolist(), share.tolist(), strict=True))
    for episode in measure.outliers().tolist():
        single.plot(places[episode], scale * measure.episodes[episode], "o", color=color, fillstyle="none")
    for episode in measure.outliers().tolist()[:_MOST_LABELS]:
        where = (places[episode], scale * measure.episodes[episode])
        single.annotate(f"{episode} ", where, ha="right", va="center", fontsize=7)
