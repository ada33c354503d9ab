"""The search for the widest randomization, on a toy, with the expert of a task, and with a policy."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pytest
import torch

pytest.importorskip("robopolicy_sim")

from robopolicy.errors import UserError  # noqa: E402
from robopolicy.evaluation.doraemon import Betas  # noqa: E402
from robopolicy.evaluation.environments import environment  # noqa: E402
from robopolicy.evaluation.randomization_search import (  # noqa: E402
    Round,
    play_expert,
    play_policy,
    ranges_of,
    search,
    widest,
)
from robopolicy.spec import PolicySpec  # noqa: E402

NARROW = Betas.around({"friction": (0.2, 1.0, 2.0), "action_latency": (0.0, 0.0, 0.2)}, concentration=200)


def test_no_seed_is_played_twice_and_the_distributions_widen():
    seeds: list[int] = []

    def play(betas: Betas, chosen: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
        seeds.extend(chosen)
        values = betas.sample(len(chosen), np.random.default_rng(chosen[0]))
        return values, values[:, 1] < 0.1

    rounds = search(NARROW, play, rounds=8, episodes=200, first_seed=7, min_success=0.9, max_divergence=0.4)
    assert seeds == list(range(7, 7 + 8 * 200))
    assert rounds[0].betas is NARROW
    assert rounds[-1].betas.entropy() > NARROW.entropy() + 1
    best = widest(rounds, 0.9)
    assert best is not None and best.success_rate >= 0.9 and best.betas.entropy() > NARROW.entropy() + 1


def test_without_success_there_is_no_widest():
    assert widest([Round(NARROW, 3, 10)], 0.9) is None


def test_the_expert_plays_under_the_distributions():
    task = "robopolicy_sim/Lift-v0"
    values, success = play_expert(task, {"variation": {"gain": 0.8, "friction": 1.2}}, "good")(NARROW, range(4))
    assert values.shape == (4, 2) and len(np.unique(values[:, 0])) == 4
    assert (np.abs(values - NARROW.mean()) < 6 * NARROW.deviation()).all()
    assert success.mean() >= 0.75
    heavy_soap = Betas.around({"friction": (0.05, 0.06, 0.07), "object_mass": (15.0, 18.0, 20.0)})
    assert not play_expert(task, {}, "good")(heavy_soap, range(2))[1].any()


class Idle:
    """A policy that asks for the same pose at every step."""

    def __init__(self) -> None:
        world = environment("lift")
        self.spec = PolicySpec(
            (world.keys["observation.state"],), world.action, world.fps, n_obs_steps=1, n_action_steps=16
        )

    def act(self, observations: Mapping[str, np.ndarray], generators: Sequence[torch.Generator]) -> np.ndarray:
        pose = np.array([0.5, 0, 0.3, 1, 0, 0, 0, -1, 0, 1], np.float32)
        return np.tile(pose, (len(generators), 16, 1))


def test_a_policy_plays_under_the_distributions():
    values, success = play_policy(Idle(), "lift", {}, batch_size=2)(NARROW, range(2))
    assert values.shape == (2, 2) and values[0, 0] != values[1, 0]
    assert not success.any()


def test_ranges_start_at_the_nominal_value():
    assert ranges_of({"friction": None, "gain": (0.2, 0.8)}) == {"friction": (0.05, 1.0, 3.0), "gain": (0.2, 0.8, 0.8)}


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        ({"frction": None}, "Did you mean 'friction'"),
        ({"background": None}, "no factor of variation with a range"),
        ({"gain": (0.0, 2.0)}, "gain=0:2 does not lie in 0.05:4"),
    ],
)
def test_impossible_ranges_are_named(wanted: dict, message: str):
    with pytest.raises(UserError, match=message):
        ranges_of(wanted)
