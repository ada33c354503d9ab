"""What a dataset holds, in one text."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np

from robopolicy.data.container import codec_configs
from robopolicy.data.statistics import ArrayStatistics, array_statistics
from robopolicy.data.store import EpisodeStore

_BAR = 40
_BINS = 8
_MOST_TASKS = 10


def describe(store: EpisodeStore) -> str:
    """Episodes, duration, arrays, sizes, episode lengths, tasks and success rate of a dataset."""
    sections = [_header(store), _arrays(store)]
    if store.n_episodes:
        sections += [_lengths(store), _labels(store)]
    return "\n\n".join(section for section in sections if section)


def statistics_table(statistics: dict[str, ArrayStatistics], columns: dict[str, tuple[str, ...]]) -> str:
    """One line for each column of each array; ``columns`` names them."""
    header = ("column", "min", "q01", "median", "mean", "q99", "max", "std")
    rows: list[Sequence[str]] = [header]
    for key, s in statistics.items():
        names = columns[key] if len(columns[key]) == len(s.mean) else tuple(f"{key}[{i}]" for i in range(len(s.mean)))
        for i, name in enumerate(names):
            numbers = (s.min[i], s.q01[i], s.q50[i], s.mean[i], s.q99[i], s.max[i], s.std[i])
            rows.append((name, *(f"{number:.5g}" for number in numbers)))
    text = table(rows)
    if not all(s.exact_quantiles for s in statistics.values()):
        text += "\nQuantiles of images with fractional values come from a sample of frames."
    return text


def table(rows: Sequence[Sequence[str]]) -> str:
    """Align columns: the first to the left, the others to the right; the first row is the header."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = [
        "  ".join(
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
    return "\n".join([lines[0], "-" * max(map(len, lines)), *lines[1:]])


def _header(store: EpisodeStore) -> str:
    rate = f"{store.fps:g} Hz" if store.fps else "rate unknown"
    duration = f", {_duration(store.n_steps / store.fps)}" if store.fps else ""
    size = sum(store.files.sizes("data").values()) + sum(store.files.sizes("meta").values())
    return (
        f"{store.path}\n{store.n_episodes} episodes, {store.n_steps} steps, {rate}{duration}, "
        f"{_bytes(size)} on disk, Zarr format {store.zarr_format}"
    )


def _arrays(store: EpisodeStore) -> str:
    rows: list[Sequence[str]] = [("array", "role", "shape", "type", "unit", "range", "codec", "on disk")]
    for name, spec in store.schema.arrays.items():
        on_disk = sum(store.files.sizes(f"data/{name}").values())
        rows.append(
            (
                name,
                spec.role,
                "x".join(map(str, spec.shape)) or "scalar",
                spec.dtype,
                spec.unit or "-",
                _range(store, name),
                _codec(store, name),
                _bytes(on_disk),
            )
        )
    return table(rows)


def _range(store: EpisodeStore, name: str) -> str:
    """Smallest and largest value; images are left to ``stats``, which decodes every frame."""
    if store.schema.arrays[name].role == "image" or not store.n_steps:
        return "-"
    statistics = array_statistics(store, name)
    if not statistics.count.any():
        return "not finite"
    return f"{np.nanmin(statistics.min):.4g} .. {np.nanmax(statistics.max):.4g}"


def _codec(store: EpisodeStore, name: str) -> str:
    array = store.array(name)
    configs = codec_configs(array)
    names = [str(config.get("id", config.get("name"))).removeprefix("imagecodecs_") for config in configs]
    if array.shards:
        names.append("blosc")
    return "+".join(n for n in names if n != "bytes") or "raw"


def _lengths(store: EpisodeStore) -> str:
    lengths = store.episode_lengths
    unit, scale = ("s", 1 / store.fps) if store.fps else ("steps", 1.0)
    counts, edges = np.histogram(lengths * scale, bins=min(_BINS, len(np.unique(lengths))))
    rows = [f"episode length: {lengths.min()}..{lengths.max()} steps, median {np.median(lengths):g}"]
    digits = 1 if store.fps else 0
    for count, low, high in zip(counts, edges[:-1], edges[1:], strict=True):
        bar = "#" * round(_BAR * count / counts.max())
        rows.append(f"  {low:8.{digits}f} .. {high:8.{digits}f} {unit} {count:6d} {bar}".rstrip())
    return "\n".join(rows)


def _labels(store: EpisodeStore) -> str:
    lines = [*_counts("tasks", store.tasks), *_counts("behaviours", store.behaviours)]
    judged = [success for success in store.episode_success if success is not None]
    if judged:
        lines.append(f"success: {sum(judged)} of {len(judged)} judged episodes ({sum(judged) / len(judged):.0%})")
    return "\n".join(lines)


def _counts(title: str, names: Sequence[str]) -> list[str]:
    counts = Counter(name for name in names if name)
    if not counts:
        return []
    lines = [f"{title}: {len(counts)}", *(f"  {n:6d} x {name}" for name, n in counts.most_common(_MOST_TASKS))]
    if len(counts) > _MOST_TASKS:
        lines.append(f"  ... and {len(counts) - _MOST_TASKS} more")
    return lines


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s"


def _bytes(size: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:.3g} TB"
