"""What the HTML pages share: templates, plots in the colours of the page, embedded videos."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jinja2
import matplotlib
from markupsafe import Markup, escape
from matplotlib.axes import Axes
from matplotlib.figure import Figure

# Colours that cannot occur otherwise; the page's style sheet gives them their meaning in light and dark mode.
INK, ACCENT, GOOD, BAD = "#010203", "#010204", "#010205", "#010206"
STYLE = {INK: "currentColor", ACCENT: "var(--accent)", GOOD: "var(--good)", BAD: "var(--bad)"}


def svg(draw: Callable[[Axes], None], label: str, size: tuple[float, float] = (5.2, 2.9)) -> Markup:
    """Draw one plot on a transparent ground, in the colours of the page."""
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": label, "font.family": "sans-serif"}):
        figure = Figure(figsize=size, layout="constrained")
        axes = figure.add_subplot()
        axes.spines[["top", "right"]].set_visible(False)
        axes.spines[["left", "bottom"]].set_color(INK)
        axes.tick_params(colors=INK)
        draw(axes)
        for text in (axes.xaxis.label, axes.yaxis.label):
            text.set(color=INK, parse_math=False)  # a policy's name may hold a dollar sign
        buffer = io.StringIO()
        figure.savefig(
            buffer, format="svg", transparent=True, metadata=dict.fromkeys(("Date", "Creator", "Format", "Type"))
        )
    page = buffer.getvalue()
    page = page[page.index("<svg") :].replace("<svg ", f'<svg role="img" aria-label="{escape(label)}" ', 1)
    for placeholder, colour in STYLE.items():
        page = page.replace(placeholder, colour)
    return Markup(page)


def write_page(path: Path, page: str) -> None:
    """Write a page, complete or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text(page, encoding="utf-8")
    partial.replace(path)


def video_uri(path: Path) -> str:
    """The mp4 as an address that holds its bytes."""
    return "data:video/mp4;base64," + base64.b64encode(path.read_bytes()).decode()


def templates() -> jinja2.Environment:
    """The templates beside this module; the filter ``number`` formats for people."""
    pages = jinja2.Environment(
        loader=jinja2.PackageLoader("robopolicy.evaluation"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    pages.filters["number"] = _number
    return pages


def _number(value: Any, digits: int = 3) -> str:
    """A number for people: three significant digits behind the point, a dash where it is not defined."""
    if isinstance(value, float) and math.isnan(value):
        return "–"
    return f"{value:,.{digits}f}" if abs(value) < 100 else f"{value:,.0f}"
