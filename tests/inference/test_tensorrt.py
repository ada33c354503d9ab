"""Sessions of TensorRT: what is decided without a GPU, what is said where there is none, and runs where there is."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from robopolicy.errors import UserError
from robopolicy.inference import device_memory
from robopolicy.inference.backends import tensorrt
from robopolicy.inference.backends.tensorrt import (
    TensorRtSession,
    border_spec,
    cache_name,
    check_plan_fits,
    invalid_reasons,
    last_errors,
    next_launch,
    replace_file,
    tensorrt_logger,
    tensorrt_module,
)
from robopolicy.inference.device_memory import (
    CudaError,
    PresentGpu,
    buffer_bytes,
    call,
    no_gpu_message,
    present_gpu,
    shape_of,
    version_text,
)
from robopolicy.inference.gpus import FAMILIES, covers, gpu_families
from robopolicy.inference.rows import rows_of
from robopolicy.inference.session import TensorSpec

runtime = pytest.importorskip("cuda.bindings.runtime")
pytest.importorskip("tensorrt_rtx_bindings")

RTX4090 = PresentGpu("NVIDIA GeForce RTX 4090", "sm89", "13.0")


def gpu():
    try:
        return present_gpu()
    except UserError:
        return None


GPU = gpu()
without_gpu = pytest.mark.skipif(GPU is not None, reason="this machine has a GPU")
with_gpu = pytest.mark.skipif(GPU is None, reason="needs an NVIDIA GPU")


def test_importing_takes_neither_torch_nor_a_gpu_library():
    code = (
        "import sys, robopolicy.inference.backends.tensorrt, robopolicy.inference.backends.aot_inductor\n"
        "print([m for m in ('torch', 'cuda.bindings.runtime', 'tensorrt_rtx_bindings', 'onnx') if m in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


@without_gpu
def test_without_a_gpu_a_plan_says_what_it_needs(tmp_path):
    (tmp_path / "sampler.plan").write_bytes(b"anything")
    with pytest.raises(UserError) as error:
        TensorRtSession(tmp_path / "sampler.plan", capabilities=["sm89", "sm120"])
    text = str(error.value)
    assert "sampler.plan is a TensorRT plan for sm89, sm120" in text and "NVIDIA driver" in text
    assert "ONNX Runtime or OpenVINO" in text


@without_gpu
def test_cuda_errors_carry_their_name():
    with pytest.raises(CudaError, match=r"cudaMalloc: .* \(cudaError\w+\)") as error:
        call("cudaMalloc", 16)
    assert error.value.name in ("cudaErrorInsufficientDriver", "cudaErrorNoDevice")


@pytest.mark.parametrize(
    ("name", "driver", "advice"),
    [
        ("cudaErrorInsufficientDriver", "none", "No NVIDIA driver is loaded"),
        ("cudaErrorInsufficientDriver", "12.2", "takes CUDA up to 12.2, the installed packages need 13.0"),
        ("cudaErrorNoDevice", "13.0", "CUDA_VISIBLE_DEVICES"),
    ],
)
def test_the_advice_fits_the_reason(name, driver, advice):
    assert advice in no_gpu_message(name, "text", driver, "13.0")


def test_versions_read_as_nvidia_writes_them():
    assert [version_text(n) for n in (0, 12090, 13000, 11040)] == ["none", "12.9", "13.0", "11.4"]


def test_every_cuda_function_exists():
    """Names are given as text, which no type checker sees."""
    source = "".join(Path(module.__file__).read_text() for module in (device_memory, tensorrt))
    names = set(re.findall(r"\b(cuda[A-Z]\w+)", source)) - {"cudaErrorInsufficientDriver"}
    assert {"cudaMallocHost", "cudaStreamEndCapture", "cudaGraphLaunch"} <= names
    members = {
        m for enum in ("cudaMemcpyKind", "cudaStreamCaptureMode", "cudaError_t") for m in dir(getattr(runtime, enum))
    }
    assert {name for name in names if not hasattr(runtime, name) and name not in members} == set()


def test_every_tensorrt_name_exists():
    trt = tensorrt_module("rtx")
    source = Path(tensorrt.__file__).read_text()
    owners = {
        "engine": trt.ICudaEngine,
        "_engine": trt.ICudaEngine,
        "context": trt.IExecutionContext,
        "config": trt.IRuntimeConfig,
        "_config": trt.IRuntimeConfig,
        "_cache": trt.IRuntimeCache,
        "_runtime": trt.Runtime,
        "_trt": trt,
    }
    for owner, kind in owners.items():
        names = set(re.findall(rf"\b{owner}\.([a-zA-Z]\w+)", source)) - {"name"}
        assert names, owner
        assert {name for name in names if not hasattr(kind, name)} == set(), owner


def test_the_cache_belongs_to_one_plan_gpu_and_driver():
    names = {
        cache_name(b"plan", RTX4090),
        cache_name(b"other", RTX4090),
        cache_name(b"plan", PresentGpu("NVIDIA GeForce RTX 4090", "sm89", "12.9")),
        cache_name(b"plan", PresentGpu("NVIDIA L4", "sm89", "13.0")),
    }
    assert len(names) == 4 and all(re.fullmatch(r"[a-z0-9.-]+\.cache", name) for name in names)
    assert cache_name(b"plan", RTX4090).endswith("-nvidia-geforce-rtx-4090-cuda13.0.cache")


def test_a_graph_is_captured_after_a_plain_run_and_then_replayed():
    assert [next_launch(0, False, True), next_launch(1, False, True), next_launch(2, True, True)] == [
        "plain",
        "capture",
        "replay",
    ]
    assert next_launch(5, False, False) == "plain"
    assert next_launch(5, True, False) == "replay"  # captured before another number of rows proved impossible


def test_a_plan_for_other_gpus_is_refused():
    assert covers(["sm86", "sm89"], "sm89") and covers([], "sm120") and not covers(["sm86"], "sm89")
    check_plan_fits(Path("a.plan"), ["sm89"], RTX4090)
    with pytest.raises(UserError, match=r"a\.plan was built for sm80, sm120.*RTX 4090.*again for sm89"):
        check_plan_fits(Path("a.plan"), ["sm80", "sm120"], RTX4090)


def test_gpu_families_know_their_formats():
    formats = {name: FAMILIES[name].formats - {"float32", "float16", "int8"} for name in FAMILIES}
    assert formats["sm75"] == set() and formats["sm87"] == {"bfloat16"} and formats["sm89"] == {"bfloat16", "float8"}
    with pytest.raises(UserError, match="'RTX 4090' is known"):
        gpu_families(["RTX 4090"])


def test_diagnostics_are_told_in_words():
    trt = tensorrt_module("rtx")
    assert invalid_reasons(trt, 1 | 4) == "version mismatch, old cuda driver"
    assert invalid_reasons(trt, 0) == "no reason given"
    validity, diagnostics = trt.Runtime(tensorrt_logger("rtx")).get_engine_validity(b"junk" * 100)
    assert validity == trt.EngineValidity.INVALID and "malformed engine" in invalid_reasons(trt, diagnostics)


def test_tensorrts_own_errors_are_kept_for_the_message():
    logger = tensorrt_logger("rtx")
    last_errors(logger)
    assert tensorrt_module("rtx").Runtime(logger).deserialize_cuda_engine(b"junk" * 100) is None
    assert len(last_errors(logger)) > 20
    assert last_errors(logger) == "It gave no reason."


def test_borders_become_specs():
    kinds = tensorrt_module("rtx").DataType
    assert border_spec("x", (-1, 4), kinds.FLOAT) == TensorSpec("x", (None, 4))
    assert border_spec("task", (2,), kinds.INT64) == TensorSpec("task", (2,), "int64")
    with pytest.raises(UserError, match="'x' is half"):
        border_spec("x", (1,), kinds.HALF)
    with pytest.raises(UserError, match="only the first dimension"):
        border_spec("x", (-1, -1), kinds.FLOAT)


def test_buffers_are_made_for_the_most_rows():
    spec = TensorSpec("image", (None, 2, 40, 40, 3), "uint8")
    assert shape_of(spec, 3) == (3, 2, 40, 40, 3) and buffer_bytes(spec, 3) == 3 * 2 * 40 * 40 * 3
    assert buffer_bytes(TensorSpec("t", (1,), "int64"), 9) == 8


def test_rows_are_the_same_for_all_inputs_and_within_limits():
    specs = (TensorSpec("x", (None, 2)), TensorSpec("y", (None, 3)), TensorSpec("t", (1,)))
    inputs = {"x": np.zeros((4, 2)), "y": np.zeros((4, 3)), "t": np.zeros(1)}
    assert rows_of(specs, inputs, (1, 8)) == 4
    assert rows_of(specs[2:], inputs, (2, 2)) == 2
    with pytest.raises(UserError, match="takes 1 to 2 rows, found 4"):
        rows_of(specs, inputs, (1, 2))
    with pytest.raises(UserError, match="different numbers of rows"):
        rows_of(specs, inputs | {"y": np.zeros((3, 3))}, (1, 8))


def test_a_cache_is_replaced_whole(tmp_path):
    file = tmp_path / "caches" / "a.cache"
    replace_file(file, b"one")
    before = file.stat().st_ino
    replace_file(file, b"one")
    assert file.stat().st_ino == before
    replace_file(file, b"two")
    assert file.read_bytes() == b"two" and list(file.parent.iterdir()) == [file]


@with_gpu
@pytest.mark.parametrize("flavour", ["rtx", "classic"])
@pytest.mark.parametrize("cuda_graph", [True, False], ids=["graph", "plain"])
def test_a_plan_computes_what_its_onnx_file_says(flavour, cuda_graph, tmp_path):
    import torch

    from robopolicy.export.onnx_graphs import export_onnx
    from robopolicy.export.tensorrt import build_plan, rtx_targets
    from tests.policies.test_contract import batch_of, make

    if flavour == "classic":
        pytest.importorskip("tensorrt")
    elif GPU.capability not in rtx_targets(tensorrt_module("rtx")):
        pytest.skip(f"TensorRT-RTX has no target for {GPU.capability}")
    policy = make("unet ddpm").eval()
    graph = policy.export_graphs({"observation.state": batch_of(policy, 2)["observation.state"]})["sampler"]
    export_onnx(graph, tmp_path / "sampler.onnx", free_rows=True)
    plan = build_plan(tmp_path / "sampler.onnx", flavour=flavour, rows=(1, 1, 8), timing_cache=tmp_path / "timings")
    (tmp_path / "sampler.plan").write_bytes(plan.data)
    generator = np.random.default_rng(0)
    with TensorRtSession(
        tmp_path / "sampler.plan", flavour, cache=tmp_path, cuda_graph=cuda_graph, capabilities=plan.capabilities
    ) as session:
        session.warmup()
        assert flavour == "classic" or list(tmp_path.glob("*.cache"))
        for rows in (1, 8, 1, 3, 1, 8, 2, 5, 4, 1):  # graphs are captured, replayed, dropped and captured again
            inputs = {s.name: generator.normal(size=shape_of(s, rows)).astype(s.dtype) for s in session.inputs}
            with torch.no_grad():
                wanted = graph.module(*(torch.from_numpy(inputs[name]) for name in graph.names)).numpy()
            for _ in range(3):
                np.testing.assert_allclose(session(inputs)["chunk"], wanted, atol=2e-3)
