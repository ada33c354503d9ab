"""`robopolicy align` and `robopolicy calibrate-guidance` from the command line, on a policy and a real critic."""

import itertools
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from robopolicy.cli.align import compose
from robopolicy.cli.main import main
from robopolicy.configuration import dataclass_from
from robopolicy.manifest import bundle_fingerprint, read_manifest
from robopolicy.policies.bundle import load_bundle
from robopolicy.training.align import AlignRun, policy_to_align
from robopolicy.training.best import BestBundles
from robopolicy.training.distributed import join_processes
from robopolicy.training.loop import RunConfig

SHORT = ["train.batch_size=8", "train.threads=1", "train.tensorboard=false", "train.validation_windows=8"]
UPDATES = [*SHORT, "train.optim.warmup_steps=1", "train.steps=4", "train.checkpoint_every=2"]
TOKENS = ["policy=beso", "policy.config.dim=16", "policy.config.layers=1", "policy.config.heads=2"]
TASK = ["task=push_puck", "task.environment="]


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """Episodes, a goal-conditioned policy, one without goals, and a critic."""
    folder = tmp_path_factory.mktemp("align")
    data = folder / "demos.zarr"
    assert main(["record", "--task", "push_puck", "--episodes", "3", "--workers", "1", "--out", str(data)]) == 0
    for name, more in (("policy", []), ("goal", ["task.goals=[observation.state]"])):
        command = ["train", *TASK, *more, *TOKENS, *UPDATES, f"data.path={data}", f"out={folder / name}"]
        assert main(command) == 0
    critic = ["train-critic", *TASK, *SHORT, "train.steps=2", f"data.path={data}", f"out={folder / 'critic'}"]
    assert main([*critic, "critic.width=16"]) == 0
    return folder


def given(place, method, out, *more):
    bundles = [
        f"{name}={place / run / 'bundles' / 'last'}" for name, run in (("bundle", "policy"), ("critic", "critic"))
    ]
    data = [f"data.path={place / 'demos.zarr'}", "data.val_ratio=0.3"]
    return [*bundles, *data, *UPDATES, f"method={method}", "eda.candidates=3", f"out={out}", *more]


def weights(run):
    folder = run / "checkpoints" / (run / "checkpoints" / "last").read_text()
    return {f"{file.stem}.{k}": v for file in folder.glob("*.safetensors") for k, v in load_file(file).items()}


@pytest.mark.parametrize("method", ["edp", "eda"])
def test_an_alignment_writes_an_ordinary_policy_and_names_both_bundles(place, tmp_path, method):
    assert main(["align", *given(place, method, tmp_path / "run")]) == 0
    aligned, manifest = load_bundle(tmp_path / "run" / "bundles" / "last")
    before, _ = load_bundle(place / "policy" / "bundles" / "last")
    assert type(aligned) is type(before) and aligned.spec == before.spec
    for name, value in before.normalizer.state_dict().items():
        assert torch.equal(value, aligned.normalizer.state_dict()[name])
    config = manifest["provenance"]["config"]
    assert config["critic"] == str(place / "critic" / "bundles" / "last")
    critic = read_manifest(place / "critic" / "bundles" / "last", "critic")
    assert config["critic_fingerprint"] == bundle_fingerprint(critic)
    assert any(not torch.equal(a, b) for a, b in zip(aligned.parameters(), before.parameters(), strict=True))


@pytest.mark.parametrize("method", ["edp", "eda"])
def test_an_interrupted_alignment_goes_on_bit_for_bit(place, tmp_path, method):
    assert main(["align", *given(place, method, tmp_path / "whole")]) == 0
    plain = compose(given(place, method, tmp_path / "half"))
    config = dataclass_from(RunConfig, {name: plain[name] for name in ("out", "task", "data", "policy", "train")}, "")
    stopped = AlignRun(
        config, plain, join_processes("cpu"), lambda data: policy_to_align(plain["bundle"], plain["policy"], data)
    )
    for batch in itertools.islice(stopped.data.training.batches(), 2):
        stopped.update(batch)
    stopped.save(BestBundles(stopped.out / "bundles", 0))
    (stopped.out / "config.json").write_text(json.dumps(plain))
    assert main(["align", "--resume", str(tmp_path / "half")]) == 0
    whole, half = weights(tmp_path / "whole"), weights(tmp_path / "half")
    assert whole.keys() == half.keys()
    assert [name for name in whole if not torch.equal(whole[name], half[name])] == []


def test_mistakes_in_the_command_are_named(place, tmp_path, fails):
    complete = given(place, "edp", tmp_path / "run")
    without = [word for word in complete if not word.startswith("critic=")]
    assert "Please give critic=…" in fails("align", *without)
    assert "wanted a critic" in fails("align", *without, f"critic={place / 'policy' / 'bundles' / 'last'}")
    assert "method='dpo' must be one of 'edp', 'eda'" in fails("align", *complete, "method=dpo")
    assert "was not started by align" in fails("align", "--resume", place / "policy")


def test_guidance_is_calibrated_and_the_result_written(place, tmp_path, capsys, fails):
    out, data = tmp_path / "guidance.json", f"data.path={place / 'demos.zarr'}"
    command = ["calibrate-guidance", data, "windows=6", "threads=1", "sampler.steps=4", "tolerance=1", f"out={out}"]
    assert main([*command, f"bundle={place / 'goal' / 'bundles' / 'last'}"]) == 0
    found = json.loads(out.read_text())
    text = capsys.readouterr().out
    assert found["full"] == 8 and len(found["agreement"]) == 4
    # every chunk reaches the smallest threshold at once, after the first call
    assert found["threshold"] == found["effects"][0]["threshold"] and found["effects"][0]["evaluations"] == 5
    assert f"steering.cfg.threshold={found['threshold']:g}" in text
    assert "needs a policy with goals" in fails(*command, f"bundle={place / 'policy' / 'bundles' / 'last'}")
