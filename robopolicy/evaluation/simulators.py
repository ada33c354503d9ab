"""Many environments side by side, in this process or in several.

Why not `gymnasium.vector`: its `AsyncVectorEnv` takes one process per environment, so that the batch of the policy
(large for a GPU) and the number of processes (one per core) could not be chosen apart; its `step` moves every
environment, so that a finished one must be restarted or refused, where we need some to rest and others to start a
given seed; it exchanges messages once per step; and the death of a process ends it. Here a message carries a whole
action chunk, workers write observations straight into shared memory, in the layout that the policy reads, and a worker
that dies is replaced: its episodes are replayed from their seeds and actions.
"""

from __future__ import annotations

import contextlib
import ctypes
import logging
import multiprocessing
import pickle
import traceback
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import Any, Protocol

import numpy as np

from robopolicy.errors import UserError
from robopolicy.evaluation.environments import Environment
from robopolicy.evaluation.episode import Episode, EpisodeResult, history_buffers
from robopolicy.spec import PolicySpec

log = logging.getLogger(__name__)

MAX_RESTARTS = 3  # of one worker, since an episode of its ended

Histories = Mapping[str, np.ndarray]
Ended = dict[int, EpisodeResult]  # by slot


class Simulators(Protocol):
    """A fixed number of slots, each holding one environment.

    Attributes:
        histories: as `history_buffers` makes them; row ``i`` is what the policy may see of slot ``i``.
    """

    histories: Histories

    def start(self, seeds: Mapping[int, int]) -> None:
        """Begin an episode in each of these slots: ``{slot: seed}``."""

    def execute(self, chunks: Mapping[int, np.ndarray]) -> Callable[[], Ended]:
        """Execute ``{slot: (n, action dim)}``; the slots not named rest.

        Returns:
            A function that waits until it is done and returns the results of the episodes that ended. The histories
            of these slots are settled only then.
        """

    def close(self) -> None: ...


class LocalSimulators:
    """Environments in this process, one after the other.

    Args:
        histories: buffers for all slots, see `Simulators`.
        slots: those of them that are simulated here.
    """

    def __init__(self, environment: Environment, spec: PolicySpec, histories: Histories, slots: Sequence[int]) -> None:
        self.histories = histories
        self._episodes = {
            slot: Episode(
                environment.make(spec), {key: rows[slot] for key, rows in histories.items()}, environment.max_steps
            )
            for slot in slots
        }

    def start(self, seeds: Mapping[int, int]) -> None:
        for slot, seed in seeds.items():
            self._episodes[slot].start(seed)

    def execute(self, chunks: Mapping[int, np.ndarray]) -> Callable[[], Ended]:
        results = {slot: self._episodes[slot].execute(chunk) for slot, chunk in chunks.items()}
        ended = {slot: result for slot, result in results.items() if result is not None}
        return lambda: ended

    def close(self) -> None:
        for episode in self._episodes.values():
            episode.close()


class WorkerSimulators:
    """Environments in several processes; slot ``i`` lives in worker ``i % workers``."""

    def __init__(self, environment: Environment, spec: PolicySpec, slots: int, workers: int) -> None:
        # spawn: a forked child would inherit torch's threads and GPU context, and MuJoCo's rendering context.
        context = multiprocessing.get_context("spawn")
        memory = {
            key: context.RawArray(ctypes.c_byte, rows.nbytes) for key, rows in history_buffers(spec, slots).items()
        }
        self.histories: Histories = _views(memory, spec, slots)
        workers = min(workers, slots)
        self._workers = [
            _Worker(context, i, (environment, spec, memory, slots, range(i, slots, workers))) for i in range(workers)
        ]
        try:
            for worker in self._workers:  # all open their environments at the same time
                worker.wait_open()
        except BaseException:  # nobody could close the others
            self.close()
            raise

    def start(self, seeds: Mapping[int, int]) -> None:
        self._post("start", seeds)()

    def execute(self, chunks: Mapping[int, np.ndarray]) -> Callable[[], Ended]:
        return self._post("execute", chunks)

    def close(self) -> None:
        for worker in self._workers:
            worker.pipe.close()  # its next recv ends it
        for worker in self._workers:
            worker.process.join()

    def _post(self, method: str, per_slot: Mapping[int, Any]) -> Callable[[], Ended]:
        shares: dict[int, dict[int, Any]] = {}
        for slot, value in per_slot.items():
            shares.setdefault(slot % len(self._workers), {})[slot] = value
        calls = [(self._workers[i], self._workers[i].post(method, share)) for i, share in shares.items()]

        def wait() -> Ended:
            ended: Ended = {}
            for worker, call in calls:
                ended |= worker.wait(call)
            return ended

        return wait


@dataclass(eq=False)
class _Call:
    """A request to a worker, and its answer once there is one."""

    method: str
    per_slot: Mapping[int, Any]
    answer: Ended | None = None


@dataclass
class _Playing:
    """What brings an episode back to where it is: simulators are deterministic."""

    seed: int
    chunks: list[np.ndarray] = field(default_factory=list)


class _Died(Exception):
    """The worker's end of the pipe is closed."""


class _Worker:
    """The parent's side of one worker process: requests, answers in their order, and what it takes to replace it."""

    def __init__(self, context: multiprocessing.context.SpawnContext, index: int, job: tuple[Any, ...]) -> None:
        self._context, self._index, self._job = context, index, job
        self._calls: deque[_Call] = deque()  # not answered yet, oldest first
        self._playing: dict[int, _Playing] = {}  # by slot, as of the last answer
        self._restarts = 0
        self.pipe, self.process = self._spawn()

    def wait_open(self) -> None:
        """Wait until its environments are open."""
        try:
            self._receive()
        except _Died:
            self.process.join()
            raise UserError(
                f"Simulation worker {self._index} ended with exit code {self.process.exitcode} while it opened its "
                "environments; its own message is above. Use fewer workers if memory ran out, or workers=0 to see the "
                "error in this process."
            ) from None

    def post(self, method: str, per_slot: Mapping[int, Any]) -> _Call:
        call = _Call(method, per_slot)
        self._calls.append(call)
        with contextlib.suppress(_Died):  # found again, and mended, by the `wait` for this call
            self._send(call)
        return call

    def wait(self, call: _Call) -> Ended:
        """Wait for the answer of a call, and so of all before it; replaces a worker that dies."""
        while call.answer is None:
            try:
                self._note(self._calls[0], self._receive())
            except _Died:
                self._restart()
        return call.answer

    def _note(self, call: _Call, ended: Ended) -> None:
        self._calls.popleft()
        call.answer = ended
        for slot, value in call.per_slot.items():
            if call.method == "start":
                self._playing[slot] = _Playing(value)
            elif slot in ended:
                del self._playing[slot]
                self._restarts = 0
            else:
                self._playing[slot].chunks.append(value)

    def _restart(self) -> None:
        """Replace the dead worker, replay its episodes up to the last answer, repeat what it had not answered."""
        self.process.join()
        self.pipe.close()
        starting = [seed for call in self._calls if call.method == "start" for seed in call.per_slot.values()]
        seeds = sorted([*starting, *(playing.seed for playing in self._playing.values())])
        death = f"Simulation worker {self._index} ended with exit code {self.process.exitcode} in the episodes {seeds}"
        if self._restarts == MAX_RESTARTS:
            raise UserError(
                f"{death}, for the {MAX_RESTARTS + 1}th time in a row; its own message is above. Use fewer workers if "
                "memory ran out, or workers=0 to see the error in this process."
            )
        self._restarts += 1
        log.warning("%s; a new one replays them (%d of %d).", death, self._restarts, MAX_RESTARTS)
        self.pipe, self.process = self._spawn()
        self.wait_open()
        replay = {slot: np.concatenate(playing.chunks) for slot, playing in self._playing.items() if playing.chunks}
        with contextlib.suppress(_Died):  # again: found by the next turn of `wait`
            for again in (_Call("start", {i: p.seed for i, p in self._playing.items()}), _Call("execute", replay)):
                self._send(again)
                self._receive()
            for call in self._calls:
                self._send(call)

    def _send(self, call: _Call) -> None:
        try:
            self.pipe.send((call.method, call.per_slot))
        except OSError as error:
            raise _Died from error

    def _receive(self) -> Ended:
        try:
            error, ended = self.pipe.recv()
        except (EOFError, OSError) as closed:
            raise _Died from closed
        if error is not None:  # of the environment or the policy's actions, whatever its type
            raise error
        return ended

    def _spawn(self) -> tuple[Connection, BaseProcess]:
        ours, theirs = self._context.Pipe()
        process = self._context.Process(
            target=_serve, args=(theirs, *self._job), daemon=True, name=f"sim-{self._index}"
        )
        process.start()
        theirs.close()  # so that the death of the worker ends the pipe
        return ours, process


def _views(memory: Mapping[str, Any], spec: PolicySpec, slots: int) -> dict[str, np.ndarray]:
    return {
        key: np.frombuffer(memory[key], rows.dtype).reshape(rows.shape)
        for key, rows in history_buffers(spec, slots).items()
    }


def _serve(
    pipe: Connection,
    environment: Environment,
    spec: PolicySpec,
    memory: Mapping[str, Any],
    slots: int,
    mine: Sequence[int],
) -> None:
    """Main function of a worker: open the environments, then answer calls until the pipe closes."""
    with contextlib.suppress(EOFError, OSError):  # the parent closed the pipe, or died
        try:
            local = LocalSimulators(environment, spec, _views(memory, spec, slots), mine)
        except Exception as error:  # the parent raises it
            pipe.send((_portable(error), {}))
            return
        with contextlib.closing(local):
            pipe.send((None, {}))
            while True:
                method, per_slot = pipe.recv()
                try:
                    answer: tuple[Exception | None, Ended] = (None, _perform(local, method, per_slot))
                except Exception as error:  # the parent raises it
                    answer = (_portable(error), {})
                pipe.send(answer)


def _perform(local: LocalSimulators, method: str, per_slot: Mapping[int, Any]) -> Ended:
    if method == "start":
        local.start(per_slot)
        return {}
    return local.execute(per_slot)()


def _portable(error: Exception) -> Exception:
    """The error with the worker's traceback as a note; as a RuntimeError where it cannot be sent."""
    trace = "".join(traceback.format_exception(error))
    try:
        error = pickle.loads(pickle.dumps(error))  # our own bytes: some errors can be written but not read back
    except Exception:  # whatever its constructor or its attributes do
        error = RuntimeError(f"{type(error).__name__}: {error}")
    error.add_note(f"In the simulation worker:\n{trace}")
    return error


def simulators(environment: Environment, spec: PolicySpec, slots: int, workers: int) -> Simulators:
    """Open ``slots`` environments, in this process (``workers=0``) or spread over worker processes."""
    if workers == 0:
        return LocalSimulators(environment, spec, history_buffers(spec, slots), range(slots))
    return WorkerSimulators(environment, spec, slots, workers)
