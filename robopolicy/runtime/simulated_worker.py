"""Inference under a simulated clock: the same chunks, after a delay of one's choice."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from robopolicy.runtime.clock import Clock, nanoseconds
from robopolicy.runtime.exchange import Chunk, Health, Request
from robopolicy.runtime.inference_process import Samples, explained, infer
from robopolicy.spec import PolicySpec


@dataclass(frozen=True)
class _Inference:
    """One that runs: when it began and ends, and what comes of it."""

    started: int
    finished: int
    chunk: Chunk | None
    error: str


class SimulatedWorker:
    """Computes in this process and hands a chunk out when the clock has passed its delay.

    What comes out depends on the requests, the clock and the delays alone, not on how often it is asked.

    Args:
        policy: an `robopolicy.inference.policy.ExportedPolicy`, or what samples as it does.
        clock: of the runtime.
        delay: seconds that the inference for a request takes, by the request's id.
    """

    def __init__(self, policy: Samples, clock: Clock, delay: Callable[[int], float]) -> None:
        self._policy, self._clock, self._delay = policy, clock, delay
        self._pending: tuple[int, Request] | None = None
        self._running: _Inference | None = None
        self._ready: Chunk | None = None
        self._error = ""
        self._failures = self._superseded = 0
        self._closed = False

    @property
    def spec(self) -> PolicySpec:
        return self._policy.spec

    def submit(self, request: Request) -> None:
        """See `robopolicy.runtime.exchange.Worker.submit`."""
        self._advance()
        self._superseded += self._pending is not None
        self._pending = (self._clock.now(), request)
        self._advance()

    def poll(self) -> Chunk | None:
        """See `robopolicy.runtime.exchange.Worker.poll`."""
        self._advance()
        chunk, self._ready = self._ready, None
        return chunk

    def health(self) -> Health:
        """See `robopolicy.runtime.exchange.Worker.health`."""
        self._advance()
        return Health(
            ready=True,
            alive=not self._closed,
            beat=self._clock.now(),
            busy_since=self._running.started if self._running else None,
            error=self._error,
            failures=self._failures,
            superseded=self._superseded,
        )

    def close(self) -> None:
        """Drop what is asked for."""
        self._closed, self._pending, self._running = True, None, None

    def _advance(self) -> None:
        """Do what happened until now: end inferences, and begin the next one at the moment when it could begin."""
        now = self._clock.now()
        idle_since = 0
        while not self._closed:
            if self._running is not None:
                if self._running.finished > now:
                    return
                idle_since = self._running.finished
                self._end(self._running)
            if self._pending is None:
                return
            submitted, request = self._pending
            self._pending = None
            self._running = self._begin(request, max(submitted, idle_since))

    def _begin(self, request: Request, started: int) -> _Inference:
        finished = started + nanoseconds(self._delay(request.id))
        try:
            actions = infer(self._policy, request)
        except Exception as error:
            return _Inference(started, finished, None, explained(error))
        chunk = Chunk(request.id, request.epoch, request.observed_at, actions, started, finished)
        return _Inference(started, finished, chunk, "")

    def _end(self, inference: _Inference) -> None:
        self._running = None
        self._error = inference.error
        if inference.chunk is None:
            self._failures += 1
        else:
            self._ready = inference.chunk
