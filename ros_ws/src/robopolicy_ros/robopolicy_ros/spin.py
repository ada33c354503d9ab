"""Spinning a node that moves a robot: whatever ends it, the robot comes to rest first."""

from __future__ import annotations

import logging
import signal
import sys
import threading
from collections.abc import Callable
from types import FrameType
from typing import Protocol

import rclpy
from rclpy.executors import SingleThreadedExecutor
from rclpy.node import Node
from rclpy.signals import SignalHandlerOptions

from robopolicy.errors import UserError

_LONGEST_WAIT = 0.1  # s until an idle executor looks whether it was interrupted


class MovesRobot(Protocol):
    """A node that can stop what it moves."""

    def begin(self) -> bool:
        """Called once before spinning; False ends the process."""

    def end(self, reason: str) -> None:
        """Bring the robot to rest and let go of everything. It does not need the executor."""


class Interrupted(threading.Event):
    """Set by SIGINT, SIGTERM and SIGHUP, instead of rclpy's handlers, which would cut off a node whose robot moves.

    SIGHUP, which a terminal sends when it is closed, stays ignored where it is (``nohup``).
    """

    def __init__(self) -> None:
        super().__init__()
        self.signal = ""
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            if number != signal.SIGHUP or signal.getsignal(number) is not signal.SIG_IGN:
                signal.signal(number, self._handle)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self.signal = signal.Signals(number).name
        self.set()


def run(make_node: Callable[[Interrupted], Node], args: list[str] | None = None) -> int:
    """Spin a node until it is interrupted or an exception escapes one of its callbacks.

    Args:
        make_node: its node is a `MovesRobot`, too.
        args: of the command line.

    Returns:
        The exit code: 0 after an interruption, 1 after an exception, 2 if the node could not begin.
    """
    logging.basicConfig(level=logging.INFO, stream=sys.stderr, format="[%(levelname)s] [%(name)s]: %(message)s")
    rclpy.init(args=args, signal_handler_options=SignalHandlerOptions.NO)
    interrupted = Interrupted()
    try:
        node = make_node(interrupted)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        rclpy.try_shutdown()
        return 2
    executor = SingleThreadedExecutor()
    executor.add_node(node)
    try:
        return _spin(node, executor, interrupted)
    finally:
        executor.shutdown()
        node.destroy_node()
        rclpy.try_shutdown()


def _spin(node: Node, executor: SingleThreadedExecutor, interrupted: Interrupted) -> int:
    robot: MovesRobot = node  # type: ignore[assignment]
    code, reason = 2, "The node did not begin."
    try:
        if robot.begin():
            while not interrupted.is_set():
                executor.spin_once(timeout_sec=_LONGEST_WAIT)
            code, reason = 0, f"Interrupted by {interrupted.signal}."
        elif interrupted.is_set():
            code = 0
    except Exception as error:
        code, reason = 1, f"The node failed: {type(error).__name__}: {error}"
        logging.getLogger(__name__).exception("An exception escaped; the robot is stopped.")
    finally:
        robot.end(reason)
    return code
