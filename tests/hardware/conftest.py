"""A ROS graph of its own for each test process."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from typing import Any

import pytest


def free_domain() -> int:
    """A domain that nobody on this machine uses: its first participant binds port 7410 + 250 * domain."""
    first = 1 + os.getpid() % 101
    for domain in (*range(first, 102), *range(1, first)):
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            try:
                probe.bind(("", 7410 + 250 * domain))
            except OSError:
                continue
            return domain
    raise AssertionError("Every ROS domain from 1 to 101 is in use.")


@pytest.fixture(scope="session")
def ros_domain() -> Iterator[None]:
    kept = {name: os.environ.get(name) for name in ("ROS_DOMAIN_ID", "ROS_AUTOMATIC_DISCOVERY_RANGE")}
    os.environ["ROS_DOMAIN_ID"] = str(free_domain())
    os.environ["ROS_AUTOMATIC_DISCOVERY_RANGE"] = "LOCALHOST"
    yield
    for name, value in kept.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value


@pytest.fixture
def ros_context(ros_domain: None) -> Iterator[Any]:
    rclpy = pytest.importorskip("rclpy", reason="ROS 2 is not installed: pip install 'robopolicy[ros]'")
    from rclpy.context import Context

    context = Context()
    rclpy.init(args=[], context=context)
    yield context
    rclpy.try_shutdown(context=context)
