"""Nodes as processes of their own, and asking them things."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from rclpy.node import Node
from std_msgs.msg import String
from std_srvs.srv import Trigger

from robopolicy_ros.qos import LATCHED

TIMEOUT = 40.0  # seconds until a test fails instead of waiting


def until(condition: Callable[[], Any], timeout: float = TIMEOUT, what: str | Callable[[], str] = "") -> Any:
    """Wait for something to become true.

    Raises:
        AssertionError: it did not.
    """
    end = time.monotonic() + timeout
    while not (found := condition()):
        if time.monotonic() > end:
            raise AssertionError(f"not within {timeout} s: {what if isinstance(what, str) else what()}")
        time.sleep(0.005)
    return found


class NodeProcess:
    """``python -m robopolicy_ros.<module>`` with parameters.

    Args:
        module, name: of the node.
        parameters: of the node.
        folder: for its parameter file and its log.
        within: a command that runs it, as ``nsenter``.

    Attributes:
        process: of the node.
        log: what it wrote so far goes there.
    """

    def __init__(
        self, module: str, name: str, parameters: Mapping[str, Any], folder: Path, within: Sequence[str] = ()
    ) -> None:
        file = folder / f"{name}.yaml"
        file.write_text(yaml.safe_dump({"/**": {"ros__parameters": dict(parameters)}}))
        self.log = folder / f"{name}.log"
        command = [sys.executable, "-m", f"robopolicy_ros.{module}", "--ros-args", "-r", f"__node:={name}"]
        with self.log.open("w") as out:
            self.process = subprocess.Popen(
                [*within, *command, "--params-file", str(file)],
                stdout=out,
                stderr=subprocess.STDOUT,
                env={**os.environ, "OMP_NUM_THREADS": "1"},
            )

    def said(self, text: str) -> bool:
        return text in self.log.read_text()

    def send(self, number: int) -> None:
        self.process.send_signal(number)

    def end(self) -> int:
        """End it; its exit code."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGCONT)
            self.process.send_signal(signal.SIGINT)
        try:
            return self.process.wait(20)
        except subprocess.TimeoutExpired:
            self.process.kill()
            return self.process.wait()

    def children(self) -> list[int]:
        """Process ids of its children: the inference."""
        task = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children")
        return [int(pid) for pid in task.read_text().split()]


class Client:
    """Asks a policy node and hears its state.

    Attributes:
        states: (monotonic time, state, reason), as they came.
    """

    def __init__(self, node: Node, name: str = "policy") -> None:
        self._node, self._name = node, name
        self._services: dict[str, Any] = {}
        self.states: list[tuple[float, str, str]] = []
        node.create_subscription(String, f"/{name}/state", self._hear, LATCHED)

    @property
    def state(self) -> str:
        return self.states[-1][1] if self.states else ""

    @property
    def reason(self) -> str:
        return self.states[-1][2] if self.states else ""

    def call(self, service: str, name: str | None = None) -> Trigger.Response:
        topic = f"/{name or self._name}/{service}"
        if topic not in self._services:
            self._services[topic] = self._node.create_client(Trigger, topic)
        client = self._services[topic]
        assert client.wait_for_service(TIMEOUT), f"no service {topic}"
        answer = client.call_async(Trigger.Request())
        return until(lambda: answer.done() and answer.result(), what=topic)

    def until_state(self, *wanted: str, within: float = TIMEOUT) -> str:
        until(lambda: self.state in wanted, within, lambda: f"{' or '.join(wanted)}; it is {self.states[-3:]}")
        return self.state

    def _hear(self, message: String) -> None:
        said = json.loads(message.data)
        self.states.append((time.monotonic(), said["state"], said["reason"]))
