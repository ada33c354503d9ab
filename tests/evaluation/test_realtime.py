"""Rehearsals in simulated real time, with a policy that knows the course of the ring from one observation."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

pytest.importorskip("mujoco", reason="the simulator is not installed: pip install 'robopolicy[sim]'")
pytest.importorskip("ruckig", reason="ruckig is not installed: pip install 'robopolicy[runtime]'")

from robopolicy.errors import UserError
from robopolicy.evaluation.realtime import Delays, Motion, evaluate_realtime
from robopolicy.runtime.chunk_scheduler import RealTimeChunkingSettings, SynchronousSettings
from robopolicy.runtime.states import State
from robopolicy.spec import KeySpec, PolicySpec

SEEDS = range(100_000, 100_004)
LAG = 0.05  # s by which the gantry follows its set points
SPEC = PolicySpec(
    (KeySpec("observation.state", (8,)),), KeySpec("action", (2,), "action"), 10, n_obs_steps=1, n_action_steps=8
)


class Foresight:
    """Where the ring will be: it circles about the hub at a constant rate."""

    spec = SPEC
    noise_shape = (1, SPEC.horizon, 2)

    def draw_noise(self, rows: int, rng: np.random.Generator) -> np.ndarray:
        return rng.standard_normal((rows, *self.noise_shape), np.float32)

    def sample(self, observations: Any, noise: Any, previous: Any = None, mask: Any = None) -> np.ndarray:
        state = np.asarray(observations["observation.state"], np.float64)[0, -1]
        _, target, velocity, hub = state.reshape(4, 2)
        arm = target - hub
        rate = (arm[0] * velocity[1] - arm[1] * velocity[0]) / (arm @ arm)
        angle = rate * ((np.arange(SPEC.horizon) + 1) / SPEC.fps + LAG)
        turned = np.stack(
            [np.cos(angle) * arm[0] - np.sin(angle) * arm[1], np.sin(angle) * arm[0] + np.cos(angle) * arm[1]], axis=1
        )
        return (hub + turned)[None].astype(np.float32)


def rehearse(scheduler: Any, delay: float, **more: Any) -> Any:
    return evaluate_realtime(Foresight(), "track_target", {}, scheduler, Delays(delay), SEEDS, progress=False, **more)


def test_a_plan_ahead_keeps_up_with_the_ring_where_pauses_lose_it() -> None:
    ahead = rehearse(RealTimeChunkingSettings(execute=4), 0.2)
    paused = rehearse(SynchronousSettings(), 0.2)
    assert [e.success for e in ahead.episodes] == [True] * len(SEEDS)
    assert not any(e.success for e in paused.episodes)
    assert ahead.mean("pause") < 0.1 < paused.mean("pause")
    for episode in (*ahead.episodes, *paused.episodes):
        assert episode.state == State.RUNNING.value and episode.acceleration <= 1 + 1e-6 and episode.seam <= 1 + 1e-6


class Told(Foresight):
    """It stays where it is unless the goal says 1."""

    spec = replace(SPEC, goals=(KeySpec("observation.state", (8,)),))

    def sample(self, observations: Any, noise: Any, previous: Any = None, mask: Any = None) -> np.ndarray:
        follows = super().sample(observations, noise)
        here = np.asarray(observations["observation.state"], np.float32)[:, -1:, :2]
        return follows if observations["goal.observation.state"][0, 0] == 1 else np.broadcast_to(here, follows.shape)


@pytest.mark.parametrize("told", [1.0, 0.0])
def test_a_policy_pursues_the_goal_that_is_given(told: float) -> None:
    result = evaluate_realtime(
        Told(),
        "track_target",
        {},
        RealTimeChunkingSettings(execute=4),
        Delays(0.1),
        SEEDS[:2],
        goal={"observation.state": np.full(8, told, np.float32)},
        progress=False,
    )
    assert [e.success for e in result.episodes] == 2 * [bool(told)]


def test_the_same_rehearsal_twice_is_the_same() -> None:
    delays = Delays(0.1, jitter=0.05)
    once, again = (
        evaluate_realtime(
            Foresight(), "track_target", {}, RealTimeChunkingSettings(execute=4), delays, SEEDS[:2], progress=False
        )
        for _ in range(2)
    )
    assert once.to_dict() == again.to_dict()


def test_limits_are_those_that_were_asked_for() -> None:
    slow = rehearse(RealTimeChunkingSettings(execute=4), 0.0, motion=Motion(velocity=0.05))
    assert not any(e.success for e in slow.episodes)  # a rod at 5 cm/s does not catch a ring at 25


def test_tasks_that_cannot_be_run_in_real_time_say_why() -> None:
    spec = PolicySpec((KeySpec("observation.state", (17,)),), KeySpec("action", (10,), "action"), 20)
    policy: Any = type("Other", (), {"spec": spec})()
    with pytest.raises(UserError, match="joint_position"):
        evaluate_realtime(policy, "reach", {}, SynchronousSettings(), Delays(), [0], progress=False)
    with pytest.raises(UserError, match="command_rate"):
        evaluate_realtime(policy, "reach", {"control_hz": 20}, SynchronousSettings(), Delays(), [0], progress=False)
