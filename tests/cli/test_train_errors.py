"""What ``robopolicy train`` says about mistakes in the configuration, the dataset and the run's folder."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import zarr

from robopolicy.cli.main import main

from .conftest import write_walks

IMAGE = "observation.image.top"


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("train.stps=3", ["'train.stps'", "Did you mean 'train.steps'?"]),
        ("train.optim.learning=3", ["'train.optim.learning'"]),
        ("trian.steps=3", ["Did you mean 'train.steps'?"]),
        ("task=push_puk", ["There is no task 'push_puk'. Did you mean 'push_puck'?"]),
        ("policy=diffusion_unt", ["There is no policy 'diffusion_unt'. Did you mean 'diffusion_unet'?"]),
        ("train=fast", ["There is no train 'fast'.", " Known: default, demo, finetune, pusht_cpu."]),
        ("train.steps=abc", ["train.steps: expected int, found 'abc'"]),
        ("train.compile=3", ["train.compile: expected bool, found 3"]),
        ("train.precision=fp16", ["train.precision='fp16' must be one of 'fp32', 'bf16'"]),
        ("train.steps", ["Cannot read 'train.steps'", "key=value"]),
        ("train.steps=[1", ["Cannot read 'train.steps=[1'"]),
        ("train.steps=0", ["train.steps=0 must be at least 1"]),
        ("train.accumulate=3", ["train.batch_size=8 must be a multiple of train.accumulate=3"]),
        ("task.horizon=7", ["horizon=7 must be a multiple of 2"]),
        ("task.n_action_steps=8", ["n_action_steps=8 must lie in 1..7"]),
        ("data.normalization.state=minmx", ["'minmx'. Did you mean 'minmax'?"]),
        ("train.device=cuda", ["'cuda'", "no GPU"]),
        ("train.device=gpu", ["There is no device 'gpu'"]),
        ("train.threads=0", ["train.threads=0 must be at least 1"]),
        ("train.validation_windows=0", ["train.validation_windows=0 must be at least 1"]),
        ("train.optim.lr=-1", ["train.optim.lr=-1.0 must be at least 0"]),
        ("data.val_ratio=1.5", ["data.val_ratio=1.5 must be below 1"]),
        ("data.memory_budget_mb=-3", ["data.memory_budget_mb=-3 must be at least 1"]),
        ("policy.config.augmentation.crop=0", ["augmentation.crop=0.0 must lie above 0"]),
        ("policy.config.n_groups=0", ["multiples of n_groups=0"]),
        ("policy.config.process.schedule=cosine", ["'cosine' must be one of 'squaredcos_cap_v2'"]),
        ("policy.config.sampler.name=ddmi", ["Unknown sampler 'ddmi'. Did you mean"]),
        ("policy.config.sampler.steps=1000", ["sampler.steps=1000 must lie in 1..100"]),
        ("task.observations=[]", ["at least one observation key"]),
        ("task.observations=[{key: observation.state, columns: [-1]}]", ["columns (-1,)"]),
        ("train.evaluate_every=1", ["train.evaluate_every needs a task with an environment"]),
        ("task.observations=[{key: observation.stte}]", ["'observation.stte'", "Did you mean 'observation.state'?"]),
        ("task.observations=[{kye: observation.state}]", ["task.observations[0]: unknown entry 'kye'", "'key'"]),
        ("task.observations=[{key: observation.state, columns: [0, 5]}]", ["columns (0, 5)", "its shape is (2,)"]),
        ("task.observations=[{key: observation.state, angles: [7]}]", ["angles (7,) are outside"]),
        ("task.observations=[{key: observation.state, role: image}]", ["an image is (height, width, 3)", "(2,)"]),
        ("+task.schema.stat.unit=m", ["no array 'stat'", "observation.state"]),
    ],
)
def test_a_mistake_in_the_configuration(
    override: str, words: list[str], train_command: list[str], tmp_path: Path, fails, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    message = fails(*train_command, override)
    for word in words:
        assert word in message
    assert not (tmp_path / "run" / "bundles").exists()


def test_a_dataset_must_be_named(fails) -> None:
    assert "data.path=…" in fails("train", "task=push_puck")


def test_a_dataset_that_is_none(train_command: list[str], tmp_path: Path, fails) -> None:
    text = tmp_path / "notes.txt"
    text.write_text("hello")
    no_ends = tmp_path / "other.zarr"
    data = zarr.open_group(no_ends, mode="w", zarr_format=2).create_group("data")
    data.create_array("action", shape=(3, 2), dtype="f4")
    assert "no such file or folder" in fails(*train_command, f"data.path={tmp_path / 'absent.zarr'}")
    assert "no zip archive" in fails(*train_command, f"data.path={text}")
    assert "meta/episode_ends" in fails(*train_command, f"data.path={no_ends}")
    assert text.read_text() == "hello"


def test_values_that_are_not_finite_are_found_before_training(train_command: list[str], tmp_path: Path, fails) -> None:
    message = fails(*train_command, f"data.path={write_walks(tmp_path / 'nan.zarr', broken_step=25)}")
    assert "step 25, dimension 1 is nan" in message
    assert "robopolicy data doctor" in message


def test_too_short_episodes(train_command: list[str], fails) -> None:
    message = fails(*train_command, "task.horizon=64", "task.n_action_steps=4")
    assert "the longest has 20 steps" in message
    assert "horizon 64" in message


def test_a_folder_with_a_run_is_left_alone(train_command: list[str], tmp_path: Path, fails) -> None:
    assert main(train_command) == 0
    run = tmp_path / "run"
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    assert f"--resume {run}" in fails(*train_command)
    assert "Did you mean 'train.steps'?" in fails("train", "--resume", run, "train.stps=4")
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before


def test_resume_wants_a_run(walks: Path, tmp_path: Path, fails) -> None:
    assert "is not a training run" in fails("train", "--resume", walks)
    assert "is not a training run" in fails("train", "--resume", tmp_path / "absent")
    for content in ('{"train": ', "{}"):
        (tmp_path / "config.json").write_text(content)
        message = fails("train", "--resume", tmp_path)
        assert f"{tmp_path / 'config.json'} is damaged" in message


def test_a_resume_that_fails_leaves_the_run_as_it_was(train_command: list[str], tmp_path: Path, fails) -> None:
    assert main(train_command) == 0
    config = (tmp_path / "run" / "config.json").read_text()
    resume = ["train", "--resume", str(tmp_path / "run")]
    assert "another architecture" in fails(*resume, "policy.config.down_dims=[32,64]")
    assert (tmp_path / "run" / "config.json").read_text() == config
    assert main([*resume, "train.steps=3"]) == 0


def test_a_configuration_folder_must_exist(train_command: list[str], fails) -> None:
    assert "--config-dir /absent is no folder" in fails(*train_command, "--config-dir", "/absent")


def test_a_sweep_stops_at_a_typo_before_its_first_job(walks: Path, fails, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    message = fails("train", "-m", "train.sed=1,2", "task=push_puck", f"data.path={walks}")
    assert "Did you mean 'train.seed'?" in message
    assert list(tmp_path.iterdir()) == []


def test_a_task_of_ones_own(
    train_command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], fails
) -> None:
    (tmp_path / "mine" / "task").mkdir(parents=True)
    (tmp_path / "mine" / "task" / "fold.yaml").write_text(
        "name: fold\nenvironment: ''\nfps: null\nn_obs_steps: 1\nhorizon: 8\nn_action_steps: 4\n"
        f"observations: [{{key: {IMAGE}}}]\naction: {{key: action}}\nschema: {{}}\n"
    )
    options = ["--config-dir", str(tmp_path / "mine")]
    assert main([*train_command, "task=fold", *options, "--print-config"]) == 0
    assert json.loads(capsys.readouterr().out)["task"]["name"] == "fold"
    assert "Did you mean 'fold'?" in fails(*train_command, *options, "task=fald")


def test_an_unknown_option_is_no_override(train_command: list[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main([*train_command, "--reset", "runs/x"])


def test_print_config_prints_and_writes_nothing(
    train_command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*train_command, "--print-config", "train.steps=77"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert (printed["train"]["steps"], printed["policy"]["config"]["down_dims"]) == (77, [16, 32])
    assert not (tmp_path / "run").exists()
