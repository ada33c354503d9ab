"""Many environments side by side, in this process or in several.

Why not `gymnasium.vector`: its `AsyncVectorEnv` takes one process per environment, so that the batch of the policy
(large for a GPU) and the number of processes (one per core) could not be chosen apart; its `step` moves every
environment, so that a finished one must be restarted or refused, where we need some to rest and others to start a
given seed; and it exchanges messages once per step. Here a message carries a whole action chunk, and workers write
observations straight into shared memory, in the layout that the policy reads.
"""

from __future__ import annotations

import contextlib
import ctypes
import multiprocessing
from collections.abc import Mapping, Sequence
from multiprocessing.connection import Connection
from typing import Any, Protocol

import numpy as np

from robopolicy.errors import UserError
from robopolicy.evaluation.environments import Environment
from robopolicy.evaluation.episode import Episode, EpisodeResult, history_buffers
from robopolicy.spec import PolicySpec

Histories = Mapping[str, np.ndarray]


class Simulators(Protocol):
    """A fixed number of slots, each holding one environment.

    Attributes:
        histories: (slots, n_obs_steps, *key.shape) per key; row ``i`` is what the policy may see of slot ``i``.
    """

    histories: Histories

    def start(self, seeds: Mapping[int, int]) -> None:
        """Begin an episode in each of these slots: ``{slot: seed}``."""

    def execute(self, chunks: Mapping[int, np.ndarray]) -> dict[int, EpisodeResult]:
        """Execute ``{slot: (n, action dim)}``; the slots not named rest. Returns the results of ended episodes."""

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

    def execute(self, chunks: Mapping[int, np.ndarray]) -> dict[int, EpisodeResult]:
        results = {slot: self._episodes[slot].execute(chunk) for slot, chunk in chunks.items()}
        return {slot: result for slot, result in results.items() if result is not None}

    def close(self) -> None:
        for episode in self._episodes.values():
            episode.close()


class WorkerSimulators:
    """Environments in several processes; slot ``i`` lives in worker ``i % workers``."""

    def __init__(self, environment: Environment, spec: PolicySpec, slots: int, workers: int) -> None:
        # spawn: a forked child would inherit torch's threads and GPU context, and MuJoCo's rendering context.
        context = multiprocessing.get_context("spawn")
        layout = history_buffers(spec, slots)
        memory = {key: context.RawArray(ctypes.c_byte, rows.nbytes) for key, rows in layout.items()}
        self.histories: Histories = _views(memory, spec, slots)
        self._workers = min(workers, slots)
        self._pipes: list[Connection] = []
        self._processes = []
        for worker in range(self._workers):
            ours, theirs = context.Pipe()
            mine = range(worker, slots, self._workers)
            process = context.Process(
                target=_serve, args=(theirs, environment, spec, memory, slots, mine), daemon=True, name=f"sim-{worker}"
            )
            process.start()
            theirs.close()  # so that the death of the worker ends the pipe
            self._pipes.append(ours)
            self._processes.append(process)
        for worker in range(self._workers):
            self._receive(worker)  # its environments are open

    def start(self, seeds: Mapping[int, int]) -> None:
        self._call("start", seeds)

    def execute(self, chunks: Mapping[int, np.ndarray]) -> dict[int, EpisodeResult]:
        return self._call("execute", chunks)

    def close(self) -> None:
        for pipe in self._pipes:
            pipe.close()  # the worker's next recv ends it
        for process in self._processes:
            process.join()

    def _call(self, method: str, per_slot: Mapping[int, Any]) -> dict[int, Any]:
        shares: list[dict[int, Any]] = [{} for _ in self._pipes]
        for slot, value in per_slot.items():
            shares[slot % self._workers][slot] = value
        asked = [worker for worker, share in enumerate(shares) if share]
        for worker in asked:
            try:
                self._pipes[worker].send((method, shares[worker]))
            except ConnectionError:
                raise self._death(worker) from None
        merged: dict[int, Any] = {}
        for worker in asked:
            merged |= self._receive(worker)
        return merged

    def _receive(self, worker: int) -> dict[int, Any]:
        try:
            error, results = self._pipes[worker].recv()
        except (EOFError, ConnectionError):
            raise self._death(worker) from None
        if error is not None:
            raise error
        return results

    def _death(self, worker: int) -> UserError:
        self._processes[worker].join()
        return UserError(
            f"Simulation worker {worker} ended with exit code {self._processes[worker].exitcode}; its own message is "
            "above. Use fewer workers if memory ran out, or workers=0 to see the error in this process."
        )


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
    try:
        local = LocalSimulators(environment, spec, _views(memory, spec, slots), mine)
    except Exception as error:  # the parent raises it
        pipe.send((error, {}))
        return
    pipe.send((None, {}))
    with contextlib.closing(local), contextlib.suppress(EOFError):
        while True:
            method, per_slot = pipe.recv()
            try:
                answer: tuple[Exception | None, dict] = (None, getattr(local, method)(per_slot) or {})
            except Exception as error:  # the parent raises it
                answer = (error, {})
            pipe.send(answer)


def simulators(environment: Environment, spec: PolicySpec, slots: int, workers: int) -> Simulators:
    """Open ``slots`` environments, in this process (``workers=0``) or spread over worker processes."""
    if workers == 0:
        return LocalSimulators(environment, spec, history_buffers(spec, slots), range(slots))
    return WorkerSimulators(environment, spec, slots, workers)
