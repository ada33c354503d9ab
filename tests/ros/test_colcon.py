"""The package as ROS users build it: colcon, and the installed executable with the command line that launch runs."""

from __future__ import annotations

import os
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.ros.conftest import BENCH, REPOSITORY
from tests.ros.launch_files import Node, read_launch_file

pytest.importorskip("rclpy", reason="rclpy is not installed: pip install 'robopolicy[ros]'")
COLCON = Path(sys.executable).with_name("colcon")
pytestmark = pytest.mark.skipif(not COLCON.exists(), reason="there is no colcon: pip install colcon-common-extensions")

TIMEOUT = 120
FAILING = "def test_that_fails():\n    assert False\n"


def environment() -> dict[str, str]:
    """With this Python first, so that executables are made for it."""
    return {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}


def colcon(workspace: Path, *words: str) -> subprocess.CompletedProcess:
    """Run colcon in a workspace; what it writes stays there."""
    command = [str(COLCON), "--log-base", str(workspace / "log"), *words]
    return subprocess.run(
        command, cwd=workspace, env=environment(), capture_output=True, text=True, timeout=TIMEOUT, check=False
    )


def bases(workspace: Path) -> list[str]:
    return ["--build-base", str(workspace / "build"), "--install-base", str(workspace / "install")]


@pytest.fixture(scope="module")
def workspace(tmp_path_factory):
    """A copy of the workspace, built."""
    workspace = tmp_path_factory.mktemp("ros_ws")
    shutil.copytree(REPOSITORY / "ros_ws" / "src", workspace / "src", ignore=shutil.ignore_patterns("__pycache__"))
    built = colcon(workspace, "build", *bases(workspace))
    assert built.returncode == 0, built.stdout + built.stderr
    return workspace


def run_installed(workspace: Path, line: list[str], **more) -> subprocess.Popen:
    """The installed executable in a shell that sourced the workspace."""
    words = f". {workspace}/install/setup.bash && exec {shlex.join(line)}"
    return subprocess.Popen(["bash", "-c", words], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, **more)


def test_colcon_takes_it_for_a_ros_package(workspace):
    """With a package.xml that is not valid it would build plain Python, and ros2 would not find it."""
    install = workspace / "install" / "robopolicy_ros"
    share = install / "share"
    assert (share / "ament_index" / "resource_index" / "packages" / "robopolicy_ros").is_file()
    assert (share / "robopolicy_ros" / "package.xml").is_file()
    hooks = [path.name for path in (share / "robopolicy_ros" / "hook").iterdir()]
    assert "ament_prefix_path.sh" in hooks
    listed = colcon(workspace, "list")
    assert "(ros.ament_python)" in listed.stdout


def test_every_file_is_installed(workspace):
    install = workspace / "install" / "robopolicy_ros"
    package, found = workspace / "src" / "robopolicy_ros", install / "share" / "robopolicy_ros"
    for folder in ("launch", "config"):
        shipped = [p.relative_to(package) for p in (package / folder).rglob("*") if p.is_file() and p.suffix != ".pyc"]
        assert shipped and all((found / path).read_bytes() == (package / path).read_bytes() for path in shipped)
    scripts = {path.name for path in (install / "lib" / "robopolicy_ros").iterdir()}
    assert {"policy_node", "monitor_node", "recorder_node", "sim_robot_node", "teleop_node"} <= scripts


def test_colcon_test_runs_the_packages_tests_and_fails_when_they_fail(workspace):
    asked = ["test", *bases(workspace), "--python-testing", "pytest", "--return-code-on-test-failure"]
    tested = colcon(workspace, *asked)
    result = colcon(workspace, "test-result", "--test-result-base", str(workspace / "build"), "--all", "--verbose")
    assert tested.returncode == 0, result.stdout + tested.stdout
    count = int(result.stdout.split("Summary: ")[1].split()[0])
    assert count >= 5 and "0 errors, 0 failures" in result.stdout
    failing = workspace / "src" / "robopolicy_ros" / "test" / "test_failing.py"
    failing.write_text(FAILING)
    try:
        assert colcon(workspace, *asked, "--pytest-args", "-k", "that_fails").returncode != 0
    finally:
        failing.unlink()


def test_the_installed_executable_with_the_command_line_of_the_launch_file(workspace, bench_bundle, tmp_path):
    """It configures, activates, answers, and ends with code 0 on Ctrl-C, from the installed modules."""
    share = workspace / "install" / "robopolicy_ros" / "share" / "robopolicy_ros"
    description = read_launch_file(share / "launch" / "policy.launch.py")
    given = {"robot": str(BENCH), "bundle": str(bench_bundle()), "namespace": "left", "dry_run": "true"}
    context = description.context(given, {}, {"robopolicy_ros": share})
    (node,) = description.of(Node)
    executable = workspace / "install" / "robopolicy_ros" / "lib" / node.package / node.executable
    line = [str(executable), *node.command_line(context, tmp_path)]
    assert line[1:5] == ["--ros-args", "-r", "__node:=policy", "-r"] and line[5] == "__ns:=/left"
    process = run_installed(workspace, line, env=environment() | context.environment)
    said = ""
    assert process.stdout is not None
    try:
        for row in process.stdout:
            said += row
            if "Ready; commands go to ~/shadow/" in row:
                break
        process.send_signal(signal.SIGINT)
        said += process.communicate(timeout=TIMEOUT)[0]
    finally:
        process.kill()
    assert process.returncode == 0, said
    assert f"Profile of Fast DDS: {share}/config/fastdds.xml" in said and "[left.policy]" in said


def test_ros_finds_the_installed_modules_first(workspace):
    """Not those of the checkout, which the environment has as well."""
    code = "import robopolicy_ros; print(robopolicy_ros.__file__)"
    process = run_installed(workspace, [sys.executable, "-c", code], env=environment())
    said = process.communicate(timeout=TIMEOUT)[0]
    assert said.strip().startswith(str(workspace / "install")), said
