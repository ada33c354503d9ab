"""What the tools that run nodes through many episodes share: calling services and reading latched topics."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from typing import Any, Self

import rclpy
from rcl_interfaces.srv import SetParameters
from rclpy.context import Context
from rclpy.executors import SingleThreadedExecutor
from rclpy.node import Node
from rclpy.parameter import Parameter
from std_msgs.msg import String
from std_srvs.srv import Trigger

from robopolicy.errors import UserError
from robopolicy_ros import qos


class Client:
    """Asks nodes for things and waits for what they say.

    Args:
        name: of this node.
        timeout: seconds that a service may take to appear, and to answer.
    """

    def __init__(self, name: str, *, timeout: float = 30.0) -> None:
        self._context = Context()
        rclpy.init(context=self._context)
        self._node = Node(name, context=self._context)
        self._executor = SingleThreadedExecutor(context=self._context)
        self._executor.add_node(self._node)
        self._timeout = timeout
        self._services: dict[str, Any] = {}
        self._said: dict[str, dict[str, Any]] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._executor.shutdown()
        self._node.destroy_node()
        rclpy.try_shutdown(context=self._context)

    def try_trigger(self, service: str) -> tuple[bool, str]:
        """Call a ``std_srvs/Trigger`` service; returns whether it did what was asked, and its message.

        Raises:
            UserError: nobody offers it, or it does not answer.
        """
        answer = self.call(Trigger, service, Trigger.Request())
        return answer.success, answer.message

    def trigger(self, service: str) -> str:
        """As `try_trigger`; returns the message.

        Raises:
            UserError: also when it was refused.
        """
        success, message = self.try_trigger(service)
        if not success:
            raise UserError(f"{service}: {message}")
        return message

    def set_parameter(self, node: str, name: str, value: Any) -> None:
        """Set a parameter of a node.

        Raises:
            UserError: the node is not there or refuses it.
        """
        request = SetParameters.Request(parameters=[Parameter(name, value=value).to_parameter_msg()])
        result = self.call(SetParameters, f"{node}/set_parameters", request).results[0]
        if not result.successful:
            raise UserError(f"{node} refuses {name}={value}: {result.reason}")

    def watch(self, topic: str) -> None:
        """Keep the newest value of a latched topic (``std_msgs/String`` with a JSON object)."""

        def listen(message: String) -> None:
            self._said[topic] = json.loads(message.data)

        self._node.create_subscription(String, topic, listen, qos.LATCHED)

    def said(self, topic: str) -> Mapping[str, Any]:
        """The newest value of a topic that is watched; empty before the first."""
        return self._said.get(topic, {})

    def wait(self, seconds: float) -> None:
        """Let time pass, listening."""
        self.wait_for(lambda: False, seconds)

    def wait_for(self, condition: Callable[[], bool], seconds: float) -> bool:
        """Listen until a condition holds; returns whether it did within the time."""
        deadline = time.monotonic() + seconds
        while not condition():
            left = deadline - time.monotonic()
            if left <= 0:
                return False
            self._executor.spin_once(timeout_sec=min(left, 0.1))
        return True

    def call(self, kind: Any, service: str, request: Any) -> Any:
        """Call a service of any type; returns its response.

        Raises:
            UserError: nobody offers it, or it does not answer.
        """
        if service not in self._services:
            self._services[service] = self._node.create_client(kind, service)
        client = self._services[service]
        if not client.wait_for_service(timeout_sec=self._timeout):
            raise UserError(
                f"Nobody offers {service}. Is its node running, with the same ROS_DOMAIN_ID "
                f"({self._context.get_domain_id()}) and namespace?"
            )
        future = client.call_async(request)
        if not self.wait_for(future.done, self._timeout):
            raise UserError(f"{service} has not answered for {self._timeout:g} s.")
        return future.result()
