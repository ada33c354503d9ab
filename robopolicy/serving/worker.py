"""One thread that owns the policy: connections take turns, and of each connection only the newest request waits."""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections.abc import Callable, Hashable
from dataclasses import dataclass

import numpy as np

from robopolicy.serving.observations import Request


@dataclass(frozen=True)
class Done:
    """What became of a request.

    Attributes:
        actions: (n, A); None where a newer request took its place or the policy failed.
        error: what the policy raised.
        queue_seconds: waited for the policy.
        infer_seconds: spent in the policy.
    """

    actions: np.ndarray | None = None
    error: Exception | None = None
    queue_seconds: float = 0.0
    infer_seconds: float = 0.0

    @property
    def superseded(self) -> bool:
        return self.actions is None and self.error is None


@dataclass(frozen=True, eq=False)
class Job:
    """A request on its way.

    Attributes:
        received: when, on `time.monotonic`'s clock.
        done: resolved in the event loop.
    """

    request: Request
    received: float
    done: asyncio.Future[Done]


class Worker:
    """Runs requests one after another in a thread of its own.

    A connection that submits joins the end of the line; a newer request of the same connection takes the older one's
    place there. So each waits for at most one inference of every other connection.

    Args:
        prepare: called first, in the thread.
        infer: computes the actions of a request, in the thread.
    """

    def __init__(self, prepare: Callable[[], None], infer: Callable[[Request], np.ndarray]) -> None:
        self._prepare, self._infer = prepare, infer
        self._line: dict[Hashable, Job] = {}
        self._changed = threading.Condition()
        self._stopping = False
        self._busy_since: float | None = None
        self._thread: threading.Thread | None = None

    async def start(self) -> None:
        """Start the thread and wait until the policy is prepared; raises what preparing raises."""
        self._loop = asyncio.get_running_loop()
        ready: asyncio.Future[None] = self._loop.create_future()
        # a daemon: an inference that never returns must not keep the process alive
        self._thread = threading.Thread(target=self._work, args=(ready,), name="policy", daemon=True)
        self._thread.start()
        await ready

    def submit(self, connection: Hashable, request: Request) -> Job:
        """Put a request in line; the one of this connection that waits there is superseded."""
        job = Job(request, time.monotonic(), self._loop.create_future())
        with self._changed:
            old = self._line.get(connection)
            self._line[connection] = job
            self._changed.notify()
        if old is not None:
            _resolve(old.done, Done())
        return job

    def drop(self, connection: Hashable) -> None:
        """Forget the waiting request of a connection that is gone."""
        with self._changed:
            self._line.pop(connection, None)

    def working(self, longest: float) -> bool:
        """Whether the thread lives and its present inference takes less than ``longest`` seconds."""
        since = self._busy_since
        alive = self._thread is not None and self._thread.is_alive()
        return alive and (since is None or time.monotonic() - since < longest)

    async def stop(self, longest: float) -> bool:
        """End the thread after what is in line; returns whether it ended within ``longest`` seconds."""
        with self._changed:
            self._stopping = True
            self._changed.notify()
        if self._thread is None:
            return True
        await asyncio.to_thread(self._thread.join, longest)
        return not self._thread.is_alive()

    def _work(self, ready: asyncio.Future[None]) -> None:
        try:
            self._prepare()
        except Exception as error:
            self._post(_fail, ready, error)
            return
        self._post(_resolve, ready, None)
        while (job := self._next()) is not None:
            done = self._run(job)
            self._busy_since = None
            self._post(_resolve, job.done, done)

    def _next(self) -> Job | None:
        with self._changed:
            self._changed.wait_for(lambda: self._line or self._stopping)
            if not self._line:
                return None
            self._busy_since = time.monotonic()
            return self._line.pop(next(iter(self._line)))

    def _run(self, job: Job) -> Done:
        began = time.monotonic()
        try:
            actions, error = self._infer(job.request), None
        except Exception as raised:
            actions, error = None, raised
        return Done(actions, error, began - job.received, time.monotonic() - began)

    def _post(self, call: Callable[..., None], *arguments: object) -> None:
        with contextlib.suppress(RuntimeError):  # the event loop is closed: nobody waits any more
            self._loop.call_soon_threadsafe(call, *arguments)


def _resolve(future: asyncio.Future, value: object) -> None:
    if not future.done():
        future.set_result(value)


def _fail(future: asyncio.Future, error: Exception) -> None:
    if not future.done():
        future.set_exception(error)
