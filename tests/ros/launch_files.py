"""Reading launch files without ROS's launch packages, which pip does not have: modules that record what is described.

The records do what ``launch`` and ``launch_ros`` do as far as the files use it: substitutions become text, parameters
files, and a node a command line.
"""

from __future__ import annotations

import runpy
import sys
import types
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml


@dataclass(frozen=True)
class Context:
    """Where substitutions are performed: arguments, environment, and where packages are installed."""

    arguments: dict[str, str]
    environment: dict[str, str]
    shares: Mapping[str, Path]


def perform(value: Any, context: Context) -> str:
    """The text of a substitution, of text, or of a list of both."""
    if isinstance(value, str):
        return value
    if isinstance(value, (list, tuple)):
        return "".join(perform(part, context) for part in value)
    return value.perform(context)


@dataclass(frozen=True)
class LaunchConfiguration:
    name: str

    def perform(self, context: Context) -> str:
        return context.arguments[self.name]


@dataclass(frozen=True)
class EnvironmentVariable:
    name: str
    default_value: Any = None

    def perform(self, context: Context) -> str:
        found = context.environment.get(self.name)
        return perform(self.default_value, context) if found is None else found


@dataclass(frozen=True)
class FindPackageShare:
    package: str

    def perform(self, context: Context) -> str:
        return str(context.shares[self.package])


@dataclass(frozen=True)
class PathJoinSubstitution:
    parts: list[Any]

    def perform(self, context: Context) -> str:
        return "/".join(perform(part, context) for part in self.parts)


@dataclass(frozen=True)
class ParameterValue:
    value: Any
    value_type: type

    def evaluate(self, context: Context) -> Any:
        text = perform(self.value, context)
        value = text if self.value_type is str else yaml.safe_load(text)
        assert isinstance(value, self.value_type), f"{text!r} is no {self.value_type.__name__}"
        return value


@dataclass(frozen=True)
class DeclareLaunchArgument:
    name: str
    default_value: Any = None
    description: str = ""
    choices: list[str] | None = None


@dataclass(frozen=True)
class SetEnvironmentVariable:
    name: str
    value: Any


@dataclass(frozen=True)
class Node:
    package: str
    executable: str
    name: str
    namespace: Any = ""
    output: str = "log"
    parameters: list[Any] = field(default_factory=list)
    remappings: list[tuple[str, str]] = field(default_factory=list)
    arguments: list[Any] = field(default_factory=list)

    def command_line(self, context: Context, folder: Path) -> list[str]:
        """What launch_ros runs after the executable's path; parameters are written to files in ``folder``."""
        line = [perform(argument, context) for argument in self.arguments]
        line += ["--ros-args", "-r", f"__node:={self.name}"]
        if namespace := perform(self.namespace, context):
            line += ["-r", f"__ns:=/{namespace.strip('/')}"]
        for i, given in enumerate(self.parameters):
            file = folder / f"launch_params_{self.name}_{i}.yaml"
            if isinstance(given, dict):
                values = {k: v.evaluate(context) if isinstance(v, ParameterValue) else v for k, v in given.items()}
                file.write_text(yaml.safe_dump({"/**": {"ros__parameters": values}}))
            else:
                file = Path(perform(given, context))
            line += ["--params-file", str(file)]
        for source, target in self.remappings:
            line += ["-r", f"{source}:={target}"]
        return line


@dataclass(frozen=True)
class LaunchDescription:
    """What a launch file describes."""

    entities: list[Any]

    def of(self, kind: type) -> list[Any]:
        return [entity for entity in self.entities if isinstance(entity, kind)]

    def context(self, given: Mapping[str, str], environment: Mapping[str, str], shares: Mapping[str, Path]) -> Context:
        """Arguments and environment after the description was executed in order."""
        context = Context({}, dict(environment), shares)
        for entity in self.entities:
            if isinstance(entity, DeclareLaunchArgument):
                if entity.name not in given and entity.default_value is None:
                    raise LookupError(f"The launch argument '{entity.name}' is required.")
                context.arguments[entity.name] = given.get(entity.name) or perform(entity.default_value, context)
            elif isinstance(entity, SetEnvironmentVariable):
                context.environment[entity.name] = perform(entity.value, context)
        return context


MODULES: dict[str, tuple[type, ...]] = {
    "launch": (LaunchDescription,),
    "launch.actions": (DeclareLaunchArgument, SetEnvironmentVariable),
    "launch.substitutions": (EnvironmentVariable, LaunchConfiguration, PathJoinSubstitution),
    "launch_ros": (),
    "launch_ros.actions": (Node,),
    "launch_ros.parameter_descriptions": (ParameterValue,),
    "launch_ros.substitutions": (FindPackageShare,),
}


def read_launch_file(path: Path) -> LaunchDescription:
    """What a launch file describes."""
    before = {name: sys.modules.get(name) for name in MODULES}
    try:
        for name, members in MODULES.items():
            module = types.ModuleType(name)
            for member in members:
                setattr(module, member.__name__, member)
            sys.modules[name] = module
        return runpy.run_path(str(path))["generate_launch_description"]()
    finally:
        for name, module in before.items():
            if module is None:
                sys.modules.pop(name)
            else:
                sys.modules[name] = module
