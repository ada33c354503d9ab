"""The inference process: real bundles and engines, real signals."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from robopolicy.data.normalize import Normalizer, fit_normalizer
from robopolicy.errors import UserError
from robopolicy.export.build import ExportConfig, build_engine
from robopolicy.export.observations import find_observations
from robopolicy.export.open import open_policy
from robopolicy.export.rtc_config import RtcConfig
from robopolicy.policies.bundle import load_bundle, save_bundle
from robopolicy.policies.registry import build_policy
from robopolicy.runtime.exchange import Request
from robopolicy.runtime.inference_process import infer
from robopolicy.runtime.shared_memory import SharedMemory
from robopolicy.runtime.worker import ProcessWorker
from robopolicy.spec import KeySpec, PolicySpec, TaskSpec

STATE = KeySpec("observation.state", (2,), unit="m")
ACTION = KeySpec("action", (2,), role="action", unit="m")
CAMERAS = tuple(KeySpec(f"observation.image.{name}", (36, 48, 3), role="image") for name in ("top", "wrist"))
SPEC = PolicySpec((STATE, *CAMERAS), ACTION, fps=10, n_obs_steps=2, horizon=8, n_action_steps=4)
TASKS = replace(
    SPEC, observations=(STATE,), goals=(STATE,), tasks=(TaskSpec("öffne die Schublade"), TaskSpec("push the cup"))
)
PATIENCE = 120.0  # seconds until a test fails instead of hanging


def save(spec: PolicySpec, folder: Path) -> Path:
    torch.manual_seed(0)
    parts = {key.key: fit_normalizer(np.array([[-1.0, -1], [1, 1]]), "minmax") for key in (STATE, ACTION)}
    sampling = {"process": {"name": "flow"}, "sampler": {"name": "euler", "steps": 2}}
    config = {"down_dims": [16, 32], "step_embed_dim": 16} | sampling
    policy = build_policy("diffusion_unet", config, spec, Normalizer.from_parts(parts))
    with torch.no_grad():
        for parameter in policy.parameters():  # heads that start at zero would agree on everything
            parameter.add_(0.05 * torch.randn_like(parameter))
    return save_bundle(policy.eval(), folder)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A policy that sees two cameras, with an engine of ONNX Runtime."""
    pytest.importorskip("onnxruntime", reason="needs ONNX Runtime: pip install 'robopolicy[onnxruntime]'")
    path = save(SPEC, tmp_path_factory.mktemp("worker") / "policy")
    policy, about = load_bundle(path)
    config = ExportConfig(exporter="torchscript", observations=4, backend="onnxruntime")
    build_engine(policy, about, path, config, find_observations(policy, about, 8), "robopolicy export")
    return path


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A policy with goals and tasks, without an engine."""
    return save(TASKS, tmp_path_factory.mktemp("worker") / "told")


@pytest.fixture
def start(bundle: Path) -> Iterator[Callable[..., ProcessWorker]]:
    """Start a worker and wait until it is ready; it is closed after the test."""
    started: list[ProcessWorker] = []

    def begin(path: Path = bundle, engine: str | None = None, **options: object) -> ProcessWorker:
        started.append(ProcessWorker(path, engine, **options))  # type: ignore[arg-type]
        wait_for(lambda: started[-1].health().ready or not started[-1].health().alive, "it is loaded")
        assert started[-1].health().ready, started[-1].health().error
        return started[-1]

    yield begin
    for worker in started:
        worker.close()


@pytest.fixture
def fresh(start: Callable[..., ProcessWorker]) -> ProcessWorker:
    """A worker that a test may end or stop."""
    return start()


@pytest.fixture(scope="module")
def worker(bundle: Path) -> Iterator[ProcessWorker]:
    """A worker for all tests that leave it as it was."""
    with closing(ProcessWorker(bundle, None)) as shared:
        wait_for(lambda: shared.health().ready, "it is loaded")
        yield shared


def wait_for(condition: Callable[[], object], what: str) -> None:
    end = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < end, f"never happened: {what}"
        time.sleep(0.002)


def request(number: int, **changes: object) -> Request:
    rng = np.random.default_rng(number)
    values: dict[str, np.ndarray] = {"observation.state": rng.uniform(-1, 1, (2, 2))}
    values |= {key.key: rng.integers(0, 256, (2, *key.shape), np.uint8) for key in CAMERAS}
    return Request(**{"id": number, "epoch": 0, "observed_at": number, "values": values, "seed": number} | changes)  # type: ignore[arg-type]


def ask(worker: ProcessWorker, wanted: Request):
    found, failures = [], worker.health().failures
    worker.submit(wanted)
    wait_for(lambda: found or found.extend(filter(None, [worker.poll()])) or worker.health().failures > failures, "it")
    return found[0] if found else None


def stop_and_see(worker: ProcessWorker) -> None:
    os.kill(worker.pid, signal.SIGSTOP)
    wait_for(lambda: "(python" in state_of(worker.pid) and ") T" in state_of(worker.pid), "it stands still")


def state_of(pid: int) -> str:
    return Path(f"/proc/{pid}/stat").read_text()


def test_the_chunk_is_that_of_the_policy_in_this_process(worker, bundle):
    with closing(open_policy(bundle)) as policy:
        for number in (1, 2, 3):
            before = time.monotonic_ns()
            chunk = ask(worker, request(number, epoch=5, observed_at=77))
            assert (chunk.id, chunk.epoch, chunk.observed_at) == (number, 5, 77)
            assert before < chunk.started < chunk.finished < time.monotonic_ns()
            np.testing.assert_array_equal(chunk.actions, infer(policy, request(number)))
    assert worker.poll() is None
    assert worker.spec == SPEC


def test_every_input_reaches_the_policy(worker):
    """A camera, the seed, the mask: each of them alone changes the chunk."""
    plain = ask(worker, request(1)).actions
    for key in CAMERAS:
        changed = request(1)
        changed.values[key.key][-1] = 0
        assert not np.array_equal(ask(worker, changed).actions, plain)
    assert not np.array_equal(ask(worker, request(1, seed=2)).actions, plain)
    previous = np.random.default_rng(0).uniform(-1, 1, (8, 2))
    mask = np.array([1.0, 1, 1, 0, 0, 0, 0, 0])
    agreed = ask(worker, request(1, previous=previous, mask=mask)).actions
    np.testing.assert_allclose(agreed[:3], previous[:3], atol=1e-5)
    assert np.abs(agreed[3:] - previous[3:]).max() > 1e-3
    np.testing.assert_array_equal(ask(worker, request(1)).actions, plain)  # nothing is left of the requests between


def test_engines_need_no_torch(worker):
    ask(worker, request(1))
    maps = Path(f"/proc/{worker.pid}/maps").read_text()
    assert "libtorch" not in maps and "onnxruntime" in maps


def test_goals_and_instructions_reach_the_policy(start, told):
    values = {"observation.state": np.zeros((2, 2)), "goal.observation.state": np.ones(2)}
    asked = request(1, values=values, instruction="öffne die Schublade")
    worker = start(told, "torch")
    with closing(open_policy(told, "torch")) as policy:
        np.testing.assert_array_equal(ask(worker, asked).actions, infer(policy, asked))
        other = replace(asked, instruction="push the cup")
        np.testing.assert_array_equal(ask(worker, other).actions, infer(policy, other))
        assert not np.array_equal(infer(policy, other), infer(policy, asked))
    assert ask(worker, replace(asked, instruction="push the cap")) is None
    assert "Did you mean 'push the cup'" in worker.health().error
    with pytest.raises(UserError, match="at most 4096"):
        worker.submit(replace(asked, instruction="x" * 5000))


def test_a_warm_start_reaches_the_policy(start, told):
    """It starts from the chunk before, so that it stays near where nothing else pulls."""
    previous = np.random.default_rng(0).uniform(-1, 1, (8, 2))
    asked = request(
        1,
        values={"observation.state": np.zeros((2, 2)), "goal.observation.state": np.ones(2)},
        instruction="push the cup",
        previous=previous,
        mask=np.linspace(1, 0, 8),
    )
    distances = []
    for config in (RtcConfig(beta=0.0), RtcConfig(beta=0.0, warm_start=1)):
        found = ask(start(told, "torch-rtc", rtc=config), asked).actions
        with closing(open_policy(told, "torch-rtc", rtc=config)) as policy:
            np.testing.assert_array_equal(found, infer(policy, asked))
        distances.append(np.abs(found - previous).mean())
    assert distances[1] < 0.8 * distances[0]


def test_health_tells_how_long_an_inference_usually_takes(worker, start):
    assert 0 < worker.health().usual < 5
    assert start(extra_delay=20.0).health().usual > 20


def test_the_newest_request_wins(start):
    worker = start(extra_delay=0.05)
    last, seen = 300, []
    for number in range(1, last + 1):
        worker.submit(request(number))
        if chunk := worker.poll():
            seen.append(chunk.id)
    wait_for(lambda: seen.extend(c.id for c in [worker.poll()] if c) or (seen and seen[-1] == last), "the last chunk")
    assert seen == sorted(set(seen))
    assert 0 < worker.health().superseded == last - len(seen) - missed_chunks(worker, seen, last)


def missed_chunks(worker: ProcessWorker, seen: list[int], last: int) -> int:
    """Chunks that a newer one replaced before they were handed out."""
    return worker._answers - len(seen)


def test_a_flood_of_requests_is_never_mixed(start, bundle):
    """Slots that were written while they were read would give chunks that belong to no request."""
    worker = start()
    requests = [request(number) for number in range(8)]
    with closing(open_policy(bundle)) as policy:
        wanted = [infer(policy, asked) for asked in requests]
    end, checked, number = time.monotonic() + 3, 0, 0
    while time.monotonic() < end or checked < 20:
        asked = replace(requests[number % 8], id=number)
        worker.submit(asked)
        number += 1
        if chunk := worker.poll():
            np.testing.assert_array_equal(chunk.actions, wanted[chunk.id % 8])
            checked += 1
        assert time.monotonic() < end + PATIENCE
    assert worker.health().failures == 0 and number > 2 * checked


def test_nothing_waits_for_a_process_that_stands_still(fresh):
    stop_and_see(fresh)
    beat = fresh.health().beat
    for number in range(1, 50):
        fresh.submit(request(number))
        assert fresh.poll() is None
    health = fresh.health()
    assert health.alive and health.beat == beat
    os.kill(fresh.pid, signal.SIGCONT)
    seen = []
    wait_for(lambda: seen or seen.extend(filter(None, [fresh.poll()])), "a chunk")
    assert seen[0].id == 49 and fresh.health().superseded == 48
    wait_for(lambda: fresh.health().beat > beat, "it beats again")


def test_a_lock_that_is_taken_delays_to_the_next_call(fresh):
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(fresh._memory.file)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        pass_fds=(fresh._memory.file,),
    )
    assert holder.stdout.readline() == b"held\n"
    for number in (1, 2, 3):
        fresh.submit(request(number))
        assert fresh.poll() is None
    holder.communicate()
    seen = []
    wait_for(lambda: seen or seen.extend(filter(None, [fresh.poll()])), "a chunk")
    assert seen[0].id == 3 and fresh.health().superseded == 2


HOLD = """
import fcntl, sys
fcntl.lockf(int(sys.argv[1]), fcntl.LOCK_EX)
print("held", flush=True)
sys.stdin.read()
"""


def test_a_killed_process_is_seen(fresh):
    os.kill(fresh.pid, signal.SIGKILL)
    wait_for(lambda: not fresh.health().alive, "it is dead")
    assert fresh.health().error == "The inference process was ended by signal 9 (Killed)."
    for number in range(5):
        fresh.submit(request(number))
        assert fresh.poll() is None


def test_an_inference_that_hangs_is_seen_while_the_process_lives(start):
    worker = start(extra_delay=1000.0)
    assert worker.health().busy_since is None
    before = time.monotonic_ns()
    worker.submit(request(1))
    wait_for(lambda: worker.health().busy_since, "it begins")
    busy, beat = worker.health().busy_since, worker.health().beat
    wait_for(lambda: worker.health().beat > max(busy, beat), "it beats")
    assert before < worker.health().busy_since == busy
    worker.close(0.1)
    assert not worker.health().alive


def test_a_failed_inference_is_counted_and_forgotten(worker):
    broken, before = request(1), worker.health().failures
    broken.values["observation.state"][0, 0] = np.nan
    assert ask(worker, broken) is None
    wait_for(lambda: worker.health().error, "the reason")
    assert "observation.state: found numbers that are not finite" in worker.health().error
    assert worker.health().failures == before + 1 and worker.health().alive
    worker.submit(request(2))
    wait_for(lambda: worker.poll() is not None, "a chunk")
    wait_for(lambda: not worker.health().error, "the error is over")
    assert worker.health().failures == before + 1


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"observation.state": np.zeros((2, 2))}, r"lacks 'observation.image.top'; found \['observation.state'\]"),
        (request(1).values | {"observation.state": np.zeros((1, 2))}, r"observation.state: found shape \(1, 2\)"),
        (request(1).values | {CAMERAS[0].key: np.zeros((2, 36, 48, 3))}, "found an image of float64, wanted uint8"),
    ],
)
def test_requests_that_do_not_fit_are_refused(worker, values, message):
    with pytest.raises(UserError, match=message):
        worker.submit(request(1, values=values))
    assert ask(worker, request(2)).id == 2


def test_a_bundle_that_is_not_there_is_an_error_at_once(tmp_path):
    with pytest.raises(UserError, match="is not a bundle"):
        ProcessWorker(tmp_path, None)


@pytest.mark.parametrize(
    ("damage", "engine", "message"),
    [
        (lambda path: None, "onnxruntime-fp33", "Did you mean 'onnxruntime-fp32'"),
        (lambda path: (path / "engines/onnxruntime-fp32/sampler.onnx").write_bytes(b"x"), None, "truncated or changed"),
        (lambda path: None, "torch-rtc", "scheduler.warm_start=2 must lie in 0..1"),
    ],
)
def test_why_a_policy_does_not_load_is_told(bundle, tmp_path, damage, engine, message):
    path = Path(shutil.copytree(bundle, tmp_path / "policy"))
    damage(path)
    rtc = RtcConfig(warm_start=2) if engine == "torch-rtc" else None
    with closing(ProcessWorker(path, engine, rtc=rtc)) as worker:
        wait_for(lambda: not worker.health().alive, "it gives up")
        health = worker.health()
        assert message in health.error and not health.ready and health.usual == 0


def test_ctrl_c_is_left_to_the_control_process(worker):
    assert os.getsid(worker.pid) == worker.pid != os.getsid(0)  # a terminal's signals do not reach it
    for ignored in (signal.SIGINT, signal.SIGTERM):
        os.kill(worker.pid, ignored)
    assert ask(worker, request(1)).id == 1


@pytest.mark.parametrize("extra_delay", [0.0, 1000.0])
def test_the_process_ends_with_its_parent(bundle, extra_delay):
    """Also while it computes."""
    parent = subprocess.Popen(
        [sys.executable, "-c", PARENT, str(bundle), str(extra_delay)], stdout=subprocess.PIPE, text=True
    )
    child = int(parent.stdout.readline())
    assert Path(f"/proc/{child}").exists()
    parent.kill()
    parent.communicate()
    wait_for(lambda: not Path(f"/proc/{child}").exists() or ") Z" in state_of(child), "it ends")


PARENT = """
import sys, time
from pathlib import Path
import numpy as np
from robopolicy.runtime.exchange import Request
from robopolicy.runtime.worker import ProcessWorker
worker = ProcessWorker(Path(sys.argv[1]), None, extra_delay=float(sys.argv[2]))
while not worker.health().ready:
    time.sleep(0.01)
kinds = {"image": np.uint8, "state": np.float32}
values = {k.key: np.zeros((2, *k.shape), kinds[k.role]) for k in worker.spec.observations}
worker.submit(Request(1, 0, 0, values))
while float(sys.argv[2]) and worker.health().busy_since is None:
    time.sleep(0.01)
print(worker.pid, flush=True)
time.sleep(1000)
"""


def test_nothing_is_left_after_closing(bundle):
    files = len(os.listdir("/proc/self/fd"))
    worker = ProcessWorker(bundle, None)
    wait_for(lambda: worker.health().ready, "it is loaded")
    pid = worker.pid
    for process in (pid, os.getpid()):  # both see it, and it has no name that could be left behind
        maps = Path(f"/proc/{process}/maps").read_text()
        assert "/memfd:robopolicy-inference (deleted)" in maps and "robopolicy" not in str(os.listdir("/dev/shm"))
    worker.close()
    worker.close()
    assert len(os.listdir("/proc/self/fd")) == files and not Path(f"/proc/{pid}").exists()
    assert not worker.health().alive and worker.health().error == "" and worker.poll() is None
    worker.submit(request(1))


def test_threads_are_bounded(worker, start):
    def threads(pid: int) -> int:
        return len(os.listdir(f"/proc/{pid}/task"))

    ask(worker, request(1))
    assert b"OMP_NUM_THREADS=1" in Path(f"/proc/{worker.pid}/environ").read_bytes().split(b"\0")
    other = start(threads=3)
    ask(other, request(1))
    assert threads(other.pid) >= threads(worker.pid) + 2 * 2  # two more for each of the two graphs


def test_the_memory_is_of_one_size():
    memory = SharedMemory(SPEC)
    with pytest.raises(UserError, match="another size"):
        SharedMemory(TASKS, memory.file)
    memory.close()
