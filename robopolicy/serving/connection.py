"""A websocket connection that cannot be kept open at the server's cost: not read, not finished, or never begun."""

from __future__ import annotations

import asyncio
import contextlib
import ssl
from typing import Any

from websockets.asyncio.server import ServerConnection

from robopolicy.serving.limits import Limits
from robopolicy.serving.metrics import Metrics

MAX_UNREAD = 2**20
"""Bytes in the write buffer, where answers to pings pile up too, at which a connection is dropped."""
MAX_HANDSHAKES = 64
"""Handshakes at a time; one more drops the oldest, since an honest one takes milliseconds."""


class Gate:
    """Handshakes in progress, TLS and websocket, oldest first."""

    def __init__(self, limits: Limits, metrics: Metrics, tls: ssl.SSLContext | None) -> None:
        self.limits, self.metrics, self.tls = limits, metrics, tls
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


class _Early(asyncio.Protocol):
    """Keeps what a client sends right behind its TLS handshake."""

    def __init__(self) -> None:
        self.received = b""

    def data_received(self, data: bytes) -> None:
        self.received += data


class GuardedConnection(ServerConnection):
    """Drops clients that do not read what they are sent.

    TLS begins here and not in asyncio's server, which shows a connection only after its TLS handshake: clients that
    never end theirs could not be counted.
    """

    def __init__(self, gate: Gate, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._gate = gate
        self._unread: asyncio.TimerHandle | None = None
        self._tls: asyncio.Task[None] | None = None
        self._began = False

    def drop(self, reason: str) -> None:
        """Close at once, without the closing handshake."""
        self._gate.metrics.refused.labels(reason).inc()
        self.transport.abort()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport
        self._gate.arrived(self)
        if self._gate.tls is None:
            self._begin(transport)
        else:
            self._tls = self.loop.create_task(self._start_tls(transport, self._gate.tls))

    def _begin(self, transport: asyncio.Transport) -> None:
        self._began = True
        super().connection_made(transport)

    async def _start_tls(self, transport: asyncio.Transport, context: ssl.SSLContext) -> None:
        if transport.is_closing():
            return
        limits, early, secure = self._gate.limits, _Early(), None
        with contextlib.suppress(OSError):  # not TLS, too old, too slow
            secure = await self.loop.start_tls(
                transport,
                early,
                context,
                server_side=True,
                ssl_handshake_timeout=limits.open_timeout,
                ssl_shutdown_timeout=limits.close_timeout,
            )
        if secure is None:
            self._gate.passed(self)
            transport.abort()
            return
        secure.set_protocol(self)
        self._begin(secure)
        if early.received:
            self.data_received(early.received)

    def connection_lost(self, exc: Exception | None) -> None:
        self._gate.passed(self)
        self._stop_timer()
        if self._began:
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
