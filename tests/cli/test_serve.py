"""``robopolicy serve``: a real process, asked by a client and stopped by a signal; its errors."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import numpy as np
import pytest

from robopolicy.cli.main import main
from robopolicy.errors import UserError
from robopolicy.export.open import open_policy
from robopolicy.manifest import bundle_fingerprint, read_manifest
from robopolicy.serving.client import PolicyClient

TOKEN = "0123456789abcdef"


@contextmanager
def serving(*words: str, **environment: str) -> Iterator[tuple[subprocess.Popen[str], list[str]]]:
    """The server's process and the lines that it prints until it listens."""
    command = [sys.executable, "-m", "robopolicy.cli.main", "serve", "port=0", *words]
    variables = os.environ | {"OMP_NUM_THREADS": "1"} | environment
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=variables
    ) as process:
        try:
            assert process.stdout is not None
            lines: list[str] = []
            for line in process.stdout:
                lines.append(line)
                if line.startswith("limits"):
                    break
            yield process, lines
        finally:
            process.kill()


def address(lines: list[str]) -> str:
    found = re.search(r"wss?://\S+", "".join(lines))
    assert found, "".join(lines)
    return found.group()


def test_a_policy_is_served_until_a_signal(bundle: Path) -> None:
    words = ["engine=torch", "host=0.0.0.0", "rate=50", "max_connections=3"]
    with serving(f"bundle={bundle}", *words, ROBOPOLICY_TOKEN=TOKEN) as (process, lines):
        text = "".join(lines)
        assert "engine torch" in text and "3 clients, 50 requests/s" in text
        assert "token needed; without TLS" in text and TOKEN not in text
        here = address(lines).replace("0.0.0.0", "127.0.0.1")
        with pytest.raises(UserError, match="401"):
            PolicyClient(here)
        with urllib.request.urlopen(here.replace("ws", "http", 1) + "/healthz", timeout=10) as answer:
            assert answer.read() == b"OK\n"
        with PolicyClient(here, token=TOKEN) as client:
            assert client.metadata["engine"] == "torch" and client.metadata["rate"] == 50
            assert client.metadata["fingerprint"] == bundle_fingerprint(read_manifest(bundle))
            actions = client.act({"observation.state": np.zeros(5, np.float32)}, seed=3)
            with closing(open_policy(bundle, "torch")) as policy:
                noise = policy.draw_noise(1, np.random.default_rng(3))
                wanted = policy.act({"observation.state": np.zeros((1, 2, 5), np.float32)}, noise)[0]
            np.testing.assert_allclose(actions, wanted, rtol=1e-5, atol=1e-4)
            process.send_signal(signal.SIGTERM)
            with pytest.raises(UserError, match="1001"):
                client.receive()
        assert process.wait(20) == 0
        assert process.stdout is not None and "stopping" in process.stdout.read()


def test_help_teaches(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as done:
        main(["serve", "--help"])
    text = capsys.readouterr().out
    assert done.value.code == 0 and "WebsocketClientPolicy" in text and "token_file" in text


def test_mistakes(fails: Callable[..., str], bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ROBOPOLICY_TOKEN", raising=False)
    assert "bundle=…" in fails("serve")
    assert "openssl rand -hex 32" in fails("serve", f"bundle={bundle}", "host=0.0.0.0")
    assert "port=70000" in fails("serve", f"bundle={bundle}", "port=70000")
    assert "rate=0" in fails("serve", f"bundle={bundle}", "rate=0")
    assert "threads=0" in fails("serve", f"bundle={bundle}", "threads=0")
    assert "tls_key" in fails("serve", f"bundle={bundle}", "tls_cert=server.crt")
    assert "cannot be read" in fails("serve", f"bundle={bundle}", f"token_file={tmp_path / 'none'}")
    assert "is not a bundle" in fails("serve", f"bundle={tmp_path}")
    assert "Did you mean 'engine'" in fails("serve", f"bundle={bundle}", "engin=torch")
    (tmp_path / "token").write_text(TOKEN)
    (tmp_path / "token").chmod(0o644)
    assert "chmod 600" in fails("serve", f"bundle={bundle}", f"token_file={tmp_path / 'token'}")
