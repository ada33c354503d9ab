"""A websocket connection that cannot be kept open at the server's cost: not read, not finished, or never begun."""

from __future__ import annotations

import asyncio
from typing import Any

from websockets.asyncio.server import ServerConnection

from robopolicy.serving.limits import Limits
from robopolicy.serving.metrics import Metrics

MAX_UNREAD = 2**20
"""Bytes in the write buffer, where answers to pings pile up too, at which a connection is dropped."""
MAX_HANDSHAKES = 64
"""Handshakes at a time; one more drops the oldest, since an honest one takes milliseconds."""


class Gate:
    """Handshakes in progress, oldest first."""

    def __init__(self, limits: Limits, metrics: Metrics) -> None:
        self.limits, self.metrics = limits, metrics
        self._handshakes: dict[GuardedConnection, None] = {}

    def arrived(self, connection: GuardedConnection) -> None:
        self._handshakes[connection] = None
        if len(self._handshakes) > MAX_HANDSHAKES:
            oldest = next(iter(self._handshakes))
            self.passed(oldest)
            oldest.drop("handshake")

    def passed(self, connection: GuardedConnection) -> None:
        """The handshake is over, or the connection is."""
        self._handshakes.pop(connection, None)

    def close(self) -> None:
        """Drop what has not begun."""
        for connection in list(self._handshakes):
            connection.transport.abort()


class GuardedConnection(ServerConnection):
    """Drops clients that do not read what they are sent."""

    def __init__(self, gate: Gate, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._gate = gate
        self._unread: asyncio.TimerHandle | None = None

    def drop(self, reason: str) -> None:
        """Close at once, without the closing handshake."""
        self._gate.metrics.refused.labels(reason).inc()
        self.transport.abort()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        self._gate.arrived(self)

    def connection_lost(self, exc: Exception | None) -> None:
        self._gate.passed(self)
        self._stop_timer()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self.transport.get_write_buffer_size() > MAX_UNREAD:
            self.drop("unread")

    def pause_writing(self) -> None:
        super().pause_writing()
        self._unread = self.loop.call_later(self._gate.limits.write_timeout, self.drop, "unread")

    def resume_writing(self) -> None:
        super().resume_writing()
        self._stop_timer()

    def _stop_timer(self) -> None:
        if self._unread is not None:
            self._unread.cancel()
            self._unread = None
