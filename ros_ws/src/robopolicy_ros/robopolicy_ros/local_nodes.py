"""Nodes as processes of this machine, for the length of a command: what a launch file does, without ``launch``."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

from robopolicy.errors import UserError

PROFILE = "FASTDDS_DEFAULT_PROFILES_FILE"
_ENDING_SIGNALS = (signal.SIGTERM, signal.SIGHUP)
_ENDING = 15.0  # s for a node to come to rest and end


@contextmanager
def local_nodes(nodes: Mapping[str, Mapping[str, Any]]) -> Iterator[None]:
    """Run nodes until the block is left; they are interrupted then, as by Ctrl-C.

    Args:
        nodes: parameters of each, by the name of its module in this package; empty texts are left out.

    Raises:
        UserError: a node has ended with an error meanwhile.
    """
    processes: dict[str, subprocess.Popen[bytes]] = {}
    failed: dict[str, int] = {}
    try:
        with _undisturbed():
            for name, parameters in nodes.items():
                processes[name] = _start(name, parameters)
        yield
    finally:
        failed = {name: code for name, process in processes.items() if (code := process.poll())}
        for process in reversed(processes.values()):
            _end(process)
        if failed:
            named = ", ".join(f"{name} (exit code {code})" for name, code in failed.items())
            raise UserError(f"Ended by themselves: {named}. What they said is above.")


def end_on_signals() -> None:
    """Let SIGTERM and SIGHUP end this process through its ``finally`` blocks, so that its nodes end, too."""
    for number in _ENDING_SIGNALS:
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, _exit)


@contextmanager
def _undisturbed() -> Iterator[None]:
    """Put signals off to the end: a node that is just being started is not known yet and would be left behind."""
    came: list[int] = []
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, *_ENDING_SIGNALS)}
    put_off = {number: handler for number, handler in handlers.items() if handler is not signal.SIG_IGN}
    for number in put_off:
        signal.signal(number, lambda number, _: came.append(number))
    try:
        yield
    finally:
        for number, handler in put_off.items():
            signal.signal(number, handler)
        for each in came[:1]:
            signal.raise_signal(each)


def _exit(number: int, frame: FrameType | None) -> None:
    for each in _ENDING_SIGNALS:
        signal.signal(each, signal.SIG_IGN)  # the nodes are given their time
    raise SystemExit(128 + number)


def _start(name: str, parameters: Mapping[str, Any]) -> subprocess.Popen[bytes]:
    given = [word for key, value in parameters.items() if value != "" for word in ("-p", f"{key}:={value}")]
    command = [sys.executable, "-m", f"robopolicy_ros.{name}", "--ros-args", *given]
    return subprocess.Popen(command, env=_environment(), start_new_session=True)


def _environment() -> dict[str, str]:
    """This process's, with the shipped profile where none is set and the package lies in its source tree."""
    shipped = Path(__file__).resolve().parents[1] / "config" / "fastdds.xml"
    return ({PROFILE: str(shipped)} if shipped.is_file() else {}) | os.environ


def _end(process: subprocess.Popen[bytes]) -> None:
    if process.poll() is not None:
        return
    process.send_signal(signal.SIGINT)
    try:
        process.wait(_ENDING)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
