"""A ROS graph of its own for each test process."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from tests.ros_domain import domain_environment


@pytest.fixture(scope="session")
def ros_domain() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        for name, value in domain_environment().items():
            patch.setenv(name, value)
        yield


@pytest.fixture
def ros_context(ros_domain: None) -> Iterator[Any]:
    rclpy = pytest.importorskip("rclpy", reason="ROS 2 is not installed: pip install 'robopolicy[ros]'")
    from rclpy.context import Context

    context = Context()
    rclpy.init(args=[], context=context)
    yield context
    rclpy.try_shutdown(context=context)
