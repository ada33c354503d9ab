"""The commands of README.md and docs/*.md, executed in order, page by page, in an empty folder.

Only their length is changed, by the table `SHORTER`. Blocks marked ``sh no-test`` need a download or several GPUs; of
them the configuration of each training is composed.
"""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from robopolicy.cli.main import main

REPOSITORY = Path(__file__).resolve().parents[2]
PAGES = [REPOSITORY / "README.md", *sorted((REPOSITORY / "docs").glob("*.md"))]

# Words added to a documented command, by what it begins with; the first entry that fits counts.
TINY = (
    "train.steps=4 train.batch_size=8 train.threads=1 train.optim.warmup_steps=1 train.validation_windows=8 "
    "train.tensorboard=false"
)
TOKENS = f"{TINY} policy.config.dim=16 policy.config.layers=1 policy.config.heads=2"
SHORTER = {
    "record --task drawer_close --episodes 400": "--episodes 6 --workers 1 --image-size 32",
    "record": "--episodes 3 --workers 1 --image-size 32",
    "train-critic --resume": "",
    "train-critic": (
        "train.steps=4 train.batch_size=8 train.optim.warmup_steps=1 train.tensorboard=false critic.width=8"
    ),
    "train-dynamics": f"{TINY} dynamics.dim=16 dynamics.layers=1",
    "train --resume runs/first train.steps=4000": "train.steps=6",
    "train --resume": "",
    "train policy=beso": TOKENS,
    "train policy=diffusion_mlp": f"{TINY} policy.config.width=16 policy.config.blocks=1",
    "train policy=diffusion_transformer_small": TOKENS,
    "train policy=sdp_small": TOKENS,
    "train": f"{TINY} policy.config.down_dims=[16,32] policy.config.step_embed_dim=16",
    "distill": TINY,
    "extend": TINY,
    "finetune": TINY,
    "align": TINY,
    "calibrate-guidance": "windows=8 threads=1",
    "describe": "calls=1",
    "eval bundle=runs/drawer/bundles/last suite=dynamics": "episodes=1 videos=0",
    "eval": "episodes=2 videos=0",
    "export": "exporter=torchscript observations=8",
    "bench": "runs=10",
    "rehearse": "episodes=1 time_limit=2",
    "identify-camera": "",
    "identify": "--steps 60 --workers 1",
    "": "",
}

# What each page promises to be there after its commands.
PROMISED = {
    "README.md": (
        "pictures data/push_puck.zarr/meta/episode_ends runs/a/config.json runs/a/metrics.jsonl "
        "runs/a/first_batch.png runs/a/checkpoints/last runs/a/bundles/last/bundle.yaml "
        "runs/b/bundles/last/bundle.yaml results/a/report.html results/b/report.html results/comparison.html "
        "runs/drawer/bundles/last/bundle.yaml results/dynamics/report.html results/engine/report.html "
        "runs/a/bundles/last/engines/openvino-fp32/engine.yaml runs/a/rehearsal/rehearsal.json"
    ),
    "export.md": (
        "runs/a/bundles/last/engines/openvino-fp32/sampler.onnx runs/a/bundles/last/engines/fast/golden.safetensors "
        "results/engine/report.html"
    ),
    "data.md": "pictures data/all.zarr data/all.zarr.zip data/train.zarr data/val.zarr data/clean.zarr",
    "training.md": (
        "runs/first/config.json runs/first/first_batch.png runs/first/metrics.jsonl runs/first/checkpoints/last "
        "runs/first/bundles/last runs/mine/bundles/last runs/push_puck/sweep/train.seed-1/bundles/last "
        "runs/push_puck/sweep/train.seed-2/bundles/last"
    ),
    "evaluation.md": (
        "results/first/report.html results/first/summary.json results/first/episodes.jsonl "
        "results/first/protocol.json results/fast/report.html results/comparison.html"
    ),
    "hardware.md": "my_arm/contract.yaml my_arm/safety.yaml",
    "data_questions.md": "pictures/quality.png data/calm.zarr data/more.zarr data/all.zarr",
    "critics.md": (
        "runs/critic/diagnostics.png runs/critic/diagnostics.json runs/critic/metrics.jsonl "
        "runs/critic/checkpoints/last runs/critic/bundles/last runs/calql/bundles/last runs/histogram/bundles/last"
    ),
    "dynamics.md": (
        "data/rings.zarr runs/rings/bundles/last runs/dynamics/bundles/last/bundle.yaml runs/puck/bundles/last "
        "results/any/report.html results/back/report.html results/not_front/report.html"
    ),
    "guidance.md": (
        "results/cfg/report.html guidance.json results/adaptive/report.html results/composed/report.html "
        "results/two_goals/report.html"
    ),
    "steering.md": (
        "runs/mixed/bundles/last runs/critic/bundles/last results/alone/report.html results/steered/report.html "
        "results/random/report.html results/comparison.html results/control.html results/stacked/report.html"
    ),
    "alignment.md": "runs/edp/bundles/last runs/eda/bundles/last results/edp/report.html",
    "matching.md": "data/real.zarr robot.json data/matched.zarr camera.json",
    "peers_environments.md": "data/drawer_open.zarr data/pick_place.zarr/data/observation.image.scene",
    "fidelity.md": "fidelity.html results/a/report.html results/b/report.html selection.json",
    "randomization.md": "data/varied.zarr data/late.zarr",
    "policies.md": (
        "results/flow/report.html results/goal/report.html results/goal_rehearsed/rehearsal.json "
        "results/tasks/summary.json results/window/report.html runs/dit/bundles/last runs/extended/bundles/last "
        "results/one_call/report.html runs/lora/bundles/last"
    ),
    "scale.md": "results/processes/report.html results/ray/report.html",
    "simulation.md": (
        "data/push_puck.zarr data/noisy.zarr data/images.zarr/data/observation.image.wrist data/joints.zarr "
        "data/mixed.zarr data/left.zarr runs/lift/bundles/last results/lift/report.html data/rings.zarr data/asked.zarr"
    ),
    "bundles.md": (
        "runs/first/bundles/last/bundle.yaml runs/first/bundles/last/model.safetensors "
        "runs/first/bundles/last/normalizer.safetensors runs/first/eval/last-push_puck-2/report.html"
    ),
}


HERE_DOCUMENT = re.compile(r"^cat > (\S+) <<'(\w+)'\n(.*?)^\2\n", re.MULTILINE | re.DOTALL)


def commands(page: Path, mark: str = "") -> list[list[str]]:
    """The words of every command in the page's blocks ```` ```sh<mark> ````; a here document's text is one word."""
    blocks = re.findall(rf"^```sh{mark}\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL)
    text, *documents = HERE_DOCUMENT.split("".join(blocks))
    found = lines(text)
    for file, _, content, text in zip(*[iter(documents)] * 4, strict=True):
        found += [["cat", ">", file, content], *lines(text)]
    return found


def lines(text: str) -> list[list[str]]:
    """The words of each command of a text without here documents."""
    split = (shlex.split(line, comments=True) for line in text.replace("\\\n", " ").splitlines())
    return [words for words in split if words]


def shortened(words: list[str]) -> list[str]:
    """The arguments of a ``robopolicy`` command with what `SHORTER` adds."""
    text = " ".join(words[1:])
    return words[1:] + next(added for start, added in SHORTER.items() if text.startswith(start)).split()


def execute(words: list[str]) -> None:
    if words[0] == "robopolicy":
        assert main(shortened(words)) == 0
    elif words[0] == "make":
        assert re.search(rf"^{words[1]}:", (REPOSITORY / "Makefile").read_text(), re.MULTILINE)
    elif words[:2] == ["cat", ">"]:
        Path(words[2]).write_text(words[3])
    else:
        assert words[0] in ("mkdir", "cp"), f"nobody knows how to test '{words[0]}'"
        subprocess.run(words, check=True)


@pytest.mark.parametrize("page", [p for p in PAGES if commands(p)], ids=lambda page: page.name)
def test_documented_commands_work(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["robopolicy"])  # a sweep changes it
    (tmp_path / "configs").symlink_to(REPOSITORY / "configs")
    for words in commands(page):
        execute(words)
    for promised in PROMISED.get(page.name, "").split():
        assert (tmp_path / promised).exists(), f"{page.name} promises {promised}"


def test_each_tested_page_promises_something() -> None:
    assert {page.name for page in PAGES if commands(page)} <= set(PROMISED) | {"results.md"}


def untested_verbs(page: Path) -> list[list[str]]:
    return [words for words in commands(page, " no-test") if {"robopolicy", "robopolicy.cli.main"} & set(words)]


@pytest.mark.parametrize("page", [p for p in PAGES if untested_verbs(p)], ids=lambda page: page.name)
def test_untested_trainings_have_a_valid_configuration(page: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for words in untested_verbs(page):
        name = next(word for word in words if word in ("robopolicy", "robopolicy.cli.main"))
        arguments = words[words.index(name) + 1 :]
        if arguments[0] == "train" and "--resume" not in arguments:
            assert main([*arguments, "--print-config"]) == 0
            assert json.loads(capsys.readouterr().out)["data"]["path"].endswith(".zarr")


def documented_verbs() -> list[tuple[str, ...]]:
    """Every ``robopolicy VERB`` and ``robopolicy data VERB`` that the pages name."""
    text = "\n".join(page.read_text() for page in PAGES)
    found = re.findall(r"(?:^|`)robopolicy (data [a-z-]+|[a-z-]+)", text, re.MULTILINE)
    return sorted({tuple(words.split()) for words in found})


@pytest.mark.parametrize("verb", documented_verbs(), ids=" ".join)
def test_every_documented_verb_explains_itself_with_an_example(
    verb: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="0"):
        main([*verb, "--help"])
    assert re.search(rf"^  robopolicy {' '.join(verb)} \S+", capsys.readouterr().out, re.MULTILINE)


def test_the_pages_name_every_verb(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        main(["--help"])
    verbs = re.findall(r"^    ([a-z-]+)(?: |$)", capsys.readouterr().out, re.MULTILINE)
    named = {verb[0] for verb in documented_verbs()}
    assert set(verbs) - {"demo"} == named - {"demo"}
    assert "demo" in verbs  # documented as `make demo`
