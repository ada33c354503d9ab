"""One self-contained HTML page for a suite: settings against the base, curves, stages, videos."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
from markupsafe import Markup
from matplotlib.axes import Axes

from robopolicy.evaluation.compare import SuiteComparison
from robopolicy.evaluation.episode import EpisodeResult
from robopolicy.evaluation.page import ACCENT, INK, svg, templates, video_uri, write_page
from robopolicy.evaluation.suite import Setting
from robopolicy.evaluation.suite_results import FactorResult, SettingResult, SuiteResult, setting_folder


def write_suite_report(
    result: SuiteResult, path: Path, *, comparison: SuiteComparison | None = None, videos_from: Path | None = None
) -> None:
    """Write the page; videos become part of the file.

    Args:
        comparison: shown as a section of its own when given.
        videos_from: the suite's folder; None for the folder of ``path``.
    """
    folder = videos_from or path.parent
    page = (
        templates()
        .get_template("suite.html")
        .render(
            title=f"{result.suite.name.replace('_', ' ').capitalize()} on {result.protocol.task['environment']}",
            result=result,
            task=result.protocol.task,
            common={k: v for k, v in result.protocol.task.items() if k != "settings" and v not in ({}, "")},
            policy=result.protocol.policy,
            stages=list(dict.fromkeys(m.name for s in result.settings for m in s.result.stages)),
            curves=[(f, level_curve(f, result.base)) for f in result.factors if f.curve],
            watched=sorted(_filmed(result, folder), key=lambda pair: (pair[1].success, pair[1].score)),
            video=lambda setting, name: video_uri(setting_folder(folder, setting.name) / name),
            comparison=comparison,
        )
    )
    write_page(path, page)


def level_curve(factor: FactorResult, base: SettingResult) -> Markup:
    """Success rate against a factor's numeric levels with Wilson intervals; dashed: the base setting. Inline SVG."""

    def draw(axes: Axes) -> None:
        levels = [level for level, _ in factor.curve]
        rate, low, high = np.array([(m.value, m.low, m.high) for _, m in factor.curve]).T
        axes.axhline(base.rate.value, color=INK, linewidth=1, linestyle="--", alpha=0.6)
        # Rounding may put the end of an interval at 0 or 1 on the wrong side of the rate.
        error = np.maximum([rate - low, high - rate], 0)
        axes.errorbar(levels, rate, error, color=ACCENT, linewidth=2, marker="o", markersize=6, capsize=4)
        axes.set(xlabel=factor.factor.replace("_", " "), ylabel="success rate", ylim=(-0.03, 1.03))

    return svg(draw, f"Success rate against {factor.factor.replace('_', ' ')}")


def _filmed(result: SuiteResult, folder: Path) -> Iterator[tuple[Setting, EpisodeResult]]:
    """Episodes whose video is there; people delete videos to save room."""
    for found in result.settings:
        videos = setting_folder(folder, found.setting.name)
        yield from ((found.setting, e) for e in found.result.episodes if e.video and (videos / e.video).is_file())
