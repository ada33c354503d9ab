"""Finding what is wrong with a dataset, with the episode and step where it is wrong."""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from robopolicy.data.container import Container, open_container, read_ends
from robopolicy.data.durable import WRITER_FOLDER
from robopolicy.data.layout import chunk_keys, chunk_time_index, file_steps
from robopolicy.data.motion import step_sizes
from robopolicy.data.schema import ATTRIBUTES_KEY, FILES_KEY, ArraySpec
from robopolicy.data.statistics import blocks
from robopolicy.data.store import EpisodeStore

Severity = Literal["error", "warning", "info"]

# Human demonstrations stay below 4 times the 99 % quantile of their steps (Push-T, 206 episodes: 3.9).
_JUMP_FACTOR = 10.0
_FEWEST_STEPS_FOR_JUMPS = 100
# So many of the largest steps may be jumps; in a small dataset they are more than 1 %.
_MOST_JUMPS = 8
_GAP_FACTOR = 1.5
_SAMPLED_FRAMES = 200
_MOST_PER_CHECK = 20
# What the codecs raise for damaged bytes; imagecodecs' and Blosc's errors are RuntimeErrors.
_DECODE_ERRORS = (RuntimeError, ValueError, OSError, EOFError, zlib.error)


@dataclass(frozen=True)
class Problem:
    """One finding.

    Attributes:
        severity: ``error`` (training would fail or learn nonsense), ``warning`` (look at it) or ``info``.
        check: name of the check, e.g. ``not-finite``.
        message: what was found.
        advice: what to do.
        key: array; empty when the finding is not about one array.
        episode: episode, where the finding has one.
        step: step within that episode.
    """

    severity: Severity
    check: str
    message: str
    advice: str
    key: str = ""
    episode: int | None = None
    step: int | None = None

    @property
    def place(self) -> str:
        """Array, episode and step in words."""
        parts = [f"'{self.key}'" if self.key else ""]
        parts.append("" if self.episode is None else f"episode {self.episode}")
        parts.append("" if self.step is None else f"step {self.step}")
        return " ".join(part for part in parts if part)


def diagnose(path: Path, *, deep: bool = False) -> list[Problem]:
    """Check a dataset.

    Args:
        path: dataset folder or zip file.
        deep: decode every frame of compressed images; else 200 evenly spaced ones.

    Returns:
        The problems, errors first; at most 20 of one check for one array, then a summary.

    Raises:
        UserError: there is no dataset at ``path``.
    """
    container = open_container(path)
    ends = read_ends(container)
    problems = [*_check_ends(ends), *_check_lengths(container, ends)]
    if not any(p.severity == "error" for p in problems):
        problems += [*_check_files(container, ends), *_check_types(container)]
        unreadable = {p.key for p in problems if p.severity == "error"}
        with EpisodeStore.open(path) as store:
            for spec in store.schema.arrays.values():
                if spec.name not in unreadable and store.n_steps:
                    problems += _check_values(store, spec, deep)
    container.close()
    order = {"error": 0, "warning": 1, "info": 2}
    return sorted(_limit(problems), key=lambda p: order[p.severity])


def _check_ends(ends: np.ndarray) -> Iterator[Problem]:
    if not len(ends):
        yield Problem("warning", "no-episodes", "the dataset has no episodes.", "Record some.")
    for episode, length in enumerate(np.diff(ends, prepend=0).tolist()):
        if length < 0:
            yield Problem(
                "error",
                "episode-ends",
                f"its end {ends[episode]} lies before its start {ends[episode - 1] if episode else 0}.",
                "Restore meta/episode_ends from a copy, or run 'repair --drop-incomplete'.",
                episode=episode,
            )
        elif length < 2:
            yield Problem(
                "warning",
                "short-episode",
                f"the episode has {length} step{'' if length == 1 else 's'}.",
                f"Remove it: drop PATH OUT --episodes {episode}.",
                episode=episode,
            )


def _check_lengths(container: Container, ends: np.ndarray) -> Iterator[Problem]:
    n_steps = int(ends.max()) if len(ends) else 0
    for name, array in container.arrays.items():
        told = array.shape[0]
        if told < n_steps:
            first = int(np.argmax(ends > told))
            start = int(ends[first - 1]) if first else 0
            yield Problem(
                "error",
                "length",
                f"the array has {told} steps, meta/episode_ends needs {n_steps}.",
                "Restore the array from a copy, or run 'repair --drop-incomplete' to remove the incomplete episodes.",
                name,
                first,
                max(0, told - start),
            )
        elif told > n_steps:
            yield Problem(
                "warning",
                "torn-tail",
                f"the array has {told - n_steps} steps after the last episode; a writer was killed while appending.",
                "Readers of robopolicy ignore them; run 'repair' before other tools read the dataset.",
                name,
            )
    if not container.is_zip and (container.path / WRITER_FOLDER).exists():
        yield Problem(
            "warning",
            "writer",
            f"the folder {WRITER_FOLDER} is there: a writer is running or was killed.",
            "If none is running, run 'repair'.",
        )


def _check_files(container: Container, ends: np.ndarray) -> Iterator[Problem]:
    """Compare the chunk files with those that the committed steps need."""
    n_steps = int(ends[-1]) if len(ends) else 0
    # Other writers leave out chunks that hold nothing but the fill value; ours stores them.
    stored = container.root.attrs.get(ATTRIBUTES_KEY)
    ours = isinstance(stored, dict) and bool(stored.get(FILES_KEY))
    for name, array in container.arrays.items():
        sizes = container.files.sizes(f"data/{name}")
        for key in chunk_keys(array, 0, n_steps):
            if sizes.get(key, 0) > 0:
                continue
            start = (chunk_time_index(key) or 0) * file_steps(array)
            episode, step = _locate(ends, start)
            state = "is empty" if key in sizes else "is missing"
            yield Problem(
                "error" if ours or key in sizes else "warning",
                "missing-file",
                f"the file data/{name}/{key} {state}; steps {start}..{start + file_steps(array) - 1} of the dataset "
                "read as the fill value.",
                "Restore the file from a copy, or drop the episodes."
                if ours or key in sizes
                else "Harmless if the steps are all zero; otherwise restore the file from a copy.",
                name,
                episode,
                step,
            )


def _check_types(container: Container) -> Iterator[Problem]:
    stored = container.root.attrs.get(ATTRIBUTES_KEY)
    told = dict(stored.get("arrays", {})) if isinstance(stored, dict) else {}
    for name in container.skipped:
        advice = "Store numbers; text belongs into the task of the episode."
        yield Problem("warning", "dtype", "its type is not numeric; readers leave the array out.", advice, name)
    for name, array in container.arrays.items():
        wanted = told.get(name, {}).get("dtype", array.dtype.name)
        if wanted != array.dtype.name:
            yield Problem(
                "error",
                "dtype",
                f"found type {array.dtype.name}, the schema of the dataset tells {wanted}.",
                "The array was replaced by another tool; write it again with the type of the schema.",
                name,
            )
        elif name == "action" and array.dtype.kind != "f":
            advice = "Policies learn continuous actions; store float32."
            yield Problem("warning", "dtype", f"actions have type {array.dtype.name}.", advice, name)


def _check_values(store: EpisodeStore, spec: ArraySpec, deep: bool) -> list[Problem]:
    if spec.role == "image" and np.dtype(spec.dtype).kind != "f":
        return list(_check_frames(store, spec, deep))
    try:
        if spec.role == "image":
            return list(_check_float_images(store, spec))
        values = store.read(spec.name)
    except _DECODE_ERRORS:
        return list(_undecodable(store, spec, np.arange(0, store.n_steps, file_steps(store.array(spec.name)))))
    problems = list(_check_finite(store, spec, np.isfinite(values).reshape(len(values), -1).all(axis=1)))
    if spec.name.split(".")[-1] == "timestamp":
        problems += _check_timestamps(store, spec, values)
    elif spec.role in ("state", "action"):
        problems += [*_check_jumps(store, spec, values), *_check_constant(spec, values)]
    return problems


def _check_frames(store: EpisodeStore, spec: ArraySpec, deep: bool) -> Iterator[Problem]:
    """Decode frames of integer images and look for blank ones."""
    count = store.n_steps if deep else min(store.n_steps, _SAMPLED_FRAMES)
    steps = np.unique(np.linspace(0, store.n_steps - 1, count).astype(int))
    broken = set()
    for problem in _undecodable(store, spec, steps):
        broken.add((problem.episode, problem.step))
        yield problem
    for step in steps.tolist():
        episode, within = _locate(store.episode_ends, step)
        if (episode, within) in broken:
            continue
        frame = store.read(spec.name, step, step + 1)
        if frame.min() == frame.max():
            yield Problem(
                "warning",
                "blank-image",
                f"every pixel has the value {frame.min()}.",
                "Check the camera; drop the episode if it shows nothing.",
                spec.name,
                episode,
                within,
            )


def _undecodable(store: EpisodeStore, spec: ArraySpec, steps: np.ndarray) -> Iterator[Problem]:
    for step in steps.tolist():
        try:
            store.read(spec.name, step, step + 1)
        except _DECODE_ERRORS as error:
            episode, within = _locate(store.episode_ends, step)
            yield Problem(
                "error",
                "undecodable",
                f"the stored bytes cannot be decoded: {error}.",
                "Restore the file from a copy, or drop the episode.",
                spec.name,
                episode,
                within,
            )


def _check_float_images(store: EpisodeStore, spec: ArraySpec) -> Iterator[Problem]:
    low, high, finite = np.empty(store.n_steps), np.empty(store.n_steps), np.empty(store.n_steps, dtype=bool)
    for start, block in blocks(store, spec.name):
        rows = slice(start, start + len(block))
        pixels = block.reshape(len(block), -1)
        low[rows], high[rows] = pixels.min(axis=1), pixels.max(axis=1)
        finite[rows] = np.isfinite(low[rows]) & np.isfinite(high[rows])  # min and max carry NaN along
    yield from _check_finite(store, spec, finite)
    outside = np.flatnonzero(finite & ((low < 0) | (high > 255)))
    for episode, steps in _by_episode(store.episode_ends, outside):
        first = int(steps[0])
        text = f"pixel values {low[first]:.4g}..{high[first]:.4g} are outside 0..255 ({len(steps)} frames)."
        advice = "Scale the images to 0..255, best as uint8."
        yield Problem("error", "image-range", text, advice, spec.name, episode, _locate(store.episode_ends, first)[1])
    top = float(high[finite].max(initial=0.0))
    if 1 < top <= 2:
        text = f"the largest pixel value {top:.4g} fits neither 0..1 nor 0..255."
        yield Problem("warning", "image-range", text, "Store uint8, or scale to exactly 0..1.", spec.name)
    elif top > 2:
        yield from _dim_episodes(store, spec, np.where(finite, high, 0.0), top)


def _dim_episodes(store: EpisodeStore, spec: ArraySpec, high: np.ndarray, top: float) -> Iterator[Problem]:
    for episode in range(store.n_episodes):
        start, stop = store.bounds(episode)
        brightest = float(high[start:stop].max(initial=0.0))
        if 0 < brightest <= 1:
            yield Problem(
                "error",
                "image-range",
                f"its pixels reach {brightest:.4g}, those of the dataset {top:.4g}: 0..1 mixed with 0..255.",
                "Scale the episode by 255.",
                spec.name,
                episode,
                0,
            )


def _check_finite(store: EpisodeStore, spec: ArraySpec, finite: np.ndarray) -> Iterator[Problem]:
    for episode, steps in _by_episode(store.episode_ends, np.flatnonzero(~finite)):
        text = f"NaN or infinite values in {len(steps)} step{'s' * (len(steps) > 1)}."
        advice = "Drop the episode, or fill the gap where it was recorded."
        step = _locate(store.episode_ends, int(steps[0]))[1]
        yield Problem("error", "not-finite", text, advice, spec.name, episode, step)


def _by_episode(ends: np.ndarray, steps: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
    """Group steps of the dataset (sorted) by the episode that holds them."""
    episodes = np.searchsorted(ends, steps, side="right")
    for episode in np.unique(episodes).tolist():
        yield episode, steps[episodes == episode]


def _check_timestamps(store: EpisodeStore, spec: ArraySpec, values: np.ndarray) -> Iterator[Problem]:
    """Time stamps are seconds, or nanoseconds when stored as integers."""
    seconds = values.reshape(len(values)).astype(np.float64) * (1e-9 if values.dtype.kind in "iu" else 1.0)
    within = _within_episodes(store)
    delta = np.diff(seconds)
    typical = float(np.median(delta[within])) if within.any() else 0.0
    expected = 1 / store.fps if store.fps else typical
    for i in np.flatnonzero(within & (delta <= 0)).tolist():
        episode, step = _locate(store.episode_ends, i + 1)
        text = f"time goes from {seconds[i]:.6f} s to {seconds[i + 1]:.6f} s."
        yield Problem("error", "time-order", text, "Drop the episode, or sort it.", spec.name, episode, step)
    for i in np.flatnonzero(within & (delta > _GAP_FACTOR * expected)).tolist() if expected > 0 else []:
        episode, step = _locate(store.episode_ends, i + 1)
        text = f"{delta[i] * 1e3:.1f} ms since the step before, expected {expected * 1e3:.1f} ms."
        advice = "Steps were lost while recording; drop the episode if the gap is during motion."
        yield Problem("warning", "time-gap", text, advice, spec.name, episode, step)


def _check_jumps(store: EpisodeStore, spec: ArraySpec, values: np.ndarray) -> Iterator[Problem]:
    """Steps far beyond nearly all (99 %) moving steps of the same column."""
    within = _within_episodes(store)
    sizes = step_sizes(values, spec)
    labels = spec.columns if sizes.shape[1] == len(spec.columns) else ()
    for column in range(sizes.shape[1]):
        size = np.where(within & np.isfinite(sizes[:, column]), sizes[:, column], 0.0)
        moving = size[size > 0]
        if len(moving) < _FEWEST_STEPS_FOR_JUMPS:
            continue
        usual = float(np.sort(moving)[-1 - max(_MOST_JUMPS, len(moving) // 100)])
        for i in np.flatnonzero(size > _JUMP_FACTOR * usual).tolist():
            episode, step = _locate(store.episode_ends, i + 1)
            label = labels[column] if labels else f"entry {column}"
            text = f"{label} moves by {size[i]:.4g} in one step; nearly all steps are below {usual:.4g}."
            advice = "Look at the episode; drop it if a sensor or the teleoperation failed."
            yield Problem("warning", "jump", text, advice, spec.name, episode, step)


def _check_constant(spec: ArraySpec, values: np.ndarray) -> Iterator[Problem]:
    flat = values.reshape(len(values), -1)
    for column in np.flatnonzero((flat == flat[0]).all(axis=0)).tolist() if len(flat) > 1 else []:
        yield Problem(
            "warning" if spec.role == "action" else "info",
            "constant",
            f"entry {column} is {flat[0, column]:.4g} in every step.",
            "Leave it out of the policy's keys unless the robot really never moves it.",
            spec.name,
        )


def _within_episodes(store: EpisodeStore) -> np.ndarray:
    """Which of the N - 1 steps from t to t + 1 stay inside an episode."""
    inside = np.ones(max(0, store.n_steps - 1), dtype=bool)
    borders = store.episode_ends[:-1] - 1
    inside[borders[(borders >= 0) & (borders < len(inside))]] = False
    return inside


def _locate(ends: np.ndarray, step: int) -> tuple[int, int]:
    """Episode of a step of the dataset, and the step's index within that episode."""
    episode = int(np.searchsorted(ends, step, side="right"))
    return episode, step - (int(ends[episode - 1]) if episode else 0)


def _limit(problems: list[Problem]) -> Iterator[Problem]:
    seen: dict[tuple[str, str], int] = {}
    for problem in problems:
        kind = (problem.check, problem.key)
        seen[kind] = seen.get(kind, 0) + 1
        if seen[kind] <= _MOST_PER_CHECK:
            yield problem
    for (check, key), count in seen.items():
        if count > _MOST_PER_CHECK:
            first = next(p for p in problems if (p.check, p.key) == (check, key))
            yield Problem(first.severity, check, f"{count - _MOST_PER_CHECK} more of these.", first.advice, key)
