"""The network between robot and policy is cut for real."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.ros.conftest import REPOSITORY

pytest.importorskip("rclpy", reason="rclpy is not installed: pip install 'robopolicy[ros]'")


def permitted() -> bool:
    """Whether two networks with a cable between them can be made here."""
    if not all(map(shutil.which, ("unshare", "nsenter", "ip"))):
        return False
    cable = ["unshare", "-rn", "ip", "link", "add", "robot0", "type", "veth", "peer", "name", "policy0"]
    return subprocess.run(cable, capture_output=True, check=False).returncode == 0


@pytest.mark.skipif(not permitted(), reason="this machine permits no networks of one's own: unshare -rn, veth")
def test_a_pulled_cable(bench_bundle: Callable[..., Path], tmp_path: Path) -> None:
    """The policy node stops with a fault, the arm ends its last trajectory at rest, nothing late moves it."""
    command = ["unshare", "-rn", sys.executable, "-m", "tests.ros.two_machines", str(bench_bundle()), str(tmp_path)]
    done = subprocess.run(
        command, cwd=REPOSITORY, env=dict(os.environ), capture_output=True, text=True, timeout=180, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["before"] == "running" and found["refused"] and found["after"] == "running"
    assert found["late"] == 0 and found["moved"] == 0.0, found
    assert not found["violations"], found
