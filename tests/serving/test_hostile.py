"""Clients that mean harm are refused, and while they try, another client gets every chunk."""

from __future__ import annotations

import contextlib
import random
import socket
import ssl
import struct
import subprocess
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import BinaryIO

import msgpack
import numpy as np
import pytest
from websockets.exceptions import ConnectionClosed, InvalidMessage, InvalidStatus
from websockets.sync.client import ClientConnection, connect

from robopolicy.errors import UserError
from robopolicy.serving.client import ServerRefusal
from robopolicy.serving.connection import MAX_HANDSHAKES
from robopolicy.serving.limits import Limits
from robopolicy.serving.security import tls_context
from robopolicy.serving.server import MAX_FRAGMENTS
from robopolicy.serving.wire import WireError, pack, unpack
from tests.serving.conftest import SPEC, TASK_SPEC, Echo, Running, state, task_frame, wait_until
from tests.serving.test_server import page
from tests.serving.test_wire import mutated

TOKEN = "0123456789abcdef"
UPGRADE = (
    b"GET / HTTP/1.1\r\nHost: localhost\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
    b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Version: 13\r\n\r\n"
)


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A self-signed certificate for 127.0.0.1 and its key."""
    folder = tmp_path_factory.mktemp("tls")
    files = folder / "server.crt", folder / "server.key"
    command = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]
    command += ["-days", "2", "-subj", "/CN=robot", "-addext", "subjectAltName=IP:127.0.0.1"]
    try:
        subprocess.run([*command, "-out", files[0], "-keyout", files[1]], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"no openssl that makes a certificate: {error}")
    return files


@contextlib.contextmanager
def unharmed(running: Running, **options) -> Iterator[None]:
    """Another client asks all the while, slower than its rate, and must get each of its chunks."""
    over, wrong, served = threading.Event(), [], []

    def ask() -> None:
        try:
            with running.client(**options) as client:
                while not over.wait(0.02):
                    value = len(served)
                    if client.act(state(value, 0))[0, 0] != value + 100:
                        wrong.append(f"a wrong chunk for {value}")
                    served.append(value)
        except Exception as error:
            wrong.append(repr(error))

    thread = threading.Thread(target=ask)
    thread.start()
    wait_until(lambda: served or wrong, "the honest client is served")
    yield
    before = len(served)
    wait_until(lambda: len(served) > before or wrong, "the honest client is served afterwards")
    over.set()
    thread.join(20)
    assert not wrong, wrong


def raw(running: Running) -> socket.socket:
    return socket.create_connection(("127.0.0.1", running.port), timeout=20)


def upgraded(running: Running) -> socket.socket:
    """A socket after the websocket handshake and the server's metadata."""
    opened = raw(running)
    opened.sendall(UPGRADE)
    received = b""
    while b"n_action_steps" not in received:
        received += opened.recv(65536)
    assert b" 101 " in received
    return opened


def wait_closed(opened: socket.socket) -> bytes:
    """All that comes until the server closes the connection."""
    received = b""
    with contextlib.suppress(ConnectionResetError):
        while data := opened.recv(65536):
            received += data
    return received


def masked(payload: bytes, opcode: int, fin: bool = True) -> bytes:
    """A client's frame; the mask is 0."""
    length = bytes([0x80 | len(payload)]) if len(payload) < 126 else b"\xfe" + struct.pack("!H", len(payload))
    return bytes([(0x80 if fin else 0) | opcode]) + length + bytes(4) + payload


def send_unread(running: Running, opened: socket.socket, frames: bytes) -> None:
    """Send frames again and again, each whole, and read no answer, until the server drops the client."""
    opened.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    opened.settimeout(0.2)
    end, left = time.monotonic() + 30, b""
    with contextlib.suppress(ConnectionError):
        while running.count("refused_total", reason="unread") == 0 and time.monotonic() < end:
            left = left or frames
            with contextlib.suppress(TimeoutError):
                left = left[opened.send(left) :]
    wait_until(lambda: running.count("refused_total", reason="unread") == 1, "the client is dropped")


def next_frame(stream: BinaryIO) -> tuple[int, bytes]:
    """Opcode and payload of a server's frame."""
    opcode, length = stream.read(2)
    if length >= 126:
        length = int.from_bytes(stream.read(2 if length == 126 else 8), "big")
    return opcode & 0x0F, stream.read(length)


def closing(client: ClientConnection) -> tuple[list[str | bytes], int | None]:
    """Remaining messages and the close code."""
    messages: list[str | bytes] = []
    try:
        while True:
            messages.append(client.recv(20))
    except ConnectionClosed as closed:
        return messages, closed.rcvd.code if closed.rcvd else None


@pytest.mark.parametrize(
    "headers",
    [{}, {"Authorization": "Api-Key wrong-wrong-wrong"}, {"Authorization": TOKEN}, {"Authorization": f"Basic {TOKEN}"}],
    ids=["none", "wrong", "bare", "basic"],
)
def test_without_the_token_nobody_gets_in(serve, headers: dict[str, str]) -> None:
    running = serve(token=TOKEN)
    with unharmed(running, token=TOKEN):
        with pytest.raises(InvalidStatus) as error, connect(running.address, additional_headers=headers):
            pass
        assert error.value.response.status_code == 401
        assert TOKEN.encode() not in (error.value.response.body or b"")
    assert running.count("refused_total", reason="token") == 1


def test_metrics_need_the_token_and_health_does_not(serve) -> None:
    running = serve(token=TOKEN)
    assert page(running, "/metrics")[0] == 401
    assert page(running, "/metrics", Authorization="Bearer wrong-wrong-wrong")[0] == 401
    assert page(running, "/metrics", Authorization=f"Bearer {TOKEN}")[0] == 200
    assert page(running, "/healthz") == (200, "OK\n")


@pytest.mark.parametrize("origin", ["http://evil.example", "null", "http://127.0.0.1"])
def test_web_pages_may_not_connect(serve, origin: str) -> None:
    running = serve(token=TOKEN, allowed_origins=("https://robots.example",))
    headers = {"Authorization": f"Bearer {TOKEN}"}
    with unharmed(running, token=TOKEN):
        with pytest.raises(InvalidStatus) as error, connect(running.address, origin=origin, additional_headers=headers):
            pass
        assert error.value.response.status_code == 403
        assert page(running, "/metrics", Origin=origin, **headers)[0] == 403
    with connect(running.address, origin="https://robots.example", additional_headers=headers) as client:
        assert unpack(client.recv())["horizon"] == 8


@pytest.mark.parametrize("host", ["evil.example", "evil.example:8000", "127.0.0.1.evil.example", "192.0.2.7", ""])
def test_web_pages_whose_name_was_pointed_here_are_refused(serve, host: str) -> None:
    """DNS rebinding: the browser takes the server for the page's own, and sends no Origin."""
    running = serve()
    for path in ("/metrics", "/healthz", "/"):
        assert page(running, path, Host=host)[0] == 403
    with unharmed(running), raw(running) as opened:
        opened.sendall(UPGRADE.replace(b"Host: localhost", b"Host: " + host.encode()))
        assert b" 403 " in wait_closed(opened)
    assert running.count("refused_total", reason="host") == 4


@pytest.mark.parametrize("hosts", [b"", b"Host: localhost\r\nHost: evil.example\r\n"], ids=["none", "two"])
def test_a_request_has_one_host(serve, hosts: bytes) -> None:
    running = serve()
    with raw(running) as opened:
        opened.sendall(UPGRADE.replace(b"Host: localhost\r\n", hosts))
        assert b" 101 " not in wait_closed(opened)


@pytest.mark.parametrize(
    "host", ["localhost:8000", "LOCALHOST", "127.0.0.1", "127.9.9.9:1", "[::1]:8000", "0.0.0.0:80"]
)
def test_names_of_this_machine(serve, host: str) -> None:
    assert page(serve(), "/metrics", Host=host)[0] == 200


def test_with_a_token_the_name_does_not_matter(serve) -> None:
    running = serve(token=TOKEN)
    assert page(running, "/metrics", Host="robots.example", Authorization=f"Bearer {TOKEN}")[0] == 200
    assert page(running, "/metrics", Host="robots.example")[0] == 401


def test_a_page_that_is_not_there(serve) -> None:
    running = serve()
    with pytest.raises(InvalidStatus) as error, connect(running.address + "/admin"):
        pass
    assert error.value.response.status_code == 404
    assert running.count("refused_total", reason="path") == 1


@pytest.mark.parametrize(
    "frame",
    [
        b"",
        b"\xc1",
        b"not msgpack at all",
        b"\x80\x05\x95\x0c\x00\x00\x00\x00\x00\x00\x00\x8c\x02os\x8c\x06system\x93.",  # a pickle
        msgpack.packb({"observation.state": {b"__ndarray__": True, b"data": b"", b"dtype": "O", b"shape": [2]}}),
        msgpack.packb({"x": {b"__ndarray__": True, b"data": bytes(8), b"dtype": "<f4", b"shape": [2**40]}}),
        b"\x91" * 900 + b"\xc0",
        "text",
    ],
)
def test_malformed_frames(serve, frame: bytes | str) -> None:
    running = serve()
    with unharmed(running):
        with connect(running.address) as client:
            client.recv()
            client.send(frame)
            (answer,), code = closing(client)
        assert isinstance(answer, str) and "Traceback" not in answer and len(answer) < 250
        assert code == 1007
    assert running.count("refused_total", reason="malformed") == 1


def test_a_malformed_frame_behind_a_good_one(serve) -> None:
    """Replies come in order: the chunk, then the refusal."""
    policy = Echo()
    running = serve(policy)
    policy.hold.clear()
    with connect(running.address) as client:
        client.recv()
        client.send(pack(state(1, 2)))
        client.send(b"\xc1")
        wait_until(lambda: running.count("refused_total", reason="malformed") == 1, "the bad frame is seen")
        policy.hold.set()
        (chunk, refusal), code = closing(client)
    assert unpack(chunk)["actions"][0, 0] == 101 and "msgpack" in refusal and code == 1007


def test_oversized_frames(serve) -> None:
    running = serve(limits=Limits(max_message_bytes=10_000))
    with unharmed(running), connect(running.address) as client:
        client.recv()
        with contextlib.suppress(ConnectionClosed):
            client.send(bytes(10_001))
        messages, code = closing(client)
        assert not messages and code == 1009
    assert running.count("refused_total", reason="too_large") == 1


def test_a_frame_that_only_says_that_it_is_large(serve) -> None:
    """The announced length is refused before any of it is kept."""
    running = serve()
    with unharmed(running), upgraded(running) as opened:
        opened.sendall(b"\x82\xff" + struct.pack("!Q", 2**62) + bytes(4))
        assert b"\x03\xf1" in wait_closed(opened)  # 1009
    assert running.count("refused_total", reason="too_large") == 1


def test_frames_that_break_the_websocket_protocol(serve) -> None:
    running = serve()
    with unharmed(running), upgraded(running) as opened:
        opened.sendall(b"\x82\x03abc")  # a client's frame without mask
        assert b"\x03\xea" in wait_closed(opened)  # 1002
    assert running.count("refused_total", reason="malformed") == 1


def test_noise_instead_of_a_handshake(serve) -> None:
    running = serve()
    rng = random.Random(0)
    with unharmed(running):
        for text in [
            rng.randbytes(300),
            b"\x16\x03\x01\x02\x00\x01\x00",
            b"GET /\r\n\r\n",
            b"A" * 20_000,
            b"\r\n" * 500,
        ]:
            with raw(running) as opened:
                opened.sendall(text)
                opened.shutdown(socket.SHUT_WR)
                assert b" 101 " not in wait_closed(opened)
    assert page(running, "/healthz")[0] == 200


def test_a_handshake_byte_by_byte(serve) -> None:
    running = serve(limits=Limits(open_timeout=0.5))
    with unharmed(running), raw(running) as opened:
        opened.settimeout(0.05)
        sent = 0
        with contextlib.suppress(ConnectionError):
            while sent < len(UPGRADE):  # 50 ms each: it would take eight seconds
                opened.sendall(UPGRADE[sent : sent + 1])
                sent += 1
                with contextlib.suppress(TimeoutError):
                    if not opened.recv(1):
                        break
        assert sent < len(UPGRADE)


@pytest.mark.parametrize("stopped", ["at once", "in TLS", "after TLS", "without TLS"])
def test_handshakes_that_never_end_do_not_lock_others_out(serve, certificate, stopped: str) -> None:
    tls = tls_context(*certificate) if stopped != "without TLS" else None
    running = serve(tls=tls, limits=Limits(open_timeout=60))
    trusting = ssl.create_default_context(cafile=str(certificate[0])) if tls else None

    def hold() -> socket.socket:
        opened = stack.enter_context(raw(running))
        if stopped == "in TLS":
            opened.sendall(b"\x16\x03\x01\x02\x00\x01")
        if stopped == "after TLS":
            assert trusting is not None
            opened = stack.enter_context(trusting.wrap_socket(opened, server_hostname="127.0.0.1"))
        return opened

    with unharmed(running, tls=trusting), contextlib.ExitStack() as stack:
        held = [hold() for _ in range(MAX_HANDSHAKES + 20)]
        for opened in held[:20]:  # the oldest make room
            with contextlib.suppress(ssl.SSLEOFError):
                assert wait_closed(opened) == b""
        with running.client(tls=trusting) as client:
            assert client.act(state(1, 2)).shape == (4, 2)
    assert running.count("refused_total", reason="handshake") >= 20


def test_half_a_frame(serve) -> None:
    """A client that stops within a frame cannot answer pings."""
    running = serve(limits=Limits(ping_interval=0.2, ping_timeout=0.3, close_timeout=0.3))
    with unharmed(running), upgraded(running) as opened:
        opened.sendall(b"\x82\xfe\x10\x00" + bytes(4) + b"the rest never comes")
        wait_closed(opened)
        wait_until(lambda: running.count("refused_total", reason="silent") == 1, "the client is counted")


def test_a_message_whose_last_fragment_never_comes(serve) -> None:
    running = serve(limits=Limits(message_timeout=0.3, close_timeout=0.3))
    with unharmed(running), upgraded(running) as opened:
        opened.sendall(masked(b"first", 2, fin=False))
        received = wait_closed(opened)
        assert b"took too long" in received and b"\x03\xf0" in received  # 1008
    assert running.count("refused_total", reason="unfinished") == 1


def test_a_message_in_endless_fragments(serve) -> None:
    running = serve(limits=Limits(close_timeout=0.3))
    with unharmed(running), upgraded(running) as opened:
        opened.sendall(masked(b"", 2, fin=False) + masked(b"", 0, fin=False) * (MAX_FRAGMENTS + 10))
        assert b"too many fragments" in wait_closed(opened)
    assert running.count("refused_total", reason="malformed") == 1


def test_flooding(serve) -> None:
    running = serve(limits=Limits(rate=60, close_timeout=0.5))
    with unharmed(running):
        with connect(running.address, max_queue=None) as client:  # it reads while it sends
            client.recv()
            with contextlib.suppress(ConnectionClosed):
                for i in range(2000):
                    client.send(pack(state(i, 0)))
            messages, _ = closing(client)
        assert messages[-1] == "More than 60 requests per second."
        assert running.count("refused_total", reason="rate") == 1
        for reply in messages[:-1]:  # what came before the refusal was answered
            assert unpack(reply).get("superseded") or "actions" in unpack(reply)
        assert len(messages) > 60


def test_a_client_that_does_not_read(serve) -> None:
    wide = replace(SPEC.action, shape=(100,))
    policy = Echo(replace(SPEC, action=wide, horizon=400, n_action_steps=399))
    running = serve(policy, limits=Limits(rate=100_000, write_timeout=0.5))
    with unharmed(running), upgraded(running) as opened:
        send_unread(running, opened, masked(pack(state(1, 2)), 2))


def test_pings_whose_answers_are_not_read(serve) -> None:
    running = serve(limits=Limits(write_timeout=60))
    with unharmed(running), upgraded(running) as opened:
        send_unread(running, opened, masked(bytes(125), 9) * 400)


def test_more_clients_than_there_is_room_for(serve) -> None:
    running = serve(limits=Limits(max_connections=3), token=TOKEN)
    with unharmed(running, token=TOKEN), running.client(token=TOKEN), contextlib.ExitStack() as stack:
        for _ in range(5):  # strangers take no room
            with pytest.raises(UserError, match="401"):
                running.client()
        stack.enter_context(running.client(token=TOKEN))
        with pytest.raises(UserError, match="503"):
            running.client(token=TOKEN)
        assert running.count("refused_total", reason="full") == 1
        stack.close()
        wait_until(lambda: running.count("connections") == 2, "one has left")
        with running.client(token=TOKEN) as client:
            assert client.act(state(1, 2)).shape == (4, 2)


def test_tls(serve, certificate: tuple[Path, Path]) -> None:
    running = serve(tls=tls_context(*certificate), token=TOKEN, limits=Limits(open_timeout=1.0))
    trusting = ssl.create_default_context(cafile=str(certificate[0]))
    with unharmed(running, token=TOKEN, tls=trusting):
        with pytest.raises(UserError, match="certificate"):
            running.client(token=TOKEN)  # an unknown certificate
        with pytest.raises(UserError, match="401"):
            running.client(tls=trusting)
        with pytest.raises((InvalidMessage, ConnectionError)), connect(f"ws://127.0.0.1:{running.port}"):
            pass
        with raw(running) as opened:  # a TLS handshake that stops
            opened.sendall(b"\x16\x03\x01\x02\x00\x01")
            wait_closed(opened)


def test_a_request_right_behind_the_tls_handshake(serve, certificate: tuple[Path, Path]) -> None:
    """The end of the handshake, the upgrade and a request arrive in one piece."""
    running = serve(tls=tls_context(*certificate))
    trusting = ssl.create_default_context(cafile=str(certificate[0]))
    incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
    secure = trusting.wrap_bio(incoming, outgoing, server_hostname="127.0.0.1")
    with raw(running) as opened:

        def listen() -> None:
            data = opened.recv(65536)
            assert data, "the server closed the connection"
            incoming.write(data)

        while True:
            try:
                secure.do_handshake()
                break
            except ssl.SSLWantReadError:
                opened.sendall(outgoing.read())
                listen()
        secure.write(UPGRADE)
        opened.sendall(outgoing.read())
        received = b""
        while b"n_action_steps" not in received:
            try:
                received += secure.read(65536)
            except ssl.SSLWantReadError:
                listen()
        assert b" 101 " in received


def test_old_tls_is_refused(serve, certificate: tuple[Path, Path]) -> None:
    running = serve(tls=tls_context(*certificate))
    old = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    old.check_hostname, old.verify_mode = False, ssl.CERT_NONE
    old.set_ciphers("DEFAULT:@SECLEVEL=0")
    with pytest.warns(DeprecationWarning):
        old.minimum_version, old.maximum_version = ssl.TLSVersion.TLSv1, ssl.TLSVersion.TLSv1_1
    with pytest.raises((ssl.SSLError, ConnectionError)), raw(running) as opened, old.wrap_socket(opened):
        pass


def readable(frame: bytes) -> bool:
    try:
        unpack(frame)
    except WireError:
        return False
    return True


def test_fuzzed_frames_against_a_running_server(serve) -> None:
    """10,000 frames, most of them broken: each gets its reply, and the server serves on."""
    running = serve(Echo(TASK_SPEC), limits=Limits(rate=1e6))
    rng = random.Random(1)
    seeds = [pack(task_frame()), pack(task_frame(previous=np.zeros((8, 2)), mask=np.zeros(8), timestep=3, seed=1))]
    small = {k: v for k, v in task_frame().items() if "image" not in k}
    seeds += [pack(small), pack({"prompt": "open the drawer", "observation": {"state": np.zeros(2)}})]
    connections: list[list[bytes]] = [[]]
    for _ in range(10_000):
        frame = mutated(rng.choice(seeds), rng)
        connections[-1].append(frame)
        if not readable(frame):  # the last one that a connection may send
            connections.append([])
    connections[-1].append(b"\xc1")

    def send(frames: list[bytes]) -> tuple[int, int]:
        with upgraded(running) as opened, opened.makefile("rb") as stream:
            opened.sendall(b"".join(masked(frame, 2) for frame in frames))
            opcodes = [next_frame(stream)[0] for _ in frames]
            assert opcodes[-1] == 1 and next_frame(stream) == (8, b"\x03\xef"), "text and 1007 for the unreadable one"
            return opcodes.count(2), opcodes.count(1)

    with ThreadPoolExecutor(8) as pool:
        counts = list(pool.map(send, connections))
    chunks, errors = (sum(column) for column in zip(*counts, strict=True))
    assert chunks + errors == sum(map(len, connections)) == 10_001 and min(chunks, errors) > 500
    assert running.count("requests_total") == 10_001
    assert running.count("errors_total", kind="internal") == 0
    with running.client() as client:
        assert client.act(task_frame()).shape == (4, 2)
    assert page(running, "/healthz")[0] == 200


def test_refusals_are_short_and_name_no_file(serve) -> None:
    with serve().client() as client, pytest.raises(ServerRefusal) as error:
        client.act({"x" * 5000: 1})
    assert len(str(error.value)) <= 500 and ".py" not in str(error.value)
