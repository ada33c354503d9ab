"""The launch files: free of logic, so that reading them tells what they would run."""

from __future__ import annotations

import ast
import importlib
import json
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests.ros.conftest import PACKAGE
from tests.ros.launch_files import DeclareLaunchArgument, Node, SetEnvironmentVariable, read_launch_file

pytest.importorskip("rclpy", reason="rclpy is not installed: pip install 'robopolicy[ros]'")

FILES = sorted((PACKAGE / "launch").glob("*.launch.py"))
SHARES = {"robopolicy_ros": PACKAGE}
GIVEN = {"robot": "ur5e", "bundle": "runs/policy", "dataset": "data.zarr", "task": "drawer_close"}
"""Values of the required arguments of all launch files."""


def entry_points() -> dict[str, str]:
    """Executables of setup.py and where they are."""
    tree = ast.parse((PACKAGE / "setup.py").read_text())
    scripts = [c.value for c in ast.walk(tree) if isinstance(c, ast.Constant) and isinstance(c.value, str)]
    return dict(text.split(" = ") for text in scripts if " = robopolicy_ros." in text)


def described(path: Path):
    description = read_launch_file(path)
    required = {a.name for a in description.of(DeclareLaunchArgument) if a.default_value is None}
    given = {name: value for name, value in GIVEN.items() if name in required}
    assert required == set(given), "add values of the new arguments to GIVEN"
    return description, given


def test_there_are_launch_files():
    assert [path.name for path in FILES] == ["policy.launch.py", "record.launch.py", "sim.launch.py"]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_nothing_is_decided_in_a_launch_file(path):
    """Conditions, loops and functions cannot be checked by reading."""
    tree = ast.parse(path.read_text())
    decisions = (ast.If, ast.For, ast.While, ast.IfExp, ast.Lambda, ast.Try, ast.ListComp)
    assert not [node.lineno for node in ast.walk(tree) if isinstance(node, decisions)]
    assert [node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)] == [
        "generate_launch_description"
    ]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_arguments_are_described(path):
    description, _ = described(path)
    arguments = description.of(DeclareLaunchArgument)
    assert arguments and all(len(argument.description) > 5 for argument in arguments)
    with pytest.raises(LookupError, match="required"):
        description.context({}, {}, SHARES)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_executables_exist(path):
    description, _ = described(path)
    nodes, known = description.of(Node), entry_points()
    assert nodes
    for node in nodes:
        assert node.package == "robopolicy_ros"
        module, function = known[node.executable].split(":")
        assert callable(getattr(importlib.import_module(module), function))


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_the_shipped_profile_is_used_unless_there_is_another_one(path):
    description, given = described(path)
    (variable,) = description.of(SetEnvironmentVariable)
    profile = Path(description.context(given, {}, SHARES).environment[variable.name])
    assert variable.name == "FASTDDS_DEFAULT_PROFILES_FILE" and profile == PACKAGE / "config" / "fastdds.xml"
    assert profile.is_file()
    own = description.context(given, {variable.name: "/own.xml"}, SHARES)
    assert own.environment[variable.name] == "/own.xml"


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_parameters_are_declared_and_read(path, tmp_path):
    """The node is started with the command line that launch would run, and asked what it has."""
    description, given = described(path)
    context = description.context(given, {}, SHARES)
    for node in description.of(Node):
        line = node.command_line(context, tmp_path)
        wanted: dict = {}
        for file in [line[i + 1] for i, word in enumerate(line) if word == "--params-file"]:
            (content,) = yaml.safe_load(Path(file).read_text()).values()
            wanted |= flat(content["ros__parameters"])
        module = entry_points()[node.executable].split(":")[0]
        found = declared(module, line, tmp_path)
        assert wanted and set(wanted) <= set(found), set(wanted) - set(found)
        assert {name: found[name] for name in wanted} == wanted
        assert found["__node"] == node.name


def flat(values: dict, prefix: str = "") -> dict:
    found: dict = {}
    for name, value in values.items():
        found |= flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return found


DECLARED = """
import importlib, json, sys
import rclpy
from rclpy.node import Node
module = importlib.import_module(sys.argv[1])
rclpy.init(args=sys.argv)
classes = [value for value in vars(module).values() if isinstance(value, type) and issubclass(value, Node)]
(kind,) = [value for value in classes if value.__module__ == sys.argv[1]]
node = kind()
names = [n for n in node._parameters]
print(json.dumps({n: node.get_parameter(n).value for n in names} | {"__node": node.get_name()}))
"""


def declared(module: str, line: list[str], folder: Path) -> dict:
    """Parameters of a node that was made with a command line, with their values."""

    command = [sys.executable, "-c", DECLARED, module, *line]
    result = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout.splitlines()[-1])


def test_every_key_of_the_shipped_parameter_file_is_a_parameter():
    """With the values that the node has without the file: it documents, it changes nothing."""
    from robopolicy_ros.parameters import PARAMETERS

    shipped = yaml.safe_load((PACKAGE / "config" / "policy_node.yaml").read_text())
    values = flat(shipped["/**"]["ros__parameters"])
    defaults = {parameter.name: parameter.default for parameter in PARAMETERS}
    assert values == {name: defaults[name] for name in values}
    arguments = {"robot", "bundle", "engine", "dry_run"}  # of the launch file, which win
    assert set(defaults) - set(values) == arguments


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_remapped_topics_are_in_the_contract(path):
    from robopolicy.runtime.robots import read_robot

    description, given = described(path)
    for node in description.of(Node):
        if node.remappings:
            contract = read_robot(given["robot"]).contract
            topics = {s.topic for s in contract.streams.values()} | {c.topic for c in contract.commands.values()}
            assert {target for _, target in node.remappings} <= topics


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_the_documented_command_names_arguments_that_exist(path):
    description = read_launch_file(path)
    said = ast.get_docstring(ast.parse(path.read_text())) or ""
    words = shlex.split(said.split("``")[1])
    assert words[:4] == ["ros2", "launch", "robopolicy_ros", path.name]
    names = {argument.name for argument in description.of(DeclareLaunchArgument)}
    assert {word.split(":=")[0] for word in words[4:]} <= names


@pytest.mark.skipif(shutil.which("ros2") is None, reason="there is no ros2 command here: launch is not on PyPI")
@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_ros2_launch_reads_them(path):
    result = subprocess.run(["ros2", "launch", str(path), "--show-args"], capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stderr
