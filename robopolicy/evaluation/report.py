"""One self-contained HTML page for an evaluation: numbers, plots and videos, readable offline and on a phone."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from robopolicy.evaluation.compare import Comparison
from robopolicy.evaluation.episode import EpisodeResult
from robopolicy.evaluation.page import ACCENT, BAD, GOOD, INK, svg, templates, video_uri, write_page
from robopolicy.evaluation.results import EvaluationResult


def write_report(
    result: EvaluationResult,
    path: Path,
    *,
    training_curve: Sequence[tuple[float, float]] | None = None,
    comparison: Comparison | None = None,
    title: str | None = None,
    videos_from: Path | None = None,
) -> None:
    """Write the page; videos become part of the file.

    Args:
        training_curve: (step, loss) pairs of the training run.
        comparison: shown as a section of its own when given.
        title: heading; by default names the environment.
        videos_from: the results folder; None for the folder of ``path``.
    """
    folder = videos_from or path.parent
    template = templates().get_template("report.html")
    page = template.render(
        title=title or f"Evaluation on {result.protocol.task['environment']}",
        result=result,
        task=result.protocol.task,
        policy=result.protocol.policy,
        watched=_watched(result.episodes, folder),
        video=lambda name: video_uri(folder / name),
        histogram=score_histogram(result.episodes),
        curve=training_plot(training_curve) if training_curve else None,
        comparison=comparison,
        scatter=paired_scatter(comparison) if comparison else None,
    )
    write_page(path, page)


def score_histogram(episodes: Sequence[EpisodeResult]) -> Markup:
    """Distribution of the scores, successes on top of failures, as inline SVG."""
    bins = np.linspace(0, 1, 21)

    def draw(axes: Axes) -> None:
        groups = [[e.score for e in episodes if e.success == wanted] for wanted in (False, True)]
        axes.hist(groups, bins=list(bins), stacked=True, color=[BAD, GOOD], label=["failure", "success"], rwidth=0.86)
        axes.set(xlabel="score", ylabel="episodes", xlim=(0, 1))
        axes.yaxis.set_major_locator(MaxNLocator(integer=True))
        axes.legend(frameon=False, labelcolor=INK, loc="lower left", bbox_to_anchor=(0, 1), ncols=2, borderaxespad=0)

    return svg(draw, "Histogram of the episode scores")


def training_plot(curve: Sequence[tuple[float, float]]) -> Markup:
    """Metric over training steps as inline SVG."""

    def draw(axes: Axes) -> None:
        steps, values = zip(*curve, strict=True)
        axes.plot(steps, values, color=ACCENT, linewidth=2, marker="o" if len(steps) < 40 else "", markersize=4)
        axes.set(xlabel="training step", ylabel="training loss")

    return svg(draw, "Metric over training steps")


def paired_scatter(comparison: Comparison) -> Markup:
    """Score of A against score of B, one point per seed, as inline SVG."""

    def draw(axes: Axes) -> None:
        by_seed = {e.seed: e.score for e in comparison.b.episodes}
        a = [e.score for e in comparison.a.episodes]
        b = [by_seed[e.seed] for e in comparison.a.episodes]
        axes.plot([0, 1], [0, 1], color=INK, linewidth=0.8, linestyle="--", alpha=0.5)
        axes.scatter(b, a, color=ACCENT, alpha=0.6, s=24, linewidths=0)
        axes.set(xlabel=f"score of {comparison.label_b}", ylabel=f"score of {comparison.label_a}", aspect="equal")
        axes.set(xlim=(-0.03, 1.03), ylim=(-0.03, 1.03))

    return svg(draw, "Scores of both policies, one point per seed; points above the line favour the first", (4.2, 4.2))


def _watched(episodes: Sequence[EpisodeResult], folder: Path) -> list[EpisodeResult]:
    """Episodes whose video is there, failures first; people delete videos to save room."""
    return sorted((e for e in episodes if e.video and (folder / e.video).is_file()), key=lambda e: (e.success, e.score))
