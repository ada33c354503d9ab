"""``robopolicy identify`` and ``robopolicy identify-camera``: what they print, write and refuse."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("robopolicy_sim")

import gymnasium  # noqa: E402

from robopolicy.cli import identify  # noqa: E402
from robopolicy.data.record import record_demonstrations  # noqa: E402
from robopolicy.data.store import EpisodeStore  # noqa: E402
from robopolicy.errors import UserError  # noqa: E402
from robopolicy_sim.matching.camera import project  # noqa: E402
from robopolicy_sim.matching.robot_parameters import RobotParameters  # noqa: E402

HIDDEN = {
    "stiffness": [2500.0, 3000.0, 2000.0, 1800.0, 1200.0, 1500.0, 1100.0],
    "damping": [500.0, 400.0, 380.0, 300.0, 230.0, 260.0, 180.0],
    "action_latency": 0.05,
}


def run(*words: object) -> int:
    parser = argparse.ArgumentParser()
    identify.add_parser(parser.add_subparsers(required=True))
    args = parser.parse_args([str(word) for word in words])
    return args.run(args)


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Recordings of a robot that follows commands otherwise than the simulated one."""
    path = tmp_path_factory.mktemp("real") / "real.zarr"
    options = {"robot_parameters": HIDDEN, "control": "joint_position"}
    record_demonstrations("robopolicy_sim/Reach-v0", path, episodes=3, options=options, progress=False)
    return path


def test_identify_writes_parameters_that_tasks_take(real: Path, tmp_path: Path, capsys) -> None:
    out = tmp_path / "new" / "robot.json"
    assert run("identify", real, "--task", "reach", "--out", out, "--steps", 60, "--workers", 1) == 0
    written = json.loads(out.read_text())
    assert written["arm"] == "panda"
    assert written["control"] == "joint_position"  # as the dataset says
    assert written["control_hz"] == 20
    assert len(written["data"]["fitted_episodes"]) == 2
    assert len(written["data"]["held_out_episodes"]) == 1
    with EpisodeStore.open(real) as store:
        assert written["data"]["fingerprint"] == store.fingerprint()
    error = written["error"]
    assert error["held_out_after"]["loss"] < error["held_out_before"]["loss"] / 2
    text = capsys.readouterr().out
    assert f"{error['held_out_before']['position'] * 1e3:.2f} mm" in text
    assert f"{error['held_out_after']['rotation'] * 1e3:.2f} mrad" in text
    assert "1 held-out episodes" in text
    assert "latency: " in text

    option = {"file": str(out)}
    env = gymnasium.make("robopolicy_sim/Lift-v0", disable_env_checker=True, robot_parameters=option).unwrapped
    found = RobotParameters.of_model(env.model, env.arm)
    np.testing.assert_allclose(found.stiffness, written["robot_parameters"]["stiffness"])
    with pytest.raises(ValueError, match="about the arm 'panda', but this is 'ur5e'"):
        gymnasium.make("robopolicy_sim/LiftUr5e-v0", disable_env_checker=True, robot_parameters=option)


def test_identify_refuses_what_does_not_fit(real: Path, tmp_path: Path) -> None:
    out = tmp_path / "robot.json"
    with pytest.raises(UserError, match="the state of the arm 'ur5e' is joint1"):
        run("identify", real, "--task", "lift_ur5e", "--out", out)
    with pytest.raises(UserError, match="The task 'push_puck' has no arm"):
        run("identify", real, "--task", "push_puck", "--out", out)
    with pytest.raises(UserError, match="have 8 entries, control='ee_pose' of 'panda' takes 10"):
        run("identify", real, "--task", "reach", "--out", out, "--control", "ee_pose", "--workers", 1)
    with pytest.raises(UserError, match="--steps is 3, wanted at least 50"):
        run("identify", real, "--task", "reach", "--out", out, "--steps", 3)
    assert not out.exists()


def test_identify_refuses_actions_that_were_not_executed(tmp_path: Path) -> None:
    record_demonstrations(
        "robopolicy_sim/Reach-v0", tmp_path / "noisy.zarr", episodes=1, noise=0.02, keep_failures=True, progress=False
    )
    with pytest.raises(UserError, match="recorded with noise 0.02"):
        run("identify", tmp_path / "noisy.zarr", "--task", "reach", "--out", tmp_path / "robot.json")


def test_episodes_to_judge_on_are_never_fitted() -> None:
    for count in (1, 2, 3, 10, 500):
        fitted, held_out = identify.choose_episodes(count, 12, 6, seed=1)
        assert 1 <= len(fitted) <= 12
        assert len(held_out) == min(6, count // 3)
        assert not {*fitted} & {*held_out}


def test_identify_camera_writes_an_option_of_tasks(tmp_path: Path, capsys) -> None:
    points = np.random.default_rng(0).uniform([0.2, -0.3, 0], [0.8, 0.3, 0.2], (8, 3))
    right, up = np.array([0.8, 0.6, 0.0]), np.array([-0.36, 0.48, 0.8])
    rotation = np.column_stack([right, up, np.cross(right, up)])
    pixels = project(points, np.array([0.9, -0.8, 0.9]), rotation, 45.0, (480, 640))
    rows = [",".join(map(str, row)) for row in np.column_stack([points, pixels])]
    (tmp_path / "points.csv").write_text("\n".join(["x,y,z,u,v", *rows]))
    out = tmp_path / "camera.json"
    assert run("identify-camera", tmp_path / "points.csv", "--size", "640x480", "--out", out) == 0
    assert "8 points, root mean square error 0.00 pixels" in capsys.readouterr().out
    poses = json.loads(out.read_text())["camera_poses"]
    env = gymnasium.make("robopolicy_sim/Lift-v0", disable_env_checker=True, camera_poses=poses).unwrapped
    env.reset(seed=0)
    np.testing.assert_allclose(env.data.camera("scene").xpos - env.base_position, [0.9, -0.8, 0.9], atol=1e-4)
    assert env.model.camera("scene").fovy[0] == pytest.approx(45.0, abs=1e-3)


@pytest.mark.parametrize(
    ("content", "size", "message"),
    [
        ("x,y,z,u\n1,2,3,4\n", "640x480", "points.csv: wanted the columns x,y,z,u,v with numbers; found 'v'"),
        ("x,y,z,u,v\n1,2,3,4,here\n", "640x480", "points.csv: wanted the columns"),
        ("x,y,z,u,v\n1,2,3,4,5\n", "640x480", "points.csv: A camera needs at least 6 points"),
        ("x,y,z,u,v\n", "640", "--size is '640', wanted WIDTHxHEIGHT"),
    ],
)
def test_identify_camera_refuses(content: str, size: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "points.csv").write_text(content)
    with pytest.raises(UserError, match=message):
        run("identify-camera", tmp_path / "points.csv", "--size", size, "--out", tmp_path / "camera.json")
