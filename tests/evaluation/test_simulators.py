"""Worker processes that die are replaced, and nobody can tell from the results."""

from __future__ import annotations

import logging
import multiprocessing
from contextlib import closing
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import pytest

from robopolicy.errors import UserError
from robopolicy.evaluation.environments import PUSHT
from robopolicy.evaluation.rollout import rollout
from robopolicy.evaluation.simulators import MAX_RESTARTS, simulators

from . import fragile
from .conftest import RandomPusher, same

SHORT_PUSHT = replace(PUSHT, max_steps=24)
SEEDS = list(range(100_000, 100_006))


def kill(name: str) -> None:
    (worker,) = (process for process in multiprocessing.active_children() if process.name == name)
    worker.kill()
    worker.join()


@dataclass
class Killer(RandomPusher):
    """Kills workers when it is asked for the n-th time: ``{n: name of the process}``."""

    victims: tuple[tuple[int, str], ...] = ()
    calls: int = 0

    def act(self, observations, generators):
        self.calls += 1
        for call, name in self.victims:
            if call == self.calls:
                kill(name)
        return super().act(observations, generators)


@pytest.mark.parametrize(
    "victims",
    [
        pytest.param(((3, "sim-0"),), id="once"),
        pytest.param(((1, "sim-1"), (4, "sim-1"), (5, "sim-0")), id="several times"),
        pytest.param(((4, "sim-0"), (4, "sim-1")), id="all at once"),
    ],
)
@pytest.mark.parametrize("shard_size", [2, 50])
def test_killed_workers_change_no_result(victims, shard_size, caplog):
    play = partial(rollout, environment=SHORT_PUSHT, seeds=SEEDS, batch_size=4, shard_size=shard_size, progress=False)
    reference = play(RandomPusher())
    with caplog.at_level(logging.WARNING):
        assert same(reference, play(Killer(victims=victims), workers=2))
    assert caplog.text.count("ended with exit code -9") == len(victims)
    assert not multiprocessing.active_children()


def test_the_observations_of_replayed_episodes_are_those_of_before(pusher):
    chunk = np.tile([200.0, 300.0], (5, 1)).astype(np.float32)
    with closing(simulators(PUSHT, pusher.spec, slots=2, workers=1)) as slots:
        slots.start({0: 1, 1: 2})
        slots.execute({0: chunk})()
        slots.execute({0: chunk[:2], 1: chunk})()
        before = slots.histories["observation.state"].copy()
        kill("sim-0")
        slots.histories["observation.state"][:] = np.nan
        slots.execute({})()  # asks nobody
        slots.start({1: 3})
        np.testing.assert_array_equal(slots.histories["observation.state"][0], before[0])
        assert not np.isnan(slots.histories["observation.state"][1]).any()


def test_an_episode_that_always_kills_its_worker_ends_the_run_naming_the_seeds(pusher, caplog):
    environment = replace(SHORT_PUSHT, build=fragile.deadly)
    with pytest.raises(UserError, match=r"worker 1 ended with exit code -9 in the episodes \[13\], for the 4th time"):
        rollout(pusher, environment, [1, 13], workers=2, progress=False)
    assert caplog.text.count("a new one replays them") == MAX_RESTARTS
    assert not multiprocessing.active_children()


@pytest.mark.parametrize(
    "build, error, message",
    [
        (fragile.failing, FileNotFoundError, "no such mesh"),
        (fragile.failing_oddly, RuntimeError, "Stubborn: this and that"),
    ],
)
def test_what_an_environment_raises_in_a_worker_is_raised_here_with_its_traceback(pusher, build, error, message):
    with pytest.raises(error, match=message) as caught:
        rollout(pusher, replace(PUSHT, build=build), [1], workers=1, progress=False)
    assert "fragile.py" in "".join(caught.value.__notes__)


def test_a_worker_that_dies_while_it_opens_its_environments_is_reported(pusher):
    environment = replace(PUSHT, build=fragile.exit_at_once)
    with pytest.raises(UserError, match="worker 0 ended with exit code 3 while it opened"):
        rollout(pusher, environment, [1], workers=1, progress=False)
