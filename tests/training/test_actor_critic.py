"""Offline and online training end to end on small problems whose answer is known."""

from __future__ import annotations

from dataclasses import asdict

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from robopolicy.cli.compose import compose_config
from robopolicy.cli.train import SECTIONS
from robopolicy.cli.train_rl import start
from robopolicy.configuration import dataclass_from
from robopolicy.data.record import Episode
from robopolicy.data.schema import ArraySpec
from robopolicy.data.store import EpisodeStore
from robopolicy.data.transitions import Transitions
from robopolicy.errors import UserError
from robopolicy.policies.bundle import load_bundle
from robopolicy.training.actor_critic import (
    ActorCriticConfig,
    ActorCriticRun,
    actor_loss,
    critic_loss,
    train_actor_critic,
)
from robopolicy.training.distributed import join_processes
from robopolicy.training.loop import RunConfig
from robopolicy.training.step import step_generator
from tests.training.conftest import rows

ARRAYS = [
    ArraySpec("observation.state", (1,), "float32", "state"),
    ArraySpec("action", (1,), "float32", "action"),
    ArraySpec("reward", (), "float32", "reward"),
]
TINY = [
    "task=push_puck",
    "task.environment=",
    "task.n_obs_steps=1",
    "task.horizon=1",
    "task.n_action_steps=1",
    "policy.config.hidden_dims=[64,64]",
    "policy.config.candidates=1",
    "train.tensorboard=false",
    "train.batch_size=64",
    "train.optim.lr=3e-3",
    "train.ema.max_decay=0.98",
    "train.log_every=4",
]


@pytest.fixture
def bandit(tmp_path):
    """One step: 70 % of the data lie about -0.5, 30 % about 0.5, which is best: the reward is 1 - (a - 0.5)^2."""
    path = tmp_path / "bandit.zarr"
    rng = np.random.default_rng(0)
    actions = np.where(np.arange(30) < 9, 0.5, -0.5) + rng.uniform(-0.2, 0.2, 30)
    with EpisodeStore.create(path, ARRAYS, fps=10) as store:
        state = rng.uniform(-1, 1, (30, 1))  # means nothing
        for i in rng.permutation(30):
            values = {
                "observation.state": state[i],
                "action": actions[i : i + 1],
                "reward": 1 - (actions[i] - 0.5) ** 2,
            }
            store.append({key: np.asarray([value], np.float32) for key, value in values.items()}, success=True)
    return path


def configured(path, out, *overrides):
    plain = compose_config("train_rl", [*TINY, f"data.path={path}", f"out={out}", *overrides])
    config = dataclass_from(RunConfig, {name: plain[name] for name in SECTIONS}, "")
    return config, dataclass_from(ActorCriticConfig, plain["rl"], "rl"), plain


def actions_of(bundle, count=400, **config):
    policy, _ = load_bundle(bundle)
    for name, value in config.items():
        object.__setattr__(policy.config, name, value)
    states = np.random.default_rng(0).uniform(-1, 1, (count, 1, 1))
    chunk = policy.act({"observation.state": states}, [torch.Generator().manual_seed(i) for i in range(count)])
    return chunk[:, 0, 0]


def test_the_actor_moves_to_the_better_mode_only_if_it_is_asked_to(bandit, tmp_path):
    overrides = ["rl.reward=dataset", "train.steps=300", "train.log_every=300"]
    greedy = actions_of(train_actor_critic(*configured(bandit, tmp_path / "greedy", *overrides, "rl.eta=40")))
    assert (greedy > 0).mean() > 0.9
    bundle = train_actor_critic(*configured(bandit, tmp_path / "cloned", *overrides, "rl.eta=0"))
    cloned = actions_of(bundle)
    assert 0.2 < (cloned > 0).mean() < 0.4
    policy, _ = load_bundle(bundle)
    state, action = torch.zeros(5, 1, 1), torch.tensor([-0.6, -0.5, -0.4, 0.4, 0.6]).view(-1, 1, 1)
    context = policy.encoder(policy.normalized({"observation.state": state}))
    values = policy.values(context, policy.normalizer["action"].normalize(action))
    torch.testing.assert_close(values, (1 - (action.flatten() - 0.5) ** 2).expand(2, 5), atol=0.15, rtol=0)
    chosen = actions_of(bundle, candidates=20, temperature=0.0)  # its critics know better
    assert np.abs(chosen - 0.5).mean() < 0.2 < np.abs(cloned - 0.5).mean()


@pytest.fixture
def walk(tmp_path):
    """Four random walks of 6 to 9 steps, half of them successes."""
    path = tmp_path / "walk.zarr"
    with EpisodeStore.create(path, ARRAYS, fps=10) as store:
        for episode in played([0, 1, 2, 3]):
            store.append(episode.arrays, success=episode.success, seed=episode.seed)
    return path


def played(seeds):
    episodes = []
    for seed in seeds:
        values = np.random.default_rng(seed).uniform(-1, 1, (6 + seed % 4, 2)).astype(np.float32)
        arrays = {
            "observation.state": values[:, :1],
            "action": values[:, 1:],
            "reward": np.zeros(len(values), np.float32),
        }
        episodes.append(Episode(arrays, "walk", seed % 2 == 0, seed))
    return episodes


ONLINE = ["train.steps=12", "train.checkpoint_every=3", "train.batch_size=8", "policy.config.hidden_dims=[8]",
          "rl.online.after=4", "rl.online.every=3", "rl.online.episodes=2"]  # fmt: skip


def test_goes_online_and_writes_what_it_promises(walk, tmp_path):
    asked = []

    def collect(policy, seeds):
        assert not policy.training
        asked.append(list(seeds))
        return played(seeds)

    out = tmp_path / "run"
    bundle = train_actor_critic(*configured(walk, out, *ONLINE), collect=collect)
    assert asked == [[400000, 400001], [400002, 400003], [400004, 400005]]  # before updates 4, 7 and 10
    with EpisodeStore.open(out / "online.zarr") as store:
        assert store.episode_seeds == sum(asked, []) and store.episode_success == [True, False] * 3
    logged = rows(out)
    assert [row["step"] for row in logged] == [4, 8, 12]
    assert {"critic/loss", "critic/value", "actor/consistency", "actor/value_loss"} <= logged[0].keys()
    assert "online/success_rate" not in logged[0] and logged[1]["online/success_rate"] == 0.5
    policy, manifest = load_bundle(bundle)
    assert manifest["provenance"]["step"] == 12 and manifest["provenance"]["config"]["rl"]["online"]["after"] == 4
    kept = load_file(out / "checkpoints" / "step_00000012" / "ema.safetensors")
    weights = dict(policy.named_parameters())
    assert {"critic.critics.0.0.weight", "denoiser.from_chunk.weight"} <= kept.keys()
    assert all(torch.equal(weights[name], value) for name, value in kept.items())


def test_half_of_an_online_batch_is_the_policys_own(walk, tmp_path):
    run = ActorCriticRun(
        *configured(walk, tmp_path / "run", *ONLINE), join_processes("cpu"), lambda p, seeds: played(seeds)
    )
    for _ in range(5):
        run.improve()
    generator = torch.Generator().manual_seed(0)
    theirs = {float(x) for x in run.offline.action.flatten()}
    batch = run._batch(generator)
    own = [float(x) not in theirs for x in batch.action.flatten()]
    assert sum(own) == 4 and len(own) == 8
    run.close()


def test_a_resumed_run_is_the_same_and_plays_nothing_twice(walk, tmp_path):
    seeds_played = []

    def collect(policy, seeds):
        seeds_played.extend(seeds)
        return played(seeds)

    train_actor_critic(*configured(walk, tmp_path / "whole", *ONLINE), collect=collect)
    whole, seeds_played = list(seeds_played), []

    def interrupted(policy, seeds):
        if len(seeds_played) >= 4:
            raise KeyboardInterrupt
        return collect(policy, seeds)

    out = tmp_path / "run"
    with pytest.raises(KeyboardInterrupt):
        train_actor_critic(*configured(walk, out, *ONLINE), collect=interrupted)
    train_actor_critic(*configured(walk, out, *ONLINE), collect=collect, resume=True)
    assert seeds_played == whole
    for name in ("model", "ema", "optimizer"):
        a, b = (
            load_file(tmp_path / run / "checkpoints" / "step_00000012" / f"{name}.safetensors")
            for run in ("whole", "run")
        )
        assert [key for key in a if not torch.equal(a[key], b[key])] == []


def transitions(rows):
    generator = torch.Generator().manual_seed(0)

    def random(*shape):
        return torch.rand(rows, *shape, generator=generator)

    observations, following = {"observation.state": random(1, 1)}, {"observation.state": random(1, 1)}
    return Transitions(observations, random(1, 1), -torch.ones(rows), torch.full((rows,), 0.9), following)


def test_gradients_reach_only_what_they_are_meant_for(walk, tmp_path):
    run = ActorCriticRun(*configured(walk, tmp_path / "run", *ONLINE), join_processes("cpu"))
    policy, averaged, batch = run.policy, run.averaged_policy(), transitions(8)
    loss, _ = critic_loss(policy, averaged, batch, (-10.0, 0.0), step_generator(0, 0))
    loss.backward()
    assert all(p.grad is None for p in policy.denoiser.parameters())
    assert all(p.grad is not None for p in policy.critic.parameters())
    policy.zero_grad(set_to_none=True)
    actor_loss(policy, averaged, batch, policy.draw(8, step_generator(0, 0)), 1.0, step_generator(0, 0))[0].backward()
    assert all(p.grad is not None for p in policy.denoiser.parameters())
    assert all(p.grad is None and p.requires_grad for p in policy.critic.parameters())
    assert all(p.grad is None for p in averaged.parameters())


def test_the_critics_scale_does_not_change_the_actors_gradient(walk, tmp_path):
    """L_Q is measured in units of the values themselves."""
    run = ActorCriticRun(*configured(walk, tmp_path / "run", *ONLINE), join_processes("cpu"))
    policy, batch, draws = run.policy, transitions(8), run.policy.draw(8, step_generator(0, 0))

    def gradient():
        policy.zero_grad(set_to_none=True)
        actor_loss(policy, run.averaged_policy(), batch, draws, 1.0, step_generator(0, 0))[0].backward()
        return torch.cat([p.grad.flatten() for p in policy.denoiser.parameters()])

    before = gradient()
    with torch.no_grad():
        for critic in policy.critic.critics:
            critic[-1].weight *= 100
            critic[-1].bias *= 100
    torch.testing.assert_close(gradient(), before, rtol=1e-3, atol=1e-6)


def test_configuration_file_and_dataclass_have_the_same_defaults():
    plain = compose_config("train_rl", ["data.path=x"])
    assert asdict(dataclass_from(ActorCriticConfig, plain["rl"], "rl")) == asdict(ActorCriticConfig())


def test_what_cannot_be_trained_so_is_refused(walk, tmp_path):
    plain = compose_config("train_rl", [*TINY, *ONLINE, f"data.path={walk}", f"out={tmp_path / 'run'}"])
    with pytest.raises(UserError, match="needs a task with an environment"):
        start(plain, resume=False)
    config, rl, plain = configured(walk, tmp_path / "run")
    other = RunConfig(config.out, config.task, config.data, {"name": "diffusion_unet", "config": {}}, config.train)
    with pytest.raises(UserError, match="trains policy=consistency_ac, found policy.name='diffusion_unet'"):
        train_actor_critic(other, rl, plain)
    with pytest.raises(UserError, match="rl.gamma=1.0 at 0 or above and below 1"):
        ActorCriticConfig(gamma=1.0)
