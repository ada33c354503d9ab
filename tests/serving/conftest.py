"""A policy of a few lines that shows which observation it saw, a real one, and a running server."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import replace

import numpy as np
import pytest
import torch

from robopolicy.data.normalize import Normalizer, fit_normalizer
from robopolicy.errors import UserError
from robopolicy.export.open import open_policy
from robopolicy.inference.policy import ExportedPolicy
from robopolicy.policies.bundle import save_bundle
from robopolicy.policies.registry import build_policy
from robopolicy.serving.client import PolicyClient
from robopolicy.serving.server import PolicyServer, ServerConfig
from robopolicy.spec import INSTRUCTION, KeySpec, PolicySpec, TaskSpec

STATE = KeySpec("observation.state", (2,), unit="m")
IMAGE = KeySpec("observation.image.top", (36, 48, 3), role="image")
ACTION = KeySpec("action", (2,), role="action", unit="m")
SPEC = PolicySpec((STATE,), ACTION, fps=10, n_obs_steps=2, horizon=8, n_action_steps=4)
IMAGE_SPEC = PolicySpec((STATE, IMAGE), ACTION, fps=10, n_obs_steps=2, horizon=8, n_action_steps=4)
TASK_SPEC = replace(IMAGE_SPEC, goals=(STATE,), tasks=(TaskSpec("open the drawer"), TaskSpec("push the cup")))


class Echo:
    """Answers with the state that it saw: row i of a chunk is the newest state, moved by 100 i."""

    name = "echo"

    def __init__(self, spec: PolicySpec = SPEC) -> None:
        self.spec = spec
        self.seen: list[dict] = []
        self.started = threading.Event()
        self.hold = threading.Event()
        self.hold.set()

    def draw_noise(self, rows: int, rng: np.random.Generator) -> np.ndarray:
        return rng.normal(size=(rows, 1, self.spec.horizon, self.spec.action.dim)).astype(np.float32)

    def sample(self, observations, noise, previous=None, mask=None) -> np.ndarray:
        self.seen.append({**observations, "noise": noise, "previous": previous, "mask": mask})
        self.started.set()
        if not self.hold.wait(20):
            raise TimeoutError("a test forgot to let the policy go")
        state = observations["observation.state"][0, -1]
        if state[0] == -13:
            raise RuntimeError("secret detail of the policy")
        if state[0] == -14:
            raise UserError("observation.state: -14 is not reachable.")
        if state[0] == -15:
            return np.full((1, self.spec.horizon, self.spec.action.dim), np.nan, np.float32)
        rows = 100 * np.arange(self.spec.horizon)[:, None]
        return (np.resize(state, self.spec.action.dim) + rows).astype(np.float32)[None]

    def warmup(self, runs: int = 3) -> None:
        pass


class Running:
    """A server in a thread with its own event loop."""

    def __init__(self, policy, config: ServerConfig) -> None:
        self.policy = policy
        self.loop = asyncio.new_event_loop()
        self.thread = threading.Thread(target=self.loop.run_forever, daemon=True)
        self.thread.start()
        self.server = PolicyServer(policy, config, "abc123")
        self.do(self.server.start())
        self.scheme = "ws" if config.tls is None else "wss"

    @property
    def port(self) -> int:
        return self.server.port

    @property
    def address(self) -> str:
        return f"{self.scheme}://127.0.0.1:{self.port}"

    def do(self, coroutine, timeout: float = 30):
        return asyncio.run_coroutine_threadsafe(coroutine, self.loop).result(timeout)

    def count(self, name: str, **labels: str) -> float:
        return self.server.metrics.registry.get_sample_value(f"robopolicy_{name}", labels) or 0.0

    def client(self, **options) -> PolicyClient:
        return PolicyClient(self.address, **options)

    def stop(self) -> None:
        if self.thread.is_alive():
            self.do(self.server.stop())
            self.loop.call_soon_threadsafe(self.loop.stop)
            self.thread.join(10)


@pytest.fixture
def serve() -> Iterator[Callable[..., Running]]:
    """Start a server on a free port of this machine; it is stopped after the test."""
    started: list[Running] = []

    def start(policy=None, **config) -> Running:
        started.append(Running(policy or Echo(), ServerConfig(**{"port": 0} | config)))
        return started[-1]

    yield start
    for running in started:
        if isinstance(running.policy, Echo):
            running.policy.hold.set()
        running.stop()


@pytest.fixture(scope="session")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ExportedPolicy]:
    """A small diffusion policy from states and images, in torch behind the interface of engines."""
    torch.manual_seed(0)
    parts = {k.key: fit_normalizer(np.array([[-1.0, -1], [1, 1]]), "minmax") for k in (STATE, ACTION)}
    config = {"down_dims": [16, 32], "step_embed_dim": 16, "sampler": {"name": "ddim", "steps": 4}}
    policy = build_policy("diffusion_unet", config, IMAGE_SPEC, Normalizer.from_parts(parts))
    bundle = save_bundle(policy, tmp_path_factory.mktemp("serving") / "policy", task={})
    with closing(open_policy(bundle, "torch")) as opened:
        yield opened


def wait_until(condition: Callable[[], bool], what: str, seconds: float = 20) -> None:
    """Wait for what another thread does; fails with ``what`` where it never does."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"never happened: {what}"
        time.sleep(0.005)


def state(*values: float) -> dict[str, np.ndarray]:
    return {"observation.state": np.array(values, np.float32)}


def task_frame(**changes) -> dict:
    """A full request to the policy of `TASK_SPEC`."""
    frame = {
        "observation.state": np.zeros(2, np.float32),
        "observation.image.top": np.zeros((36, 48, 3), np.uint8),
        "goal.observation.state": np.ones(2, np.float32),
        INSTRUCTION: "push the cup",
    }
    return frame | changes
