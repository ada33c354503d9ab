"""Record, train with simulated evaluations in between, and find the evaluated bundles."""

import json

import pytest

from robopolicy.cli.main import main
from robopolicy.manifest import read_manifest

pytest.importorskip("robopolicy_sim", reason="needs the simulator: pip install 'robopolicy[sim]'")


def test_evaluations_during_training_rank_the_bundles(tmp_path):
    data, run = tmp_path / "demos.zarr", tmp_path / "run"
    assert main(["record", "--task", "push_puck", "--episodes", "3", "--workers", "1", "--out", str(data)]) == 0
    command = (
        f"train task=push_puck policy=diffusion_unet_small train=demo data.path={data} out={run} data.val_ratio=0 "
        "policy.config.down_dims=[16,32] policy.config.step_embed_dim=16 policy.config.sampler.steps=2 "
        "train.steps=6 train.batch_size=8 train.tensorboard=false train.evaluate_every=2 train.keep_best=2 "
        "evaluation.episodes=2 evaluation.batch_size=2"
    )
    assert main(command.split()) == 0
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    scores = {row["step"]: row["eval/score"] for row in rows if "eval/score" in row}
    assert list(scores) == [2, 4, 6] and all("eval/success_rate" in row for row in rows if row["step"] in scores)
    bundles = sorted(path.name for path in (run / "bundles").iterdir())
    best = sorted(scores, key=lambda step: (scores[step], step))[-2:]
    assert bundles == sorted(["last", *(f"step_{step:07d}_score_{scores[step]:.3f}" for step in best)])
    manifest = read_manifest(run / "bundles" / bundles[1])
    assert manifest["provenance"]["metrics"]["eval/score"] == scores[manifest["provenance"]["step"]]
