import numpy as np

from robopolicy.evaluation.collect import collect_episodes
from tests.evaluation.conftest import Counter, Script, scripted_environment


def test_episodes_hold_what_was_seen_before_each_action_and_the_reward_after_it():
    """Observations are [seed, step], action k is executed at step k."""
    script = Script(rewards=lambda seed: [0.1 * (i + 1) for i in range(seed)], success_at=lambda seed: 5)
    played = collect_episodes(Counter(), scripted_environment(script), [7, 5, 4], batch_size=2)
    assert [episode.seed for episode in played] == [7, 5, 4]
    assert [episode.success for episode in played] == [True, True, False]
    for episode in played:
        steps = np.arange(episode.seed)
        np.testing.assert_array_equal(episode.arrays["observation.state"][:, 1], steps)
        np.testing.assert_array_equal(episode.arrays["observation.state"][:, 0], np.full(len(steps), episode.seed))
        np.testing.assert_array_equal(episode.arrays["action"][:, 0], steps)
        np.testing.assert_allclose(episode.arrays["reward"], 0.1 * (steps + 1), rtol=1e-6)


def test_the_limit_of_steps_ends_an_episode():
    world = scripted_environment(Script(rewards=lambda seed: [0.0] * 50), max_steps=6)
    (episode,) = collect_episodes(Counter(), world, [1])
    assert len(episode.arrays["action"]) == 6 and not episode.success
