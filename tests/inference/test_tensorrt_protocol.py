"""What a TensorRT session asks of a GPU, against a stand-in that keeps the rules; see `stand_in_gpu`."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest

from robopolicy.errors import UserError
from robopolicy.inference import device_memory
from robopolicy.inference.backends import tensorrt
from robopolicy.inference.backends.tensorrt import MAX_LANES, TensorRtSession
from tests.inference.stand_in_gpu import GPU, Engine, Gpu, stand_in_tensorrt


@pytest.fixture
def start(tmp_path, monkeypatch):
    """A session on a stand-in."""

    def start(gpu, flavour="rtx", capturable=True, engine=True, **settings):
        (tmp_path / "sampler.plan").write_bytes(b"plan")
        start.engine = Engine(gpu, capturable)
        module = stand_in_tensorrt(start.engine if engine else None)
        for place in (device_memory, tensorrt):
            monkeypatch.setattr(place, "call", gpu.call)
            monkeypatch.setattr(place, "cuda_runtime", lambda: gpu.runtime)
        monkeypatch.setattr(tensorrt, "present_gpu", lambda: GPU)
        monkeypatch.setattr(tensorrt, "tensorrt_module", lambda flavour: module)
        monkeypatch.setattr(tensorrt, "tensorrt_logger", lambda flavour: SimpleNamespace(errors=[]))
        return TensorRtSession(tmp_path / "sampler.plan", flavour, **settings)

    return start


def run(session, rows, seed=0):
    x = np.random.default_rng(seed).normal(size=(rows, 2)).astype(np.float32)
    found = session({"x": x})["y"]
    np.testing.assert_allclose(found, x + 1, rtol=1e-6)
    return found


@pytest.mark.parametrize("flavour", ["rtx", "classic"])
def test_each_number_of_rows_gets_its_own_results(flavour, start):
    gpu = Gpu()
    with start(gpu, flavour) as session:
        kept = run(session, 2)
        copy = kept.copy()
        for i, rows in enumerate([1, 8, 1, 1, 8, 8, 3, 5, 4, 2, 1, 1, 1, 7]):
            run(session, rows, seed=i)
        np.testing.assert_array_equal(kept, copy)
    assert not gpu.blocks and not gpu.alive


def test_classic_tensorrt_captures_after_a_plain_run(start):
    gpu = Gpu()
    with start(gpu, "classic") as session:
        for i in range(5):
            run(session, 1, seed=i)
        assert gpu.launches == {"plain": 1, "graph": 4}
        for rows in range(2, 2 + MAX_LANES):  # one run each pushes the first out
            run(session, rows)
        run(session, 1)
        assert gpu.launches == {"plain": 2 + MAX_LANES, "graph": 4}
    assert not gpu.blocks and not gpu.alive


def test_tensorrt_rtx_captures_by_itself(start):
    gpu = Gpu()
    with start(gpu, cuda_graph=True) as session:
        for _ in range(3):
            run(session, 1)
    assert gpu.launches == {"plain": 3, "graph": 0}
    assert {context.strategy for context in start.engine.contexts} == {"whole"}


@pytest.mark.parametrize(("flavour", "capturable"), [("classic", True), ("rtx", False)])
def test_what_cannot_be_captured_runs_without(flavour, capturable, start, caplog):
    caplog.set_level("INFO")
    gpu = Gpu(capture_fails=True)
    with start(gpu, flavour, capturable=capturable) as session:
        for i in range(4):
            run(session, 2, seed=i)
        assert gpu.launches == {"plain": 4, "graph": 0}
    if flavour == "rtx":
        assert [context.strategy for context in start.engine.contexts] == ["whole", "disabled", "disabled"]
    assert len(caplog.records) == 1 and "CUDA graph" in caplog.text  # tried once, said once
    assert not gpu.blocks and not gpu.alive


def test_graphs_can_be_turned_off(start):
    gpu = Gpu()
    with start(gpu, "classic", cuda_graph=False) as session:
        for _ in range(4):
            run(session, 1)
    assert gpu.launches == {"plain": 4, "graph": 0}


def test_what_was_compiled_is_kept_for_the_next_start(start, tmp_path, caplog):
    folder = tmp_path / "caches"
    with start(Gpu(), cache=folder) as session:
        session.warmup(1)
        (file,) = folder.iterdir()
    assert file.read_bytes() == b"compiled"
    with start(Gpu(), cache=folder):
        assert start.engine.cache.content == b"compiled"
    file.write_bytes(b"of another driver")
    with start(Gpu(), cache=folder) as session:
        assert start.engine.cache.content == b"empty" and "is written anew" in caplog.text
        session.warmup(1)
    assert file.read_bytes() == b"compiled"


def test_a_cache_that_cannot_be_written_does_not_stop_the_robot(start, tmp_path, caplog):
    (tmp_path / "taken").write_text("a file where the folder should be")
    with start(Gpu(), cache=tmp_path / "taken") as session:
        session.warmup(1)
        run(session, 1)
    assert "the next start compiles again" in caplog.text


@pytest.mark.parametrize(
    ("gpu", "engine", "message"),
    [(Gpu(memory=100), True, "no room for"), (Gpu(), False, "cannot be deserialised")],
    ids=["memory", "plan"],
)
def test_a_start_that_fails_gives_everything_back(gpu, engine, message, start):
    with pytest.raises(UserError, match=message):
        start(gpu, engine=engine)
    assert not gpu.blocks and not gpu.alive


def test_rows_outside_the_plan_are_refused(start):
    with start(Gpu()) as session, pytest.raises(UserError, match="takes 1 to 8 rows, found 9"):
        run(session, 9)
