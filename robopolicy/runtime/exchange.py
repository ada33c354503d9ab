"""What the runtime and the inference worker tell each other."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from robopolicy.spec import PolicySpec


@dataclass(frozen=True, eq=False)
class Request:
    """What a chunk is asked for.

    Attributes:
        id: counts up.
        epoch: counts the interruptions (stops, interventions); answers of another epoch are thrown away.
        observed_at: time of the newest observation [ns].
        values: by key, (n_obs_steps, *shape), physical units; images uint8 RGB. Goals (*shape) under ``goal.<key>``.
        previous: (H, A) the chunk to agree with, physical units, entry i for the same time as entry i of the answer.
        mask: (H,) in [0, 1], how far each action must agree with ``previous``; given with it.
        seed: of the noise.
        instruction: what to do, for a policy with tasks.
    """

    id: int
    epoch: int
    observed_at: int
    values: Mapping[str, np.ndarray]
    previous: np.ndarray | None = None
    mask: np.ndarray | None = None
    seed: int = 0
    instruction: str | None = None


@dataclass(frozen=True, eq=False)
class Chunk:
    """The answer.

    Attributes:
        id, epoch, observed_at: of the request.
        actions: (H, A) in physical units as the policy gave them, not yet checked; entry ``n_obs_steps - 1`` is to be
            reached one control step after ``observed_at``.
        started, finished: when the worker began and ended [ns], on the runtime's clock.
    """

    id: int
    epoch: int
    observed_at: int
    actions: np.ndarray
    started: int
    finished: int


@dataclass(frozen=True)
class Health:
    """How the worker is.

    Attributes:
        ready: the policy is loaded and warm.
        alive: its process runs.
        beat: when it last said that it lives [ns].
        busy_since: when the inference that runs began [ns]; None when it waits.
        error: what the last inference or the loading raised, for a person; empty when it went well.
        failures: inferences that raised.
        superseded: requests that a newer one replaced before they were begun.
        usual: seconds that an inference usually takes, as warming up showed; 0 where that is not known.
    """

    ready: bool = False
    alive: bool = True
    beat: int = 0
    busy_since: int | None = None
    error: str = ""
    failures: int = 0
    superseded: int = 0
    usual: float = 0.0


class Worker(Protocol):
    """Computes chunks beside the command loop. No method but `close` waits for anything."""

    @property
    def spec(self) -> PolicySpec: ...

    def submit(self, request: Request) -> None:
        """Ask for a chunk. The newest request wins: it replaces one that was not begun."""

    def poll(self) -> Chunk | None:
        """The newest chunk that is ready and was not handed out before."""

    def health(self) -> Health: ...

    def close(self) -> None:
        """End the worker; it is killed if it does not end by itself."""


@dataclass(frozen=True, eq=False)
class Command:
    """One set point of the robot, in action space.

    Attributes:
        time: when it is to be reached [ns].
        position: (A,) physical units of the action: joint angles [rad], gripper, pose.
        velocity, acceleration: (A,) its derivatives; zero where they mean nothing.
    """

    time: int
    position: np.ndarray
    velocity: np.ndarray
    acceleration: np.ndarray


@dataclass(frozen=True, eq=False)
class Trajectory:
    """Set points to come, ending at rest.

    Attributes:
        times: (T,) ns, rising; the first lies in the future.
        positions, velocities, accelerations: (T, A).
    """

    times: np.ndarray
    positions: np.ndarray
    velocities: np.ndarray
    accelerations: np.ndarray


@dataclass(frozen=True, eq=False)
class Observation:
    """What a policy sees at one moment.

    Attributes:
        time: of the newest step [ns].
        values: by key, (n_obs_steps, *shape), oldest first.
        stamps: newest stamp that was used of each stream [ns].
    """

    time: int
    values: Mapping[str, np.ndarray] = field(default_factory=dict)
    stamps: Mapping[str, int] = field(default_factory=dict)
