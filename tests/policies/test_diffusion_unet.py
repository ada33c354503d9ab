import numpy as np
import pytest
import torch

from robopolicy.errors import UserError
from robopolicy.training.config import OptimConfig
from robopolicy.training.step import LossModule, build_optimizer, step_generator, train_step


def fit(policy, batch, steps, lr=3e-3):
    optimizer = build_optimizer(policy, OptimConfig())
    module = LossModule(policy)
    for step in range(steps):
        loss, _ = train_step(
            module, optimizer, batch, policy.draw(len(batch["action"]), step_generator(0, step)), lr=lr, clip_norm=1.0
        )
    return loss.item()


def observe(state):
    return {"observation.state": np.repeat(np.asarray(state, np.float32)[:, None], 2, axis=1)}


def generators(n, first=0):
    return [torch.Generator().manual_seed(first + i) for i in range(n)]


def test_learns_a_known_map_in_physical_units(make_policy):
    """The action is a quarter turn of the state, in millimetres around 500: the chunk comes back in those units."""
    policy = make_policy(low=0.0, high=1000.0, process={"prediction": "sample"})
    state = torch.rand(64, 2) * 600 + 200
    turned = torch.stack([1000 - state[:, 1], state[:, 0]], dim=1)
    batch = {"observation.state": state[:, None].repeat(1, 2, 1), "action": turned[:, None].repeat(1, 8, 1)}
    fit(policy, batch, 120)
    chunk = policy.eval().act(observe(state.numpy()), generators(64))
    assert chunk.shape == (64, 4, 2) and chunk.dtype == np.float32
    assert np.abs(chunk - turned[:, None].numpy()).mean() < 40


def test_finds_both_modes_of_a_fork_and_never_the_mean(make_policy):
    """Half of the demonstrations go left, half right; a regression would go straight ahead."""
    policy = make_policy(process={"prediction": "sample"})
    side = torch.tensor([-0.8, 0.8]).repeat(64)
    action = torch.stack([side, side], dim=1)[:, None].repeat(1, 8, 1)
    fit(policy, {"observation.state": torch.zeros(128, 2, 2), "action": action}, 220)
    chunk = policy.eval().act(observe(np.zeros((400, 2))), generators(400))[:, 0, 0]
    assert 0.4 < (chunk > 0).mean() < 0.6
    assert (np.abs(chunk) > 0.4).mean() > 0.97


def test_same_seed_same_chunk_in_any_batch(make_policy):
    policy = make_policy().eval()
    states = np.random.default_rng(0).uniform(-1, 1, (5, 2))
    together = policy.act(observe(states), generators(5))
    alone = policy.act(observe(states[3:4]), generators(1, first=3))
    np.testing.assert_allclose(together[3:4], alone, atol=1e-4)
    assert np.abs(together - policy.act(observe(states), generators(5, first=9))).max() > 1e-2


def test_chunks_stay_in_the_range_of_the_data(make_policy):
    policy = make_policy(low=10.0, high=30.0).eval()
    chunk = policy.act(observe(np.full((100, 2), 20.0)), generators(100))
    assert chunk.min() >= 10 - 1e-3 and chunk.max() <= 30 + 1e-3


def test_executed_actions_start_at_the_newest_observation(make_policy):
    policy = make_policy().eval()
    states = np.zeros((1, 2))
    with torch.no_grad():
        whole = policy.sample({k: torch.from_numpy(v) for k, v in observe(states).items()}, generators(1))
    np.testing.assert_array_equal(policy.act(observe(states), generators(1)), whole[:, 1:5].numpy())


def test_overfits_one_batch_of_images(make_policy):
    """The action is where a white square lies in the picture."""
    policy = make_policy(images=True, augmentation={"crop": 1.0}, process={"prediction": "sample"})
    images = torch.zeros(8, 2, 48, 48, 3, dtype=torch.uint8)
    for i in range(8):
        images[i, :, 18:30, 5 * i : 5 * i + 12] = 255
    batch = {
        "observation.state": torch.zeros(8, 2, 2),
        "observation.image.top": images,
        "action": torch.linspace(-1, 1, 8)[:, None, None].repeat(1, 8, 2),
    }
    fit(policy, batch, 80, lr=1e-3)
    observations = {k: v.numpy() for k, v in batch.items() if k != "action"}
    chunk = policy.eval().act(observations, generators(8))
    assert np.abs(chunk[:, 0] - batch["action"][:, 0].numpy()).mean() < 0.25


def test_loss_is_a_function_of_batch_and_draws(make_policy):
    policy = make_policy()
    batch = {"observation.state": torch.rand(16, 2, 2), "action": torch.rand(16, 8, 2)}
    draws = policy.draw(16, step_generator(0, 5))
    whole = policy.loss(batch, draws)
    assert torch.equal(whole, policy.loss(batch, policy.draw(16, step_generator(0, 5))))
    halves = [
        policy.loss({k: v[part] for k, v in batch.items()}, {k: v[part] for k, v in draws.items()})
        for part in (slice(0, 8), slice(8, 16))
    ]
    torch.testing.assert_close(whole, sum(halves) / 2)


def test_wrong_observations_are_named(make_policy):
    policy = make_policy()
    with pytest.raises(UserError, match="lacks 'observation.state'"):
        policy.act({"state": np.zeros((1, 2, 2))}, generators(1))
    with pytest.raises(UserError, match=r"found shape \(1, 2, 7\), wanted \(batch, 2, 2\)"):
        policy.act({"observation.state": np.zeros((1, 2, 7))}, generators(1))


def test_impossible_architectures_are_refused(make_policy):
    with pytest.raises(UserError, match="horizon=8 must be a multiple of 16"):
        make_policy(down_dims=[8, 8, 8, 8, 8])
    with pytest.raises(UserError, match="multiples of n_groups"):
        make_policy(down_dims=[12, 20])
