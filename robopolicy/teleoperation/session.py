"""Recording what an operator does: one episode after the other, each on disk once it is confirmed.

An episode ends when the environment reports success, or by the operator's word. It is stored at once when its outcome
is known, and waits for the operator's word when it is not (stopped, or the time is over). A process that is killed
loses the episode that runs and nothing else.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np

from robopolicy.data.record import EVALUATION_SEEDS_FROM, array_specs, check_same_environment
from robopolicy.data.store import EpisodeStore
from robopolicy.data.undo import remove_last_episode
from robopolicy.errors import UserError
from robopolicy.teleoperation.actions import ActionAdapter
from robopolicy.teleoperation.command import Command, SessionKey


class Phase(Enum):
    """What the session is doing."""

    READY = "paused"
    RECORDING = "recording"
    REVIEW = "waiting for your word"


@dataclass(frozen=True)
class SessionReport:
    """Outcome of a session.

    Attributes:
        path: the dataset.
        recorded: episodes of this session that are in the dataset.
        succeeded: those of them that succeeded.
        steps: steps of them.
        episodes_in_dataset: episodes in the dataset now.
    """

    path: Path
    recorded: int
    succeeded: int
    steps: int
    episodes_in_dataset: int


class Session:
    """Drives an environment with commands and records the episodes.

    Per step are stored the observation before the action under the environment's keys, the ``action`` and the
    ``reward`` that followed: the layout of `record_demonstrations`. Each episode starts from the first seed, counted
    from ``seed``, that the dataset does not hold yet, so an episode that is taken back is played again.

    Attributes:
        phase: what the session is doing.
        seed: of the present episode.
        observation: the newest one.
        message: what happened last, for the operator.
        finished: the operator has quit, or all episodes are recorded.
    """

    phase: Phase
    seed: int
    observation: Mapping[str, np.ndarray]
    message: str

    def __init__(
        self, env: Any, store: EpisodeStore, adapter: ActionAdapter, *, seed: int = 0, episodes: int | None = None
    ) -> None:
        """Reset the environment for the first episode.

        Args:
            env: a Gymnasium environment as `array_specs` describes it.
            store: opened for appending; the session closes it.
            adapter: turns commands into the environment's actions.
            seed: the first one to use.
            episodes: the session ends when it has recorded so many; None: when the operator quits.
        """
        self._env = env
        self._store = store
        self._adapter = adapter
        self._first_seed = seed
        self._wanted = episodes
        self._episodes_before, self._steps_before = store.n_episodes, store.n_steps
        self.finished = False
        self._prepare("Press start.")

    @property
    def instruction(self) -> str:
        """What the operator has to do in the present episode."""
        return str(getattr(self._env.unwrapped, "instruction", ""))

    @property
    def steps(self) -> int:
        """Recorded in the present episode."""
        return len(self._recorded_steps)

    @property
    def recorded(self) -> int:
        """Episodes of this session that are in the dataset."""
        return self._store.n_episodes - self._episodes_before

    @property
    def report(self) -> SessionReport:
        """What is in the dataset now."""
        return SessionReport(
            path=self._store.path,
            recorded=self.recorded,
            succeeded=sum(bool(success) for success in self._store.episode_success[self._episodes_before :]),
            steps=self._store.n_steps - self._steps_before,
            episodes_in_dataset=self._store.n_episodes,
        )

    def advance(self, command: Command) -> None:
        """Obey the keys of a command; while recording, also move the arm for one control period."""
        for key in SessionKey:
            if key in command.keys and not self.finished:
                self._obey(key)
        if self.phase is Phase.RECORDING and not self.finished:
            self._step(command)

    def close(self) -> None:
        """Give the dataset back. The episode that runs, if any, is not stored."""
        self._store.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _obey(self, key: SessionKey) -> None:
        if key is SessionKey.QUIT:
            self.finished = True
        elif key is SessionKey.TOGGLE and self.phase is Phase.READY:
            self.phase, self.message = Phase.RECORDING, ""
        elif key is SessionKey.TOGGLE and self.phase is Phase.RECORDING:
            self._ask("Stopped.")
        elif key is SessionKey.UNDO and self.phase is Phase.READY:
            self._undo()
        elif key is SessionKey.UNDO:
            self._prepare("Thrown away; the same start again.")
        elif key in (SessionKey.SUCCESS, SessionKey.FAILURE) and self.steps:
            self._confirm(key is SessionKey.SUCCESS)

    def _prepare(self, message: str) -> None:
        """Reset the environment for the next episode."""
        self.seed = self._free_seed()
        self.observation, _ = self._env.reset(seed=self.seed)
        self._adapter.reset(self.observation)
        self._recorded_steps: list[dict[str, Any]] = []
        self.phase, self.message = Phase.READY, message

    def _step(self, command: Command) -> None:
        action = self._adapter.action(command, self.observation)
        before = {**self.observation, "action": action}
        self.observation, reward, terminated, truncated, info = self._env.step(action)
        self._recorded_steps.append({**before, "reward": np.float32(reward)})
        if info.get("success", False):
            self._confirm(True)
        elif terminated or truncated:
            self._ask("The time is over." if truncated else "The episode is over.")

    def _ask(self, why: str) -> None:
        if not self.steps:
            return self._prepare(why)
        self.phase, self.message = Phase.REVIEW, f"{why} Success or failure? Undo throws it away."

    def _confirm(self, success: bool) -> None:
        steps = self._recorded_steps
        arrays = {name: np.stack([step[name] for step in steps]) for name in steps[0]}
        index = self._store.append(
            arrays, task=self.instruction, success=success, seed=self.seed, behaviour="teleoperated"
        )
        if self.recorded == self._wanted:
            self.finished = True
        else:
            self._prepare(f"Episode {index} stored: {'success' if success else 'failure'}, {len(steps)} steps.")

    def _undo(self) -> None:
        if not self.recorded:
            self.message = "Nothing to take back: this session has stored no episode."
            return
        self._store = remove_last_episode(self._store)
        self._prepare(f"Episode {self._store.n_episodes} taken back; the same start again.")

    def _free_seed(self) -> int:
        taken = set(self._store.episode_seeds)
        for seed in range(self._first_seed, EVALUATION_SEEDS_FROM):
            if seed not in taken:
                return seed
        raise UserError(
            f"{self._store.path}: no seed is left from {self._first_seed} to {EVALUATION_SEEDS_FROM - 1}; those from "
            f"{EVALUATION_SEEDS_FROM} on are kept for evaluation. Choose a smaller --seed."
        )


def open_dataset(
    path: str | os.PathLike[str], env: Any, *, append: bool = False, attributes: Mapping[str, Any] | None = None
) -> EpisodeStore:
    """Create the dataset of a session, or open an existing one to go on.

    Args:
        path: a Zarr folder.
        env: the environment that will be recorded.
        append: add to an existing dataset.
        attributes: provenance of a new dataset, JSON values.

    Raises:
        UserError: the dataset exists and ``append`` is False, or the environment does not fit it.
    """
    path, specs, fps = Path(path), array_specs(env), float(env.metadata["render_fps"])
    if not path.exists():
        return EpisodeStore.create(path, specs, fps=fps, attributes=attributes)
    if not append:
        raise UserError(f"{path} exists already. Add to it with --append, or choose another path.")
    store = EpisodeStore.open(path, "a")
    if attributes and "env_id" in attributes:
        check_same_environment(store, attributes["env_id"], attributes.get("environment_options", {}))
    wanted = {spec.name: (spec.shape, spec.dtype, spec.names) for spec in specs}
    found = {name: (spec.shape, spec.dtype, spec.names) for name, spec in store.schema.arrays.items()}
    differences = [
        f"{name}: found {found.get(name, 'nothing')}, the environment gives {wanted.get(name, 'nothing')}."
        for name in sorted(found.keys() | wanted.keys())
        if found.get(name) != wanted.get(name)
    ]
    if store.fps != fps:
        differences.append(f"fps: found {store.fps}, the environment runs at {fps}.")
    if differences:
        store.close()
        raise UserError(
            f"{path}: this environment does not fit the dataset. Use the task, --option, --cameras and --image-size "
            "that it was recorded with, or another path.\n  " + "\n  ".join(differences)
        )
    return store
