"""The latencies of a benchmark as one picture."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from robopolicy.benchmarking.measure import BenchResult
from robopolicy.benchmarking.serve_engine import STAGES


def write_picture(result: BenchResult, path: Path) -> Path:
    """Write a PNG; returns the file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    FigureCanvasAgg(latency_figure(result)).print_png(path)
    return path


def latency_figure(result: BenchResult) -> Figure:
    """One bar for each engine: its stages' medians, the spread of the whole call, and the machine's limit."""
    figure = Figure(figsize=(8.0, 1.6 + 0.55 * len(result.engines)), layout="constrained")
    axis = figure.subplots()
    _draw_bars(axis, result)
    threads = f"{result.threads} thread{'' if result.threads == 1 else 's'}"
    axis.set_title(f"{result.machine.processor}, {threads}, batch {result.rows}", fontsize=10)
    handles, labels = axis.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, fontsize=8, frameon=False)
    return figure


def _draw_bars(axis: Axes, result: BenchResult) -> None:
    rows = np.arange(len(result.engines))
    left = np.zeros(len(rows))
    for stage, color in zip(STAGES, ("0.6", "C0", "C2", "0.8"), strict=True):
        width = np.array([1e3 * r.stages[stage].p50 for r in result.engines])
        axis.barh(rows, width, left=left, height=0.6, color=color, label=f"{stage}, median")
        left += width
    p50, p99 = (np.array([1e3 * getattr(r.latency, q) for r in result.engines]) for q in ("p50", "p99"))
    axis.errorbar(
        p50, rows, xerr=np.stack([np.zeros(len(rows)), p99 - p50]), fmt="k|", ms=10, capsize=4, label="call, p50 to p99"
    )
    for kind, color in (("memory", "C3"), ("compute", "C1")):
        bounds = {
            row: 1e3 * r.bound.seconds for row, r in enumerate(result.engines) if r.bound and r.bound.binds == kind
        }
        if bounds:
            label = f"limit of the machine, {kind}"
            axis.plot(list(bounds.values()), list(bounds), "D", color=color, mec="w", ms=7, label=label)
    for row, r in enumerate(result.engines):
        share = f", {r.fraction:.0%} of the limit" if r.fraction else ""
        text = f"{1e3 * r.latency.p50:.3g} ms{share}"
        axis.annotate(text, (1e3 * r.latency.p99, row), (8, 0), textcoords="offset points", va="center", fontsize=8)
    axis.set_yticks(rows, [r.facts.name for r in result.engines])
    axis.invert_yaxis()
    axis.set_xlim(0, 1.45 * p99.max())
    axis.set_xlabel("milliseconds for a chunk")
    axis.tick_params(labelsize=8)
    axis.grid(axis="x", alpha=0.3)
