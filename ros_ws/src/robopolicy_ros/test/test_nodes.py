"""What `colcon test` runs: the installed package is whole. The behaviour is tested in robopolicy's own tests."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import entry_points
from pathlib import Path

import pytest
import rclpy
from rclpy.node import Node

EXECUTABLES = {point.name: point for point in entry_points(group="console_scripts") if "robopolicy_ros" in point.value}
PACKAGE = Path(__file__).parents[1]


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """On this machine, in a domain of this process."""
    monkeypatch.setenv("ROS_AUTOMATIC_DISCOVERY_RANGE", "LOCALHOST")
    rclpy.init(domain_id=1 + os.getpid() % 100)
    yield
    rclpy.shutdown()


def test_the_executables_are_those_of_setup_py() -> None:
    written = (PACKAGE / "setup.py").read_text()
    assert {"policy_node", "sim_robot_node", "recorder_node", "teleop_node"} <= set(EXECUTABLES)
    assert all(f'"{name} = {point.value}"' in written for name, point in EXECUTABLES.items())


@pytest.mark.parametrize("name", sorted(EXECUTABLES))
def test_every_executable_can_be_imported(name: str) -> None:
    assert callable(EXECUTABLES[name].load())


def test_the_policy_node_declares_described_parameters_and_serves() -> None:
    module = importlib.import_module("robopolicy_ros.policy_node")
    parameters = importlib.import_module("robopolicy_ros.parameters")
    node: Node = module.PolicyNode()
    try:
        for parameter in parameters.PARAMETERS:
            about = node.describe_parameter(parameter.name)
            assert about.description and node.get_parameter(parameter.name).value == parameter.default
        services = {name for name, _ in node.get_service_names_and_types_by_node("policy", "/")}
        assert {f"/policy/{name}" for name in ("start", "stop", "hold", "estop", "reset_fault")} <= services
        assert "/policy/change_state" in services
    finally:
        node.destroy_node()


def test_launch_files_and_the_profile_are_installed() -> None:
    """Where the package was built; in a source checkout they lie beside the modules."""
    prefixes = [Path(p) for p in os.environ.get("AMENT_PREFIX_PATH", "").split(os.pathsep) if p]
    shares = [p / "share" / "robopolicy_ros" for p in prefixes if (p / "share" / "robopolicy_ros").is_dir()]
    share = shares[0] if shares else PACKAGE
    assert (share / "launch" / "policy.launch.py").is_file() and (share / "config" / "fastdds.xml").is_file()


def test_a_node_without_a_robot_says_what_is_missing() -> None:
    """As a process: exit code 2 and one sentence."""
    command = [sys.executable, "-m", "robopolicy_ros.policy_node"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert result.returncode == 2 and "parameter 'robot' is not set" in result.stdout + result.stderr
