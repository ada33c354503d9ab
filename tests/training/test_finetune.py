"""Fine-tuning starts where the bundle stopped, trains what it should and nothing else, and ends in a plain bundle."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from robopolicy.cli.compose import compose_config
from robopolicy.cli.main import main
from robopolicy.configuration import dataclass_from
from robopolicy.data.normalize import AffineNormalizer, Normalizer
from robopolicy.data.schema import ArraySpec
from robopolicy.data.store import EpisodeStore
from robopolicy.errors import UserError
from robopolicy.policies.bundle import load_bundle, save_bundle
from robopolicy.policies.registry import build_policy
from robopolicy.spec import KeySpec, PolicySpec, TaskSpec
from robopolicy.training import optimizers
from robopolicy.training.config import OptimConfig
from robopolicy.training.dataset import prepare_data
from robopolicy.training.distributed import Processes
from robopolicy.training.finetune import (
    EMBEDDINGS,
    SENTENCES,
    Domain,
    FinetuneConfig,
    LoraSettings,
    add_adapters,
    initial_policy,
    joined_tasks,
    load_matching,
    merge_adapters,
)
from robopolicy.training.loop import Run, RunConfig
from robopolicy.training.step import LossModule, build_optimizer, step_generator, train_step
from tests.training.conftest import OVERRIDES, rows

FAMILIES = {
    "diffusion_unet": {"down_dims": [16, 32], "step_embed_dim": 16},
    "diffusion_transformer": {"dim": 16, "layers": 2, "heads": 2},
    "mode": {"dim": 16, "layers": 2, "heads": 2, "expert_hidden": 16, "dropout": 0.0},
}
MODES = ("full", "head", "lora")
RANK = 4


def write_circles(path: Path, dim: int = 2, scale: float = 1.0, unit: str = "m") -> Path:
    """Points that run round circles of radius ``scale``; the action is where they go next, in ``dim`` entries."""
    arrays = [
        ArraySpec("observation.state", (2,), "float32", "state", unit="m"),
        ArraySpec("action", (dim,), "float32", "action", unit=unit),
    ]
    rng = np.random.default_rng(0)
    with EpisodeStore.create(path, arrays, fps=10) as store:
        for _ in range(4):
            phase = rng.uniform(0, 6) + 0.2 * np.arange(21)
            points = scale * np.stack([np.cos(phase), np.sin(phase)], axis=1).astype(np.float32)
            store.append({"observation.state": points[:-1], "action": points[1:].repeat(2, axis=1)[:, :dim]})
    return path


def prepared(path: Path, *overrides: str):
    """The training data of a dataset."""
    plain = compose_config("train", [*OVERRIDES, "data.val_ratio=0", f"data.path={path}", "out=none", *overrides])
    config = dataclass_from(RunConfig, {k: plain[k] for k in ("out", "task", "data", "policy", "train")}, "")
    return prepare_data(config.task, config.data, config.train, Processes())


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return prepared(write_circles(tmp_path_factory.mktemp("old") / "circles.zarr"))


@pytest.fixture(scope="module")
def bundles(tmp_path_factory, data):
    """A bundle of each family for that data; its weights are random, none of them zero."""
    folder = tmp_path_factory.mktemp("bundles")
    for name, config in FAMILIES.items():
        torch.manual_seed(0)
        policy = build_policy(name, config, data.spec, data.normalizer)
        with torch.no_grad():
            for parameter in policy.parameters():
                parameter.add_(0.05 * torch.randn_like(parameter))
        save_bundle(policy, folder / name, task={"name": "circles"})
    return folder


@pytest.fixture
def start_from(bundles, data):
    """Make the policy that a fine-tuning of a bundle trains."""

    def make(mode="full", family="diffusion_unet", new=None, architecture=None, **settings):
        torch.manual_seed(1)
        config = FinetuneConfig(str(bundles / family), mode, lora=LoraSettings(RANK, 8), **settings)
        architecture = architecture or {"name": family, "config": FAMILIES[family]}
        return initial_policy(config, architecture, new or data)

    return make


def batch_of(data):
    return next(data.training.batches(start=0))


def fit(policy, data, steps=3, lr=1e-2):
    policy.train()
    optimizer, module = build_optimizer(policy, OptimConfig(weight_decay=0.1)), LossModule(policy)
    batches = data.training.batches(start=0)
    for step in range(steps):
        batch = next(batches)
        train_step(module, optimizer, batch, policy.draw(16, step_generator(0, step)), lr=lr, clip_norm=1.0)
    return policy.eval()


def weights(policy):
    return {name: parameter.detach().clone() for name, parameter in policy.named_parameters()}


def changed(before, policy):
    return {name for name, parameter in policy.named_parameters() if not torch.equal(before[name], parameter)}


def loss_of(policy, data):
    policy = policy.eval()
    with torch.no_grad():
        return policy.loss(batch_of(data), policy.draw(16, step_generator(0, 0))).item()


def sample(policy, data):
    observations = {k: v for k, v in batch_of(data).items() if k != "action"}
    with torch.no_grad():
        return policy.sample(observations, torch.Generator().manual_seed(0))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("mode", MODES)
def test_it_starts_with_the_bundles_function(mode, family, start_from, bundles, data):
    bundle, _ = load_bundle(bundles / family)
    assert loss_of(start_from(mode, family), data) == pytest.approx(loss_of(bundle, data), rel=1e-6)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("mode", MODES)
def test_each_mode_changes_what_it_should(mode, family, start_from, data):
    policy = start_from(mode, family)
    before = weights(policy)
    fit(policy, data)
    wanted = {
        "full": lambda name: True,
        "head": lambda name: name.startswith("denoiser.head."),
        "lora": lambda name: ".lora_" in name,
    }[mode]
    assert changed(before, policy) == {name for name in before if wanted(name)}
    assert all(p.requires_grad == wanted(name) for name, p in policy.named_parameters())


def test_adapters_have_the_parameters_of_their_rank(start_from):
    policy = start_from("lora")
    wanted = 0
    for layer in start_from("full").denoiser.modules():
        if type(layer) in (nn.Linear, nn.Conv1d):
            wanted += RANK * layer.weight[0].numel() + RANK * layer.weight.shape[0]
    assert wanted == sum(p.numel() for p in policy.parameters() if p.requires_grad)


@pytest.mark.parametrize("family", FAMILIES)
def test_merged_adapters_compute_the_same_in_an_ordinary_policy(family, start_from, bundles, data, tmp_path):
    adapted = fit(start_from("lora", family), data)
    before = {name: value.clone() for name, value in adapted.state_dict().items()}
    merged = merge_adapters(adapted)
    torch.testing.assert_close(sample(merged, data), sample(adapted, data), atol=1e-5, rtol=1e-5)
    old, _ = load_bundle(bundles / family)
    assert merged.state_dict().keys() == old.state_dict().keys() and type(merged) is type(old)
    assert (sample(merged, data) - sample(old, data)).abs().max() > 1e-3
    assert all(torch.equal(value, adapted.state_dict()[name]) for name, value in before.items())
    loaded, _ = load_bundle(save_bundle(merged, tmp_path / "bundle"))
    torch.testing.assert_close(sample(loaded, data), sample(merged, data))


def test_nothing_to_merge_is_left_as_it_is(start_from):
    policy = start_from("head")
    assert merge_adapters(policy) is policy


def test_adapters_of_the_encoder_reach_its_image_networks():
    image = KeySpec("observation.image.top", (40, 40, 3), role="image")
    state, action = KeySpec("observation.state", (2,)), KeySpec("action", (2,), role="action")
    spec = PolicySpec((state, image), action, 10, 2, 8, 4)
    parts = {key.key: AffineNormalizer(2) for key in (state, action)}
    policy = build_policy("diffusion_unet", FAMILIES["diffusion_unet"], spec, Normalizer.from_parts(parts))
    add_adapters(policy, LoraSettings(rank=2, encoder=True))
    trained = {name.split(".lora_")[0] for name, p in policy.named_parameters() if p.requires_grad}
    assert any("encoder.image_encoders" in name and "trunk" in name for name in trained)
    assert (
        merge_adapters(policy).state_dict().keys()
        == build_policy("diffusion_unet", FAMILIES["diffusion_unet"], spec, Normalizer.from_parts(parts))
        .state_dict()
        .keys()
    )


@pytest.mark.parametrize("mode", MODES)
def test_another_action_space_keeps_the_trunk_and_trains_the_ends(mode, start_from, bundles, tmp_path, caplog):
    caplog.set_level("INFO")
    new = prepared(write_circles(tmp_path / "three.zarr", dim=3))
    policy = start_from(mode, new=new)
    old, _ = load_bundle(bundles / "diffusion_unet")
    ends = {"down.0.first.first.0.weight", "down.0.first.skip.weight", "head.1.weight", "head.1.bias"}
    loaded, source = merge_adapters(policy).state_dict(), old.state_dict()
    for name in (name for name in source if name.startswith("denoiser.")):
        same = loaded[name].shape == source[name].shape and torch.equal(loaded[name], source[name])
        assert same == (name.removeprefix("denoiser.") not in ends)
    assert f"{len(list(old.parameters())) - 4} of {len(list(old.parameters()))} tensors" in caplog.text
    assert "denoiser.head.1.weight (3, 16, 1)" in caplog.text
    before = weights(policy)
    fit(policy, new)
    assert {f"denoiser.{name}" for name in ends} <= changed(before, policy)
    assert ("denoiser.middle.first.first.0.weight" in changed(before, policy)) == (mode == "full")
    assert sample(merge_adapters(policy), new).shape == (16, 8, 3)
    for name in ("scale", "offset"):  # of the state as the network knows it, of the action as the new data has it
        kept, found = (getattr(p.normalizer["observation.state"], name) for p in (policy, old))
        torch.testing.assert_close(kept, found)
    torch.testing.assert_close(policy.normalizer["action"].scale, new.normalizer["action"].scale)


def test_a_policy_that_nothing_fits_is_refused(start_from):
    other = {"name": "diffusion_transformer", "config": FAMILIES["diffusion_transformer"]}
    with pytest.raises(UserError, match="Nothing of the bundle's denoiser fits"):
        start_from(architecture=other)


def test_kept_normalisers_keep_their_units_and_hold_the_new_range(start_from, bundles, data, tmp_path):
    old, _ = load_bundle(bundles / "diffusion_unet")
    wide = prepared(write_circles(tmp_path / "wide.zarr", scale=3.0))
    kept, refit = start_from(new=wide).normalizer["action"], start_from(new=wide, normalization="refit").normalizer
    torch.testing.assert_close(kept.scale, old.normalizer["action"].scale)
    torch.testing.assert_close(kept.high, wide.normalizer["action"].high)  # sampling clips to it
    torch.testing.assert_close(refit["action"].scale, wide.normalizer["action"].scale)
    narrow = prepared(write_circles(tmp_path / "narrow.zarr", scale=0.1))
    torch.testing.assert_close(start_from(new=narrow).normalizer["action"].high, old.normalizer["action"].high)


def test_another_unit_is_fitted_anew_unless_told_otherwise(start_from, tmp_path):
    new = prepared(write_circles(tmp_path / "mm.zarr", scale=1000.0, unit="mm"))
    torch.testing.assert_close(start_from(new=new).normalizer["action"].scale, new.normalizer["action"].scale)
    with pytest.raises(UserError, match=r"is 'action' \(2,\) m, the new data's is 'action' \(2,\) mm"):
        start_from(new=new, normalization="keep")


def test_tasks_of_the_bundle_stay_behind_those_of_the_new_data(data):
    spec = replace(data.spec, tasks=(TaskSpec("push", 0), TaskSpec("lift", 1)))
    new = replace(data.spec, tasks=(TaskSpec("turn", 0), TaskSpec("lift", 1)))
    tasks, domains = joined_tasks(spec, new, keep=True)
    assert [task.instruction for task in tasks] == ["turn", "lift", "push"]
    assert [domains[task.domain] for task in tasks] == [Domain(None, (0,)), Domain(1, (1,)), Domain(0, ())]
    _, domains = joined_tasks(spec, new, keep=False)
    assert domains == (Domain(None, (0,)), Domain(None, (1,)), Domain(0, ()))
    one = replace(data.spec, tasks=(TaskSpec("push"),))
    assert joined_tasks(one, new, keep=True)[1] == (Domain(0, (0, 1)),)
    assert joined_tasks(data.spec, data.spec, keep=True) == ((), (Domain(0, (0,)),))
    assert joined_tasks(data.spec, data.spec, keep=False) == ((), (Domain(None, (0,)),))


def test_embeddings_go_with_their_instructions(data):
    def policy(*texts):
        torch.manual_seed(len(texts))
        spec = replace(data.spec, tasks=tuple(TaskSpec(text) for text in texts))
        return build_policy("diffusion_unet", FAMILIES["diffusion_unet"], spec, data.normalizer)

    old, new = policy("push", "lift"), policy("turn", "lift", "push")
    assert load_matching(new, old) == [EMBEDDINGS]  # not all of its rows
    table = old.encoder.instructions.table.weight
    torch.testing.assert_close(new.encoder.instructions.table.weight[1:], table[[1, 0]])
    same = policy("lift", "push")
    assert load_matching(same, old) == []
    torch.testing.assert_close(same.encoder.instructions.table.weight, table[[1, 0]])


def test_sentence_vectors_of_known_instructions_need_no_sentence_model(data):
    def policy(*texts):
        torch.manual_seed(0)
        spec = replace(data.spec, tasks=tuple(TaskSpec(text) for text in texts))
        config = FAMILIES["diffusion_unet"] | {"language": {"encoder": "sentence"}}
        return build_policy("diffusion_unet", config, spec, data.normalizer, fresh=False)

    old, same, new = policy("push", "lift"), policy("lift", "push"), policy("lift", "turn")
    sentences = old.get_buffer(SENTENCES).copy_(torch.randn(2, 384))
    assert load_matching(same, old) == load_matching(new, old) == []
    torch.testing.assert_close(same.get_buffer(SENTENCES), sentences[[1, 0]])
    torch.testing.assert_close(new.get_buffer(SENTENCES)[0], sentences[1])
    assert new.get_buffer(SENTENCES)[1].isnan().all()


@pytest.fixture(scope="module")
def command(bundles, tmp_path_factory):
    """A LoRA fine-tuning of six steps into a folder."""
    path = write_circles(tmp_path_factory.mktemp("new") / "circles.zarr", scale=2.0)
    usual = [o for o in OVERRIDES if o.startswith("train.")]
    start = ["finetune", f"bundle={bundles / 'diffusion_unet'}", f"data.path={path}", "mode=lora", "lora.rank=4"]
    start += [*usual, "data.val_ratio=0.25", "train.steps=6", "train.checkpoint_every=3"]
    return lambda out: [*start, f"out={out}"]


@pytest.fixture(scope="module")
def finished(command, tmp_path_factory):
    """That run, complete."""
    out = tmp_path_factory.mktemp("run") / "whole"
    assert main(command(out)) == 0
    return out


def test_a_run_ends_in_an_ordinary_bundle(finished, bundles, data):
    policy, manifest = load_bundle(finished / "bundles" / "last")
    old, _ = load_bundle(bundles / "diffusion_unet")
    assert policy.state_dict().keys() == old.state_dict().keys()
    assert changed(weights(old), policy) >= {"denoiser.head.1.weight", "denoiser.film_cond.1.weight"}
    torch.testing.assert_close(policy.normalizer["action"].high, 2 * old.normalizer["action"].high, atol=0.2, rtol=0)
    assert manifest["task"]["name"] == "circles" and manifest["provenance"]["config"]["mode"] == "lora"
    assert "val/action_error" in rows(finished)[-1]


def test_a_run_that_was_cut_off_goes_on_exactly(command, finished, tmp_path, monkeypatch):
    update, done = Run.update, []

    def stop_in_the_fifth(self, batch):
        if len(done) == 4:
            raise KeyboardInterrupt
        done.append(1)
        return update(self, batch)

    monkeypatch.setattr(Run, "update", stop_in_the_fifth)
    assert main(command(tmp_path / "cut")) == 130
    monkeypatch.setattr(Run, "update", update)
    assert main(["finetune", "--resume", str(tmp_path / "cut")]) == 0
    whole, cut = (load_bundle(run / "bundles" / "last")[0].state_dict() for run in (finished, tmp_path / "cut"))
    assert all(torch.equal(value, cut[name]) for name, value in whole.items())


def test_what_the_command_says_about_mistakes(command, finished, tmp_path, capsys):
    def fails(*words):
        capsys.readouterr()
        assert main([str(word) for word in words]) == 2
        return capsys.readouterr().err

    words = command(tmp_path / "other")
    assert "'half' must be one of 'full', 'head', 'lora'" in fails(*words, "mode=half")
    assert "lora.rank=0 must be at least 1" in fails(*words, "lora.rank=0")
    assert "Did you mean 'task.horizon'?" in fails(*words, "task.horizn=8")
    assert "already holds a training run" in fails(*command(finished))
    assert "robopolicy finetune --resume" in fails("train", "--resume", finished)
    assert "is not a bundle" in fails(*words, f"bundle={tmp_path}")
    (tmp_path / "moved").mkdir()
    plain = json.loads((finished / "config.json").read_text())
    (tmp_path / "moved" / "config.json").write_text(json.dumps(plain | {"bundle_fingerprint": "0123"}))
    assert "started from a bundle 0123" in fails("finetune", "--resume", tmp_path / "moved")


def test_overrides_of_the_bundles_task_and_architecture(command, capsys):
    assert main([*command("none"), "--print-config", "task.n_action_steps=2", "policy.config.sampler.steps=4"]) == 0
    plain = json.loads(capsys.readouterr().out)
    assert plain["task"]["n_action_steps"] == 2 and plain["task"]["action"]["unit"] == "m"
    assert plain["policy"]["config"]["sampler"]["steps"] == 4
    assert main([*command("none"), "--print-config", "task=push_puck", "task.horizon=8"]) == 0
    assert json.loads(capsys.readouterr().out)["task"]["name"] == "push_puck"


def test_adapters_need_peft(start_from, monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(UserError, match=r"pip install 'robopolicy\[lora\]'"):
        start_from("lora")


class EightBit(torch.optim.Optimizer):
    """Keeps its state as bitsandbytes does: bytes, block maxima, one shared table and a counter in Python."""

    table = torch.linspace(-1, 1, 256)

    def __init__(self, parameters):
        super().__init__(parameters, {"lr": 1e-3})

    def step(self, closure=None):
        for p in self.param_groups[0]["params"]:
            state = self.state[p]
            state["step"] = state.get("step", 0) + 1
            state["state1"] = torch.zeros_like(p, dtype=torch.uint8) + state["step"]
            state["absmax1"], state["qmap1"] = torch.full((3,), 0.5), self.table


def test_eight_bit_moments_survive_a_checkpoint(tmp_path):
    channels_last = torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last)
    parameters = [nn.Parameter(channels_last), nn.Parameter(torch.randn(256))]
    before, after = EightBit(parameters), EightBit(parameters)
    before.step()
    before.step()
    save_file({k: v.contiguous() for k, v in optimizers.optimizer_tensors(before).items()}, tmp_path / "moments")
    optimizers.restore_optimizer(after, load_file(tmp_path / "moments"))
    for p in parameters:
        for name, value in before.state[p].items():
            restored = after.state[p][name]
            assert type(restored) is type(value)
            if isinstance(value, torch.Tensor):
                assert restored.dtype == value.dtype and restored.stride() == value.stride()
                assert torch.equal(restored, value)
            else:
                assert restored == value == 2


def test_the_eight_bit_optimiser_learns_and_resumes():
    pytest.importorskip("bitsandbytes")
    config = OptimConfig(name="adamw8bit", lr=1e-2)
    torch.manual_seed(0)
    layers = [nn.Linear(128, 128) for _ in range(2)]
    layers[1].load_state_dict(layers[0].state_dict())
    a, b = (build_optimizer(layer, config) for layer in layers)
    x = torch.randn(64, 128)

    def update(layer, optimizer):
        loss = (layer(x) - x).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    losses = [update(layers[0], a) for _ in range(10)]
    assert losses[-1] < 0.8 * losses[0]
    layers[1].load_state_dict(layers[0].state_dict())
    optimizers.restore_optimizer(b, optimizers.optimizer_tensors(a))
    assert [update(layers[0], a) for _ in range(3)] == [update(layers[1], b) for _ in range(3)]


def test_without_the_eight_bit_optimiser_an_error_says_what_to_do(monkeypatch):
    config = OptimConfig(name="adamw8bit")
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(UserError, match=r"pip install 'robopolicy\[8bit\]'"):
        build_optimizer(nn.Linear(2, 2), config)

    class Broken:
        __version__ = "0.1"

        class optim:  # noqa: N801
            @staticmethod
            def AdamW8bit(*args, **kwargs):  # noqa: N802
                raise NameError("str2optimizer8bit_blockwise")

    monkeypatch.setitem(sys.modules, "bitsandbytes", Broken)
    with pytest.raises(UserError, match=r"bitsandbytes 0.1 cannot update parameters on cpu.*train.optim.name=adamw"):
        build_optimizer(nn.Linear(2, 2), config)
