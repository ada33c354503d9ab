"""``robopolicy serve``"""

from __future__ import annotations

import argparse
import asyncio
import logging
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from robopolicy.cli.compose import compose_config
from robopolicy.errors import UserError

if TYPE_CHECKING:
    from robopolicy.serving.server import PolicyServer

log = logging.getLogger(__name__)

HELP = """\
Answer observations with chunks of actions over the network, for a robot whose computer is too slow.

  robopolicy serve bundle=runs/pusht_state/diffusion_unet-seed42/bundles/last
  robopolicy serve bundle=… engine=openvino-fp32 threads=2 port=8001
  openssl rand -hex 32 > token && chmod 600 token
  robopolicy serve bundle=… host=0.0.0.0 token_file=token tls_cert=server.crt tls_key=server.key

openpi's public client connects as it is: WebsocketClientPolicy("127.0.0.1", 8000).infer({"observation.state": …}).
From Python without openpi: robopolicy.serving.client.PolicyClient. The protocol, the limits and a systemd unit are in
docs/serving.md.

Without a token the server listens on this machine only. The token is read from token_file or from the environment
variable ROBOPOLICY_TOKEN. GET /healthz and GET /metrics (Prometheus) are on the same port. Ctrl-C or SIGTERM: what
waits is answered, then the server ends; while the policy loads, it ends at once.
"""
SIGNALS = (signal.SIGINT, signal.SIGTERM)


def add_parser(verbs: Any) -> None:
    parser = verbs.add_parser(
        "serve",
        help="a policy over the network, for openpi's client and ours",
        description=HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="see above and configs/serve.yaml")
    parser.set_defaults(run=run)


@dataclass(frozen=True)
class Settings:
    """The entries of ``configs/serve.yaml``, explained there."""

    bundle: str
    verify: bool
    allow_native_code: bool
    threads: int
    host: str
    port: int
    allowed_origins: tuple[str, ...]
    max_connections: int
    rate: float
    open_timeout: float
    message_timeout: float
    write_timeout: float
    ping_interval: float
    ping_timeout: float
    close_timeout: float
    stuck_after: float
    stop_timeout: float
    max_message_bytes: int | None = None
    engine: str | None = None
    device: str | None = None
    token_file: str | None = None
    tls_cert: str | None = None
    tls_key: str | None = None

    def __post_init__(self) -> None:
        if self.threads < 1:
            raise UserError(f"threads={self.threads} must be at least 1.")


def run(args: argparse.Namespace) -> int:
    from robopolicy.configuration import dataclass_from
    from robopolicy.export.open import open_policy
    from robopolicy.serving.address import check_free
    from robopolicy.serving.limits import Limits
    from robopolicy.serving.security import read_token, tls_context
    from robopolicy.serving.server import PolicyServer, ServerConfig

    settings = dataclass_from(Settings, compose_config("serve", args.overrides), "")
    config = ServerConfig(
        settings.host,
        settings.port,
        read_token(_path(settings.token_file)),
        tls_context(_path(settings.tls_cert), _path(settings.tls_key)),
        settings.allowed_origins,
        Limits(**{field.name: getattr(settings, field.name) for field in fields(Limits)}),
    )
    check_free(config.host, config.port)
    with _signals_end_the_process():
        policy = open_policy(
            Path(settings.bundle),
            settings.engine,
            threads=settings.threads,
            device=settings.device,
            verify=settings.verify,
            allow_native_code=settings.allow_native_code,
        )
        print(f"policy    {settings.bundle}, engine {policy.name}", flush=True)
        try:
            at_rest = asyncio.run(_serve(PolicyServer(policy, config, policy.fingerprint)))
        except UserError:  # before the first request: nothing uses the policy
            policy.close()
            raise
        if not at_rest:
            _exit_beside_a_running_call(settings.stop_timeout)
        policy.close()
    return 0


async def _serve(server: PolicyServer) -> bool:
    """Serve until a signal; returns whether the policy may be closed, see `PolicyServer.stop`."""
    await server.start()
    stop = asyncio.Event()
    for number in SIGNALS:
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    print("\n".join(_introduction(server)), flush=True)
    await stop.wait()
    print("stopping: answering what waits", flush=True)
    return await server.stop()


@contextmanager
def _signals_end_the_process() -> Iterator[None]:
    """Python's own handlers wait until native code returns, and loading or warming up an engine is one long call."""
    before = {number: signal.signal(number, signal.SIG_DFL) for number in SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _exit_beside_a_running_call(waited: float) -> NoReturn:
    log.error("The policy is still computing, stop_timeout=%g s after the signal; it ends with the process.", waited)
    sys.stdout.flush()
    logging.shutdown()
    os._exit(1)  # an ordinary end runs destructors of libraries that the call is using


def _introduction(server: PolicyServer) -> list[str]:
    config, limits = server.config, server.config.limits
    host = f"[{config.host}]" if ":" in config.host else config.host
    token = "token needed" if config.token is not None else "no token: this machine only"
    if config.token is not None and config.tls is None:
        token += "; without TLS others on the network can read it"
    return [
        f"address   {'wss' if config.tls else 'ws'}://{host}:{server.port} ({token})",
        f"limits    {limits.max_connections} clients, {limits.rate:g} requests/s each, "
        f"{server.max_message_bytes:,} bytes a frame",
    ]


def _path(text: str | None) -> Path | None:
    return Path(text) if text is not None else None
