import pytest
import torch

from robopolicy.values.critic import TwinCritic, bellman_target, choose, value_bounds


def make():
    torch.manual_seed(0)
    return TwinCritic(3, 4, (8, 8))


def test_the_critics_share_nothing():
    critic = make()
    context, chunk = torch.randn(5, 3), torch.randn(5, 2, 2)
    first, second = critic(context, chunk)
    assert first.shape == (5,) and not torch.allclose(first, second)
    critic(context, chunk)[0].sum().backward()
    of_first = sum(p.numel() for p in critic.parameters() if p.grad is not None and p.grad.abs().sum() > 0)
    assert all(p.grad is None or not p.grad.any() for p in critic.critics[1].parameters())
    assert 0 < of_first <= sum(p.numel() for p in critic.critics[0].parameters())


def test_target_takes_the_smaller_value_and_stops_where_the_task_ended():
    reward, discount = torch.tensor([-1.0, -1.0, 0.0]), torch.tensor([0.9, 0.9, 0.0])
    following = torch.tensor([[-3.0, -5.0, -7.0], [-4.0, -2.0, 1e6]])
    target = bellman_target(reward, discount, following, (-10.0, 0.0))
    torch.testing.assert_close(target, torch.tensor([-1 - 0.9 * 4, -1 - 0.9 * 5, 0.0]))


def test_target_believes_no_impossible_value():
    """Rewards are -1 or 0 and gamma is 0.9: no policy is worth more than 0 or less than -10."""
    reward, discount = torch.tensor([-1.0, 0.0]), torch.tensor([0.9, 0.0])
    bounds = value_bounds(reward, discount)
    assert bounds == pytest.approx((-10.0, 0.0))
    dreamt = bellman_target(reward[:1], discount[:1], torch.tensor([[50.0], [80.0]]), bounds)
    assert dreamt.item() == -1.0


def test_chunks_of_several_steps_have_the_same_bounds():
    gamma, steps = 0.9, 4
    reward = torch.tensor([-sum(gamma**i for i in range(steps)), 0.0])
    low, high = value_bounds(reward, torch.tensor([gamma**steps, 0.0]))
    assert low == pytest.approx(-1 / (1 - gamma), rel=1e-5) and high == 0


def test_candidates_are_chosen_as_often_as_softmax_says():
    values = torch.tensor([0.0, 1.0, 2.0]).repeat(20_000, 1)
    chosen = choose(values, 0.5, torch.rand(20_000, generator=torch.Generator().manual_seed(0)))
    found = torch.bincount(chosen, minlength=3) / len(chosen)
    torch.testing.assert_close(found, (values[0] / 0.5).softmax(dim=0), atol=0.01, rtol=0)


def test_zero_temperature_takes_the_best_and_large_values_are_no_problem():
    values = torch.tensor([[1.0, 3.0, 2.0], [9e4, 0.0, -9e4]])
    assert choose(values, 0.0, torch.zeros(2)).tolist() == [1, 0]
    assert choose(values, 1e-3, torch.tensor([0.999, 0.999])).tolist() == [1, 0]
