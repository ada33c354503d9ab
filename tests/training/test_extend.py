"""Continual learning: new tasks are learned, old ones stay the same bit for bit."""

import json

import numpy as np
import pytest
import torch
import yaml

from robopolicy.cli.main import main
from robopolicy.data.normalize import AffineNormalizer, Normalizer, fit_normalizer
from robopolicy.errors import UserError
from robopolicy.policies.bundle import load_bundle, save_bundle
from robopolicy.policies.registry import build_policy
from robopolicy.spec import KeySpec, PolicySpec, TaskSpec
from robopolicy.training.config import OptimConfig
from robopolicy.training.extend import extend_policy
from robopolicy.training.step import LossModule, build_optimizer, step_generator, train_step

HORIZON = 4
STATE, ACTION = KeySpec("observation.state", (2,), unit="m"), KeySpec("action", (2,), role="action", unit="m")
IMAGE = KeySpec("observation.image.top", (40, 40, 3), role="image")
CONFIG = {
    "dim": 32,
    "layers": 2,
    "heads": 2,
    "mlp_ratio": 2,
    "experts": 4,
    "dropout": 0.0,
    "process": {"name": "ddpm", "prediction": "sample"},
    "sampler": {"name": "ddim", "steps": 4},
    "images": {"keypoints": 4, "feature_dim": 8},
}


def spec_of(instructions, images=False, **changes):
    fields = {"fps": 10, "n_obs_steps": 2, "horizon": HORIZON, "n_action_steps": 2} | changes
    tasks = tuple(TaskSpec(text, domain=i) for i, text in enumerate(instructions))
    return PolicySpec((STATE, IMAGE) if images else (STATE,), ACTION, tasks=tasks, **fields)


def normalizer_of(spec, reach=1.0):
    part = fit_normalizer(np.array([[-reach, -reach], [reach, reach]]), "minmax")
    return Normalizer.from_parts(
        {key: AffineNormalizer.stack([part] * spec.domains) for key in ("observation.state", "action")}
    )


def make(instructions=("go along", "go far along"), images=False, name="sdp", config=CONFIG):
    torch.manual_seed(0)
    spec = spec_of(instructions, images)
    return build_policy(name, config, spec, normalizer_of(spec))


def windows(policy, tasks, factor=1.0, rows=32, reach=1.0):
    """The action is the state times a factor, in tasks (rows of them in turn)."""
    generator = torch.Generator().manual_seed(3)
    states = (torch.rand(rows, 2, generator=generator) * 1.6 - 0.8) * reach
    batch = {
        "observation.state": states[:, None].repeat(1, 2, 1),
        "action": factor * states[:, None].repeat(1, HORIZON, 1),
        "task": torch.tensor(tasks).repeat(rows)[:rows],
    }
    if policy.spec.images:
        batch[IMAGE.key] = torch.randint(0, 256, (rows, 2, *IMAGE.shape), generator=generator, dtype=torch.uint8)
    return batch


def fit(policy, batch, steps, lr=2e-2):
    policy.train()
    optimizer = build_optimizer(policy, OptimConfig(weight_decay=1e-2))
    for step in range(steps):
        draws = policy.draw(len(batch["action"]), step_generator(0, step))
        train_step(LossModule(policy), optimizer, batch, draws, lr=lr * (1 - step / steps), clip_norm=1.0)
    return policy.eval()


@torch.no_grad()
def sampled(policy, batch):
    generators = [torch.Generator().manual_seed(i) for i in range(len(batch["task"]))]
    return policy.eval().sample({k: v for k, v in batch.items() if k != "action"}, generators)


def extended(old, instruction="go back", new_experts=2, reach=1.0):
    torch.manual_seed(1)
    spec = spec_of((instruction,), images=bool(old.spec.images))
    return extend_policy(old, spec, normalizer_of(spec, reach), new_experts)


@pytest.mark.parametrize(("images", "new_experts"), [(False, 2), (False, 0), (True, 2)])
def test_old_tasks_do_not_change_by_a_bit(images, new_experts, tmp_path):
    old = make(images=images)
    batch = windows(old, [0, 1], rows=4)
    before = sampled(fit(old, batch, 2), batch)
    policy = extended(old, new_experts=new_experts)
    assert torch.equal(sampled(policy, batch), before)
    new = windows(policy, [2], factor=-1.0, rows=4)
    untrained = sampled(policy, new)
    fit(policy, new, 2)
    assert torch.equal(sampled(policy, batch), before)
    assert not torch.equal(sampled(policy, new), untrained)
    loaded, _ = load_bundle(save_bundle(policy, tmp_path / "bundle"))
    assert torch.equal(sampled(loaded, batch), before)
    assert [task.instruction for task in loaded.spec.tasks] == ["go along", "go far along", "go back"]


def test_a_policy_of_one_task_can_be_extended_twice(tmp_path):
    """Normalisers of one dataset become several."""
    old = make(("go along",))
    batch = windows(old, [0], rows=6)
    before = sampled(fit(old, batch, 3), batch)
    once = fit(extended(old, reach=5.0), windows(extended(old), [1], rows=6, reach=5.0), 3)
    middle = windows(once, [1], rows=6, reach=5.0)
    after_one = sampled(once, middle)
    twice = extended(once, "turn round", new_experts=3)
    fit(twice, windows(twice, [2], rows=6), 3)
    assert twice.config.router_experts == (4, 6, 9) and twice.spec.domains == 3 and twice.task_offset == 2
    assert torch.equal(sampled(twice, batch), before) and torch.equal(sampled(twice, middle), after_one)


def changed(policy, batch):
    before = {name: p.detach().clone() for name, p in policy.named_parameters()}
    fit(policy, batch, 2)
    return {name for name, p in policy.named_parameters() if not torch.equal(p, before[name])}


def test_only_new_experts_and_the_new_router_are_trained():
    policy = extended(make())
    moved = changed(policy, windows(policy, [2]))
    for layer in range(2):
        names = {n.removeprefix(f"denoiser.blocks.{layer}.experts.") for n in moved if f"blocks.{layer}." in n}
        assert {".".join(n.split(".")[:2]) for n in names} == {"experts.4", "experts.5", "routers.2"}
    assert moved == {n for n, p in policy.named_parameters() if p.requires_grad}


def test_transfer_trains_the_new_router_only():
    policy = extended(make(), new_experts=0)
    moved = changed(policy, windows(policy, [2]))
    assert moved and all(".experts.routers.2." in name for name in moved)


def test_new_routers_can_choose_old_experts_and_old_routers_no_new_ones():
    policy = extended(make())
    assert policy.config.router_experts == (4, 4, 6)
    batch = windows(policy, [0, 1, 2])
    seen = policy.noised(batch, policy.draw(32, step_generator(0, 0)))
    _, routed = policy.denoiser.denoise(seen.x, policy.denoiser.embed(seen.level), seen.cond)
    assert [p.shape[1] for p in routed[0]] == [4, 4, 6]
    chosen = routed[0][2].topk(2).indices
    assert (chosen[:, 0] == 4).all()  # so that there is something to learn with, whatever the seed
    assert set(chosen[:, 1].tolist()) & {0, 1, 2, 3}


def test_learns_the_opposite_of_what_it_did_in_its_own_units():
    old = make(("go along",))
    fit(old, windows(old, [0]), 60)
    policy = extended(old, reach=100.0)
    batch = windows(policy, [1], factor=-1.0, reach=100.0)
    fit(policy, batch, 150)
    error = (sampled(policy, batch) - batch["action"]).abs().mean()
    assert error < 20  # of a range of 200


def test_goes_on_with_the_running_usage_and_warms_up_the_new_task_only():
    old = make()
    old.denoiser.usage.batches.fill_(500)
    old.denoiser.usage.running.fill_(0.25)
    policy = extended(old)
    assert policy.denoiser.usage.batches.tolist() == [500, 500, 0]
    assert policy.denoiser.usage.running[:, :2].sum((1, 2)).tolist() == pytest.approx([2, 2])
    fit(policy, windows(policy, [2]), 2)
    assert policy.denoiser.usage.batches.tolist() == [500, 500, 2]


@pytest.mark.parametrize(
    ("new", "message"),
    [
        (spec_of(("go along",)), "already knows 'go along'"),
        (spec_of(()), "set task.multitask=true"),
        (spec_of(("x",), horizon=8), "horizon: found 8 in the new task, wanted 4"),
        (spec_of(("x",), images=True), r"does not know the new data's keys \['observation.image.top'\]"),
        (spec_of(("x",), goals=(STATE,)), "differ in their goals"),
    ],
)
def test_data_that_does_not_fit_is_refused(new, message):
    with pytest.raises(UserError, match=message):
        extend_policy(make(), new, normalizer_of(new), 1)


def test_policies_without_routers_or_tasks_are_refused():
    new = spec_of(("go back",))
    unet = make(name="diffusion_unet", config={"down_dims": [16], "step_embed_dim": 16})
    with pytest.raises(UserError, match="found DiffusionUnet"):
        extend_policy(unet, new, normalizer_of(new), 1)
    with pytest.raises(UserError, match="task.multitask=true"):
        extend_policy(make(()), new, normalizer_of(new), 1)


OPTIONS = [
    "task=push_puck",
    "task.environment=",
    "task.horizon=8",
    "task.n_action_steps=4",
    "data.val_ratio=0.2",
    "train.batch_size=16",
    "train.threads=1",
    "train.optim.warmup_steps=2",
    "train.tensorboard=false",
    "train.validate_every=4",
    "train.validation_windows=24",
    "train.checkpoint_every=4",
    "train.steps=4",
]
SMALL = ["policy=sdp_small", "policy.config.dim=16", "policy.config.layers=1", "policy.config.experts=3"]


def test_command_line_extends_a_bundle_and_resumes(circles, tmp_path, capsys):
    first, second = tmp_path / "first", tmp_path / "second"
    data = f"data.mixture=[{{path: {circles}, instruction: run round}}]"
    assert main(["train", *OPTIONS, *SMALL, data, "task.multitask=true", f"out={first}"]) == 0
    named = ["instruction=run again", f"data.path={circles}", f"bundle={first / 'bundles/last'}", f"out={second}"]
    assert main(["extend", *OPTIONS, *named, "new_experts=1"]) == 0
    assert main(["extend", "--resume", str(second), "train.steps=6"]) == 0
    manifest = yaml.safe_load((second / "bundles/last/bundle.yaml").read_text())
    assert manifest["provenance"]["step"] == 6
    assert manifest["architecture"]["config"]["router_experts"] == [3, 4]
    old, new = load_bundle(first / "bundles/last")[0], load_bundle(second / "bundles/last")[0]
    state = np.random.default_rng(0).uniform(-1, 1, (3, 2, 2))
    chunks = [
        policy.act(
            {"observation.state": state, "instruction": ["run round"] * 3},
            [torch.Generator().manual_seed(i) for i in range(3)],
        )
        for policy in (old, new)
    ]
    np.testing.assert_array_equal(*chunks)
    assert json.loads((second / "config.json").read_text())["new_experts"] == 1
    assert main(["extend", *OPTIONS, *named[1:-1], "instruction=run round", f"out={tmp_path / 'third'}"]) == 2
    assert "already knows 'run round'" in capsys.readouterr().err
