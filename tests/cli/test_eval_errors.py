"""What ``robopolicy eval`` and ``compare`` say about bundles, environments and settings that do not fit."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml


def edit(bundle: Path, change: Callable[[dict], object]) -> Path:
    file = bundle / "bundle.yaml"
    manifest = yaml.safe_load(file.read_text())
    change(manifest)
    file.write_text(yaml.safe_dump(manifest))
    return bundle


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("environment=push", ["There is no environment 'push'", "pusht"]),
        ("sampler.name=dimm", ["'dimm'. Did you mean 'ddim'?"]),
        ("sampler.steps=1000", ["sampler.steps=1000 must lie in 1..100"]),
        ("sampler.steps=few", ["sampler.steps: expected int, found 'few'"]),
        ("episodes=abc", ["episodes: expected int, found 'abc'"]),
        ("episode=3", ["'episode'. Did you mean 'episodes'?"]),
        ("device=cuda", ["'cuda'", "no GPU"]),
    ],
)
def test_a_wrong_setting(
    override: str, words: list[str], bundle: Path, tmp_path: Path, fails, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    message = fails("eval", f"bundle={bundle}", f"out={tmp_path / 'results'}", override)
    for word in words:
        assert word in message
    assert not (tmp_path / "results").exists()


def test_a_policy_in_other_units_than_the_environment_is_refused(bundle: Path, tmp_path: Path, fails) -> None:
    message = fails("eval", f"bundle={bundle}", f"out={tmp_path / 'results'}")
    assert "observation.state: found unit 'px', wanted 'm'; convert before use." in message
    assert "action" not in message
    assert not (tmp_path / "results").exists()


def test_a_bundle_must_be_named(fails) -> None:
    assert "bundle=…" in fails("eval")


def test_something_else_than_a_bundle(walks: Path, tmp_path: Path, fails) -> None:
    assert "is not a bundle" in fails("eval", f"bundle={walks}")
    assert "is not a bundle" in fails("eval", f"bundle={tmp_path / 'absent'}")


def test_a_truncated_bundle(bundle: Path, fails) -> None:
    weights = bundle / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    message = fails("eval", f"bundle={bundle}")
    assert f"{weights} is truncated or changed" in message
    weights.unlink()
    assert "'model.safetensors' is missing" in fails("eval", f"bundle={bundle}")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda m: m["architecture"].update(name="diffusion_unt"), "'diffusion_unt'. Did you mean 'diffusion_unet'?"),
        (lambda m: m["architecture"]["config"].update(levels=3), "unknown entry 'levels'"),
        (lambda m: m.update(format_version=9), "has format_version 9"),
        (lambda m: m.update(kind="critic"), "holds a 'critic', wanted a policy"),
        (lambda m: m["spec"].pop("fps"), "spec: the entry 'fps' is missing"),
        (lambda m: m.pop("task"), "the entry 'task' is missing"),
        (lambda m: m["files"].update({"../walks": "0"}), "points outside the bundle"),
        (lambda m: m["task"].clear(), "name one with environment=…"),
    ],
)
def test_a_bundle_that_says_something_impossible(change, words: str, bundle: Path, fails) -> None:
    assert words in fails("eval", f"bundle={edit(bundle, change)}")


def test_a_bundle_cannot_run_code(bundle: Path, tmp_path: Path, fails) -> None:
    (bundle / "bundle.yaml").write_text(f'!!python/object/apply:os.system ["touch {tmp_path / "ran"}"]')
    assert "is not valid YAML" in fails("eval", f"bundle={bundle}")
    assert not (tmp_path / "ran").exists()


def test_a_fresh_process_knows_the_simulator(bundle: Path) -> None:
    command = [sys.executable, "-m", "robopolicy.cli.main", "eval", f"bundle={bundle}", "environment=push_puck"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "The policy and the environment 'push_puck' do not fit" in done.stderr


def test_compare_wants_results(bundle: Path, tmp_path: Path, fails) -> None:
    assert "protocol.json is not there" in fails("compare", bundle, tmp_path)
