"""Videos of episodes: H.264 in mp4, yuv420p, which every browser plays."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from itertools import zip_longest
from pathlib import Path

import av
import gymnasium
import numpy as np
from PIL import Image, ImageOps

from robopolicy.evaluation.environments import Environment
from robopolicy.evaluation.episode import EpisodeResult
from robopolicy.spec import PolicySpec

log = logging.getLogger(__name__)

SUCCESS_COLOUR, FAILURE_COLOUR = (34, 160, 90), (214, 66, 66)  # RGB


def write_video(path: Path, frames: Iterable[np.ndarray], fps: float) -> int:
    """Encode frames as they come.

    Args:
        frames: (height, width, 3) uint8 RGB, all of one size; an odd last row or column is cut off, because yuv420p
            stores colour for blocks of 2 x 2 pixels.

    Returns:
        The number of frames.
    """
    count = 0
    with av.open(str(path), "w", options={"movflags": "+faststart"}) as container:
        stream = container.add_stream(
            "libx264", rate=Fraction(fps).limit_denominator(1000), options={"crf": "23", "preset": "veryfast"}
        )
        stream.pix_fmt = "yuv420p"
        for count, frame in enumerate(frames, 1):  # noqa: B007
            height, width = (side - side % 2 for side in frame.shape[:2])
            stream.width, stream.height = width, height
            image = av.VideoFrame.from_ndarray(np.ascontiguousarray(frame[:height, :width]), format="rgb24")
            container.mux(stream.encode(image))
        container.mux(stream.encode())
    return count


def read_video(path: Path) -> Iterator[np.ndarray]:
    """Decode frames one by one, (height, width, 3) uint8 RGB."""
    with av.open(str(path)) as container:
        for frame in container.decode(video=0):
            yield frame.to_ndarray(format="rgb24")


def replay(environment: Environment, spec: PolicySpec, episode: EpisodeResult) -> Iterator[np.ndarray]:
    """Simulate a finished episode again from its seed and actions and yield its frames, the start included.

    So only the episodes that are worth watching are rendered, and which they are may depend on how they ended. Logs a
    warning when the score is not the recorded one.
    """
    env = environment.make(replace(spec, observations=()))
    try:
        env.reset(seed=episode.seed)
        yield _frame(env)
        score = 0.0
        for action in episode.actions:
            score = max(score, float(env.step(action)[1]))
            yield _frame(env)
    finally:
        env.close()
    if abs(score - episode.score) > 1e-6:
        log.warning(
            "replaying seed %d of %s gave the score %.6f, the rollout %.6f: something besides the seed and the actions "
            "decides this environment, and the video does not show what happened",
            episode.seed, environment.name, score, episode.score,
        )  # fmt: skip


def _frame(env: gymnasium.Env) -> np.ndarray:
    return np.asarray(env.render(), dtype=np.uint8)


def choose(episodes: Sequence[EpisodeResult], count: int) -> list[EpisodeResult]:
    """The ``count`` episodes to watch: failures first (the lowest score leads), up to a quarter successes."""
    failures = sorted((e for e in episodes if not e.success), key=lambda e: e.score)
    successes = [e for e in episodes if e.success]
    kept = max(min(len(successes), count // 4), count - len(failures))
    return [*failures[: count - kept], *successes[:kept]]


@dataclass(frozen=True)
class Clip:
    """A video on disk and how its episode ended."""

    path: Path
    success: bool


def write_grid(path: Path, clips: Sequence[Clip], fps: float, *, columns: int = 4, cell: int = 192) -> int:
    """Write all clips side by side with a green (success) or red border; a clip that ended keeps its last frame.

    Args:
        cell: width and height of one clip in pixels, even.

    Returns:
        The number of frames.
    """
    return write_video(path, _grid_frames(clips, min(columns, len(clips)), cell), fps)


def _grid_frames(clips: Sequence[Clip], columns: int, cell: int) -> Iterator[np.ndarray]:
    grid = np.full((-(-len(clips) // columns) * cell, columns * cell, 3), 255, np.uint8)
    for frames in zip_longest(*(read_video(clip.path) for clip in clips)):
        for i, (clip, frame) in enumerate(zip(clips, frames, strict=True)):
            if frame is None:
                continue
            row, column = divmod(i, columns)
            grid[row * cell : (row + 1) * cell, column * cell : (column + 1) * cell] = _bordered(
                frame, cell, SUCCESS_COLOUR if clip.success else FAILURE_COLOUR
            )
        yield grid


def _bordered(frame: np.ndarray, cell: int, colour: tuple[int, int, int], border: int = 6) -> np.ndarray:
    inner = Image.fromarray(frame).resize((cell - 2 * border,) * 2, Image.Resampling.BOX)
    return np.asarray(ImageOps.expand(inner, border, fill=colour))
