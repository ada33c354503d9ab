"""Quality of service of every kind of topic; publishers and subscribers of a kind find each other."""

from __future__ import annotations

from rclpy.duration import Duration
from rclpy.qos import DurabilityPolicy, HistoryPolicy, QoSProfile, ReliabilityPolicy

from robopolicy.runtime.contract import Stream

COMMAND = QoSProfile(
    history=HistoryPolicy.KEEP_LAST,
    depth=1,
    reliability=ReliabilityPolicy.RELIABLE,
    lifespan=Duration(seconds=0.2),  # a command of before a cut network must not arrive when it is mended
)
"""Publishers of commands: controllers subscribe reliably, and only the newest command counts."""

COMMAND_SUBSCRIPTION = QoSProfile(history=HistoryPolicy.KEEP_LAST, depth=50, reliability=ReliabilityPolicy.RELIABLE)
"""Listeners to commands, which miss none while they are busy."""

NEWEST_COMMAND = QoSProfile(history=HistoryPolicy.KEEP_LAST, depth=1, reliability=ReliabilityPolicy.RELIABLE)
"""Listeners to set points of which only the newest counts."""

LATCHED = QoSProfile(
    history=HistoryPolicy.KEEP_LAST,
    depth=1,
    reliability=ReliabilityPolicy.RELIABLE,
    durability=DurabilityPolicy.TRANSIENT_LOCAL,
)
"""Newest value, also for those who come later."""

SIGNAL = QoSProfile(history=HistoryPolicy.KEEP_LAST, depth=10, reliability=ReliabilityPolicy.RELIABLE)
"""Stopping topics, which are repeated; a short press while a node is busy is not lost."""


def subscription(stream: Stream) -> QoSProfile:
    """What a stream's subscription asks for."""
    return _keep_last(stream.depth, stream.reliability)


def publisher(stream: Stream) -> QoSProfile:
    """What the simulated robot offers: reliable, which both kinds of subscriptions match; images do not wait."""
    return _keep_last(stream.depth, "best_effort" if stream.image else "reliable")


def _keep_last(depth: int, reliability: str) -> QoSProfile:
    policy = ReliabilityPolicy.RELIABLE if reliability == "reliable" else ReliabilityPolicy.BEST_EFFORT
    return QoSProfile(history=HistoryPolicy.KEEP_LAST, depth=depth, reliability=policy)
