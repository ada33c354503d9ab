"""Whether contract, limits and bundle of a robot fit each other, without the robot."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file

from robopolicy.errors import UserError
from robopolicy.manifest import read_manifest
from robopolicy.runtime.contract import Contract
from robopolicy.runtime.kinematics import forward
from robopolicy.runtime.limits import AxisLimits, Limits
from robopolicy.spec import PolicySpec, check_keys

Level = Literal["OK", "WARN", "FAIL"]

POSTURES = 4000
"""Random postures by which the reach into the workspace is judged."""
TURN = 2 * math.pi


@dataclass(frozen=True)
class Finding:
    """What one check found.

    Attributes:
        check: what was looked at, e.g. ``stream wrist_camera``.
        level: ``FAIL`` keeps the robot from running, ``WARN`` is to be known.
        message: what was found.
        advice: what to do; empty when all is well.
    """

    check: str
    level: Level
    message: str
    advice: str = ""


def failed(findings: Iterable[Finding]) -> bool:
    return any(finding.level == "FAIL" for finding in findings)


def check_robot(contract: Contract, limits: Limits) -> list[Finding]:
    """Check a robot's two files against each other and for plausibility."""
    findings = [
        Finding(
            "contract",
            "OK",
            f"{contract.robot}: {len(contract.joints)} joints, {len(contract.streams)} streams, "
            f"{len(contract.action.names)} actions at {contract.policy_rate:g} Hz",
        ),
        _check_source(limits),
        *_check_streams(contract),
        *_check_axes(contract, limits),
    ]
    if limits.workspace is not None and contract.action.kind == "joint_position":
        findings.append(_check_workspace(contract, limits))
    return findings


def _check_source(limits: Limits) -> Finding:
    if "invented" in limits.source:
        return Finding(
            "limits", "WARN", "these are the template's invented numbers", "Put the arm's own into safety.yaml."
        )
    return Finding("limits", "OK", f"{len(limits.axes)} axes; {limits.source}")


def _check_streams(contract: Contract) -> list[Finding]:
    findings = []
    for name, stream in contract.streams.items():
        where, periods = f"stream {name}", stream.stale_after * stream.rate
        if periods < 2:
            findings.append(
                Finding(
                    where,
                    "FAIL",
                    f"stale_after={stream.stale_after:g} s is {periods:.1f} periods of {stream.rate:g} Hz",
                    "One late message would stop the robot: allow 5 to 10 periods.",
                )
            )
        elif stream.stale_after > 0.5:
            findings.append(
                Finding(
                    where,
                    "WARN",
                    f"it may be silent for {stream.stale_after:g} s before anything happens",
                    "The robot acts on what it last saw for so long; 0.1 to 0.3 s is usual.",
                )
            )
    return findings or [Finding("streams", "OK", "each may miss some messages before it counts as silent")]


def _check_axes(contract: Contract, limits: Limits) -> list[Finding]:
    findings = []
    if contract.action.kind == "joint_position":
        if missing := [name for name in contract.joints if name not in contract.action.names]:
            findings.append(
                Finding(
                    "action",
                    "FAIL",
                    f"{', '.join(missing)} of joints are not in action.names",
                    "Name the action's entries as the joints, in any order.",
                )
            )
        for name in contract.joints:
            axis = limits.axes.get(name)
            if axis is not None and max(abs(axis.lower), abs(axis.upper)) > 2 * TURN:
                findings.append(
                    Finding(
                        f"axis {name}",
                        "FAIL",
                        f"limits of {axis.lower:g} to {axis.upper:g} rad are more than two turns",
                        "Degrees? Limits are in radians.",
                    )
                )
    if findings:
        return findings
    fastest = max(axis.velocity for axis in limits.axes.values())
    return [Finding("axes", "OK", f"every action has limits, at most {fastest:g} units/s")]


def _check_workspace(contract: Contract, limits: Limits) -> Finding:
    """How much of what the joints can reach lies inside the box."""
    assert limits.kinematics is not None and limits.workspace is not None  # read_limits wants both
    axes = [limits.axes.get(name) for name in contract.joints]
    if None in axes:
        return Finding("workspace", "FAIL", "joints without limits cannot be judged", "See the lines above.")
    rng = np.random.default_rng(0)
    lower = np.array([axis.lower + axis.margin for axis in axes if axis])
    upper = np.array([axis.upper - axis.margin for axis in axes if axis])
    tool, _ = forward(limits.kinematics, rng.uniform(lower, upper, (POSTURES, len(axes))))
    share = inside_workspace(limits, tool).mean()
    box = "; ".join(f"{name} {getattr(limits.workspace, name)}" for name in "xyz")
    if share == 0:
        reach = "; ".join(
            f"{name} {low:.2f} to {high:.2f}" for name, low, high in zip("xyz", tool.min(0), tool.max(0), strict=True)
        )
        return Finding(
            "workspace",
            "FAIL",
            f"no posture reaches the box ({box}); the tool reaches {reach} m",
            "Metres, in the base frame? Check kinematics and tool_xyz, too.",
        )
    level: Level = "WARN" if share < 0.01 else "OK"
    advice = "Is the box where the table is?" if level == "WARN" else ""
    return Finding("workspace", level, f"{share:.1%} of all postures lie in the box ({box} m)", advice)


def inside_workspace(limits: Limits, tool: np.ndarray) -> np.ndarray:
    """Whether positions (..., 3) [m] lie in the box; all do when there is none."""
    if limits.workspace is None:
        return np.ones(tool.shape[:-1], bool)
    low, high = np.array([limits.workspace.x, limits.workspace.y, limits.workspace.z]).T
    inside: np.ndarray = ((tool >= low) & (tool <= high)).all(axis=-1)
    return inside


def check_bundle(contract: Contract, limits: Limits, bundle: Path) -> list[Finding]:
    """Check whether a policy was made for this robot: keys, units, rate, and the range of its actions."""
    try:
        manifest = read_manifest(bundle)
        spec = PolicySpec.from_dict(manifest["spec"], f"{bundle / 'bundle.yaml'}: spec")
    except UserError as error:
        return [Finding("bundle", "FAIL", str(error), "Give the folder of a policy that `robopolicy train` wrote.")]
    findings = [*_check_keys(contract, spec), _check_rate(contract, spec), _check_open_loop(limits, spec)]
    if spec.action.dim == len(contract.action.names):
        findings += _check_action_range(contract, limits, bundle)
    return findings


def _check_keys(contract: Contract, spec: PolicySpec) -> list[Finding]:
    findings = []
    offered = contract.observation_specs
    for key in spec.observations:
        try:
            check_keys(offered, (key,), f"policy against robot {contract.robot}")
        except UserError as error:
            found = str(error).splitlines()[-1].strip()
            findings.append(Finding(f"key {key.key}", "FAIL", found, "Record and train with this robot's contract."))
    try:
        check_keys({"action": contract.action_spec}, (spec.action,), "action")
    except UserError as error:
        found = str(error).splitlines()[-1].strip()
        findings.append(Finding("action", "FAIL", found, f"The robot takes {', '.join(contract.action.names)}."))
    if findings:
        return findings
    keys = ", ".join(key.key for key in spec.observations)
    return [Finding("keys", "OK", f"the robot offers {keys} and takes the action ({spec.action.dim})")]


def _check_rate(contract: Contract, spec: PolicySpec) -> Finding:
    if abs(spec.fps / contract.policy_rate - 1) > 0.01:
        return Finding(
            "rate",
            "FAIL",
            f"the policy acts at {spec.fps:g} Hz, the contract's policy_rate is {contract.policy_rate:g}",
            "At another rate the robot would move faster or slower than it was shown: change policy_rate.",
        )
    return Finding("rate", "OK", f"{spec.fps:g} Hz")


def _check_open_loop(limits: Limits, spec: PolicySpec) -> Finding:
    executed = spec.n_action_steps / spec.fps
    if executed > limits.max_open_loop:
        return Finding(
            "open loop",
            "WARN",
            f"the policy executes {executed:.2f} s of a chunk, max_open_loop is {limits.max_open_loop:g} s",
            "With synchronous execution the robot would hold between chunks: execute fewer steps.",
        )
    return Finding("open loop", "OK", f"{executed:.2f} s of each chunk are executed")


def _check_action_range(contract: Contract, limits: Limits, bundle: Path) -> list[Finding]:
    file = bundle / "normalizer.safetensors"
    try:
        tensors = load_file(file)
        low, high = (np.atleast_2d(tensors[f"action.{name}"]).astype(np.float64) for name in ("low", "high"))
    except (SafetensorError, OSError, KeyError) as error:
        return [Finding("action range", "FAIL", f"{file} cannot be read: {error}", "Copy the bundle again.")]
    findings = []
    for i, name in enumerate(contract.action.names):
        if name in limits.axes:  # the six rotation numbers of a pose have none
            finding = _check_axis_range(name, limits.axes[name], float(low[:, i].min()), float(high[:, i].max()))
            findings += [finding] if finding else []
    return findings or [Finding("action range", "OK", "the actions of the training data lie within the limits")]


def _check_axis_range(name: str, axis: AxisLimits, low: float, high: float) -> Finding | None:
    where = f"action {name}"
    found = f"trained on {low:.3g} to {high:.3g}, limits are {axis.lower:g} to {axis.upper:g}"
    slack = 0.05 * (axis.upper - axis.lower)
    if not (math.isfinite(low) and math.isfinite(high)):
        return Finding(where, "FAIL", f"trained on {low:g} to {high:g}", "The bundle's normaliser knows no range.")
    if low < axis.lower - slack or high > axis.upper + slack:
        degrees = max(abs(low), abs(high)) > TURN + slack and axis.upper - axis.lower < 2 * TURN + slack
        advice = "Degrees? Convert the dataset to radians and train again." if degrees else "A bundle of another robot?"
        return Finding(where, "FAIL", found, advice)
    if low < axis.lower + axis.margin or high > axis.upper - axis.margin:
        return Finding(where, "WARN", f"{found}, margin {axis.margin:g}", "The robot will stop short of its ends.")
    return None
