from __future__ import annotations

import logging
from dataclasses import replace

import av
import numpy as np
import pytest

from robopolicy.evaluation.environments import PUSHT
from robopolicy.evaluation.episode import EpisodeResult
from robopolicy.evaluation.rollout import rollout
from robopolicy.evaluation.video import Clip, choose, read_video, replay, write_grid, write_video


def solid(colour, count, size=(64, 64)):
    return [np.full((*size, 3), colour, np.uint8)] * count


def test_a_video_keeps_its_frames_and_rate(tmp_path):
    path = tmp_path / "a.mp4"
    ramp = [np.full((63, 97, 3), 40 * i, np.uint8) for i in range(6)]
    assert write_video(path, ramp, fps=10) == 6
    frames = list(read_video(path))
    assert [f.shape for f in frames] == [(62, 96, 3)] * 6
    np.testing.assert_allclose([f.mean() for f in frames], [40 * i for i in range(6)], atol=4)
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        assert (stream.codec_context.name, stream.codec_context.pix_fmt, stream.average_rate) == ("h264", "yuv420p", 10)


def test_a_grid_borders_by_outcome_and_holds_the_last_frame(tmp_path):
    short, long = tmp_path / "short.mp4", tmp_path / "long.mp4"
    write_video(short, solid((250, 250, 250), 2), 10)
    write_video(long, solid((10, 10, 10), 5), 10)
    write_grid(tmp_path / "grid.mp4", [Clip(short, False), Clip(long, True)], 10, cell=96)
    frames = list(read_video(tmp_path / "grid.mp4"))
    assert len(frames) == 5 and frames[0].shape == (96, 192, 3)
    last = frames[-1].astype(int)
    assert last[48, 48].min() > 230, "the clip that ended stays"
    assert last[48, 144].max() < 30
    red, green = last[48, 1], last[48, 98]
    assert red[0] > red[1] + 80 and green[1] > green[0] + 80


def episode(seed, score, success):
    return EpisodeResult(seed, score, success, 1, score, 0.1, np.zeros((1, 2), np.float32))


@pytest.mark.parametrize(
    ("failures", "successes", "count", "expected"),
    [(10, 10, 4, (3, 1)), (10, 0, 4, (4, 0)), (1, 10, 4, (1, 3)), (0, 2, 4, (0, 2)), (5, 5, 0, (0, 0))],
)
def test_failures_are_chosen_first(failures, successes, count, expected):
    episodes = [episode(i, 0.9 - i / 100, False) for i in range(failures)]
    episodes += [episode(100 + i, 1.0, True) for i in range(successes)]
    chosen = choose(episodes, count)
    assert (sum(not e.success for e in chosen), sum(e.success for e in chosen)) == expected
    scores = [e.score for e in chosen]
    assert scores == sorted(scores)


def test_a_replay_shows_the_episode_that_was_played(pusher, caplog):
    (played,) = rollout(pusher, replace(PUSHT, max_steps=25), [100_001], progress=False)
    with caplog.at_level(logging.WARNING):
        frames = list(replay(PUSHT, pusher.spec, played))
    assert not [record for record in caplog.records if record.levelname == "WARNING"]
    assert len(frames) == 26 and not np.array_equal(frames[0], frames[-1])


def test_a_replay_that_goes_otherwise_is_reported(pusher, caplog):
    (played,) = rollout(pusher, replace(PUSHT, max_steps=5), [100_001], progress=False)
    with caplog.at_level(logging.WARNING):
        list(replay(PUSHT, pusher.spec, replace(played, score=0.77)))
    assert "does not show what happened" in caplog.text
