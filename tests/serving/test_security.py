"""The token, the address and its names, TLS files."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

from robopolicy.errors import UserError
from robopolicy.serving.address import check_address, check_free, is_loopback, names_this_machine
from robopolicy.serving.security import authorized, read_token, tls_context
from robopolicy.serving.server import ServerConfig

TOKEN = "0123456789abcdef"


def private(path: Path, text: str, mode: int = 0o600) -> Path:
    path.write_text(text)
    path.chmod(mode)
    return path


def test_the_token_comes_from_a_private_file_or_the_environment(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.delenv("ROBOPOLICY_TOKEN", raising=False)
    assert read_token(None) is None
    assert read_token(private(tmp_path / "token", TOKEN + "\n")) == TOKEN
    monkeypatch.setenv("ROBOPOLICY_TOKEN", TOKEN[::-1])
    assert read_token(None) == TOKEN[::-1]
    assert read_token(tmp_path / "token") == TOKEN


@pytest.mark.parametrize("mode", [0o604, 0o644, 0o602, 0o666])
def test_a_file_that_everybody_can_reach_is_refused(tmp_path: Path, mode: int) -> None:
    with pytest.raises(UserError, match="chmod 600"):
        read_token(private(tmp_path / "token", TOKEN, mode))


@pytest.mark.parametrize("text", ["", "short", "two words of a token", "ünïcode-token-0123456789", "a\x00b" * 8])
def test_weak_tokens_are_refused(tmp_path: Path, text: str) -> None:
    with pytest.raises(UserError, match="openssl rand"):
        read_token(private(tmp_path / "token", text))


def test_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot be read"):
        read_token(tmp_path / "token")


def test_the_token_is_not_shown() -> None:
    assert TOKEN not in repr(ServerConfig(token=TOKEN))


@pytest.mark.parametrize("header", [f"Api-Key {TOKEN}", f"Bearer {TOKEN}", f"bearer  {TOKEN} ", f"API-KEY {TOKEN}"])
def test_good_headers(header: str) -> None:
    assert authorized([header], TOKEN)


@pytest.mark.parametrize(
    "headers",
    [
        [],
        [TOKEN],
        ["Bearer"],
        ["Bearer "],
        [f"Bearer {TOKEN}0"],
        [f"Bearer {TOKEN[:-1]}"],
        [f"Basic {TOKEN}"],
        [f"Bearer {TOKEN.upper()}"],
        ["Bearer \xff\xfe"],
        [f"Bearer {TOKEN}", f"Bearer {TOKEN}"],
    ],
)
def test_bad_headers(headers: list[str]) -> None:
    assert not authorized(headers, TOKEN)


@pytest.mark.parametrize("host", ["127.0.0.1", "127.8.8.8", "::1", "localhost"])
def test_this_machine_needs_no_token(host: str) -> None:
    assert is_loopback(host)
    check_address(host, None)


@pytest.mark.parametrize("host", ["", "0.0.0.0", "::", "192.0.2.7"])
def test_other_addresses_need_one(host: str) -> None:
    with pytest.raises(UserError, match="openssl rand -hex 32"):
        ServerConfig(host=host)
    ServerConfig(host=host, token=TOKEN)


def test_a_name_that_the_server_was_told_to_listen_on() -> None:
    assert names_this_machine(["arm.local:8000"], "Arm.local")
    assert not names_this_machine(["arm.local:8000"], "127.0.0.1")
    assert not names_this_machine(["arm.local", "arm.local"], "arm.local")


@pytest.mark.parametrize("name", ["me@localhost", "localhost/x", "[localhost]", "localhost:", "::1", "localhost:1:1"])
def test_names_are_read_strictly(name: str) -> None:
    assert names_this_machine([name], "127.0.0.1") == (name == "localhost:")


def test_a_taken_port_is_known_without_listening() -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        for host in ("127.0.0.1", "localhost", "0.0.0.0", ""):
            with pytest.raises(UserError, match=f"{host}:{port} cannot be listened on: .*port=…"):
                check_free(host, port)
    check_free("127.0.0.1", port)
    check_free("localhost", 0)


def test_tls_needs_certificate_and_key(tmp_path: Path) -> None:
    assert tls_context(None, None) is None
    with pytest.raises(UserError, match="both"):
        tls_context(tmp_path / "a.crt", None)
    with pytest.raises(UserError, match="cannot be used"):
        tls_context(private(tmp_path / "a.crt", "no"), private(tmp_path / "a.key", "no"))
