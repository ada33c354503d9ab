"""Several datasets and tasks in one run: what the spec says, what is normalised how, what is saved and resumed."""

import dataclasses
import itertools

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from robopolicy.cli.compose import compose_config
from robopolicy.cli.train import evaluation_of, start
from robopolicy.configuration import dataclass_from
from robopolicy.data.schema import ArraySpec
from robopolicy.data.store import EpisodeStore
from robopolicy.errors import UserError
from robopolicy.policies.bundle import load_bundle
from robopolicy.policies.registry import build_policy
from robopolicy.spec import TaskSpec
from robopolicy.training.dataset import prepare_data
from robopolicy.training.distributed import Processes
from robopolicy.training.loop import RunConfig, validate
from robopolicy.training.step import LossModule, build_optimizer, step_generator, train_step
from tests.training.conftest import OVERRIDES, rows

FORWARD, BACKWARD = "run forward", "run backward"


def write_circles(path, scale=1.0, direction=1, episodes=5, fps=10.0, unit="", tasks=(), width=2, **attributes):
    """A point that runs round circles of radius ``scale``; the action is where it goes next."""
    arrays = [
        ArraySpec("observation.state", (2,), "float32", "state", unit=unit),
        ArraySpec("action", (width,), "float32", "action"),
    ]
    rng = np.random.default_rng(0)
    with EpisodeStore.create(path, arrays, fps=fps, attributes=attributes) as store:
        for i in range(episodes):
            phase = rng.uniform(0, 6) + 0.2 * direction * np.arange(31)
            points = scale * np.stack([np.cos(phase), np.sin(phase)], axis=1).astype(np.float32)
            action = np.concatenate([points[1:]] * (width // 2), axis=1)
            store.append(
                {"observation.state": points[:-1], "action": action}, task=tasks[i % len(tasks)] if tasks else ""
            )
    return path


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """The same motion in metres and, backward, in millimetres."""
    folder = tmp_path_factory.mktemp("pair")
    metres = write_circles(folder / "metres.zarr", tasks=[FORWARD])
    return metres, write_circles(folder / "millimetres.zarr", scale=1000, direction=-1, episodes=3)


def mixed(*paths, **weights):
    return f"data.mixture=[{', '.join(f'{{path: {p}, weight: {weights.get(p.stem, 1)}}}' for p in paths)}]"


def composed(out, *overrides):
    plain = compose_config("train", [*OVERRIDES, f"out={out}", *overrides])
    return dataclass_from(RunConfig, {k: plain[k] for k in ("out", "task", "data", "policy", "train")}, ""), plain


def prepared(tmp_path, *overrides, **processes):
    config, _ = composed(tmp_path / "run", *overrides)
    return prepare_data(config.task, config.data, config.train, Processes(**processes))


def test_each_dataset_becomes_a_task_with_normalisers_of_its_own(pair, tmp_path):
    data = prepared(tmp_path, mixed(*pair))
    assert data.spec.tasks == (TaskSpec(FORWARD, 0), TaskSpec("millimetres", 1))
    batch = next(data.training.batches())
    domain = batch["task"]
    for key in ("observation.state", "action"):
        seen = data.normalizer[key].normalize(batch[key], domain)
        assert seen.abs().max() <= 1 + 1e-5
        assert all(seen[domain == i].abs().max() > 0.8 for i in range(2))
        torch.testing.assert_close(data.normalizer[key].unnormalize(seen, domain), batch[key], rtol=1e-5, atol=1e-4)
    size = batch["action"].abs().amax(dim=(1, 2))
    assert torch.equal(size > 10, domain == 1)


def test_normalised_together_they_share_one_range(pair, tmp_path):
    data = prepared(tmp_path, mixed(*pair), "data.normalize=together")
    assert [task.domain for task in data.spec.tasks] == [0, 0]
    assert data.normalizer["action"].high.shape == (2,) and data.normalizer["action"].high.max() > 900


def test_one_dataset_stays_one_task_unless_asked(pair, tmp_path):
    assert prepared(tmp_path, f"data.path={pair[0]}").spec.tasks == ()
    asked = prepared(tmp_path, f"data.path={pair[0]}", "task.multitask=true")
    assert asked.spec.tasks == (TaskSpec(FORWARD),)
    assert set(next(asked.training.batches())["task"].tolist()) == {0}


def test_tasks_of_one_dataset_are_told_apart_by_its_instructions(tmp_path):
    path = write_circles(tmp_path / "both.zarr", tasks=[FORWARD, BACKWARD], episodes=6)
    data = prepared(tmp_path, f"data.path={path}", "task.multitask=true", "data.val_ratio=0")
    assert {task.instruction for task in data.spec.tasks} == {FORWARD, BACKWARD} and data.spec.domains == 1
    assert set(next(data.training.batches())["task"].tolist()) == {0, 1}


def test_validation_holds_every_dataset_and_no_untrained_task(pair, tmp_path):
    data = prepared(tmp_path, mixed(*pair), "train.validation_windows=30")
    tasks = torch.cat([batch["task"] for batch in data.validation.batches()])
    assert tasks.tolist() == [0] * 15 + [1] * 15
    rare = write_circles(tmp_path / "rare.zarr", tasks=[FORWARD, BACKWARD, "stop", "turn"], episodes=4)
    data = prepared(tmp_path, f"data.path={rare}", "task.multitask=true", "data.val_ratio=0.3")
    assert len(data.spec.tasks) == 3 and data.validation is None


def test_goals_are_observations_of_the_task(pair, tmp_path):
    data = prepared(tmp_path, f"data.path={pair[0]}", "task.goals=[observation.state]", "task.goal_horizon=5")
    assert [key.key for key in data.spec.goals] == ["observation.state"] and data.spec.goal_horizon == 5
    assert next(data.training.batches())["goal.observation.state"].shape == (16, 2)


def test_one_policy_learns_datasets_in_different_units(pair, tmp_path):
    """Forward in metres, backward in millimetres; each task's chunks come out in its own units."""
    changes = ["train.batch_size=32", "policy.config.process.prediction=sample", "policy.config.sampler.steps=8"]
    config, _ = composed(tmp_path, mixed(*pair), *changes)
    data = prepare_data(config.task, config.data, config.train, Processes())
    torch.manual_seed(0)
    policy = build_policy(config.policy["name"], config.policy["config"], data.spec, data.normalizer, "")
    optimizer = build_optimizer(policy, dataclasses.replace(config.train.optim, lr=3e-3))
    for step, batch in enumerate(itertools.islice(data.training.batches(), 120)):
        draws = policy.draw(32, step_generator(0, step))
        train_step(LossModule(policy), optimizer, batch, draws, lr=3e-3 * (1 - step / 120), clip_norm=1.0)
    policy.eval()
    for scale, direction, instruction in ((1.0, 1, FORWARD), (1000.0, -1, "millimetres")):
        phase = np.array([[0.3], [2.0], [4.0]]) + 0.2 * direction * np.arange(6)
        points = (scale * np.stack([np.cos(phase), np.sin(phase)], axis=2)).astype(np.float32)
        policy.instruction = instruction
        chunk = policy.act({"observation.state": points[:, :2]}, [torch.Generator().manual_seed(i) for i in range(3)])
        assert np.abs(chunk - points[:, 2:6]).mean() < 0.15 * scale
    assert validate(policy, data.validation, config.train)["val/loss"] < 0.1


def weights(run):
    folder = run / "checkpoints" / (run / "checkpoints" / "last").read_text()
    return {f"{file.stem}.{k}": v for file in folder.glob("*.safetensors") for k, v in load_file(file).items()}


def test_a_mixed_run_resumes_bit_for_bit_wherever_its_datasets_lie(pair, tmp_path):
    changes = ["task.goals=[observation.state]", "train.checkpoint_every=2", "train.optim.warmup_steps=50"]

    def run(name, steps, *paths, resume=False, **shares):
        start(composed(tmp_path / name, mixed(*paths, **shares), *changes, f"train.steps={steps}")[1], resume)

    run("whole", 4, *pair, millimetres=2)
    run("halves", 2, *pair, millimetres=2)
    moved = [path.rename(tmp_path / path.name) for path in pair]
    try:
        run("halves", 4, *moved, resume=True, millimetres=2)
        with pytest.raises(UserError, match="cannot be resumed: dataset was"):
            run("halves", 5, *moved, resume=True)
    finally:
        for here, there in zip(moved, pair, strict=True):
            here.rename(there)
    whole, halves = weights(tmp_path / "whole"), weights(tmp_path / "halves")
    assert [name for name in whole if not torch.equal(whole[name], halves[name])] == []
    assert "val/loss" in rows(tmp_path / "halves")[-1]
    policy, manifest = load_bundle(tmp_path / "halves" / "bundles" / "last")
    assert policy.spec.tasks == (TaskSpec(FORWARD, 0), TaskSpec("millimetres", 1))
    assert policy.normalizer["action"].high.shape == (2, 2)
    assert manifest["task"] == {"name": "push_puck", "environment": "", "environment_options": {}}


def test_a_policy_is_judged_in_the_environment_of_each_dataset(tmp_path, monkeypatch):
    pytest.importorskip("robopolicy_sim")
    worlds = ({"env_id": "robopolicy_sim/PushPuck-v0"}, {"env_id": "robopolicy_sim/PushPuck-v0"})
    paths = [
        write_pucks(tmp_path / f"{name}.zarr", name, attributes)
        for name, attributes in zip(("left", "right"), worlds, strict=True)
    ]
    changes = [f"data.mixture=[{{path: {paths[0]}}}, {{path: {paths[1]}, instruction: Push right}}]", "train.steps=1"]
    config, plain = composed(tmp_path / "run", *changes, "task.environment=dataset")
    asked = []

    def judged(policy, world, **settings):
        asked.append((policy.instruction, world.name))
        values = {"mean_score": len(asked) / 10, "success_rate": len(asked) / 4}
        return type("Result", (), {"metric": lambda self, name: type("Metric", (), {"value": values[name]})})()

    monkeypatch.setattr("robopolicy.evaluation.evaluate.evaluate", judged)
    judge = evaluation_of(config, plain)
    policy = type("Policy", (), {"instruction": None})()
    assert judge(policy, 1) == pytest.approx(
        {
            "eval/score": 0.15,
            "eval/success_rate": 0.375,
            "eval/push-left/success_rate": 0.25,
            "eval/push-right/success_rate": 0.5,
        }
    )
    assert asked == [("push left", "push_puck"), ("Push right", "push_puck")] and policy.instruction is None
    data = prepare_data(config.task, config.data, config.train, Processes())
    entry = {"environment": "robopolicy_sim/PushPuck-v0", "environment_options": {}}
    each = [entry | {"instruction": text} for text in ("push left", "Push right")]
    assert data.task_entry() == entry | {"environments": each}
    with pytest.raises(UserError, match="no environment gives a goal"):
        evaluation_of(*composed(tmp_path, *changes, "task.environment=dataset", "task.goals=[observation.state]"))


def write_pucks(path, side, attributes):
    """Random numbers in the shapes of the puck-pushing scene."""
    from robopolicy.evaluation.environments import environment

    world = environment("push_puck")
    shapes = {"observation.state": world.keys["observation.state"], "action": world.action}
    arrays = [ArraySpec(name, key.shape, "float32", key.role, unit=key.unit) for name, key in shapes.items()]
    rng = np.random.default_rng(0)
    with EpisodeStore.create(path, arrays, fps=world.fps, attributes=attributes) as store:
        values = {name: rng.normal(size=(20, *key.shape)).astype(np.float32) for name, key in shapes.items()}
        store.append(values, task=f"push {side}")
    return path


def test_datasets_that_differ_are_named(pair, tmp_path):
    wide = write_circles(tmp_path / "wide.zarr", width=4)
    fast = write_circles(tmp_path / "fast.zarr", fps=20)
    units = [write_circles(tmp_path / f"{unit}.zarr", unit=unit) for unit in ("m", "mm")]
    with pytest.raises(UserError, match=r"wide.zarr and .*metres.zarr(.|\n)*action: found shape \(4,\), wanted \(2,\)"):
        prepared(tmp_path, mixed(pair[0], wide))
    with pytest.raises(UserError, match=r"fast.zarr: found 20 steps/s, wanted 10 as .*metres.zarr has"):
        prepared(tmp_path, mixed(pair[0], fast))
    with pytest.raises(UserError, match="observation.state: found unit 'mm', wanted 'm'; convert"):
        prepared(tmp_path, mixed(*units))


def test_one_instruction_cannot_have_two_ranges(pair, tmp_path):
    other = write_circles(tmp_path / "other.zarr", tasks=[FORWARD])
    with pytest.raises(UserError, match=f"'{FORWARD}' is an instruction in .*metres.zarr and in .*other.zarr"):
        prepared(tmp_path, mixed(pair[0], other))
    assert len(prepared(tmp_path, mixed(pair[0], other), "data.normalize=together").spec.tasks) == 1
    renamed = f"data.mixture=[{{path: {pair[0]}}}, {{path: {other}, instruction: {BACKWARD}}}]"
    assert prepared(tmp_path, renamed).spec.tasks == (TaskSpec(FORWARD, 0), TaskSpec(BACKWARD, 1))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["data.path=x", "data.mixture=[{path: y}]"], r"data.path=… or data.mixture=\[…\], found both"),
        ([], r"data.path=… or data.mixture=\[…\], found neither"),
        (["data.mixture=[{pth: y}]"], "unknown entry 'pth'. Did you mean 'path'"),
        (["data.mixture=[{path: a}, {path: b, weight: x}]"], "weight: expected float, found 'x'"),
        (["data.path=x", "data.normalize=apart"], "must be one of 'per_dataset', 'together'"),
        (["data.path=x", "task.goals=[observation.stat]"], "Did you mean 'observation.state'"),
        (["data.path=x", "task.goal_horizon=5"], "task.goal_horizon needs goals"),
    ],
)
def test_a_mistake_in_the_configuration(changes, message, tmp_path):
    with pytest.raises(UserError, match=message):
        composed(tmp_path, *changes)


def test_impossible_combinations(pair, tmp_path):
    with pytest.raises(UserError, match="task.multitask=false: a policy that is not told.*data.normalize=together"):
        prepared(tmp_path, mixed(*pair), "task.multitask=false")
    together = prepared(tmp_path, mixed(*pair), "task.multitask=false", "data.normalize=together")
    assert together.spec.tasks == () and "task" not in next(together.training.batches())
    with pytest.raises(UserError, match="no episode of .*millimetres.zarr has an instruction"):
        prepared(tmp_path, f"data.path={pair[1]}", "task.multitask=true")
