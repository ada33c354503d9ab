"""The policy server: openpi's websocket protocol, inference off the event loop, hostile clients refused."""

from __future__ import annotations

import asyncio
import http
import logging
import ssl
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any, Protocol

import numpy as np
from websockets.asyncio.server import Server, ServerConnection, serve
from websockets.exceptions import ConnectionClosed
from websockets.frames import CloseCode
from websockets.http11 import Request as HttpRequest
from websockets.http11 import Response

from robopolicy import __version__
from robopolicy.errors import UserError
from robopolicy.serving.address import check_address, listening, names_this_machine
from robopolicy.serving.connection import Gate, GuardedConnection
from robopolicy.serving.limits import Limits, TokenBucket
from robopolicy.serving.metrics import CONTENT_TYPE, Metrics
from robopolicy.serving.observations import History, Request
from robopolicy.serving.security import authorized
from robopolicy.serving.wire import WireError, pack, unpack
from robopolicy.serving.worker import Done, Job, Worker
from robopolicy.spec import KeySpec, PolicySpec

log = logging.getLogger(__name__)
_websockets_log = logging.getLogger(__name__ + ".websockets")
_websockets_log.setLevel(logging.ERROR)  # else every refused client writes a line

MAX_FRAGMENTS = 1024
MAX_REPLIES = 256
"""Replies that one connection may wait for; the server stops reading beyond."""
LONGEST_TEXT = 500
REPORT_EVERY = 10.0


class ServedPolicy(Protocol):
    """What the server needs of a policy; `robopolicy.inference.policy.ExportedPolicy` is one.

    Attributes:
        spec: keys, shapes, horizons.
        name: of the engine, for the client.
    """

    spec: PolicySpec
    name: str

    def draw_noise(self, rows: int, rng: np.random.Generator) -> np.ndarray:
        """Noise for so many chunks."""

    def sample(
        self,
        observations: Mapping[str, Any],
        noise: np.ndarray,
        previous: np.ndarray | None = None,
        mask: np.ndarray | None = None,
    ) -> np.ndarray:
        """Chunks (B, H, A) in physical units; called from one thread."""

    def warmup(self, runs: int = 3) -> None:
        """Do what an engine does once."""


@dataclass(frozen=True)
class ServerConfig:
    """Where and for whom a policy is served.

    Attributes:
        host: address to listen on; other machines reach the server only with a token.
        port: 0: any free one.
        token: what clients must send; None: no check, on this machine only.
        tls: makes it wss:// and https://.
        allowed_origins: web pages that may connect, e.g. ``https://robots.example``; browsers send their page's origin,
            programs send none.
        limits: see there.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    token: str | None = field(default=None, repr=False)
    tls: ssl.SSLContext | None = None
    allowed_origins: tuple[str, ...] = ()
    limits: Limits = field(default_factory=Limits)

    def __post_init__(self) -> None:
        check_address(self.host, self.token)
        if not 0 <= self.port < 2**16:
            raise UserError(f"port={self.port} must lie in 0..65535.")


@dataclass(frozen=True)
class _Reply:
    payload: bytes | str
    close: CloseCode | None = None


class _Refused(Exception):
    def __init__(self, reason: str, code: CloseCode, text: str) -> None:
        super().__init__(text)
        self.reason, self.code = reason, code


@dataclass(eq=False)
class _Client:
    socket: ServerConnection
    history: History
    bucket: TokenBucket
    replies: asyncio.Queue[_Reply | Job] = field(default_factory=lambda: asyncio.Queue(MAX_REPLIES))
    previous_total: float | None = None


class PolicyServer:
    """Serves one policy to several clients; use as ``async with`` or by `start` and `stop`.

    Args:
        policy: used from one thread of the server; the caller closes it, once `stop` says that it is at rest.
        config: address, token, TLS, limits.
        fingerprint: of the bundle, for the client.
    """

    def __init__(self, policy: ServedPolicy, config: ServerConfig, fingerprint: str = "") -> None:
        self.policy, self.config = policy, config
        self.metrics = Metrics()
        self.max_message_bytes = config.limits.message_bytes(policy.spec)
        self._metadata = pack(self._about(fingerprint))
        self._worker = Worker(policy.warmup, self._infer)
        self._gate = Gate(config.limits, self.metrics, config.tls)
        self._clients: set[_Client] = set()
        self._rng = np.random.default_rng()
        self._stopping = False
        self._totals: list[float] = []
        self._server: Server
        self._reports: asyncio.Task[None]

    @property
    def port(self) -> int:
        return int(self._server.sockets[0].getsockname()[1])

    async def start(self) -> None:
        """Take the address, warm the policy up, then listen.

        Raises:
            UserError: the address cannot be used, or the policy.
        """
        limits, host, port = self.config.limits, self.config.host, self.config.port
        with listening(host, port):
            self._server = await serve(
                self._handle,
                host,
                port,
                start_serving=False,
                compression=None,
                process_request=self._process_request,
                server_header=None,
                open_timeout=limits.open_timeout,
                ping_interval=limits.ping_interval,
                ping_timeout=limits.ping_timeout,
                close_timeout=limits.close_timeout,
                max_size=self.max_message_bytes,
                max_queue=4,
                logger=_websockets_log,
                create_connection=partial(GuardedConnection, self._gate),  # type: ignore[arg-type]
            )
        try:
            await self._worker.start()
            with listening(host, port):  # another server may have begun to since
                await self._server.start_serving()
        except BaseException:
            self._server.close()
            await self._worker.stop(limits.stop_timeout)
            raise
        self._reports = asyncio.create_task(self._report())

    async def stop(self) -> bool:
        """Answer what waits, then close all connections with code 1001.

        Returns:
            Whether the policy is at rest. False: a call of it takes longer than ``stop_timeout``, and nobody may close
            the policy under that call.
        """
        self._stopping = True
        self._reports.cancel()
        await asyncio.gather(*(self._flushed(client) for client in self._clients))
        self._gate.close()
        self._server.close(code=CloseCode.GOING_AWAY, reason="server is stopping")
        await self._server.wait_closed()
        return await self._worker.stop(self.config.limits.stop_timeout)

    async def __aenter__(self) -> PolicyServer:
        await self.start()
        return self

    async def __aexit__(self, *error: object) -> None:
        await self.stop()

    def _about(self, fingerprint: str) -> dict[str, Any]:
        """The first frame of a connection."""
        spec = self.policy.spec
        return {
            "server": f"robopolicy {__version__}",
            "engine": self.policy.name,
            "fingerprint": fingerprint,
            "observations": [_key_about(k) for k in spec.observations],
            "goals": [_key_about(k) for k in spec.goals],
            "instructions": [task.instruction for task in spec.tasks][:256],
            "action": _key_about(spec.action),
            "fps": float(spec.fps),
            "n_obs_steps": spec.n_obs_steps,
            "horizon": spec.horizon,
            "n_action_steps": spec.n_action_steps,
            "max_message_bytes": self.max_message_bytes,
            "rate": float(self.config.limits.rate),
        }

    async def _flushed(self, client: _Client) -> None:
        """Wait until a client has its replies, or is gone, or the time to stop is over."""
        either = {asyncio.create_task(client.replies.join()), asyncio.create_task(client.socket.wait_closed())}
        await asyncio.wait(either, timeout=self.config.limits.stop_timeout, return_when=asyncio.FIRST_COMPLETED)
        for task in either:
            task.cancel()

    # HTTP

    def _process_request(self, connection: ServerConnection, request: HttpRequest) -> Response | None:
        """Answer plain HTTP and refuse clients before the websocket opens; None lets one in."""
        path = request.path.partition("?")[0]
        token = self.config.token
        if token is None and not names_this_machine(request.headers.get_all("Host"), self.config.host):
            text = "Without a token this server answers to localhost only.\n"
            return self._refuse(connection, "host", http.HTTPStatus.FORBIDDEN, text)
        if path == "/healthz":
            healthy = not self._stopping and self._worker.working(self.config.limits.stuck_after)
            status = http.HTTPStatus.OK if healthy else http.HTTPStatus.SERVICE_UNAVAILABLE
            return connection.respond(status, "OK\n" if healthy else "stopping or stuck\n")
        if any(origin not in self.config.allowed_origins for origin in request.headers.get_all("Origin")):
            return self._refuse(connection, "origin", http.HTTPStatus.FORBIDDEN, "Web pages may not connect.\n")
        if token is not None and not authorized(request.headers.get_all("Authorization"), token):
            text = "Send the header 'Authorization: Api-Key TOKEN'.\n"
            response = self._refuse(connection, "token", http.HTTPStatus.UNAUTHORIZED, text)
            response.headers["WWW-Authenticate"] = "Api-Key"
            return response
        if path == "/metrics":
            response = connection.respond(http.HTTPStatus.OK, self.metrics.text())
            del response.headers["Content-Type"]
            response.headers["Content-Type"] = CONTENT_TYPE
            return response
        if path != "/":
            return self._refuse(connection, "path", http.HTTPStatus.NOT_FOUND, "There are /, /healthz, /metrics.\n")
        if self._stopping:
            return self._refuse(connection, "stopping", http.HTTPStatus.SERVICE_UNAVAILABLE, "Stopping.\n")
        if len(self._clients) >= self.config.limits.max_connections:
            return self._refuse(connection, "full", http.HTTPStatus.SERVICE_UNAVAILABLE, "Too many clients.\n")
        return None

    def _refuse(self, connection: ServerConnection, reason: str, status: http.HTTPStatus, text: str) -> Response:
        self.metrics.refused.labels(reason).inc()
        return connection.respond(status, text)

    # websocket

    async def _handle(self, socket: ServerConnection) -> None:
        assert isinstance(socket, GuardedConnection)
        self._gate.passed(socket)
        if len(self._clients) >= self.config.limits.max_connections:  # several handshakes ended at once
            self.metrics.refused.labels("full").inc()
            await socket.close(CloseCode.TRY_AGAIN_LATER, "too many clients")
            return
        client = _Client(socket, History(self.policy.spec), TokenBucket(self.config.limits.rate))
        self._clients.add(client)
        self.metrics.connections.inc()
        await client.replies.put(_Reply(self._metadata))
        reader, writer = asyncio.create_task(self._read(client)), asyncio.create_task(self._write(client))
        try:
            await asyncio.wait({reader, writer}, return_when=asyncio.FIRST_COMPLETED)
            if reader.done() and reader.exception() is None:
                await asyncio.wait({writer})  # it ends with the refusal
        finally:
            reader.cancel()
            writer.cancel()
            self._worker.drop(client)
            self._clients.discard(client)
            self.metrics.connections.dec()
        ended = await asyncio.gather(reader, writer, return_exceptions=True)
        closed = [error for error in ended if isinstance(error, ConnectionClosed)]
        if closed:
            self._count(closed[0])
        for error in ended:
            if isinstance(error, Exception) and not isinstance(error, ConnectionClosed):
                raise error

    async def _read(self, client: _Client) -> None:
        """Queue a reply for each frame; returns once the client is refused, with a reply that closes queued."""
        while True:
            try:
                reply = self._accept(client, await self._message(client))
            except _Refused as refused:
                self.metrics.refused.labels(refused.reason).inc()
                await client.replies.put(_Reply(str(refused), refused.code))
                return
            except UserError as error:
                reply = self._user_error(error)
            await client.replies.put(reply)

    async def _message(self, client: _Client) -> bytes | str:
        parts: list[Any] = []
        try:
            async with asyncio.timeout(None) as limit:
                async for part in client.socket.recv_streaming():
                    if not parts:
                        limit.reschedule(asyncio.get_running_loop().time() + self.config.limits.message_timeout)
                    parts.append(part)
                    if len(parts) > MAX_FRAGMENTS:
                        raise _Refused("malformed", CloseCode.MESSAGE_TOO_BIG, "The message has too many fragments.")
        except TimeoutError as error:
            raise _Refused("unfinished", CloseCode.POLICY_VIOLATION, "The message took too long.") from error
        return parts[0] if len(parts) == 1 else type(parts[0])().join(parts)

    def _accept(self, client: _Client, message: bytes | str) -> _Reply | Job:
        if not client.bucket.take():
            text = f"More than {self.config.limits.rate:g} requests per second."
            raise _Refused("rate", CloseCode.POLICY_VIOLATION, text)
        self.metrics.requests.inc()
        if isinstance(message, str):
            raise _Refused("malformed", CloseCode.INVALID_DATA, "Requests are binary frames of msgpack.")
        try:
            frame = unpack(message)
        except WireError as error:
            raise _Refused("malformed", CloseCode.INVALID_DATA, _short(error)) from error
        if self._stopping:
            self.metrics.refused.labels("stopping").inc()
            return _Reply("The server is stopping.")
        return self._worker.submit(client, client.history.request(frame))

    async def _write(self, client: _Client) -> None:
        """Send replies in the order of their requests."""
        while True:
            entry = await client.replies.get()
            reply = entry if isinstance(entry, _Reply) else self._reply(client, entry, await entry.done)
            await client.socket.send(reply.payload)
            if isinstance(entry, Job):
                client.previous_total = time.monotonic() - entry.received
                self._totals.append(client.previous_total)
            client.replies.task_done()
            if reply.close is not None:
                await client.socket.close(reply.close)
                return

    def _reply(self, client: _Client, job: Job, done: Done) -> _Reply:
        timestep = job.request.timestep
        if done.superseded:
            self.metrics.superseded.inc()
            return _Reply(pack({"superseded": True, "timestep": timestep}))
        self.metrics.queue.observe(done.queue_seconds)
        self.metrics.inference.observe(done.infer_seconds)
        if isinstance(done.error, UserError):
            return self._user_error(done.error)
        if done.actions is None:
            self.metrics.errors.labels("internal").inc()
            log.error("The policy failed.", exc_info=done.error)
            return _Reply("The policy failed; the server's log says why.", CloseCode.INTERNAL_ERROR)
        timing = {"infer_ms": 1e3 * done.infer_seconds, "queue_ms": 1e3 * done.queue_seconds}
        if client.previous_total is not None:
            timing["prev_total_ms"] = 1e3 * client.previous_total
        reply: dict[str, Any] = {"actions": done.actions, "server_timing": timing}
        if timestep is not None:
            reply |= {"timestep": timestep, "timesteps": timestep + np.arange(len(done.actions))}
        return _Reply(pack(reply))

    def _user_error(self, error: UserError) -> _Reply:
        self.metrics.errors.labels("user").inc()
        return _Reply(_short(error))

    def _count(self, closed: ConnectionClosed) -> None:
        """Count connections that the websocket layer refused."""
        if closed.sent is None or closed.rcvd_then_sent:
            return
        reasons: dict[int, str] = {
            CloseCode.MESSAGE_TOO_BIG: "too_large",
            CloseCode.PROTOCOL_ERROR: "malformed",
            CloseCode.INVALID_DATA: "malformed",
        }
        reason = "silent" if "ping timeout" in closed.sent.reason else reasons.get(closed.sent.code)
        if reason is not None:
            self.metrics.refused.labels(reason).inc()

    # policy

    def _infer(self, request: Request) -> np.ndarray:
        """Actions (n, A) from the newest observation on; in the worker's thread."""
        spec = self.policy.spec
        rng = self._rng if request.seed is None else np.random.default_rng(request.seed)
        noise = self.policy.draw_noise(1, rng)
        chunk = self.policy.sample(request.observations, noise, request.previous, request.mask)[0]
        actions = chunk[spec.n_obs_steps - 1 :] if request.full else chunk[spec.executed]
        if not np.isfinite(actions).all():
            raise FloatingPointError("The policy's actions hold NaN or infinite entries.")
        return np.ascontiguousarray(actions, np.float32)

    async def _report(self) -> None:
        """Say how fast requests are answered, while there are any."""
        while True:
            await asyncio.sleep(REPORT_EVERY)
            totals, self._totals = self._totals, []
            if totals:
                p50, p99 = 1e3 * np.percentile(totals, [50, 99])
                log.info(
                    "%.1f requests/s, latency p50 %.1f ms, p99 %.1f ms, clients: %d",
                    len(totals) / REPORT_EVERY,
                    p50,
                    p99,
                    len(self._clients),
                )


def _key_about(key: KeySpec) -> dict[str, Any]:
    about = {name: asdict(key)[name] for name in ("key", "role", "unit", "rotation")}
    return about | {"shape": list(key.shape), "dtype": "uint8" if key.role == "image" else "float32"}


def _short(error: Exception) -> str:
    return str(error)[:LONGEST_TEXT]
