import json
import shutil
from dataclasses import replace

import pytest

from robopolicy.benchmarking.ceilings import Ceilings
from robopolicy.benchmarking.engine_process import Call, Start
from robopolicy.benchmarking.measure import EngineFacts, benchmark, chosen_engines, engine_result
from robopolicy.benchmarking.picture import latency_figure, write_picture
from robopolicy.benchmarking.work import ChunkWork, Work
from robopolicy.diffusion.process import SamplerConfig
from robopolicy.errors import UserError
from robopolicy.export.observations import find_observations
from robopolicy.policies.bundle import load_bundle

FACTS = EngineFacts("torch", "fp32", "cpu", 10, SamplerConfig())
WORK = ChunkWork(Work(10**6, 0, 0), (Work(10**6, 0, 0),) * 3)
LIMITS = Ceilings("cpu", 1, {1: 1e9}, {"fp32": 1e9}, 1e9)  # 4 ms for WORK


def test_one_engine_from_known_calls():
    calls = [Call(1e-3 * ms, 0.1e-3, 0.2e-3, 1e-3 * ms - 0.5e-3, 0.2e-3) for ms in (8, 6, 10)]
    found = engine_result(FACTS, WORK, Start(0.5, 1.5, 100, 350), calls, LIMITS)
    assert (found.latency.p50, found.latency.max) == pytest.approx((0.008, 0.010))
    assert found.stages["denoise"].p50 == pytest.approx(0.0075)
    assert found.memory == 250
    assert found.bound.seconds == pytest.approx(0.004) and found.fraction == pytest.approx(0.5)
    assert found.best_fraction == pytest.approx(4 / 6)


def test_no_bound_without_limits_of_the_device():
    found = engine_result(FACTS, WORK, Start(0.5, 1.5, 100, 350), [Call(1, 0, 0, 1, 0)], None)
    assert found.bound is None and found.fraction is None


def test_unknown_engine_names_the_nearest(tiny_bundle):
    with pytest.raises(UserError, match="no engine 'torhc'.* Did you mean 'torch'"):
        chosen_engines(tiny_bundle, ["torch", "torhc"])


def test_engines_are_measured_once_and_those_that_do_not_run_are_listed(tiny_bundle, tmp_path):
    bundle = tmp_path / "policy"
    shutil.copytree(tiny_bundle, bundle)
    (bundle / "engines" / "old").mkdir(parents=True)
    (bundle / "engines" / "old" / "engine.yaml").write_text("format_version: 0\ncommand: robopolicy export x\n")
    result = benchmark(bundle, runs=3, warmup=1, rows=2, progress=False)
    assert [r.facts.name for r in result.engines] == ["torch"]
    assert "robopolicy export x" in result.refused["old"]
    (torch,) = result.engines
    assert torch.latency.runs == 3 and torch.facts.file_bytes == (bundle / "model.safetensors").stat().st_size
    assert len(torch.work.denoise) == 4 and 0 < torch.fraction < 1
    result.save(tmp_path / "out" / "bench.json")
    saved = json.loads((tmp_path / "out" / "bench.json").read_text())
    assert saved["engines"][0]["fraction"] == torch.fraction and saved["rows"] == 2
    assert saved["machine"]["processor"] == result.machine.processor
    assert write_picture(result, tmp_path / "out" / "bench.png").read_bytes().startswith(b"\x89PNG")
    _check_bars(result)


def _check_bars(result):
    (axis,) = latency_figure(result).axes
    assert [label.get_text() for label in axis.get_yticklabels()] == ["torch"]
    drawn = sum(bar.get_width() for bar in axis.patches)
    assert drawn == pytest.approx(1e3 * sum(stage.p50 for stage in result.engines[0].stages.values()))


@pytest.fixture
def exported(tiny_bundle, tmp_path):
    """A copy of the bundle with an ONNX Runtime engine that samples in two steps, not four."""
    for package in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(package)
    from robopolicy.export.build import ExportConfig, build_engine

    bundle = tmp_path / "policy"
    shutil.copytree(tiny_bundle, bundle)
    policy, about = load_bundle(bundle)
    policy.sampler = replace(policy.sampler, steps=2)
    config = ExportConfig(backend="onnxruntime", exporter="torchscript", observations=4, calibration=4)
    build_engine(policy, about, bundle, config, find_observations(policy, about, 4), "robopolicy export …")
    return bundle


def test_an_engine_beside_torch(exported):
    result = benchmark(exported, runs=2, warmup=1, progress=False)
    engine, own = result.engines
    assert (engine.facts.name, own.facts.name) == ("onnxruntime-fp32", "torch") and not result.refused
    assert engine.facts.file_bytes > sum(f.stat().st_size for f in exported.glob("engines/*/*.onnx"))
    # it samples as it was exported, and its process never imported torch
    assert (len(engine.work.denoise), len(own.work.denoise)) == (2, 4)
    assert engine.memory < own.memory / 2


def test_a_bundle_of_which_nothing_runs_says_why(tiny_bundle, tmp_path):
    bundle = tmp_path / "policy"
    shutil.copytree(tiny_bundle, bundle)
    (bundle / "engines" / "old").mkdir(parents=True)
    (bundle / "engines" / "old" / "engine.yaml").write_text("format_version: 0\n")
    with pytest.raises(UserError, match=r"No engine of .* runs on this machine:\n  old: .*format_version 0"):
        benchmark(bundle, ["old"], runs=1, progress=False)
