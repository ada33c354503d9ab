"""The parameters of the policy node: what they mean, what they may be, and which may change while it runs."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from rcl_interfaces.msg import FloatingPointRange, IntegerRange, ParameterDescriptor
from rclpy.node import Node

from robopolicy.configuration import dataclass_from
from robopolicy.errors import UserError
from robopolicy.inference.observations import task_indices
from robopolicy.runtime.chunk_scheduler import SchedulerSettings
from robopolicy.runtime.runner import RunnerSettings
from robopolicy.runtime.settings import SCHEDULERS
from robopolicy.runtime.settings import scheduler_settings as settings_of
from robopolicy.spec import KeySpec, PolicySpec

Value = str | int | float | bool


@dataclass(frozen=True)
class Parameter:
    """One parameter.

    Attributes:
        name: dots group.
        default: its type is the parameter's.
        description: for people.
        range: smallest and largest value of numbers.
        constraint: what texts may be, for people.
        live: may change while the node is configured.
        fixed: is read once, when the process starts.
    """

    name: str
    default: Value
    description: str
    range: tuple[float, float] | None = None
    constraint: str = ""
    live: bool = False
    fixed: bool = False

    def descriptor(self) -> ParameterDescriptor:
        about = ParameterDescriptor(
            name=self.name,
            description=self.description,
            additional_constraints=self.constraint,
            read_only=self.fixed,
        )
        if self.range and isinstance(self.default, float):
            low, high = self.range
            about.floating_point_range = [FloatingPointRange(from_value=low, to_value=high, step=0.0)]
        elif self.range:
            low, high = map(int, self.range)
            about.integer_range = [IntegerRange(from_value=low, to_value=high, step=1)]
        return about


PARAMETERS = (
    Parameter("robot", "", "name of an arm (fr3, ur5e, so101) or folder of its contract.yaml and safety.yaml"),
    Parameter("bundle", "", "folder of the policy"),
    Parameter("engine", "", "of the bundle, or torch, torch-compile, torch-rtc; empty: the only engine, else torch"),
    Parameter("allow_native_code", False, "load engines of AOTInductor, which are native code; only your own ones"),
    Parameter("threads", 1, "CPU threads of inference; leave one core to the command loop", (1, 256)),
    Parameter("scheduler.name", "rtc", "how action chunks are executed", constraint=f"one of {', '.join(SCHEDULERS)}"),
    Parameter("scheduler.mode", "soft", "of rtc: how chunks are made to agree", constraint="soft, vjp or prefix"),
    Parameter("scheduler.execute", 0, "steps of each chunk until the next; 0: the policy's n_action_steps", (0, 1000)),
    Parameter(
        "scheduler.beta",
        -1.0,
        "of rtc, mode=vjp: largest weight of the guidance; 0: none; -1: the number of network calls",
        (-1.0, 1000.0),
    ),
    Parameter("scheduler.warm_start", 0, "of rtc, mode=vjp: network calls that the chunk before saves", (0, 1000)),
    Parameter("scheduler.settle", 0.1, "of synchronous: seconds at rest before the next observation", (0.0, 10.0)),
    Parameter("scheduler.coefficient", 0.01, "of temporal_ensembling: above 0 older chunks weigh more", (-10.0, 10.0)),
    Parameter("scheduler.every", 1, "of temporal_ensembling: steps between observations that are used", (1, 1000)),
    Parameter("scheduler.delay.window", 10, "newest measured delays that count", (1, 10000)),
    Parameter("scheduler.delay.percentile", 100.0, "of these that is expected; 100: their largest", (0.0, 100.0)),
    Parameter("lookahead", 0.1, "seconds ahead at which the plan is aimed at; longer is smoother", (0.001, 1.0)),
    Parameter("seed", 0, "of the policy's noise", (0, 2**31 - 1)),
    Parameter(
        "speed_scale",
        1.0,
        "factor on the velocities of safety.yaml, start low; it clips speeds: a path is cut, not stretched in time",
        (0.01, 1.0),
    ),
    Parameter("resume_after_intervention", False, "go on when a person lets go; otherwise hold until started again"),
    Parameter("intervention_timeout", 0.25, "seconds without a target after which a person has let go", (0.01, 60.0)),
    Parameter("dry_run", False, "publish commands below ~/shadow/ and nowhere else"),
    Parameter("instruction", "", "what to do, for policies with tasks", live=True),
    Parameter(
        "goal",
        "",
        "for goal-conditioned policies",
        constraint="YAML, by key: numbers in the key's unit, or an image file; {observation.state: [0.1, 0.2]}",
        live=True,
    ),
    Parameter("configure_timeout", 120.0, "seconds until the policy must be loaded and warm", (1.0, 3600.0)),
    Parameter("extra_delay", 0.0, "seconds by which inference is made slower, for experiments", (0.0, 60.0)),
    Parameter("auto_start", False, "let the policy drive as soon as everything is ready, without ~/start", live=True),
    Parameter("auto_activate", True, "configure and activate at once, without a lifecycle manager", fixed=True),
)


def declare(node: Node) -> None:
    """Declare all parameters, with their descriptions and ranges."""
    for parameter in PARAMETERS:
        node.declare_parameter(parameter.name, parameter.default, parameter.descriptor())


def read(node: Node) -> dict[str, Value]:
    """The values by name."""
    return {parameter.name: node.get_parameter(parameter.name).value for parameter in PARAMETERS}


def refusal(changes: Iterable[str], configured: bool) -> str:
    """Why parameters may not change now; empty when they may."""
    live = {parameter.name for parameter in PARAMETERS if parameter.live}
    known = {parameter.name for parameter in PARAMETERS}
    stuck = [name for name in changes if name in known - live]
    if configured and stuck:
        return f"{', '.join(stuck)} cannot change while the node is configured; run its transition 'cleanup' first."
    return ""


def scheduler_settings(values: Mapping[str, Value]) -> SchedulerSettings:
    """The settings of the chosen scheduler.

    Raises:
        UserError: there is no such scheduler, or a setting was changed that it does not have.
    """
    name = str(values["scheduler.name"])
    mine = {field.name for field in dataclasses.fields(settings_of(name, {}))} - {"name"}
    changed: dict[str, Any] = {}
    for parameter in PARAMETERS:
        group, _, setting = parameter.name.partition(".")
        value = values[parameter.name]
        if group != "scheduler" or setting == "name" or value == parameter.default:
            continue
        outer, _, inner = setting.rpartition(".")
        if (outer or setting) not in mine:
            has = ", ".join(sorted(mine - {"delay"}))
            raise UserError(f"{parameter.name}={value}: scheduler.name={name} has no such setting; it has {has}.")
        (changed.setdefault(outer, {}) if outer else changed)[inner] = value
    return settings_of(name, changed)


def runner_settings(values: Mapping[str, Value]) -> RunnerSettings:
    """The settings of the runner."""
    names = ("seed", "lookahead", "resume_after_intervention", "intervention_timeout")
    return dataclass_from(RunnerSettings, {name: values[name] for name in names}, "")


def instruction_of(text: str, spec: PolicySpec) -> str | None:
    """The instruction, None for no text.

    Raises:
        UserError: the policy is not told what to do, or does not know this task.
    """
    if not text:
        return None
    if not spec.tasks:
        raise UserError(f"instruction='{text}': this policy is not told what to do; leave it empty.")
    task_indices(spec, [text])
    return text


def goal_of(text: str, spec: PolicySpec) -> dict[str, np.ndarray]:
    """The goal's values by key, (*shape); empty for no text.

    Raises:
        UserError: the text cannot be read, or does not fit the policy's goals.
    """
    if not text:
        return {}
    if not spec.goals:
        raise UserError(f"goal='{text}': this policy takes no goal; leave it empty.")
    known = {key.key: key for key in spec.goals}
    try:
        given = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise UserError(f"goal='{text}' is not valid YAML: {error}") from error
    if not isinstance(given, Mapping) or set(given) != set(known):
        raise UserError(f"goal='{text}': wanted a mapping with the keys {', '.join(known)}.")
    return {
        name: _image(given[name], key) if key.role == "image" else _vector(given[name], key)
        for name, key in known.items()
    }


def _vector(value: Any, key: KeySpec) -> np.ndarray:
    try:
        vector = np.asarray(value, np.float32)
    except (TypeError, ValueError):
        vector = np.empty(0, np.float32)
    if vector.shape != key.shape or not np.isfinite(vector).all():
        raise UserError(f"goal: '{key.key}' must be {key.dim} numbers, found {value!r}.")
    return vector


def _image(value: Any, key: KeySpec) -> np.ndarray:
    from PIL import Image, UnidentifiedImageError

    height, width, _ = key.shape
    try:
        with Image.open(Path(str(value))) as image:
            return np.asarray(image.convert("RGB").resize((width, height), Image.Resampling.BILINEAR))
    except (OSError, UnidentifiedImageError) as error:
        raise UserError(f"goal: '{key.key}' must be an image file, found {value!r} ({error}).") from error
