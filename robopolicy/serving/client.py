"""A client of the policy server for a control loop: pipelining, timestep labels, real-time chunking."""

from __future__ import annotations

import ssl
from collections.abc import Mapping
from contextlib import ExitStack, suppress
from types import TracebackType
from typing import Any, Self

import numpy as np
from websockets.exceptions import ConnectionClosed, InvalidHandshake, InvalidURI
from websockets.sync.client import connect

from robopolicy.errors import UserError
from robopolicy.serving.wire import pack, unpack


class ServerRefusal(UserError):
    """What the server said instead of actions."""


class PolicyClient:
    """One connection to a policy server: one thread may send while another one receives.

    Attributes:
        metadata: the server's first frame: keys, shapes, units, horizons, rate, engine.

    Args:
        address: ``ws://host:port`` or ``wss://host:port``.
        token: the server's, if it has one.
        tls: which certificates are trusted; by default the machine's.
        timeout: seconds for connecting and for each reply; None: no limit.

    Raises:
        UserError: the server cannot be reached or refuses the client.
    """

    def __init__(
        self,
        address: str,
        *,
        token: str | None = None,
        tls: ssl.SSLContext | None = None,
        timeout: float | None = 10.0,
    ) -> None:
        self._timeout = timeout
        self._sent = self._received = 0
        headers = {"Authorization": f"Api-Key {token}"} if token is not None else None
        try:
            with ExitStack() as stack:
                self._socket = stack.enter_context(
                    connect(
                        address,
                        ssl=tls,
                        compression=None,
                        max_size=None,
                        additional_headers=headers,
                        open_timeout=timeout,
                        proxy=None,
                    )
                )
                self.metadata: dict[str, Any] = unpack(self._socket.recv(timeout, decode=False))
                self._open = stack.pop_all()
        except (OSError, InvalidHandshake, InvalidURI, ConnectionClosed) as error:
            raise UserError(f"No connection to the policy server at {address}: {error}") from error

    def send(self, observation: Mapping[str, Any], **options: Any) -> None:
        """Send an observation without waiting for the reply.

        Args:
            observation: by key, either the newest value (*shape) or a history (n_obs_steps, *shape); goals under
                ``goal.<key>``, the instruction under ``instruction``.
            options: ``timestep``, ``reset``, ``full``, ``previous`` with ``mask``, ``seed``; see docs/serving.md.

        Raises:
            UserError: the connection is closed.
        """
        try:
            self._socket.send(pack({**observation, **options}))
        except ConnectionClosed as error:
            raise UserError(f"The policy server closed the connection: {error}") from error
        self._sent += 1

    def receive(self) -> dict[str, Any]:
        """The reply to the oldest request without one: ``actions`` (n, A) or ``superseded``.

        Raises:
            ServerRefusal: the server answered with an error.
            UserError: no reply in time, then the request is still without one; or the connection is closed.
        """
        try:
            reply = self._socket.recv(self._timeout)
        except TimeoutError as error:
            raise UserError(f"No reply of the policy server within {self._timeout} s.") from error
        except ConnectionClosed as error:
            raise UserError(f"The policy server closed the connection: {error}") from error
        self._received += 1
        if isinstance(reply, str):
            raise ServerRefusal(reply)
        found: dict[str, Any] = unpack(reply)
        return found

    def act(self, observation: Mapping[str, Any], **options: Any) -> np.ndarray:
        """Send an observation and wait for its actions; replies to earlier requests are thrown away.

        Returns:
            (n, A), physical units.

        Raises:
            ServerRefusal: the server answered with an error, or another thread sent a newer observation meanwhile.
            UserError: no reply in time, or the connection is closed.
        """
        self.send(observation, **options)
        own = self._sent
        while self._received < own - 1:
            with suppress(ServerRefusal):
                self.receive()
        reply = self.receive()
        if "actions" not in reply:
            raise ServerRefusal(
                "A newer observation of this client took the place of this one, and there are no actions for it. "
                "Where one thread sends while another one waits, use `send` and `receive`."
            )
        actions: np.ndarray = reply["actions"]
        return actions

    def close(self) -> None:
        self._open.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()
