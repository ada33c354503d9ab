import pytest

from robopolicy.benchmarking.engine_process import EngineProcess, EngineRefusedError
from robopolicy.benchmarking.serve_engine import some_observations
from robopolicy.spec import KeySpec, PolicySpec, TaskSpec


@pytest.fixture
def process(tiny_bundle):
    with EngineProcess(str(tiny_bundle), "torch", threads=1, rows=2, device="cpu", allow_native_code=False) as process:
        yield process


def test_opens_an_engine_and_computes_chunks(process):
    start = process.start
    assert 0 < start.open < start.first_chunk
    assert start.memory_after > start.memory_before > 2**20
    for call in (process(), process()):
        parts = call.preprocess + call.encode + call.denoise + call.postprocess
        assert 0 < call.encode < parts <= call.seconds
        assert call.denoise > call.preprocess  # four network calls against a check of two arrays


def test_says_that_its_process_ended(process):
    process._process.kill()
    process._process.wait()
    with pytest.raises(EngineRefusedError, match=r"ended with code -9"):
        process()


def test_passes_on_why_an_engine_does_not_open(tiny_bundle):
    with pytest.raises(EngineRefusedError, match="openvino-fp99"):
        EngineProcess(str(tiny_bundle), "openvino-fp99", threads=1, rows=1, device="cpu", allow_native_code=False)


def test_observations_of_all_that_a_policy_reads():
    spec = PolicySpec(
        (KeySpec("observation.state", (3,)), KeySpec("observation.image.top", (4, 5, 3), role="image")),
        KeySpec("action", (2,), role="action"),
        fps=10,
        goals=(KeySpec("observation.state", (3,)),),
        tasks=(TaskSpec("push"), TaskSpec("pull")),
    )
    found = some_observations(spec, rows=2)
    assert {key: value.shape for key, value in found.items()} == {
        "observation.state": (2, 2, 3),
        "observation.image.top": (2, 2, 4, 5, 3),
        "goal.observation.state": (2, 3),
        "instruction": (2,),
    }
    assert found["observation.image.top"].dtype == "uint8" and found["instruction"].tolist() == ["push", "push"]
