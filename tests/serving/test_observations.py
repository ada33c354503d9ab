"""From frames to what the policy takes: names, shapes, histories, and the errors."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from robopolicy.errors import UserError
from robopolicy.serving.observations import History, Request
from tests.serving.conftest import SPEC, TASK_SPEC, state, task_frame

LONG = replace(SPEC, n_obs_steps=3)


def column(request: Request) -> list[float]:
    """First entry of the state, row by row."""
    return request.observations["observation.state"][0, :, 0].tolist()


def test_the_history_grows_from_the_first_observation() -> None:
    history = History(LONG)
    assert [column(history.request(state(i, 0))) for i in (1, 2, 3, 4)] == [[1, 1, 1], [1, 1, 2], [1, 2, 3], [2, 3, 4]]


def test_reset_forgets_the_episode() -> None:
    history = History(LONG)
    history.request(state(1, 0))
    assert column(history.request(state(5, 0) | {"reset": True})) == [5, 5, 5]
    assert column(history.request(state(6, 0) | {"reset": False})) == [5, 5, 6]


def test_labels_choose_the_nearest_observation() -> None:
    history = History(LONG)
    labelled = [(10, 1), (12, 2), (13, 3), (33, 4)]
    seen = [column(history.request(state(value, 0) | {"timestep": label})) for label, value in labelled]
    # 10, 11, 12: nearest to 11 is 10, the older of two; 31, 32, 33: nothing else is near
    assert seen == [[1, 1, 1], [1, 1, 2], [1, 2, 3], [4, 4, 4]]


def test_a_label_that_does_not_grow_begins_an_episode() -> None:
    history = History(LONG)
    for label in (5, 6, 7):
        history.request(state(label, 0) | {"timestep": label})
    assert column(history.request(state(1, 0) | {"timestep": 0})) == [1, 1, 1]


def test_a_whole_history_is_taken_as_it_is_and_remembered() -> None:
    history = History(LONG)
    rows = np.array([[7, 0], [8, 0], [9, 0]], np.float64)
    assert column(history.request({"observation.state": rows})) == [7, 8, 9]
    assert column(history.request(state(10, 0))) == [9, 9, 10]


def test_a_refused_frame_leaves_no_trace() -> None:
    history = History(LONG)
    history.request(state(1, 0))
    with pytest.raises(UserError):
        history.request(state(2, 0) | {"seed": -1})
    assert column(history.request(state(3, 0))) == [1, 1, 3]


@pytest.mark.parametrize(
    "changes",
    [
        lambda f: f,
        lambda f: {k.replace(".", "/"): v for k, v in f.items()},
        lambda f: {
            "observation": {"state": f["observation.state"], "image": {"top": f["observation.image.top"]}},
            "goal": {"observation": {"state": f["goal.observation.state"]}},
            "prompt": f["instruction"],
        },
    ],
    ids=["joined", "slashes", "nested"],
)
def test_names_may_be_joined_or_nested(changes) -> None:
    found = History(TASK_SPEC).request(changes(task_frame())).observations
    assert found["observation.image.top"].shape == (1, 2, 36, 48, 3)
    assert found["observation.image.top"].dtype == np.uint8
    assert found["goal.observation.state"].tolist() == [[1, 1]]
    assert found["instruction"] == ["push the cup"]


def test_options_reach_the_request() -> None:
    previous, mask = np.ones((8, 2)), np.linspace(0, 1, 8)
    options = {"timestep": np.int64(4), "full": True, "previous": previous, "mask": mask, "seed": 3}
    request = History(SPEC).request(state(1, 2) | options)
    assert (request.timestep, request.full, request.seed) == (4, True, 3)
    assert request.previous.shape == (1, 8, 2) and request.previous.dtype == np.float32
    assert request.mask.shape == (1, 8) and request.mask[0, -1] == 1


@pytest.mark.parametrize(
    ("frame", "message"),
    [
        ([1, 2], "a map of observations, found list"),
        ({}, "lacks 'observation.image.top'|lacks 'observation.state'"),
        ({b"observation.state": 1}, "names in a request are texts"),
        (task_frame(**{"observation.stat": 1}), "Did you mean 'observation.state'"),
        (task_frame(**{"observation.state": np.zeros(3)}), r"found shape \(3,\), wanted \(2,\) .*or \(2, 2\)"),
        (task_frame(**{"observation.state": [0.0, 0.0]}), "found list, wanted an array"),
        (task_frame(**{"observation.state": np.array([0, np.nan])}), "NaN or infinite"),
        (task_frame(**{"observation.state": np.array([0, 1e300])}), "NaN or infinite"),
        (task_frame(**{"observation.image.top": np.zeros((36, 48, 3), np.float32)}), "found float32, wanted uint8"),
        (task_frame(**{"observation.image.top": np.zeros((48, 36, 3), np.uint8)}), r"found shape \(48, 36, 3\)"),
        (task_frame(**{"goal.observation.state": np.zeros((1, 2))}), r"goal.observation.state: found shape \(1, 2\)"),
        (task_frame(instruction=3), "needs a text"),
        (task_frame(prompt="push the cup"), "needs a text"),
        (task_frame(timestep=1.5), "timestep: found '1.5'"),
        (task_frame(timestep=True), "timestep: found 'True'"),
        (task_frame(timestep=2**60), "whole number"),
        (task_frame(seed=-1), "seed"),
        (task_frame(reset=1), "reset: found '1', wanted true or false"),
        (task_frame(mask=np.zeros(8)), "belong together"),
        (task_frame(previous=np.zeros((7, 2)), mask=np.zeros(8)), r"previous: found shape \(7, 2\), wanted \(8, 2\)"),
        (task_frame(previous=np.zeros((8, 2)), mask=np.full(8, 1.5)), r"0\.\.1"),
    ],
)
def test_mistakes(frame, message: str) -> None:
    with pytest.raises(UserError, match=message):
        History(TASK_SPEC).request(frame)


def test_a_policy_that_is_not_told_what_to_do() -> None:
    with pytest.raises(UserError, match="leave 'instruction' and 'prompt' out"):
        History(SPEC).request(state(1, 2) | {"prompt": "push the cup"})
    without = {k: v for k, v in task_frame().items() if not k.startswith("goal")}
    with pytest.raises(UserError, match="lacks the goal 'goal.observation.state'"):
        History(TASK_SPEC).request(without)
