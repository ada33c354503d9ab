"""The README's way over ROS 2, short: record over DDS, train, export, let `policy_node` drive the simulated robot.

The nodes are processes of their own, as on a robot; nothing is replaced.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from robopolicy.cli.main import main
from robopolicy.data.store import EpisodeStore
from tests.ros_domain import domain_environment

pytest.importorskip("rclpy", reason="ROS 2 is not installed: pip install 'robopolicy[ros]'")

REPOSITORY = Path(__file__).resolve().parents[2]
ROBOT = REPOSITORY / "ros_ws/src/robopolicy_ros/config/sim_ur5e_drawer_close"
SMALL = "train.steps=30 train.batch_size=32 train.threads=1 train.tensorboard=false policy.config.width=32"


def tool(name: str, *arguments: str) -> str:
    """Run a tool of robopolicy_ros on a ROS domain of its own; returns what it prints."""
    environment = os.environ | domain_environment() | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", f"robopolicy_ros.{name}", *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_record_train_export_and_drive_over_ros(tmp_path: Path) -> None:
    data, run = tmp_path / "ros.zarr", tmp_path / "run"
    out = tool("collect", "--robot", str(ROBOT), "--dataset", str(data), "--demonstrations", "3")
    assert "3 played" in out
    with EpisodeStore.open(data) as store:
        assert store.n_episodes >= 2 and all(store.episode_success)
        assert store.fps == 20 and (store.episode_lengths > 20).all()
        assert set(store.tasks) <= {"close the left drawer", "close the right drawer"}
    words = f"train task=arm_state task.name=drawer policy=diffusion_mlp data.path={data} out={run} {SMALL}"
    place = ("task.environment=drawer_close_ur5e", "+task.environment_options.control=joint_position")
    assert main([*words.split(), *place]) == 0
    bundle = run / "bundles/last"
    assert main(["export", f"bundle={bundle}", "backend=onnxruntime", "observations=8"]) == 0
    result = tmp_path / "success.json"
    out = tool(
        "evaluate",
        *("--robot", str(ROBOT), "--bundle", str(bundle), "--episodes", "2", "--time-limit", "3"),
        *("--out", str(result)),
    )
    played = json.loads(result.read_text())["played"]
    assert [episode["seed"] for episode in played] == [100_000, 100_001]
    # thirty updates teach nothing, but the arm moved until the time was over, or the policy was stopped for a reason
    assert all(episode["ended"] for episode in played), out
