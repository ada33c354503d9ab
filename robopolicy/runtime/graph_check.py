"""Whether what a robot's topics carry is what its contract says; judged from what was heard for some seconds."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

import numpy as np

from robopolicy.runtime.check import TURN, Finding, Level, inside_workspace
from robopolicy.runtime.clock import NS
from robopolicy.runtime.contract import CommandTopic, Contract, Stream
from robopolicy.runtime.kinematics import forward
from robopolicy.runtime.limits import Limits
from robopolicy.runtime.samples import Joints

LATE = 0.1
"""Seconds between stamp and arrival above which something is slow, or two clocks differ."""


@dataclass
class HeardStream:
    """What was heard of a stream.

    Attributes:
        types: of the messages that are published on its topic.
        publishers: how many there are.
        reliable: whether each of them is.
        stamps: of the headers [ns, wall clock]; zeros where a driver does not stamp.
        received: when each message came [ns, wall clock].
        joints: the newest ``JointState``.
        size: (height, width) of the newest raw image.
    """

    types: tuple[str, ...] = ()
    publishers: int = 0
    reliable: tuple[bool, ...] = ()
    stamps: list[int] = field(default_factory=list)
    received: list[int] = field(default_factory=list)
    joints: Joints | None = None
    size: tuple[int, int] | None = None


@dataclass(frozen=True)
class HeardCommand:
    """Who is on a command topic.

    Attributes:
        types: of the topic.
        writers: nodes that publish on it.
        readers: nodes that subscribe to it.
    """

    types: tuple[str, ...] = ()
    writers: tuple[str, ...] = ()
    readers: tuple[str, ...] = ()


def check_graph(
    contract: Contract,
    limits: Limits,
    streams: Mapping[str, HeardStream],
    commands: Mapping[str, HeardCommand],
    needed: Collection[str],
) -> list[Finding]:
    """Judge what was heard.

    Args:
        contract, limits: of the robot.
        streams: by the contract's names.
        commands: by the contract's names.
        needed: streams that the policy needs; silence of others is a warning only.
    """
    findings = []
    for name, stream in contract.streams.items():
        findings += check_stream(name, stream, streams[name], limits, name in needed)
        if (heard := streams[name].joints) is not None:
            findings += _check_names(contract, name, heard)
    joints = streams[contract.measured].joints
    if joints is not None and joints.position is not None:
        findings += check_posture(contract, limits, joints)
    for name, command in contract.commands.items():
        findings.append(check_command(name, command, commands[name]))
    return findings


def check_stream(name: str, stream: Stream, heard: HeardStream, limits: Limits, needed: bool) -> list[Finding]:
    """Judge publisher, rate and stamps of one stream."""
    where, worst = f"stream {name}", "FAIL" if needed else "WARN"
    problem = _connection_problem(stream, heard)
    if problem is not None:
        return [Finding(where, worst, *problem)]  # type: ignore[arg-type]
    received = np.sort(np.array(heard.received, dtype=np.int64)) / NS
    rate = (len(received) - 1) / (received[-1] - received[0])
    gap = float(np.diff(received).max())
    text = f"{stream.topic}: {rate:.1f} Hz, longest gap {1e3 * gap:.0f} ms"
    level: Level = "OK"
    advice = ""
    if rate < 0.8 * stream.rate:
        level, advice = (
            "FAIL",
            f"Wanted {stream.rate:g} Hz: set it in the driver, or change the contract.",
        )
    elif gap > stream.stale_after:
        level, advice = "FAIL", f"Longer than stale_after={stream.stale_after:g} s: it would stop the robot."
    elif rate > 1.5 * stream.rate:
        level, advice = "WARN", f"The contract expects {stream.rate:g} Hz; more costs time without a use."
    if heard.publishers > 1:
        level, advice = "FAIL", f"{heard.publishers} nodes publish here: `ros2 topic info -v`, end all but one."
    if stream.size is not None and heard.size is not None and heard.size != stream.size:
        level, advice = "FAIL", f"Images are {heard.size}, the contract says {stream.size}: set it in the driver."
    findings = [Finding(where, level, text, advice)]
    if stream.stamp == "header":
        findings.append(_check_stamps(name, stream, heard, limits))
    return [f if needed or f.level != "FAIL" else Finding(f.check, "WARN", f.message, f.advice) for f in findings]


def _connection_problem(stream: Stream, heard: HeardStream) -> tuple[str, str] | None:
    if not heard.publishers:
        return f"nobody publishes {stream.topic}", "Is the driver running? Namespace, ROS_DOMAIN_ID: `ros2 topic list`."
    if stream.type not in heard.types:
        return f"{stream.topic} carries {', '.join(heard.types)}", f"The contract says {stream.type}: change it."
    if stream.reliability == "reliable" and not all(heard.reliable):
        return (
            f"{stream.topic} is published best effort",
            "A reliable subscription gets nothing from it: set reliability: best_effort.",
        )
    if len(heard.received) < 2:
        return (
            f"{stream.topic} is silent ({len(heard.received)} messages)",
            "The driver is up but sends nothing: see its log; cameras: USB bandwidth; networks: multicast, firewall.",
        )
    return None


def _check_stamps(name: str, stream: Stream, heard: HeardStream, limits: Limits) -> Finding:
    where = f"stamps {name}"
    stamps, received = np.array(heard.stamps, dtype=np.int64), np.array(heard.received, dtype=np.int64)
    if (stamps == 0).any():
        return Finding(where, "FAIL", "header.stamp is zero", "The driver does not stamp: set stamp: receive.")
    if (steps := np.diff(stamps)).size and (steps < 0).any():
        worst = -steps.min() / NS
        return Finding(
            where,
            "FAIL",
            f"{int((steps < 0).sum())} stamps run backwards, by up to {worst:.3f} s",
            "Two publishers, or a clock that is set while it runs (use chrony, not ntpdate).",
        )
    age = (received - stamps) / NS
    text = f"age at arrival {1e3 * np.median(age):.1f} ms (median), {1e3 * age.max():.1f} ms (longest)"
    if age.min() < -limits.max_stamp_ahead:
        return Finding(where, "FAIL", text, "Stamps of the future: the clocks differ; run chrony or PTP.")
    if np.median(age) > stream.stale_after:
        return Finding(
            where,
            "FAIL",
            text,
            f"Older than stale_after={stream.stale_after:g} s: the clocks differ, or messages queue up.",
        )
    if abs(np.median(age)) > LATE:
        return Finding(where, "WARN", text, "More than 0.1 s: the clocks differ, or messages queue up.")
    return Finding(where, "OK", text)


def _check_names(contract: Contract, name: str, heard: Joints) -> list[Finding]:
    wanted = [n for o in contract.observations.values() for p in o.parts if p.stream == name for n in p.names]
    if name == contract.measured:
        wanted += contract.joints
    missing = [n for n in dict.fromkeys(wanted) if n not in heard.names]
    if missing:
        return [
            Finding(
                f"names {name}",
                "FAIL",
                f"{', '.join(missing)} are not among {', '.join(heard.names)}",
                "Use the driver's names in the contract; another topic may hold them.",
            )
        ]
    return [Finding(f"names {name}", "OK", f"all {len(set(wanted))} are there")] if wanted else []


def check_posture(contract: Contract, limits: Limits, heard: Joints) -> list[Finding]:
    """Judge where the arm is: radians, inside its limits and its workspace."""
    assert heard.position is not None
    found = dict(zip(heard.names, heard.position.tolist(), strict=False))
    if any(name not in found for name in contract.joints):
        return []
    q = np.array([found[name] for name in contract.joints])
    if not np.isfinite(q).all():
        return [Finding("posture", "FAIL", f"joint positions are not finite: {q.tolist()}", "See the driver's log.")]
    if np.abs(q).max() > 1.05 * TURN:
        name = contract.joints[int(np.abs(q).argmax())]
        return [
            Finding(
                "posture",
                "FAIL",
                f"{name} is at {found[name]:.4g}: more than a turn in radians",
                "Degrees? The driver must publish radians (REP 103), or part.scale must convert.",
            )
        ]
    outside = []
    for name in contract.joints:
        axis = limits.axes.get(name)
        if axis is not None and not axis.lower + axis.margin <= found[name] <= axis.upper - axis.margin:
            outside.append(f"{name} at {found[name]:.3f} ({axis.lower:g} to {axis.upper:g}, margin {axis.margin:g})")
    if outside:
        return [Finding("posture", "FAIL", "; ".join(outside), "Jog the arm into its limits before you start.")]
    findings = [Finding("posture", "OK", f"{', '.join(f'{v:.2f}' for v in q)} rad, inside the limits")]
    if limits.workspace is not None and limits.kinematics is not None:
        tool, _ = forward(limits.kinematics, q)
        inside = bool(inside_workspace(limits, tool))
        text = f"the tool is at x {tool[0]:.3f}, y {tool[1]:.3f}, z {tool[2]:.3f} m"
        advice = "" if inside else "Compare with the robot's own display; jog it into the box, or correct the box."
        findings.append(Finding("workspace now", "OK" if inside else "FAIL", text, advice))
    return findings


def check_command(name: str, command: CommandTopic, heard: HeardCommand) -> Finding:
    """Judge who reads and who writes a command topic."""
    where = f"command {name}"
    if heard.types and command.type not in heard.types:
        return Finding(where, "FAIL", f"{command.topic} carries {', '.join(heard.types)}", f"Wanted {command.type}.")
    if heard.writers:
        return Finding(
            where,
            "FAIL",
            f"{', '.join(heard.writers)} already publishes {command.topic}",
            "Two writers fight over the arm: end it (a running policy_node is one, too).",
        )
    if not heard.readers:
        return Finding(
            where,
            "FAIL",
            f"nobody listens to {command.topic}",
            "Is the controller active? `ros2 control list_controllers`.",
        )
    return Finding(where, "OK", f"{command.topic} is read by {', '.join(heard.readers)}")
