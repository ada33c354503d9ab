"""Real-time chunking (Black, Galliker & Levine 2025, arXiv 2506.07339)."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from robopolicy.errors import UserError
from robopolicy.export.rtc_config import GUIDED_ENGINE, RtcConfig
from robopolicy.runtime.clock import NS
from robopolicy.runtime.delays import DelaySettings, steps_of
from robopolicy.runtime.scheduling import Agreement, Scheduler, Timing, executed_steps


@dataclass(frozen=True)
class RealTimeChunkingSettings:
    """Infer while moving; each chunk agrees with what is carried out until it arrives.

    Attributes:
        mode: ``soft``: the mask decays, and the engine moves its clean estimates towards the chunk before.
            ``vjp``: the same mask for the guidance as published, which the engine `GUIDED_ENGINE` computes. ``prefix``:
            agreement is full or none, for policies that were trained with a prefix; a chunk that comes later than its
            prefix reaches is not used.
        execute: steps s after a chunk's observation at which the next one is asked for, if the one before has arrived;
            0: the policy's ``n_action_steps``.
        beta: of ``vjp``: largest weight of the guidance; None: the number of network calls; 0: no guidance.
        warm_start: of ``vjp``: network calls that are left out by starting from the chunk before, noised.
        delay: how the delay is estimated.

    Raises:
        UserError: a setting of ``vjp`` in another mode, or one that is negative.
    """

    name: Literal["rtc"] = "rtc"
    mode: Literal["soft", "vjp", "prefix"] = "soft"
    execute: int = 0
    beta: float | None = None
    warm_start: int = 0
    delay: DelaySettings = field(default_factory=DelaySettings)

    def __post_init__(self) -> None:
        if RtcConfig(self.beta, self.warm_start) != RtcConfig() and self.mode != "vjp":
            raise UserError(
                f"scheduler.beta={self.beta} and scheduler.warm_start={self.warm_start} are settings of "
                f"scheduler.mode=vjp, found scheduler.mode={self.mode}. Leave them out, or set scheduler.mode=vjp and "
                f"engine={GUIDED_ENGINE}."
            )

    @property
    def guidance(self) -> RtcConfig | None:
        """What the engine `GUIDED_ENGINE` is told; None in modes that go with other engines."""
        return RtcConfig(self.beta, self.warm_start) if self.mode == "vjp" else None

    def check_engine(self, engine: str) -> None:
        """Raise a `UserError` if an engine, by name, does not do what the mode says."""
        if (self.mode == "vjp") != (engine == GUIDED_ENGINE):
            raise UserError(
                f"scheduler.mode={self.mode} does not fit engine={engine}: mode=vjp goes with engine={GUIDED_ENGINE}, "
                "the other modes with any other engine."
            )


class RealTimeChunking(Scheduler):
    """Real-time chunking.

    The chunk before is read from the plan, at the times of the next chunk's entries, whatever the phase between the
    two observations. Entries before the newest observation are frozen to what was carried out, where the plan still
    knows it: training saw the true past there. Prefixes begin at the newest observation.

    Args:
        settings, timing, prior: see `Scheduler`.
        prefix_steps: the longest prefix that the policy was trained with; None: not known. Mode ``prefix`` only.

    Raises:
        UserError: the execution horizon leaves no room for any delay, or not for the one that is expected; or the
            policy was trained without a prefix, or with a shorter one.

    Attributes:
        counters: beside those of `Scheduler`: ``delay_clipped``: requests whose expected delay was longer than what is
            left of the chunk before, or than the policy's prefix; ``late``: chunks that took longer than their request
            reckoned with.
    """

    def __init__(
        self, settings: RealTimeChunkingSettings, timing: Timing, prior: float = 0.0, prefix_steps: int | None = None
    ) -> None:
        super().__init__(timing, settings.delay, prior)
        self._mode = settings.mode
        self._execute = executed_steps(settings.execute, timing)
        self.counters |= {"delay_clipped": 0, "late": 0}
        self._frozen: int | None = None
        self._longest: int | None = prefix_steps if self._mode == "prefix" else None
        if self._longest == 0:
            raise UserError(
                "scheduler.mode=prefix: this policy was trained without a prefix. Set scheduler.mode=soft, or train it "
                "with policy.prefix_steps."
            )
        step, largest = timing.step / NS, largest_delay(timing.usable, self._execute)
        expected = self._steps(prior)
        if expected > largest or largest < 1:
            raise UserError(
                f"scheduler.execute={self._execute}: real-time chunking needs delay <= execute <= {timing.usable} - "
                f"delay (steps of {step:g} s), which allows a delay of {largest} steps; {max(expected, 1)} are "
                f"expected ({prior:.3g} s of inference, {timing.committed:g} s until commands are carried out). Set a "
                "smaller execute, or use a faster engine, fewer sampler steps or a policy with a longer horizon."
            )
        if self._longest is not None and expected > self._longest:
            raise UserError(
                f"scheduler.mode=prefix: a delay of {expected} steps is expected, and this policy was trained with "
                f"prefixes of up to {self._longest}. Set scheduler.mode=soft, use a faster engine, or train with "
                f"policy.prefix_steps={expected}."
            )

    def reset(self, now: int, position: np.ndarray) -> None:
        super().reset(now, position)
        self._frozen = None

    def _steps(self, delay: float) -> int:
        return steps_of(delay + self.timing.committed, self.timing.step / NS)

    def _due(self, now: int) -> bool:
        return now >= self._origin + self._execute * self.timing.step

    def _agreement(self, observed_at: int) -> Agreement:
        assert self._plan is not None
        first = self.timing.n_obs_steps - 1
        previous, known = self._plan.reached(self.timing.reached(observed_at))
        left = int(known[first:].sum()) if self._followed else 0
        self._frozen = None
        if left == 0:  # the robot will stand before the chunk begins
            return Agreement()
        delay = self._steps(self.delay.seconds)
        possible = left if self._longest is None else min(left, self._longest)
        self.counters["delay_clipped"] += delay > possible
        # a plan that ends earlier is no harm: the robot stands, and the chunk goes on where it stood
        self._frozen = delay if self._longest is None else min(delay, self._longest)
        frozen = min(delay, possible)
        mask = np.zeros(self.timing.horizon, np.float32)
        if self._mode == "prefix":
            mask[first:] = prefix_mask(self.timing.usable, frozen)
        else:
            mask[:first] = known[:first]
            mask[first:] = soft_mask(self.timing.usable, frozen, self.timing.usable - left)
        return Agreement(previous.astype(np.float32), mask)

    def _in_time(self, delay: float) -> bool:
        late = self._frozen is not None and self._steps(delay) > self._frozen
        self.counters["late"] += late
        return not (late and self._mode == "prefix")


def soft_mask(horizon: int, delay: int, executed: int) -> np.ndarray:
    """The paper's equation 5: ones, a decay, zeros.

    ``W_i = 1`` for ``i < d``, ``c_i (e^c_i - 1) / (e - 1)`` with ``c_i = (H - s - i) / (H - s - d + 1)`` for
    ``d <= i < H - s``, and 0 from there on.

    Args:
        horizon: H, actions of a chunk from the newest observation on.
        delay: d, actions that are carried out before the chunk arrives.
        executed: s, actions of the chunk before that the next one no longer holds; H - s are left of it.

    Returns:
        (H,) float32.
    """
    i = np.arange(horizon)
    left = horizon - executed
    c = np.clip((left - i) / (left - delay + 1), 0, 1)
    return np.where(i < min(delay, left), 1.0, c * np.expm1(c) / (math.e - 1)).astype(np.float32)


def prefix_mask(horizon: int, delay: int) -> np.ndarray:
    """(H,) float32: 1 for the first ``delay`` actions, 0 for the others (training-time RTC, arXiv 2512.05964)."""
    return (np.arange(horizon) < delay).astype(np.float32)


def largest_delay(horizon: int, execute: int) -> int:
    """Largest delay d in steps for which ``d <= s <= H - d`` can hold with ``s >= execute``."""
    return min(horizon - execute, horizon // 2)
