"""``robopolicy eval`` with options of the environment and with a suite, on a bundle on disk."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("robopolicy_sim", reason="needs the simulator: pip install 'robopolicy[sim]'")
from robopolicy.cli.main import main
from robopolicy.data.normalize import Normalizer, fit_normalizer
from robopolicy.evaluation.suite_results import SuiteResult
from robopolicy.policies.bundle import save_bundle
from robopolicy.policies.registry import build_policy
from robopolicy.spec import PolicySpec

from . import sliding
from .test_suite import written

SUITE = "name: two\nsettings: [{factor: base}, {factor: friction, level: 0.5}]"


@pytest.fixture(autouse=True)
def slide():
    with sliding.registered():
        yield


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    """An untrained policy for the cart on a slightly slippery rail."""
    torch.manual_seed(0)
    spec = PolicySpec((sliding.STATE, sliding.ENVIRONMENT_STATE), sliding.ACTION, fps=10, horizon=8, n_action_steps=4)
    parts = {k.key: fit_normalizer(np.array([[-1.0], [1.0]]), "minmax") for k in (*spec.states, spec.action)}
    config = {"down_dims": [16, 32], "step_embed_dim": 16, "sampler": {"name": "ddim", "steps": 2}}
    policy = build_policy("diffusion_unet", config, spec, Normalizer.from_parts(parts))
    task = {"environment": "slide", "environment_options": {"variation": {"friction": 0.1}}}
    return save_bundle(policy, tmp_path / "policy", task=task)


def options_of(folder: Path) -> dict:
    return json.loads((folder / "protocol.json").read_text())["task"].get("options", {})


def run(bundle: Path, out: Path, *overrides: str) -> int:
    return main(["eval", f"bundle={bundle}", "episodes=2", "videos=0", f"out={out}", *overrides])


def test_the_options_that_the_task_was_trained_with_are_the_default(bundle, tmp_path):
    assert run(bundle, tmp_path / "usual") == 0
    assert options_of(tmp_path / "usual") == {"variation": {"friction": 0.1}}
    assert run(bundle, tmp_path / "other", "environment_options={variation: {lighting: darker}}") == 0
    assert options_of(tmp_path / "other") == {"variation": {"lighting": "darker"}}
    assert run(bundle, tmp_path / "named", "environment=slide") == 0
    assert options_of(tmp_path / "named") == {}


def test_a_suite_runs_and_prints_its_numbers(bundle, tmp_path, capsys):
    out = tmp_path / "suite"
    assert run(bundle, out, f"suite={written(tmp_path, SUITE)}") == 0
    result = SuiteResult.load(out)
    assert [s.options["variation"]["friction"] for s in result.suite.settings] == [0.1, 0.5]
    printed = capsys.readouterr().out
    assert all(f"\n{name} " in printed for name in ("base", "friction-0.5", "aggregate"))
    assert result.protocol.policy["sampler"]["steps"] == 2
    assert (out / "report.html").exists()


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("suite=variant_agregation", "no suite 'variant_agregation'. Did you mean 'variant_aggregation'"),
        ("suite=absent.yaml", "absent.yaml is not there"),
        ("suite=visual_matching", "needs background.photo"),
        ("environment_options={background: {photo: absent.png}}", "absent.png, which is not there"),
        ("environment_options={variation: {fog: 1}}", "There is no factor 'fog'"),
    ],
)
def test_what_does_not_fit(override, words, bundle, tmp_path, capsys):
    assert run(bundle, tmp_path / "out", override) == 2
    assert words in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
