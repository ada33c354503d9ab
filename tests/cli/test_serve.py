"""``robopolicy serve``: a real process, asked by a client and stopped by a signal; its errors."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import numpy as np
import pytest

from robopolicy.cli.main import main
from robopolicy.data.normalize import Normalizer, fit_normalizer
from robopolicy.errors import UserError
from robopolicy.export.open import open_policy
from robopolicy.manifest import bundle_fingerprint, read_manifest
from robopolicy.policies.bundle import save_bundle
from robopolicy.policies.registry import build_policy
from robopolicy.serving.client import PolicyClient
from robopolicy.spec import KeySpec, PolicySpec

TOKEN = "0123456789abcdef"


@pytest.fixture(scope="module")
def slow_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A policy of 300 denoising steps: a chunk takes a good part of a second, the warm-up several."""
    spec = PolicySpec(
        (KeySpec("observation.state", (2,)),),
        KeySpec("action", (2,), role="action"),
        fps=10,
        horizon=8,
        n_action_steps=4,
    )
    normalizer = Normalizer.from_parts(
        {k: fit_normalizer(np.eye(2), "minmax") for k in ("observation.state", "action")}
    )
    config = {
        "down_dims": [16, 32],
        "step_embed_dim": 16,
        "process": {"train_steps": 300},
        "sampler": {"name": "ddpm", "steps": 300},
    }
    policy = build_policy("diffusion_unet", config, spec, normalizer)
    return save_bundle(policy, tmp_path_factory.mktemp("slow") / "policy", task={})


@contextmanager
def serving(
    *words: str, until: str = "limits", **environment: str
) -> Iterator[tuple[subprocess.Popen[str], list[str]]]:
    """The server's process and the lines that it prints, by default until it listens."""
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
                if line.startswith(until):
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


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_during_the_warm_up_ends_the_process(slow_bundle: Path, number: signal.Signals) -> None:
    with serving(f"bundle={slow_bundle}", "engine=torch", until="policy") as (process, _):
        process.send_signal(number)
        assert process.stdout is not None and "address" not in process.stdout.read()
        assert process.wait(20) == -number


def test_a_policy_that_goes_on_computing_is_not_closed(slow_bundle: Path) -> None:
    """The process ends beside a call that takes longer than stop_timeout."""
    with serving(f"bundle={slow_bundle}", "engine=torch", "stop_timeout=0.05") as (process, lines):
        here = address(lines)
        with PolicyClient(here) as client:
            client.send({"observation.state": np.zeros(2, np.float32)})
            metrics = here.replace("ws", "http", 1) + "/metrics"
            while True:
                with urllib.request.urlopen(metrics, timeout=10) as answer:
                    if "robopolicy_requests_total 1.0" in answer.read().decode():
                        break
            process.send_signal(signal.SIGTERM)
            assert process.stdout is not None
            text = process.stdout.read()
        assert process.wait(20) == 1
        assert "still computing, stop_timeout=0.05 s" in text and "Traceback" not in text


def test_a_taken_port_is_found_before_the_policy_is_loaded(fails: Callable[..., str], tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        assert f"127.0.0.1:{port} cannot be listened on" in fails("serve", f"bundle={tmp_path}", f"port={port}")


def test_signals_are_as_before_after_a_mistake(fails: Callable[..., str], tmp_path: Path) -> None:
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    assert "is not a bundle" in fails("serve", f"bundle={tmp_path}", "port=0")
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before


def test_help_teaches(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as done:
        main(["serve", "--help"])
    text = capsys.readouterr().out
    assert done.value.code == 0 and "WebsocketClientPolicy" in text and "token_file" in text


def test_mistakes(fails: Callable[..., str], bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ROBOPOLICY_TOKEN", raising=False)
    assert "bundle=…" in fails("serve")
    assert "openssl rand -hex 32" in fails("serve", "port=0", f"bundle={bundle}", "host=0.0.0.0")
    assert "port=70000" in fails("serve", f"bundle={bundle}", "port=70000")
    assert "rate=0" in fails("serve", "port=0", f"bundle={bundle}", "rate=0")
    assert "threads=0" in fails("serve", "port=0", f"bundle={bundle}", "threads=0")
    assert "tls_key" in fails("serve", "port=0", f"bundle={bundle}", "tls_cert=server.crt")
    assert "cannot be read" in fails("serve", "port=0", f"bundle={bundle}", f"token_file={tmp_path / 'none'}")
    assert "is not a bundle" in fails("serve", "port=0", f"bundle={tmp_path}")
    assert "Did you mean 'engine'" in fails("serve", "port=0", f"bundle={bundle}", "engin=torch")
    (tmp_path / "token").write_text(TOKEN)
    (tmp_path / "token").chmod(0o644)
    assert "chmod 600" in fails("serve", "port=0", f"bundle={bundle}", f"token_file={tmp_path / 'token'}")
    assert "device=npu" in fails("serve", "port=0", f"bundle={bundle}", "engine=torch", "device=npu")
