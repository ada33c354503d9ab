"""Contact sheets of a dataset's cameras and plots of its actions."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from robopolicy.data.schema import ArraySpec
from robopolicy.data.store import EpisodeStore

_EPISODES = 6
_FRAMES = 8
_MOST_COLUMNS = 16


def write_pictures(store: EpisodeStore, folder: Path) -> list[Path]:
    """Write one contact sheet per camera and one plot per action array as PNG; returns the files.

    Six evenly spaced episodes are shown, eight evenly spaced frames of each.
    """
    if not store.n_episodes:
        return []
    folder.mkdir(parents=True, exist_ok=True)
    count = min(_EPISODES, store.n_episodes)
    episodes = np.unique(np.linspace(0, store.n_episodes - 1, count).round().astype(int)).tolist()
    written = []
    for spec in store.schema.of_role("image"):
        written.append(_save(contact_sheet(store, spec, episodes), folder / f"frames_{spec.name}.png"))
    for spec in store.schema.of_role("action"):
        written.append(_save(column_plot(store, spec, episodes), folder / f"plot_{spec.name}.png"))
    return written


def contact_sheet(store: EpisodeStore, spec: ArraySpec, episodes: list[int]) -> Figure:
    """One row per episode, from its first to its last frame; the label under a frame is its time or step."""
    height, width = spec.shape[:2]
    tile = 1.6
    rows = tile * height / width + 0.22
    figure = Figure(figsize=(tile * _FRAMES + 1.5, rows * len(episodes) + 0.5), layout="constrained")
    axes = figure.subplots(len(episodes), _FRAMES, squeeze=False)
    for row, episode in zip(axes, episodes, strict=True):
        start, stop = store.bounds(episode)
        steps = np.linspace(start, max(start, stop - 1), _FRAMES).round().astype(int).tolist()
        row[0].set_ylabel(_episode_label(store, episode), rotation=0, ha="right", va="center", fontsize=8)
        for axis, step in zip(row, steps, strict=True):
            axis.set(xticks=[], yticks=[])
            axis.set_frame_on(False)
            if stop > start:
                axis.imshow(_displayable(store.read(spec.name, step, step + 1)[0]), interpolation="nearest")
                axis.set_xlabel(_time_label(store, step - start), fontsize=7, labelpad=1)
    figure.suptitle(f"{store.path.name}: {spec.name} ({width} x {height})", fontsize=10)
    return figure


def column_plot(store: EpisodeStore, spec: ArraySpec, episodes: list[int]) -> Figure:
    """Each column of an array over time for some episodes, beside a histogram of all steps."""
    values = store.read(spec.name).reshape(store.n_steps, -1)
    columns = min(values.shape[1], _MOST_COLUMNS)
    labels = spec.columns if len(spec.columns) == values.shape[1] else [f"entry {i}" for i in range(columns)]
    figure = Figure(figsize=(10, 1.7 * columns + 0.9), layout="constrained")
    axes = figure.subplots(columns, 2, squeeze=False, width_ratios=(4, 1), sharey="row")
    scale = 1 / store.fps if store.fps else 1.0
    for column, (trace, histogram) in enumerate(axes):
        for episode in episodes:
            start, stop = store.bounds(episode)
            time = np.arange(stop - start) * scale
            trace.plot(time, values[start:stop, column], linewidth=1, label=f"episode {episode}")
        trace.set_ylabel(f"{labels[column]}\n{spec.unit}".strip(), fontsize=8)
        trace.grid(alpha=0.3)
        finite = values[np.isfinite(values[:, column]), column]
        histogram.hist(finite, bins=60, orientation="horizontal", color="0.45")
        histogram.set_xticks([])
        trace.tick_params(labelsize=7)
    axes[-1][0].set_xlabel("time (s)" if store.fps else "step", fontsize=8)
    axes[-1][1].set_xlabel("all steps", fontsize=8)
    handles, names = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside upper right", ncols=len(episodes), fontsize=7, frameon=False)
    shown = "" if columns == values.shape[1] else f" (first {columns} of {values.shape[1]} columns)"
    figure.suptitle(f"{store.path.name}: {spec.name}{shown}", fontsize=10, x=0.01, ha="left")
    return figure


def _save(figure: Figure, path: Path) -> Path:
    FigureCanvasAgg(figure).print_png(path)
    return path


def _displayable(frame: np.ndarray) -> np.ndarray:
    """An image of any stored type as uint8 RGB; float images above 1 are taken as 0..255."""
    if frame.dtype != np.uint8:
        frame = np.nan_to_num(frame.astype(np.float32))
        frame = (frame * (255 if frame.max(initial=0) <= 1 else 1)).clip(0, 255).astype(np.uint8)
    return np.broadcast_to(frame, (*frame.shape[:2], 3))


def _episode_label(store: EpisodeStore, episode: int) -> str:
    start, stop = store.bounds(episode)
    outcome = {True: "success", False: "failure", None: ""}[store.episode_success[episode]]
    task = store.tasks[episode]
    length = _time_label(store, stop - start) if store.fps else f"{stop - start} steps"
    lines = [f"episode {episode}", length, outcome, task[:24]]
    return "\n".join(line for line in lines if line)


def _time_label(store: EpisodeStore, steps: int) -> str:
    return f"{steps / store.fps:.1f} s" if store.fps else f"step {steps}"
