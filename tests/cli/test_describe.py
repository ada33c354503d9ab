"""``robopolicy describe``: what it prints, its JSON, its errors."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from robopolicy.cli.main import main
from robopolicy.manifest import bundle_fingerprint, read_manifest
from robopolicy.policies.bundle import load_bundle


@pytest.fixture
def described(bundle: Path, capsys: pytest.CaptureFixture[str]):
    """Run the command on the tiny bundle; returns what it prints."""

    def run(*words: str) -> str:
        threads = torch.get_num_threads()
        assert main(["describe", f"bundle={bundle}", "calls=2", *words]) == 0
        torch.set_num_threads(threads)
        return capsys.readouterr().out

    return run


def test_json_holds_what_the_bundle_is(described, bundle: Path) -> None:
    about = json.loads(described("--json", "threads=1"))
    policy, manifest = load_bundle(bundle)
    total = sum(p.numel() for p in policy.parameters())
    assert about["parameters"] == {"total": total, "parts": {"denoiser": total}, "active_per_network_call": total}
    assert about["fingerprint"] == bundle_fingerprint(read_manifest(bundle))
    assert about["chunk"]["network_calls"] == 16 and about["chunk"]["gflop"] > 0
    assert about["spec"] == manifest["spec"] and about["task"] == {"environment": "pusht"}
    assert about["latency"]["threads"] == 1 and about["latency"]["calls"] == 2 and about["latency"]["median"] > 0


def test_another_sampler_costs_less(described) -> None:
    usual, fast = (json.loads(described("--json", *words)) for words in ([], ["sampler.steps=4"]))
    assert fast["chunk"]["network_calls"] == 4 and fast["chunk"]["sampler"]["steps"] == 4
    assert fast["chunk"]["gflop"] < usual["chunk"]["gflop"] / 3


def test_the_table_names_parts_keys_units_and_machine(described, bundle: Path) -> None:
    text = described("threads=1")
    lines = {line.split()[0]: line for line in text.splitlines() if line}
    total = sum(p.numel() for p in load_bundle(bundle)[0].parameters())
    assert f"{total:,} parameters" in lines["denoiser"] and f"{total:,} parameters" in lines["total"]
    assert lines["sampler"].split(maxsplit=1)[1] == "ddim, 16 steps: 16 network calls"
    assert lines["reads"].split()[1:] == ["observation.state", "5", "m"]
    assert lines["writes"].split()[1:] == ["action", "2", "px"]
    assert "1 thread" in lines["latency"] and "GFLOP" in text
    assert lines["environment"].split()[1] == "pusht"


def test_mistakes(fails, bundle: Path, tmp_path: Path) -> None:
    assert "bundle=…" in fails("describe")
    assert "is not a bundle" in fails("describe", f"bundle={tmp_path}")
    assert "Unknown sampler 'ddmi'. Did you mean" in fails("describe", f"bundle={bundle}", "sampler.name=ddmi")
    assert "calls=0 must be at least 1" in fails("describe", f"bundle={bundle}", "calls=0")
    assert "Did you mean 'device'?" in fails("describe", f"bundle={bundle}", "devize=cpu")
