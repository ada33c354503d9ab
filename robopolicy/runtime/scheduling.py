"""What all ways to execute action chunks share: their times, the one request under way, the plan they go into."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from robopolicy.errors import UserError
from robopolicy.runtime.clock import NS
from robopolicy.runtime.contract import Contract
from robopolicy.runtime.delays import DelayEstimate, DelaySettings
from robopolicy.runtime.exchange import Chunk
from robopolicy.runtime.plan import ChunkPlan, Plan
from robopolicy.spec import PolicySpec

HISTORY = NS
"""How much of the plan's past is kept [ns]: enough for a chunk whose first entries lie before a late observation."""


@dataclass(frozen=True, eq=False)
class Agreement:
    """What a chunk is asked to agree with, see `exchange.Request`.

    Attributes:
        previous: (H, A) float32 physical units, entry i for the same time as entry i of the answer; None: nothing.
        mask: (H,) float32 in [0, 1]; given with it.
    """

    previous: np.ndarray | None = None
    mask: np.ndarray | None = None


class ChunkScheduler(Protocol):
    """Says when to infer, and turns chunks into a plan. At most one inference is under way.

    Attributes:
        delay: from an observation to the arrival of its chunk.
        counters: what happened so far, by name.
    """

    delay: DelayEstimate
    counters: dict[str, int]

    def reset(self, now: int, position: np.ndarray) -> None:
        """Start anew from rest at a posture (A,), e.g. the measured one; an inference under way is forgotten."""

    def wants(self, now: int) -> bool:
        """Whether an inference should begin now."""

    def request(self, now: int, observed_at: int) -> Agreement:
        """An inference begins with an observation of that time [ns]; what its chunk must agree with."""

    def accept(self, chunk: Chunk, now: int) -> bool:
        """Take over a checked chunk.

        Returns:
            Whether the plan changed. A chunk that was not asked for since the reset, or came too late to be of use, is
            counted and nothing else.
        """

    def lost(self) -> None:
        """The inference under way came to nothing: it failed, or its chunk was thrown away."""

    def plan(self) -> Plan | None:
        """What to follow; None before the first chunk."""


@dataclass(frozen=True, eq=False)
class Timing:
    """When the entries of a chunk are to be reached.

    Attributes:
        step: control step [ns].
        horizon: H.
        n_obs_steps: entry ``n_obs_steps - 1`` is to be reached one step after the newest observation.
        n_action_steps: actions that the policy was made to execute of each chunk.
        latency: (A,) seconds from a command until it is reached.
        lookahead: ns that the plan is read ahead of now; new chunks take over from there.
    """

    step: int
    horizon: int
    n_obs_steps: int
    n_action_steps: int
    latency: np.ndarray
    lookahead: int

    @property
    def usable(self) -> int:
        """Actions of a chunk from the newest observation on."""
        return self.horizon - self.n_obs_steps + 1

    @property
    def largest_latency(self) -> int:
        return round(float(self.latency.max()) * NS)

    @property
    def committed(self) -> float:
        """Seconds after a chunk's arrival for which the robot's motion can no longer change."""
        return (self.lookahead + self.largest_latency) / NS

    def reached(self, observed_at: int) -> list[int]:
        """(H,) ns at which the entries of a chunk are to be reached."""
        return [observed_at + (i - self.n_obs_steps + 2) * self.step for i in range(self.horizon)]


def timing_of(spec: PolicySpec, latency: np.ndarray | None, lookahead: float) -> Timing:
    """The times of a policy's chunks; see `chunk_scheduler.make_scheduler`."""
    delays = np.zeros(spec.action.dim) if latency is None else np.asarray(latency, np.float64)
    return Timing(
        round(NS / spec.fps), spec.horizon, spec.n_obs_steps, spec.n_action_steps, delays, round(lookahead * NS)
    )


def action_latency(contract: Contract) -> np.ndarray:
    """(A,) seconds until each entry of the action is reached once its command was sent."""
    latency = np.zeros(len(contract.action.names))
    for command in contract.commands.values():
        latency[list(command.entries)] = command.latency
    return latency


def executed_steps(wanted: int, timing: Timing) -> int:
    """How many steps of a chunk to execute; 0 means the policy's own number.

    Raises:
        UserError: a chunk has not so many.
    """
    steps = wanted or timing.n_action_steps
    if not 1 <= steps <= timing.usable:
        raise UserError(
            f"scheduler.execute={wanted}: a chunk of this policy has {timing.usable} actions from the newest "
            f"observation on. Set 1 to {timing.usable}, or 0 for the policy's own {timing.n_action_steps}."
        )
    return steps


class Scheduler(ABC):
    """One request at a time; a chunk replaces what the plan held from its arrival on.

    Times of a chunk count from its observation. While the robot stands they do not pass: it has not moved since it was
    observed, and the chunk begins with its first action. This is so after a reset, and when the plan was used up.

    Args:
        timing: of the chunks.
        delay: how the delay is estimated.
        prior: seconds, the delay that is expected before the first measurement.

    Attributes:
        timing: the argument.
        delay: the estimate.
        counters: ``accepted`` chunks; ``over_budget``: came when all of their actions were past; ``stale``: were not
            asked for; ``lost`` inferences.
    """

    def __init__(self, timing: Timing, delay: DelaySettings, prior: float = 0.0) -> None:
        self.timing = timing
        self.delay = DelayEstimate(delay, prior)
        self.counters = dict.fromkeys(("accepted", "over_budget", "stale", "lost"), 0)
        self._plan: ChunkPlan | None = None
        self._followed = False
        self._origin = 0
        self._asked: int | None = None

    def reset(self, now: int, position: np.ndarray) -> None:
        self._plan = ChunkPlan.standing(now, position, self.timing.latency)
        self._followed = False
        self._asked = None

    def wants(self, now: int) -> bool:
        return self._plan is not None and self._asked is None and (not self._followed or self._due(now))

    def request(self, now: int, observed_at: int) -> Agreement:
        self._asked = observed_at
        return self._agreement(observed_at)

    def accept(self, chunk: Chunk, now: int) -> bool:
        if self._plan is None or chunk.observed_at != self._asked:
            self.counters["stale"] += 1
            return False
        self._asked = None
        delay = (now - chunk.observed_at) / NS
        self.delay.add(delay)
        if not self._in_time(delay):
            return False
        seam = now + self.timing.lookahead
        origin = chunk.observed_at + self._stood(chunk.observed_at, seam)
        times, actions = self._merged(self.timing.reached(origin), chunk.actions, now)
        keep = now - HISTORY
        self._plan, late = self._plan.spliced(seam, times, actions, step=self.timing.step, keep=keep)
        self.counters["over_budget"] += late
        self.counters["accepted"] += 1
        self._origin, self._followed = origin, True
        return True

    def lost(self) -> None:
        if self._asked is not None:
            self.counters["lost"] += 1
        self._asked = None

    def plan(self) -> Plan | None:
        return self._plan if self._followed else None

    @abstractmethod
    def _due(self, now: int) -> bool:
        """Whether to infer while a chunk is followed and no inference is under way."""

    def _agreement(self, observed_at: int) -> Agreement:
        return Agreement()

    def _in_time(self, delay: float) -> bool:
        """Whether a chunk that took so many seconds is of use."""
        return True

    def _merged(self, times: list[int], actions: np.ndarray, now: int) -> tuple[list[int], np.ndarray]:
        """What is put into the plan for a chunk: times of being reached (n,) [ns], actions (n, A)."""
        first = self.timing.n_obs_steps - 1
        return times[first:], actions[first:]

    def _stood(self, observed_at: int, seam: int) -> int:
        """How long the robot stood between an observation and a seam [ns]."""
        assert self._plan is not None
        if not self._followed:
            return seam + self.timing.largest_latency - observed_at
        if self._plan.end >= seam:
            return 0
        return max(0, seam + self.timing.largest_latency - max(self._plan.rest, observed_at))
