"""Where a server listens, and the names that it may be asked for by."""

from __future__ import annotations

import re
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from ipaddress import ip_address

from robopolicy.errors import UserError
from robopolicy.serving.security import TOKEN_VARIABLE

_HOST = re.compile(r"(?:\[([0-9a-f:.]+)\]|([^\[\]:@/]+))(?::\d*)?")


def check_address(host: str, token: str | None) -> None:
    """Refuse an address that other machines can reach when there is no token.

    Raises:
        UserError: so it is, or the address is unknown.
    """
    if token is None and not is_loopback(host):
        raise UserError(
            f"host={host or repr('')} can be reached from other machines, and there is no token. Make one, "
            f"openssl rand -hex 32 > token && chmod 600 token, and add token_file=token (or set {TOKEN_VARIABLE})."
        )


def is_loopback(host: str) -> bool:
    """Whether all addresses of a name are this machine's own.

    Raises:
        UserError: the name is unknown.
    """
    return bool(host) and all(
        ip_address(str(address[0]).partition("%")[0]).is_loopback for _, address in _addresses(host, 0)
    )


def check_free(host: str, port: int) -> None:
    """Refuse a port that is taken, before a policy is loaded for it.

    Raises:
        UserError: nothing can listen there.
    """
    for family, address in _addresses(host, port):
        with listening(host, port), socket.socket(family, socket.SOCK_STREAM) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if family == socket.AF_INET6:
                probe.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            probe.bind(address)


@contextmanager
def listening(host: str, port: int) -> Iterator[None]:
    """Turn the errors of sockets into a `UserError`."""
    try:
        yield
    except OSError as error:
        text = f"{host}:{port} cannot be listened on: {error}. Choose another with port=… (0: any free one)."
        raise UserError(text) from error


def names_this_machine(headers: list[str], host: str) -> bool:
    """Whether a request's ``Host`` headers are one that no name server outside this machine can have answered for.

    A web page whose own name was made to point to this machine (DNS rebinding) sends its name there, and no ``Origin``.

    Args:
        headers: the values of all ``Host`` headers.
        host: that the server was told to listen on, which may be a name of this machine.
    """
    found = _HOST.fullmatch(headers[0].lower()) if len(headers) == 1 else None
    if found is None:
        return False
    name = found[1] or found[2]
    if name in ("localhost", host.lower()):
        return True
    try:
        address = ip_address(name)
    except ValueError:
        return False
    return address.is_loopback or address.is_unspecified  # programs that connect to 0.0.0.0 reach this machine


def _addresses(host: str, port: int) -> list[tuple[int, tuple]]:
    """The address families and socket addresses that a name stands for; an empty one stands for all."""
    try:
        found = socket.getaddrinfo(host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except OSError as error:
        raise UserError(f"host={host} is no address of this machine: {error}") from error
    return [(family, address) for family, _, _, _, address in found]
