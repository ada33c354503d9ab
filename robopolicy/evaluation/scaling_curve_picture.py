"""Scaling curves and the plan made from them as one picture."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from robopolicy.evaluation.scaling_curves import CollectionPlan, PlannedFactor
from robopolicy.evaluation.statistics import wilson

_COLUMNS = 3


def write_plan_picture(plan: CollectionPlan, folder: Path) -> Path:
    """Write ``plan.png``: one panel for each factor; returns the file."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "plan.png"
    FigureCanvasAgg(plan_figure(plan)).print_png(path)
    return path


def plan_figure(plan: CollectionPlan) -> Figure:
    """Draw measured success rates, fitted curves with 95 % bands, and how far the plan follows each."""
    columns = min(_COLUMNS, len(plan.factors))
    rows = -(-len(plan.factors) // columns)
    figure = Figure(figsize=(max(4.0 * columns, 5.5), 3.0 * rows + 0.8), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False, sharey=True).ravel()
    for axis, factor in zip(axes, plan.factors, strict=False):
        _draw(axis, factor, plan.budget)
    for axis in axes[len(plan.factors) :]:
        axis.set_axis_off()
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=2, fontsize=8, frameon=False)
    return figure


def _draw(axis: Axes, factor: PlannedFactor, budget: int) -> None:
    curve = factor.curve
    trials, have = curve.trials, curve.trials.collected
    demos = np.linspace(0, have + budget, 200)
    draws = curve.draws_at(demos)
    low, high = np.quantile(draws, [0.025, 0.975], axis=0)
    axis.fill_between(demos, low, high, color="C0", alpha=0.2, linewidth=0, label="95 % of the fitted curves")
    axis.plot(demos, draws.mean(axis=0), color="C0", label="expected success")
    rates = [wilson(int(s), int(n)) for s, n in zip(trials.successes, trials.n, strict=True)]
    error = [[r.value - r.low for r in rates], [r.high - r.value for r in rates]]
    label = "evaluated policy, 95 % interval"
    axis.errorbar(trials.demos, [r.value for r in rates], yerr=error, fmt="ko", ms=4, capsize=3, label=label)
    axis.axvline(have, color="0.5", linestyle=":", linewidth=1)
    if factor.collect:
        axis.axvspan(have, have + factor.collect, color="C2", alpha=0.2, linewidth=0, label="to collect")
    axis.set(ylim=(0, 1.02), xlim=(-0.02 * (have + budget), have + budget))
    axis.set_title(f"{trials.factor}: collect {factor.collect} more", fontsize=10)
    axis.set_xlabel("demonstrations that vary the factor", fontsize=8)
    axis.yaxis.set_major_formatter(PercentFormatter(1))
    axis.tick_params(labelsize=8)
    axis.grid(alpha=0.3)
