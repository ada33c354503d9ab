"""A robot's week in seconds: schedulers under a simulated clock, with chunks that disagree as a sampler's do."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from robopolicy.runtime.chunk_scheduler import Agreement, ChunkScheduler, SchedulerSettings, make_scheduler
from robopolicy.runtime.clock import NS, SimulatedClock, nanoseconds
from robopolicy.runtime.exchange import Chunk
from robopolicy.spec import KeySpec, PolicySpec

FPS = 20.0
STEP = nanoseconds(1 / FPS)


def spec_of(dim=2, n_obs_steps=2, horizon=16, n_action_steps=8):
    return PolicySpec(
        (KeySpec("observation.state", (dim,)),),
        KeySpec("action", (dim,), "action"),
        FPS,
        n_obs_steps,
        horizon,
        n_action_steps,
    )


def path(times, dim=2):
    """Where a demonstrator would be, (n, dim), at times in ns."""
    t = np.asarray(times, np.float64)[:, None] / NS
    return np.sin(2 * t + np.arange(dim))


class Sampler:
    """The path with an offset of its own for each chunk, and the soft projection of exported engines."""

    def __init__(self, spec: PolicySpec, spread: float = 0.1, seed: int = 0) -> None:
        self.spec, self.spread = spec, spread
        self.rng = np.random.default_rng(seed)

    def __call__(self, observed_at: int, agreement: Agreement) -> np.ndarray:
        spec = self.spec
        times = [observed_at + (i - spec.n_obs_steps + 2) * STEP for i in range(spec.horizon)]
        dim = spec.action.dim
        free = path(times, dim) + self.spread * self.rng.standard_normal(dim)
        if agreement.mask is None:
            return free.astype(np.float32)
        mask = agreement.mask[:, None]
        return ((1 - mask) * free + mask * agreement.previous).astype(np.float32)


@dataclass
class Swap:
    """One chunk: when it was asked for, with which agreement, what came, and the plans before and after."""

    observed_at: int
    accepted_at: int
    agreement: Agreement
    actions: np.ndarray
    before: object
    after: object


@dataclass
class Run:
    """What a scheduler did."""

    scheduler: ChunkScheduler
    times: np.ndarray
    positions: np.ndarray
    velocities: np.ndarray
    swaps: list[Swap] = field(default_factory=list)

    @property
    def paused(self) -> float:
        """Share of the time, after the first chunk, at which the robot was told to stand still; turning is no pause."""
        still = abs(self.velocities).max(axis=1) == 0
        return float((still[1:] & still[:-1]).mean())


def drive(
    settings: SchedulerSettings,
    delay: Callable[[int], float] | float,
    *,
    spec: PolicySpec | None = None,
    seconds: float = 6.0,
    tick: float = 0.01,
    observation_age: float = 0.03,
    lookahead: float = 0.02,
    latency: np.ndarray | None = None,
    sampler: Callable[[int, Agreement], np.ndarray] | None = None,
    prior: float = 0.0,
) -> Run:
    """Follow a scheduler's plan; the k-th inference takes ``delay(k)`` seconds."""
    spec = spec or spec_of()
    sampler = sampler or Sampler(spec)
    scheduler = make_scheduler(settings, spec, latency=latency, lookahead=lookahead, prior_delay=prior)
    clock = SimulatedClock(1000 * NS)
    scheduler.reset(clock.now(), path([clock.now()], spec.action.dim)[0])
    rows, swaps, pending, count = [], [], None, 0
    for _ in range(round(seconds / tick)):
        now = clock.now()
        if pending is not None and now >= pending[0]:
            ready, observed_at, agreement, actions = pending
            pending, before = None, scheduler.plan()
            accepted = scheduler.counters["accepted"]
            scheduler.accept(Chunk(count, 0, observed_at, actions, observed_at, ready), now)
            if scheduler.counters["accepted"] > accepted:
                swaps.append(Swap(observed_at, now, agreement, actions, before, scheduler.plan()))
        if scheduler.wants(now):
            assert pending is None
            observed_at = now - nanoseconds(observation_age)
            agreement = scheduler.request(now, observed_at)
            took = delay(count) if callable(delay) else delay
            pending = (now + nanoseconds(took), observed_at, agreement, sampler(observed_at, agreement))
            count += 1
        plan = scheduler.plan()
        if plan is not None:
            rows.append((now, *plan.at(now + nanoseconds(lookahead))))
        clock.advance(nanoseconds(tick))
    times, positions, velocities = zip(*rows, strict=True)
    return Run(scheduler, np.array(times), np.array(positions), np.array(velocities), swaps)
