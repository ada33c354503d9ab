"""The environment that a policy is judged in, from what its dataset says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from robopolicy.data.edit import merge
from robopolicy.data.schema import ArraySpec
from robopolicy.data.store import EpisodeStore
from robopolicy.errors import UserError
from robopolicy.training.dataset import TaskConfig, TaskKey, task_environment

JOINTS = {"env_id": "robopolicy_sim/Lift-v0", "environment_options": {"control": "joint_position"}}


def dataset(path: Path, attributes: dict[str, Any]) -> Path:
    arrays = [ArraySpec("observation.state", (2,), "float32", "state"), ArraySpec("action", (2,), "float32", "action")]
    with EpisodeStore.create(path, arrays, fps=20, attributes=attributes) as store:
        store.append({"observation.state": np.zeros((3, 2), "float32"), "action": np.zeros((3, 2), "float32")})
    return path


def world_of(path: Path, environment: str = "dataset", **options: Any) -> tuple[str, dict[str, Any]]:
    keys = TaskKey("observation.state"), TaskKey("action")
    task = TaskConfig("arm", (keys[0],), keys[1], environment=environment, environment_options=options)
    with EpisodeStore.open(path) as store:
        return task_environment(task, store)


def merged(folder: Path, *attributes: dict[str, Any]) -> Path:
    parts = [dataset(folder / f"{i}.zarr", each) for i, each in enumerate(attributes)]
    merge(folder / "all.zarr", parts)
    return folder / "all.zarr"


def test_the_recording_says_it_and_the_task_adds_options(tmp_path: Path) -> None:
    path = dataset(tmp_path / "d.zarr", JOINTS)
    assert world_of(path, action_latency=0.1) == (
        "robopolicy_sim/Lift-v0",
        {"control": "joint_position", "action_latency": 0.1},
    )
    assert world_of(path, "reach") == ("reach", {})


def test_merged_recordings_of_one_environment_still_say_it(tmp_path: Path) -> None:
    path = merged(tmp_path, JOINTS, JOINTS | {"noise": 0.03}, JOINTS | {"source": "teleoperation"})
    assert world_of(path) == ("robopolicy_sim/Lift-v0", {"control": "joint_position"})


@pytest.mark.parametrize(
    ("others", "message"),
    [
        ({"env_id": "robopolicy_sim/Lift-v0"}, "was recorded in several environments"),
        ({"source": "a robot"}, "several environments"),
    ],
)
def test_merged_recordings_that_differ_do_not(tmp_path: Path, others: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        world_of(merged(tmp_path, JOINTS, others))


def test_a_recording_of_unknown_origin(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="does not say in which environment.*task.environment=''"):
        world_of(dataset(tmp_path / "d.zarr", {}))
