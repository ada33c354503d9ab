"""``robopolicy export`` and ``robopolicy eval engine=…``."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import yaml

from robopolicy.cli.main import main
from robopolicy.evaluation.results import EvaluationResult
from robopolicy.inference.engine import engine_names, read_engine
from robopolicy.policies.bundle import load_bundle, save_bundle

QUICK = ["backend=onnxruntime", "exporter=torchscript", "observations=8", "sampler.steps=3"]


@pytest.fixture
def pusht_bundle(bundle: Path) -> Path:
    """The tiny bundle with a state that Push-T gives, and some opinion about what to do."""
    policy, about = load_bundle(bundle)
    values = yaml.safe_load((bundle / "bundle.yaml").read_text())
    values["spec"]["observations"][0]["unit"] = ""
    (bundle / "bundle.yaml").write_text(yaml.safe_dump(values, sort_keys=False))
    policy, _ = load_bundle(bundle)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return save_bundle(policy, bundle, task=about["task"])


def test_prints_what_was_built_and_how_far_it_is_off(bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["export", f"bundle={bundle}", *QUICK, "name=fast"]
    assert main(command) == 0
    out = capsys.readouterr().out
    assert "compared with the policy on 8 observations (made up" in out and "largest error of each entry" in out
    assert out.splitlines()[-1].startswith(f"engine: {bundle / 'engines' / 'fast'}  (")
    manifest, _ = read_engine(bundle, "fast")
    assert manifest.sampler["steps"] == 3 and manifest.backend == "onnxruntime"
    assert manifest.command == " ".join(["robopolicy", *command])
    assert manifest.versions["opset"] == "17" and manifest.parity.max_share < 1e-3


def test_an_engine_plays_the_episodes_of_its_policy(pusht_bundle: Path, tmp_path: Path) -> None:
    bundle = f"bundle={pusht_bundle}"
    assert main(["export", bundle, *QUICK, "eval=true", "episodes=3"]) == 0
    found = read_engine(pusht_bundle, "onnxruntime-fp32")[0].evaluation
    assert found["environment"].endswith("pusht") and found["episodes"] == 3 and found["engine"] == found["policy"]
    common = ["episodes=3", "videos=0"]
    assert main(["eval", bundle, *common, f"out={tmp_path / 'engine'}", "engine=onnxruntime-fp32"]) == 0
    assert main(["eval", bundle, *common, f"out={tmp_path / 'torch'}", "sampler.steps=3"]) == 0
    engine, torch_ = (EvaluationResult.load(tmp_path / name) for name in ("engine", "torch"))
    assert [e.steps for e in engine.episodes] == [e.steps for e in torch_.episodes]
    ours, own = ([e.score for e in result.episodes] for result in (engine, torch_))
    assert ours == pytest.approx(own, abs=0.02)  # contacts enlarge the last digits
    about = engine.protocol.policy
    assert about["engine"]["name"] == "onnxruntime-fp32" and about["sampler"]["steps"] == 3


def test_mistakes(fails, bundle: Path) -> None:
    export = ["export", f"bundle={bundle}"]
    assert "has no precision=bf16; it has fp32, fp16, int8" in fails(*export, "backend=onnxruntime", "precision=bf16")
    assert "openvino" in fails(*export, "backend=openvin")
    message = fails(*export, "backend=tensorrt_rtx", "device-capability=sm90")
    assert "sm90" in message and "aot_inductor" in message
    assert "Set sampler.guidance_threshold=2" in fails(*export, *QUICK, "sampler.guidance_threshold=0.9")
    assert "bundle=…" in fails("export")
    assert "refused" in fails(*export, *QUICK, "tolerance=1e-12") and engine_names(bundle) == []
    assert "has no engine 'fast'" in fails("eval", f"bundle={bundle}", "engine=fast")
    assert main([*export, *QUICK]) == 0
    engine = ["eval", f"bundle={bundle}", "engine=onnxruntime-fp32"]
    assert "samples as it was exported" in fails(*engine, "sampler.steps=2")
    assert "launcher=local" in fails(*engine, "launcher=ray")
