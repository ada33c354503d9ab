"""Who may connect: the token, TLS."""

from __future__ import annotations

import hmac
import os
import ssl
import stat
from pathlib import Path

from robopolicy.errors import UserError

TOKEN_VARIABLE = "ROBOPOLICY_TOKEN"
SHORTEST_TOKEN = 16


def read_token(file: Path | None) -> str | None:
    """The token from a file, or from the environment variable ``ROBOPOLICY_TOKEN``; None where there is neither.

    Raises:
        UserError: the file cannot be read, other users of the machine can read or change it, or the token is weak.
    """
    if file is None:
        text, source = os.environ.get(TOKEN_VARIABLE), TOKEN_VARIABLE
    else:
        text, source = _read_private(file), str(file)
    if text is None:
        return None
    token = text.strip()
    if len(token) < SHORTEST_TOKEN or not token.isascii() or not token.isprintable() or " " in token:
        raise UserError(
            f"{source}: a token is one word of at least {SHORTEST_TOKEN} ASCII characters; "
            "make one with: openssl rand -hex 32"
        )
    return token


def _read_private(file: Path) -> str:
    try:
        with file.open(encoding="utf-8") as opened:
            mode = os.fstat(opened.fileno()).st_mode
            if mode & (stat.S_IROTH | stat.S_IWOTH):
                raise UserError(f"Every user of this machine can reach the token in {file}; run: chmod 600 {file}")
            return opened.read(4096)
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"token_file={file} cannot be read: {error}") from error


def authorized(headers: list[str], token: str) -> bool:
    """Whether the request's ``Authorization`` headers are one ``Api-Key TOKEN`` or ``Bearer TOKEN``."""
    if len(headers) != 1:
        return False
    scheme, _, given = headers[0].strip().partition(" ")
    matches = hmac.compare_digest(given.strip().encode(), token.encode())
    return scheme.lower() in ("api-key", "bearer") and matches


def tls_context(certificate: Path | None, key: Path | None) -> ssl.SSLContext | None:
    """TLS 1.2 or newer with a certificate chain and its private key (PEM); None where neither is given.

    Raises:
        UserError: only one is given, or they cannot be used.
    """
    if certificate is None and key is None:
        return None
    if certificate is None or key is None:
        raise UserError("TLS needs both tls_cert=… and tls_key=….")
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    try:
        context.load_cert_chain(certificate, key, password="")  # an encrypted key is refused, not asked about
    except (OSError, ValueError) as error:
        raise UserError(f"tls_cert={certificate} and tls_key={key} cannot be used: {error}") from error
    return context
