"""The task TrackTarget, its scripted expert, and that acting late or with pauses fails at it."""

from __future__ import annotations

from dataclasses import replace

import gymnasium
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env

import robopolicy_sim  # noqa: F401  (registers the environments)
from robopolicy_sim.envs.track_target import TrackTargetConfig, TrackTargetEnv
from robopolicy_sim.experts.track_target import SERVO_LAG, CircularCourse

TIME_LIMIT = 6.0  # s
CHUNK = 0.8  # s
STATE = "observation.state"


class Episode:
    """One episode, step by step, with what was seen and done."""

    def __init__(self, env: TrackTargetEnv, seed: int) -> None:
        self.env, self.expert = env, env.make_expert(seed)
        observation, self.info = env.reset(seed=seed)
        self.states, self.actions = [observation[STATE]], []

    @property
    def running(self) -> bool:
        return not self.info["success"] and len(self.actions) < round(TIME_LIMIT * self.env.control_hz)

    def step(self, action: np.ndarray) -> None:
        if self.running:
            observation, *_, self.info = self.env.step(action)
            self.states.append(observation[STATE])
            self.actions.append(action)

    def stay(self, steps: int) -> None:
        for _ in range(steps):
            self.step(self.actions[-1] if self.actions else self.states[0][:2])


def closed_loop(env: TrackTargetEnv, seed: int, *, delay: float = 0.0) -> Episode:
    """The expert, each action from an observation that is ``delay`` seconds old."""
    episode, age = Episode(env, seed), round(delay * env.control_hz)
    episode.stay(age)
    while episode.running:
        episode.step(episode.expert.act({STATE: episode.states[-1 - age]}))
    return episode


def in_chunks(env: TrackTargetEnv, seed: int, *, age: float = 0.0, pause: float = 0.0) -> Episode:
    """Open loop over chunks, each from an observation ``age`` seconds old and knowing what was done since.

    The pusher stands still for ``pause`` seconds after each chunk; the next one then starts from a new observation.
    """
    episode, steps = Episode(env, seed), round(age * env.control_hz)
    episode.stay(steps)
    while episode.running:
        done = episode.actions[len(episode.actions) - steps :]
        for action in plan(episode, episode.states[-1 - steps], done, round(CHUNK * env.control_hz)):
            episode.step(action)
        episode.stay(round(pause * env.control_hz))
    return episode


def plan(episode: Episode, state: np.ndarray, done: list[np.ndarray], steps: int) -> list[np.ndarray]:
    """Actions of the expert on states foreseen from ``state`` (8,), the first of which lead through ``done``."""
    period, actions = 1 / episode.env.control_hz, list(done)
    for i in range(len(done) + steps):
        if i == len(actions):
            actions.append(episode.expert.act({STATE: state}))
        pusher, target, velocity, centre = np.asarray(state, dtype=np.float64).reshape(4, 2)
        pusher = pusher + (actions[i] - pusher) * period / (period + SERVO_LAG)
        course = CircularCourse.through(target, velocity, centre)
        state = np.concatenate([pusher, course.position(period), course.velocity(period), centre])
    return actions[len(done) :]


def successes(play, episodes: int = 40, control_hz: float = 10, **how: float) -> float:
    env = TrackTargetEnv(control_hz=control_hz)
    return float(np.mean([play(env, seed, **how).info["success"] for seed in range(episodes)]))


@pytest.fixture
def env():
    env = TrackTargetEnv()
    yield env
    env.close()


@pytest.mark.parametrize("control_hz", [10, 100])
def test_gymnasium_accepts_the_environment(control_hz):
    check_env(TrackTargetEnv(control_hz=control_hz), skip_render_check=True)


def test_registered_with_the_time_limit():
    with_limit = gymnasium.make("robopolicy_sim/TrackTarget-v0")
    assert with_limit.spec.max_episode_steps == TIME_LIMIT * with_limit.metadata["render_fps"]
    with_limit.close()


def test_same_seed_same_episode(env):
    first, again, other = (closed_loop(env, seed).states for seed in (7, 7, 8))
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(first[0], other[0])


def test_starts_keep_the_course_in_reach_and_the_pusher_off_the_ring(env):
    directions = set()
    for seed in range(200):
        observation, info = env.reset(seed=seed)
        pusher, target, velocity, centre = observation[STATE].reshape(4, 2)
        radius = np.linalg.norm(target - centre)
        assert radius == pytest.approx(0.155, abs=0.01501)
        assert np.linalg.norm(velocity) == pytest.approx(1.85 * float(radius), rel=0.0811)
        assert np.abs(centre).max() + radius < env.action_space.high.min()
        assert np.linalg.norm(pusher - target) > 3 * env.tolerance
        assert not info["success"] and info["progress"] == 0
        directions.add(np.sign(env.course.rate))
    assert directions == {-1, 1}


def test_one_observation_tells_the_whole_course(env):
    observation, _ = env.reset(seed=3)
    _, target, velocity, centre = observation[STATE].astype(np.float64).reshape(4, 2)
    course = CircularCourse.through(target, velocity, centre)
    for step in range(1, 21):
        observation, *_ = env.step(env._pusher)
        np.testing.assert_allclose(observation[STATE][2:4], course.position(step / 10), atol=1e-5)
        np.testing.assert_allclose(observation[STATE][4:6], course.velocity(step / 10), atol=1e-5)


def test_a_velocity_is_the_change_of_the_position():
    course = CircularCourse(np.array([0.02, -0.05]), np.array([0.12, -0.01]), rate=-1.7)
    times = np.linspace(0, 3, 7)
    change = (course.position(times + 1e-6) - course.position(times - 1e-6)) / 2e-6
    np.testing.assert_allclose(course.velocity(times), change, atol=1e-8)


def test_the_ring_moves_alike_at_every_control_rate():
    """Without it the same policy would face another task in the runtime than in training."""
    envs = {rate: TrackTargetEnv(control_hz=rate) for rate in (10, 30, 100)}
    ends = {}
    for rate, env in envs.items():
        start = env.reset(seed=5)[0][STATE]
        for _ in range(2 * rate):
            end = env.step(start[:2])[0][STATE]
        ends[rate] = end[2:]
    np.testing.assert_allclose(ends[30], ends[10], atol=1e-6)
    np.testing.assert_allclose(ends[100], ends[10], atol=1e-6)


@pytest.mark.parametrize("control_hz", [10, 100])
def test_success_needs_the_whole_dwell_without_a_break(control_hz):
    env = TrackTargetEnv(config=replace(TrackTargetConfig(), dwell=0.5, rate=(0.0, 0.0)), control_hz=control_hz)
    env.reset(seed=0)
    ring, offset = env._target.copy(), np.array([env.tolerance, 0])
    dwell = control_hz // 2

    def stand(position: np.ndarray) -> tuple[bool, float]:
        env._place_pusher(position)
        env.data.qvel[:] = 0
        _, reward, terminated, _, info = env.step(position)
        assert not terminated and reward == info["progress"]
        return info["success"], reward

    outcomes = [stand(ring + 0.95 * offset) for _ in range(dwell - 1)]
    assert outcomes[-1] == (False, pytest.approx(1 - 1 / dwell))
    assert stand(ring + 1.05 * offset) == outcomes[-1]  # a break; the longest stay counts as progress
    outcomes = [stand(ring + 0.95 * offset) for _ in range(dwell)]
    assert [success for success, _ in outcomes] == [False] * (dwell - 1) + [True]
    assert outcomes[-1][1] == 1.0
    assert stand(ring + 2 * offset) == (True, 1.0)  # what has been achieved stays


def test_commanded_speed_is_limited(env):
    env.reset(seed=0)
    far_corner = -np.sign(env._pusher) * 0.29
    path = [env._pusher.copy()]
    for _ in range(6):
        env.step(far_corner)
        path.append(env._pusher.copy())
    speed = np.linalg.norm(np.diff(path, axis=0), axis=1) * 10
    assert speed.max() < 1.1 * env.config.max_speed
    assert speed[3] > 0.8 * env.config.max_speed


@pytest.mark.parametrize("control_hz", [0, -10, np.inf, np.nan, "fast"])
def test_impossible_rates_are_refused(control_hz):
    with pytest.raises(ValueError, match="control_hz"):
        TrackTargetEnv(control_hz=control_hz)


@pytest.mark.parametrize("action", [[np.nan, 0.0], [0.0, 0.0, 0.0]])
def test_impossible_actions_are_refused(env, action):
    env.reset(seed=0)
    with pytest.raises(ValueError, match="finite"):
        env.step(np.array(action))


def test_top_camera_shows_where_the_ring_is():
    env = TrackTargetEnv(cameras=("top",), image_size=64)
    env.reset(seed=0)
    for _ in range(8):
        observation, *_ = env.step(env._pusher)
    image = observation["observation.image.top"].astype(int)
    green = (image[..., 1] > 150) & (image[..., 1] - image[..., 0] > 40) & (image[..., 1] - image[..., 2] > 40)
    row, column = np.argwhere(green).mean(axis=0)
    # The camera sees 0.69 m of the table's width.
    seen = np.array([column - 31.5, 31.5 - row]) / 64 * 0.69
    np.testing.assert_allclose(seen, env._target, atol=0.01)
    env.close()


@pytest.mark.parametrize(("control_hz", "episodes"), [(10, 100), (100, 20)])
def test_the_expert_succeeds(control_hz, episodes):
    assert successes(closed_loop, episodes, control_hz) > 0.98


def test_the_expert_keeps_to_its_speed_and_wastes_no_time(env):
    played = [closed_loop(env, seed) for seed in range(20)]
    assert np.mean([len(episode.actions) for episode in played]) < 25
    steps = np.concatenate([np.array(e.actions) - np.array(e.states[:-1])[:, :2] for e in played])
    assert np.linalg.norm(steps, axis=1).max() <= 0.42 * (0.1 + SERVO_LAG) + 1e-6


@pytest.mark.parametrize("control_hz", [10, 100])
def test_acting_on_old_observations_fails(control_hz):
    assert successes(closed_loop, 20, control_hz, delay=0.2) < 0.3


@pytest.mark.parametrize("control_hz", [10, 100])
@pytest.mark.parametrize("age", [0.0, 0.2, 0.3])
def test_planning_ahead_succeeds_even_from_old_observations(control_hz, age):
    assert successes(in_chunks, 20, control_hz, age=age) > 0.95


@pytest.mark.parametrize("control_hz", [10, 100])
def test_a_pause_after_each_chunk_fails(control_hz):
    assert successes(in_chunks, 20, control_hz, pause=0.2) < 0.5
