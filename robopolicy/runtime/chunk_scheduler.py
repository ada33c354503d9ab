"""Ways to execute action chunks, chosen by name."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from robopolicy.errors import UserError
from robopolicy.runtime.clock import nanoseconds
from robopolicy.runtime.delays import DelaySettings
from robopolicy.runtime.rtc import RealTimeChunking, RealTimeChunkingSettings
from robopolicy.runtime.scheduling import (
    Agreement,
    ChunkScheduler,
    Scheduler,
    Timing,
    action_latency,
    executed_steps,
    timing_of,
)
from robopolicy.runtime.temporal_ensembling import TemporalEnsembling, TemporalEnsemblingSettings
from robopolicy.spec import PolicySpec

__all__ = [
    "Agreement",
    "Asynchronous",
    "AsynchronousSettings",
    "ChunkScheduler",
    "RealTimeChunking",
    "RealTimeChunkingSettings",
    "SchedulerSettings",
    "Synchronous",
    "SynchronousSettings",
    "TemporalEnsembling",
    "TemporalEnsemblingSettings",
    "action_latency",
    "make_scheduler",
]


@dataclass(frozen=True)
class SynchronousSettings:
    """Receding horizon: execute, stand still, observe, infer.

    Attributes:
        execute: actions of each chunk that are executed; 0: the policy's ``n_action_steps``.
        settle: seconds between the end of the motion and the next observation, at least the age that observations
            have when they arrive.
        delay: how the delay is estimated, which is only reported.
    """

    name: Literal["synchronous"] = "synchronous"
    execute: int = 0
    settle: float = 0.1
    delay: DelaySettings = field(default_factory=DelaySettings)

    def __post_init__(self) -> None:
        if self.settle < 0:
            raise UserError(f"scheduler.settle={self.settle} must not be negative.")


class Synchronous(Scheduler):
    """The robot executes part of a chunk, comes to rest, and waits for the next one.

    What simulations do, where time stands still during inference. Here the robot does: each chunk is executed from its
    arrival on, so that its actions follow the posture that was observed, at the price of a pause.

    Raises:
        UserError: more actions are to be executed than a chunk has.
    """

    def __init__(self, settings: SynchronousSettings, timing: Timing, prior: float = 0.0) -> None:
        super().__init__(timing, settings.delay, prior)
        self._execute = executed_steps(settings.execute, timing)
        self._settle = nanoseconds(settings.settle) + timing.largest_latency

    def _due(self, now: int) -> bool:
        assert self._plan is not None
        return now >= self._plan.end + self._settle

    def _merged(self, times: list[int], actions: np.ndarray, now: int) -> tuple[list[int], np.ndarray]:
        times, actions = super()._merged(times, actions, now)
        return times[: self._execute], actions[: self._execute]


@dataclass(frozen=True)
class AsynchronousSettings:
    """Infer while moving; switch over without agreement.

    Attributes:
        execute: steps after a chunk's observation at which the next one is asked for; 0: ``n_action_steps``.
        delay: how the delay is estimated, which is only reported.
    """

    name: Literal["asynchronous"] = "asynchronous"
    execute: int = 0
    delay: DelaySettings = field(default_factory=DelaySettings)


class Asynchronous(Scheduler):
    """The next chunk replaces the one that is executed as soon as it is there, whether or not both agree.

    Raises:
        UserError: more actions are to be executed than a chunk has.
    """

    def __init__(self, settings: AsynchronousSettings, timing: Timing, prior: float = 0.0) -> None:
        super().__init__(timing, settings.delay, prior)
        self._execute = executed_steps(settings.execute, timing)

    def _due(self, now: int) -> bool:
        return now >= self._origin + self._execute * self.timing.step


SchedulerSettings = SynchronousSettings | AsynchronousSettings | TemporalEnsemblingSettings | RealTimeChunkingSettings


def make_scheduler(
    settings: SchedulerSettings,
    spec: PolicySpec,
    *,
    latency: np.ndarray | None = None,
    lookahead: float = 0.0,
    prior_delay: float = 0.0,
    prefix_steps: int | None = None,
) -> ChunkScheduler:
    """The scheduler that settings describe.

    Args:
        settings: of any kind.
        spec: of the policy.
        latency: (A,) seconds until a command is reached, see `action_latency`; None: zero.
        lookahead: seconds that the plan is read ahead of now; a new chunk takes over from there.
        prior_delay: seconds from an observation to its chunk that are expected before the first was measured.
        prefix_steps: the longest prefix that the policy was trained with; None: not known.

    Raises:
        UserError: the settings do not fit the policy.
    """
    timing = timing_of(spec, latency, lookahead)
    if isinstance(settings, SynchronousSettings):
        return Synchronous(settings, timing, prior_delay)
    if isinstance(settings, AsynchronousSettings):
        return Asynchronous(settings, timing, prior_delay)
    if isinstance(settings, TemporalEnsemblingSettings):
        return TemporalEnsembling(settings, timing, prior_delay)
    return RealTimeChunking(settings, timing, prior_delay, prefix_steps)
