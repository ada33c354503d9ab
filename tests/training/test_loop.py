"""The loop end to end on a small dataset: what it writes, that it learns, and that it resumes bit for bit."""

import itertools
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from robopolicy.cli.compose import compose_config
from robopolicy.cli.train import start
from robopolicy.configuration import dataclass_from
from robopolicy.data.schema import ArraySpec
from robopolicy.data.store import EpisodeStore
from robopolicy.errors import UserError
from robopolicy.policies.bundle import load_bundle
from robopolicy.training.best import BestBundles
from robopolicy.training.config import TrainConfig
from robopolicy.training.distributed import join_processes
from robopolicy.training.loop import Run, RunConfig, train
from tests.training.conftest import rows


def weights(run: Path) -> dict[str, torch.Tensor]:
    folder = run / "checkpoints" / (run / "checkpoints" / "last").read_text()
    return {f"{file.stem}.{k}": v for file in folder.glob("*.safetensors") for k, v in load_file(file).items()}


def assert_same_run(a: Path, b: Path) -> None:
    left, right = weights(a), weights(b)
    assert left.keys() == right.keys()
    assert [k for k in left if not torch.equal(left[k], right[k])] == []
    for row_a, row_b in zip(rows(a), rows(b), strict=True):
        assert {k: v for k, v in row_a.items() if "speed" not in k} == {
            k: v for k, v in row_b.items() if "speed" not in k
        }


def test_a_run_writes_what_it_promises(plain, tmp_path):
    start(plain(), resume=False)
    run = tmp_path / "run"
    assert {"config.json", "metrics.jsonl", "first_batch.png", "checkpoints", "bundles"} <= {
        p.name for p in run.iterdir()
    }
    logged = rows(run)
    assert [r["step"] for r in logged] == [4, 8, 12, 16]
    assert {"train/loss", "train/lr", "train/grad_norm", "speed/samples_per_s"} <= logged[0].keys()
    assert [r["step"] for r in logged if "val/action_error" in r] == [8, 16]
    _, manifest = load_bundle(run / "bundles" / "last")
    assert manifest["provenance"]["step"] == 16 and len(manifest["provenance"]["dataset"]["fingerprint"]) > 10


def test_it_learns(plain, tmp_path):
    changes = {
        "train.steps": 250,
        "train.optim.lr": 3e-3,
        "train.validate_every": 125,
        "train.batch_size": 64,
        "train.ema.max_decay": 0.95,
        "policy.config.process.prediction": "sample",
    }
    start(plain(**changes), resume=False)
    errors = [r["val/action_error"] for r in rows(tmp_path / "run") if "val/action_error" in r]
    assert errors[-1] < 0.1  # metres, on a circle of radius 1


def test_bundle_holds_the_averaged_weights(plain, tmp_path):
    start(plain(), resume=False)
    policy, _ = load_bundle(tmp_path / "run" / "bundles" / "last")
    kept = weights(tmp_path / "run")
    name = "denoiser.head.1.weight"
    bundled = dict(policy.named_parameters())[name]
    assert torch.equal(bundled, kept[f"ema.{name}"])
    assert not torch.equal(bundled, kept[f"model.{name}"])


def test_killed_and_resumed_run_is_bit_identical(overrides, plain, tmp_path):
    """SIGKILL in the middle; the resumed run ends with the same weights, averages, moments and log rows."""
    long = ["train.steps=60", "train.checkpoint_every=7", "train.validate_every=20"]
    command = [sys.executable, "-m", "robopolicy.cli.main", "train", *overrides, *long]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, bufsize=1)
    pointer = tmp_path / "run" / "checkpoints" / "last"
    while process.poll() is None and not (pointer.exists() and int(re.sub(r"\D", "", pointer.read_text()) or 0) >= 21):
        pass
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL, "the run ended before it could be killed"
    subprocess.run(
        [sys.executable, "-m", "robopolicy.cli.main", "train", "--resume", str(tmp_path / "run")],
        check=True, capture_output=True,
    )  # fmt: skip
    changes = dict(item.split("=") for item in long)
    start(plain(**changes, out=tmp_path / "whole"), resume=False)
    assert_same_run(tmp_path / "run", tmp_path / "whole")


def test_an_image_policy_resumes_bit_for_bit(plain, tmp_path):
    """Its convolutions lie in memory channels last, its checkpoints do not."""
    images = tmp_path / "images.zarr"
    arrays = [ArraySpec("camera", (40, 40, 3), "uint8", "image"), ArraySpec("action", (2,), "float32", "action")]
    rng = np.random.default_rng(0)
    with EpisodeStore.create(images, arrays, fps=10) as store:
        for _ in range(2):
            frames = rng.integers(0, 256, (12, 40, 40, 3), dtype=np.uint8)
            store.append({"camera": frames, "action": rng.normal(size=(12, 2)).astype(np.float32)})
    changes = {
        "data.path": images,
        "task.observations": "[{key: observation.image.top, source: camera}]",
        "data.val_ratio": 0,
        "train.batch_size": 4,
        "train.checkpoint_every": 2,
    }
    start(plain(**changes, **{"train.steps": 4, "out": tmp_path / "whole"}), resume=False)
    half = plain(**changes, **{"train.steps": 4})
    config = dataclass_from(RunConfig, {k: half[k] for k in ("out", "task", "data", "policy", "train")}, "")
    stopped = Run(config, half, join_processes("cpu"))
    for batch in itertools.islice(stopped.data.training.batches(), 2):
        stopped.update(batch)
    stopped.save(BestBundles(stopped.out / "bundles", 0))
    start(half, resume=True)
    a, b = weights(tmp_path / "whole"), weights(tmp_path / "run")
    assert [k for k in a if not torch.equal(a[k], b[k])] == []


def test_a_run_is_not_resumed_on_other_data(plain, tmp_path):
    start(plain(), resume=False)
    with pytest.raises(UserError, match="train.batch_size was 16 and is 8 now"):
        start(plain(**{"train.batch_size": 8, "train.steps": 20}), resume=True)
    with pytest.raises(UserError, match="data.normalization was"):
        start(plain(**{"data.normalization.state": "gaussian", "train.steps": 20}), resume=True)


def test_resuming_a_complete_run_changes_nothing(plain, tmp_path):
    start(plain(), resume=False)
    before = (tmp_path / "run" / "bundles" / "last" / "bundle.yaml").read_text()
    assert "val/loss" in before
    start(plain(), resume=True)
    assert (tmp_path / "run" / "bundles" / "last" / "bundle.yaml").read_text() == before


def test_configuration_files_and_dataclasses_have_the_same_defaults(plain):
    shipped = compose_config("train", ["data.path=x"])["train"]
    assert dataclass_from(TrainConfig, shipped, "train") == TrainConfig()


def test_accumulation_changes_nothing_but_memory(plain, tmp_path):
    start(plain(), resume=False)
    start(plain(**{"train.accumulate": 4, "out": tmp_path / "split"}), resume=False)
    whole, split = weights(tmp_path / "run"), weights(tmp_path / "split")
    for name, value in whole.items():
        torch.testing.assert_close(split[name], value, rtol=1e-3, atol=1e-5)


def test_two_processes_give_the_update_of_one(overrides, plain, tmp_path):
    start(plain(), resume=False)
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m",
               "robopolicy.cli.main", "train", *overrides, f"out={tmp_path / 'two'}", "train.device=cpu"]  # fmt: skip
    subprocess.run(command, check=True, capture_output=True, env=environment)
    one, two = weights(tmp_path / "run"), weights(tmp_path / "two")
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, rtol=1e-3, atol=1e-5)


def test_bf16_runs_close_to_fp32(plain, tmp_path):
    start(plain(), resume=False)
    start(plain(**{"train.precision": "bf16", "out": tmp_path / "bf16"}), resume=False)
    a, b = (np.array([r["train/loss"] for r in rows(tmp_path / name)]) for name in ("run", "bf16"))
    assert not np.array_equal(a, b)
    np.testing.assert_allclose(a, b, rtol=0.05)


def test_the_best_bundles_are_kept_by_score(plain):
    values = plain(**{"train.evaluate_every": 4, "train.keep_best": 2})
    config = dataclass_from(RunConfig, {k: values[k] for k in ("out", "task", "data", "policy", "train")}, "config")
    scores = {4: 0.2, 8: 0.9, 12: 0.5, 16: 0.1}
    judged = []

    def judge(policy, step):
        judged.append(step)
        assert not policy.training
        return {"eval/score": scores[step]}

    bundle = train(config, values, judge)
    assert judged == [4, 8, 12, 16]
    kept = sorted(p.name for p in bundle.parent.iterdir())
    assert kept == ["last", "step_0000008_score_0.900", "step_0000012_score_0.500"]


def test_an_existing_run_is_not_overwritten(plain):
    start(plain(), resume=False)
    with pytest.raises(UserError, match="already holds a training run. Continue it with --resume"):
        start(plain(), resume=False)
