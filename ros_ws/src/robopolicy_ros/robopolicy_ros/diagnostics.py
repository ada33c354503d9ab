"""What the policy node says about itself once a second, and the times behind it."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from typing import Any

import numpy as np
from diagnostic_msgs.msg import DiagnosticArray, DiagnosticStatus, KeyValue

from robopolicy.runtime.clock import NS
from robopolicy.runtime.exchange import Chunk, Health
from robopolicy.runtime.runner import Status
from robopolicy.runtime.states import State

_KEPT_PERIODS = 3000
_KEPT_CHUNKS = 200
_LEVELS = {State.FAULT: DiagnosticStatus.ERROR, State.STOPPING: DiagnosticStatus.WARN}


class LoopTimes:
    """Periods of the command loop.

    Args:
        period: wanted [s].

    Attributes:
        cycles, missed: how many there were, and how many more there would have been in time.
    """

    def __init__(self, period: float) -> None:
        self.period = period
        self.cycles = self.missed = 0
        self._periods: deque[int] = deque(maxlen=_KEPT_PERIODS)
        self._spent: deque[int] = deque(maxlen=_KEPT_PERIODS)
        self._last: int | None = None

    def begin(self, now: int) -> None:
        """A cycle begins [ns]."""
        self.cycles += 1
        if self._last is not None:
            passed = now - self._last
            self._periods.append(passed)
            self.missed += max(0, round(passed / NS / self.period) - 1)
        self._last = now

    def end(self, now: int) -> None:
        """The cycle that began last is done [ns]."""
        assert self._last is not None
        self._spent.append(now - self._last)

    def values(self) -> dict[str, str]:
        """Milliseconds of the newest cycles, in words."""
        return {
            "loop period p50 p99 max [ms]": _milliseconds(self._periods),
            "loop work p50 p99 max [ms]": _milliseconds(self._spent),
            "cycles": str(self.cycles),
            "missed cycles": str(self.missed),
        }


class ChunkTimes:
    """How long the newest chunks took, by stage."""

    STAGES = ("observation", "inference", "delivery", "total")

    def __init__(self) -> None:
        self._kept: dict[str, deque[int]] = {stage: deque(maxlen=_KEPT_CHUNKS) for stage in self.STAGES}

    def add(self, chunk: Chunk, sent: int) -> dict[str, float]:
        """Seconds of a chunk's stages: its observation's age when inference began, inference, from its end until the
        first command of it was sent, and all of it.

        Args:
            chunk: the chunk.
            sent: when the first command that knows of it was sent [ns].
        """
        times = (
            chunk.started - chunk.observed_at,
            chunk.finished - chunk.started,
            sent - chunk.finished,
            sent - chunk.observed_at,
        )
        for stage, passed in zip(self.STAGES, times, strict=True):
            self._kept[stage].append(passed)
        return {stage: passed / NS for stage, passed in zip(self.STAGES, times, strict=True)}

    def values(self) -> dict[str, str]:
        return {f"{stage} p50 p99 max [ms]": _milliseconds(kept) for stage, kept in self._kept.items()}


def _milliseconds(times: deque[int]) -> str:
    if not times:
        return "none yet"
    found = np.array(times) / 1e6
    return f"{np.percentile(found, 50):.2f} {np.percentile(found, 99):.2f} {found.max():.2f}"


def diagnostics(
    name: str,
    stamp: Any,
    status: Status,
    health: Health,
    streams: Mapping[str, Mapping[str, int]],
    loop: LoopTimes,
    chunks: ChunkTimes,
    about: Mapping[str, str],
    now: int,
) -> DiagnosticArray:
    """The node's message for ``/diagnostics``.

    Args:
        name: of the node.
        stamp: of the message.
        status, health: of the runner and its worker.
        streams: counters of each stream.
        loop, chunks: times.
        about: what does not change: engine, bundle, robot.
        now: ns.
    """
    state = status.state.value
    level = _LEVELS.get(status.state, DiagnosticStatus.OK)
    if status.waiting and status.state is State.RUNNING:
        level = max(level, DiagnosticStatus.WARN)
    said = f"{state}: {status.reason}" if status.reason else state
    general = dict(about) | {"waiting for": status.waiting, "plan left [s]": f"{status.plan_left:.3f}"}
    general["delay reckoned with [s]"] = f"{status.delay:.3f}"
    counted = {key: str(count) for key, count in sorted(status.counters.items())}
    silent = [stream for stream, age in status.ages.items() if age == float("inf")]
    lost = [stream for stream, counts in streams.items() if counts.get("gaps", 0)]
    heard = {f"{stream} age [s]": f"{age:.3f}" for stream, age in status.ages.items()}
    heard |= {f"{stream} {what}": str(count) for stream, counts in streams.items() for what, count in counts.items()}
    sick = not health.alive or (not health.ready and health.error)
    worker = {
        "ready": str(health.ready),
        "alive": str(health.alive),
        "heartbeat age [s]": f"{(now - health.beat) / NS:.3f}",
        "failures": str(health.failures),
        "superseded requests": str(health.superseded),
    }
    message = DiagnosticArray(
        status=[
            _status(name, "state", level, said, general | counted),
            _status(
                name,
                "streams",
                DiagnosticStatus.WARN if silent or lost else DiagnosticStatus.OK,
                _streams_said(silent, lost),
                heard,
            ),
            _status(
                name,
                "policy",
                DiagnosticStatus.ERROR if sick else DiagnosticStatus.OK,
                health.error or ("ready" if health.ready else "loading"),
                worker | chunks.values(),
            ),
            _status(name, "command loop", DiagnosticStatus.OK, "", loop.values()),
        ]
    )
    message.header.stamp = stamp
    return message


def _streams_said(silent: list[str], lost: list[str]) -> str:
    said = [f"nothing came of {', '.join(silent)}"] if silent else []
    said += [f"messages of {', '.join(lost)} were lost"] if lost else []
    return "; ".join(said) or "all there"


def _status(name: str, part: str, level: bytes, said: str, values: Mapping[str, str]) -> DiagnosticStatus:
    pairs = [KeyValue(key=key, value=value) for key, value in values.items()]
    return DiagnosticStatus(level=level, name=f"{name}: {part}", message=said, hardware_id="", values=pairs)
