"""What the environment asks for reaches the policy, row by row, wherever the environment is simulated."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, field, replace

import numpy as np
import pytest
import torch

from robopolicy.cli.main import main
from robopolicy.data.normalize import Normalizer, fit_normalizer
from robopolicy.errors import UserError
from robopolicy.evaluation import pusht
from robopolicy.evaluation.environments import PUSHT, environment
from robopolicy.evaluation.episode import INSTRUCTION_BYTES, read_instructions, write_instruction
from robopolicy.evaluation.evaluate import evaluate
from robopolicy.evaluation.launch import ray_cluster
from robopolicy.evaluation.launch.ray_cluster import Job, Stored, play_shard
from robopolicy.evaluation.rollout import rollout
from robopolicy.evaluation.simulators import simulators
from robopolicy.evaluation.tasks import TaskPlace, task_names, task_places
from robopolicy.policies.bundle import load_bundle, save_bundle
from robopolicy.policies.registry import build_policy
from robopolicy.spec import PolicySpec, TaskSpec

from . import sliding, talking
from .conftest import same
from .test_simulators import kill

SMALL = {"down_dims": [16, 32], "step_embed_dim": 16, "sampler": {"name": "ddim", "steps": 2}}


@dataclass
class Obedient:
    """Does what its text says, and nothing else tells it what that is."""

    instruction: str | None = None
    known: tuple[str, ...] = talking.TEXTS
    seen: list[tuple[int, str]] = field(default_factory=list)

    @property
    def spec(self) -> PolicySpec:
        tasks = tuple(TaskSpec(text) for text in self.known)
        return PolicySpec((talking.STATE,), talking.ACTION, fps=10, n_action_steps=2, tasks=tasks)

    def act(self, observations: Mapping[str, np.ndarray], generators: Sequence[torch.Generator]) -> np.ndarray:
        seeds = observations["observation.state"][:, -1, 0].astype(int).tolist()
        texts = observations.get("instruction", [self.instruction] * len(seeds))
        self.seen += zip(seeds, map(str, texts), strict=True)
        return np.array([[[talking.WANTED.get(str(text), 9.0)]] * 2 for text in texts])


@pytest.mark.parametrize("workers", [0, 1])
def test_each_row_gets_its_own_text(workers):
    """Episodes of different lengths, so that slots are reused at different times."""
    policy = Obedient()
    results = rollout(policy, talking.talking(), range(9), batch_size=4, workers=workers, progress=False)
    assert all(result.success for result in results)
    assert {result.instruction for result in results} == set(talking.TEXTS)
    assert all(text == talking.text_of(seed) for seed, text in policy.seen)


def test_workers_change_nothing_for_a_network_in_a_simulator():
    pytest.importorskip("robopolicy_sim", reason="needs the simulator: pip install 'robopolicy[sim]'")
    world = replace(environment("choose_object"), max_steps=6)
    torch.manual_seed(0)
    tasks = tuple(TaskSpec(f"lift the {colour} block") for colour in ("red", "green"))
    state = world.keys["observation.environment_state"]
    spec = PolicySpec((state,), world.action, fps=world.fps, horizon=8, n_action_steps=3, tasks=tasks)
    parts = {k.key: fit_normalizer(np.array([[-1.0] * k.dim, [1.0] * k.dim]), "minmax") for k in (state, spec.action)}
    policy = build_policy("diffusion_unet", SMALL, spec, Normalizer.from_parts(parts)).eval()
    seen = []

    def act(observations, generators, act=policy.act):
        wanted = observations[state.key][:, -1, -2:].argmax(axis=1)  # the environment's one-hot: red, green
        seen.extend(zip(wanted, observations["instruction"], strict=True))
        return act(observations, generators)

    policy.act = act
    here = rollout(policy, world, range(4), batch_size=3, progress=False)
    there = rollout(policy, world, range(4), batch_size=3, workers=1, progress=False)
    assert same(here, there)
    assert {text for _, text in seen} == {task.instruction for task in tasks}
    assert all(text == tasks[wanted].instruction for wanted, text in seen)


def test_texts_survive_the_death_of_their_worker():
    with closing(simulators(talking.talking(), Obedient().spec, slots=2, workers=1)) as slots:
        slots.start({0: 3, 1: 5})
        kill("sim-0")
        slots.histories["instruction"][:] = 0
        slots.start({1: 4})
        assert read_instructions(slots.histories["instruction"]) == [talking.text_of(3), talking.text_of(4)]


def test_a_text_of_any_letters_fits_if_its_bytes_do():
    rows = np.zeros((3, INSTRUCTION_BYTES), np.uint8)
    write_instruction(talking.longest(0), rows[0])
    write_instruction("a 🤖", rows[1])
    assert read_instructions(rows) == [talking.longest(0), "a 🤖", ""]
    write_instruction("b", rows[0])
    assert read_instructions(rows)[0] == "b", "nothing of the text before is left"


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize(
    ("say", "words"),
    [
        (talking.too_long, "may have 256 bytes, the environment's has 258"),
        (talking.silent, "does not say what to do, and the policy must be told: instruction='…', of 'go left', 'go"),
    ],
)
def test_what_cannot_be_passed_on(say, words, workers):
    with pytest.raises(UserError, match=words):
        rollout(Obedient(), talking.talking(say), [1], workers=workers, progress=False)


def test_the_policys_own_instruction_holds_in_all_episodes_and_is_part_of_the_protocol():
    policy = Obedient(instruction="go right")
    result = evaluate(policy, talking.talking(talking.too_long), episodes=2, progress=False)
    assert {text for _, text in policy.seen} == {"go right"}
    assert result.protocol.policy["instruction"] == "go right"
    told = evaluate(Obedient(), talking.talking(), episodes=2, progress=False)
    assert "instruction" not in told.protocol.policy
    assert evaluate(Obedient(), talking.talking(), episodes=2, progress=False).protocol.hash == told.protocol.hash


# ------------------------------------------------------------------------------------------------- the command line


@pytest.fixture
def slide():
    pytest.importorskip("robopolicy_sim", reason="needs the simulator: pip install 'robopolicy[sim]'")
    with sliding.registered():
        yield


@pytest.fixture
def make_bundle(slide, tmp_path):
    """An untrained policy for the cart, which is told ``go left`` or ``go right`` by its environment."""

    def make(*texts, **task):
        torch.manual_seed(0)
        spec = PolicySpec(
            (sliding.STATE, sliding.ENVIRONMENT_STATE),
            sliding.ACTION,
            fps=10,
            horizon=8,
            n_action_steps=4,
            tasks=tuple(TaskSpec(text) for text in texts),
        )
        parts = {k.key: fit_normalizer(np.array([[-1.0], [1.0]]), "minmax") for k in (*spec.states, spec.action)}
        policy = build_policy("diffusion_unet", SMALL, spec, Normalizer.from_parts(parts))
        return save_bundle(policy, tmp_path / "policy", task=task)

    return make


def run(bundle, out, *overrides) -> int:
    return main(["eval", f"bundle={bundle}", "episodes=4", "videos=0", f"out={out}", *overrides])


def policy_of(folder) -> dict:
    return json.loads((folder / "protocol.json").read_text())["policy"]


ROUGH = {"variation": {"friction": 0.5}}
SEVERAL = [
    {"environment": "slide", "environment_options": {}, "instruction": "go left"},
    {"environment": "slide", "environment_options": ROUGH, "instruction": "Stop, then go right!"},
    {"environment": "slide", "environment_options": ROUGH, "instruction": ""},
]
TEXTS = ("go left", "go right", "Stop, then go right!")


def test_eval_passes_on_what_the_environment_says_or_the_user(make_bundle, tmp_path, capsys):
    bundle = make_bundle(*TEXTS, environment="slide")
    assert run(bundle, tmp_path / "told") == 0
    assert "instruction" not in policy_of(tmp_path / "told")
    assert run(bundle, tmp_path / "asked", "instruction=Stop, then go right!") == 0
    assert policy_of(tmp_path / "asked")["instruction"] == "Stop, then go right!"
    assert run(bundle, tmp_path / "quoted", "instruction='go left'") == 0
    assert policy_of(tmp_path / "quoted")["instruction"] == "go left"
    assert run(bundle, tmp_path / "wrong", "instruction=go lefd") == 2
    assert "was not trained for 'go lefd'. Did you mean 'go left'?" in capsys.readouterr().err
    assert not (tmp_path / "wrong").exists()


def test_a_policy_that_is_not_told_what_to_do_refuses_an_instruction(make_bundle, tmp_path, capsys):
    assert run(make_bundle(environment="slide"), tmp_path / "out", "instruction=go left") == 2
    assert "is not told what to do; leave the instruction 'go left' out" in capsys.readouterr().err


def test_an_environment_asks_for_what_the_policy_does_not_know(make_bundle, tmp_path, capsys):
    assert run(make_bundle("go up", environment="slide"), tmp_path / "out") == 2
    assert "was not trained for 'go " in capsys.readouterr().err


def test_several_tasks_are_judged_each_in_its_place(make_bundle, tmp_path, capsys):
    bundle, out = make_bundle(*TEXTS, environments=SEVERAL), tmp_path / "tasks"
    assert run(bundle, out) == 0
    assert [policy_of(out / name).get("instruction", "") for name in ("go-left", "stop-then-go-right", "slide")] == [
        place["instruction"] for place in SEVERAL
    ]
    summary = json.loads((out / "summary.json").read_text())
    rates = [task["success_rate"]["value"] for task in summary["tasks"].values()]
    assert summary["mean_success_rate"]["value"] == pytest.approx(np.mean(rates))
    printed = capsys.readouterr().out
    assert all(f"\n{name} " in printed for name in ("go-left", "stop-then-go-right", "slide", "mean"))
    for name in summary["tasks"]:
        assert (out / name / "report.html").exists()
    assert run(bundle, tmp_path / "one", "environment=slide") == 0
    assert (tmp_path / "one" / "report.html").exists()
    assert run(bundle, tmp_path / "same", "instruction=Stop, then go right!") == 0
    same_task = json.loads((tmp_path / "same" / "protocol.json").read_text())
    assert same_task == json.loads((out / "stop-then-go-right" / "protocol.json").read_text())


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("suite=variant_aggregation", "suite=… is for one environment, the policy was trained for slide"),
        ("environment_options={variation: {friction: 0}}", "environment_options=… is for one environment"),
        ("goal=a.zarr#3", "goal=… is for one environment"),
        ("instruction=go right", "none with the instruction 'go right'; name one with environment=…."),
    ],
)
def test_what_needs_one_environment(override, words, make_bundle, tmp_path, capsys):
    assert run(make_bundle(*TEXTS, environments=SEVERAL), tmp_path / "out", override) == 2
    assert words in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_task_that_the_policy_does_not_know_ends_it_before_any_episode(make_bundle, tmp_path, capsys):
    assert run(make_bundle("go left", environments=SEVERAL), tmp_path / "out") == 2
    assert "was not trained for 'Stop, then go right!'" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_the_only_task_has_its_options_unless_others_are_given(make_bundle, tmp_path):
    bundle = make_bundle(*TEXTS, environments=SEVERAL[1:2])
    assert run(bundle, tmp_path / "usual") == 0
    assert policy_of(tmp_path / "usual")["instruction"] == "Stop, then go right!"
    assert run(bundle, tmp_path / "other", "environment_options={variation: {friction: 0}}") == 0
    found = [
        json.loads((tmp_path / name / "protocol.json").read_text())["task"]["options"] for name in ("usual", "other")
    ]
    assert found == [ROUGH, {"variation": {"friction": 0}}]


def test_folders_of_tasks_have_different_names_that_any_disk_takes():
    places = [
        TaskPlace("lab/slide", {}, text) for text in ("Öffne: a/b!", "ffne a b 2", "ffne-a-b", "拿", "", "x" * 300)
    ]
    names = task_names([*places, places[0]])
    assert len(set(names)) == len(names) and max(map(len, names)) <= 64
    assert names[0] == "ffne-a-b" and names[4] == "slide" and names[2] == "ffne-a-b-3"
    assert all(name.replace("-", "").isascii() and name.replace("-", "").isalnum() for name in names)


@pytest.mark.parametrize(
    ("task", "words"),
    [
        ({"environments": {"environment": "slide"}}, "expected a list"),
        ({"environments": ["slide"]}, r"task.environments\[0\]: expected a mapping"),
        ({"environments": [{"name": "slide"}]}, r"task.environments\[0\]: unknown entry 'name'"),
    ],
)
def test_a_bundle_with_damaged_environments(task, words):
    with pytest.raises(UserError, match=words):
        task_places(task)


# ------------------------------------------------------------------------------------------------------ other machines


def test_instruction_and_goal_travel_to_other_machines(tmp_path, monkeypatch):
    """Without Ray: what a worker does with a job as text and a bundle as files."""
    torch.manual_seed(0)
    spec = PolicySpec(
        (pusht.STATE,), pusht.ACTION, fps=10, goals=(pusht.STATE,), tasks=(TaskSpec("push"), TaskSpec("pull"))
    )
    parts = {
        k.key: fit_normalizer(np.array([[0.0] * k.dim, [512.0] * k.dim]), "minmax") for k in (*spec.states, spec.action)
    }
    policy = build_policy("diffusion_unet", SMALL, spec, Normalizer.from_parts(parts)).eval()
    policy.instruction = "pull"
    policy.goal = {pusht.STATE.key: np.linspace(0.1, 300.7, 5, dtype=np.float32)}
    world = replace(PUSHT, max_steps=16)
    job = Job(
        world.name, {}, world.max_steps, 2, 1, "cpu", asdict(policy.sampler), ray_cluster._versions(world),
        **ray_cluster.told(policy),
    )  # fmt: skip
    save_bundle(policy, tmp_path / "bundle")
    monkeypatch.setattr(ray_cluster, "_loaded", lambda bundle, device: load_bundle(tmp_path / "bundle", device)[0])
    played = play_shard(json.dumps(asdict(job)), Stored("", None), {}, [1, 2])
    assert same(rollout(policy, world, [1, 2], batch_size=2, threads=1, progress=False), played.results)
    policy.instruction = "push"
    other = rollout(policy, world, [1, 2], batch_size=2, threads=1, progress=False)
    assert not same(other, played.results), "or equality means little"
