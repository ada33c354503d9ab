"""One episode: the environment side of a rollout, from reset to result, one action chunk at a time."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import gymnasium
import numpy as np

from robopolicy.errors import UserError
from robopolicy.spec import INSTRUCTION, PolicySpec

INSTRUCTION_BYTES = 256  # of UTF-8, that an instruction may have


@dataclass(frozen=True)
class EpisodeResult:
    """Outcome of one episode.

    Attributes:
        seed: seed of the start and of the policy's random generator.
        score: maximum of the reward over the steps, in [0, 1].
        success: the environment reported success after some step.
        steps: control steps that were executed.
        episode_return: sum of the rewards.
        wall_s: seconds from reset to result, the time spent waiting for other episodes of the batch included.
        actions: (steps, action dim) what was executed; with the seed, enough to replay the episode.
        video: path of the episode's video relative to the results folder; empty when there is none.
        instruction: what the robot was asked to do; empty when the environment does not say.
        stages: stages of the task, e.g. grasped, in the order in which the environment lists them; true when reached
            at some step.
        variation: what the environment varied in this episode, plain values by factor.
    """

    seed: int
    score: float
    success: bool
    steps: int
    episode_return: float
    wall_s: float
    actions: np.ndarray = field(repr=False, compare=False)
    video: str = ""
    instruction: str = ""
    stages: Mapping[str, bool] = field(default_factory=dict)
    variation: Mapping[str, Any] = field(default_factory=dict)


def history_buffers(spec: PolicySpec, rows: int) -> dict[str, np.ndarray]:
    """Zeros for the observations of a batch: ``(rows, n_obs_steps, *key.shape)``, uint8 images, float32 vectors.

    Where the spec has tasks, ``instruction`` too: ``(rows, INSTRUCTION_BYTES)`` uint8, see `read_instructions`.
    """
    buffers = {
        key.key: np.zeros((rows, spec.n_obs_steps, *key.shape), np.uint8 if key.role == "image" else np.float32)
        for key in spec.observations
    }
    return buffers | ({INSTRUCTION: np.zeros((rows, INSTRUCTION_BYTES), np.uint8)} if spec.tasks else {})


def write_instruction(text: str, row: np.ndarray) -> None:
    """Write a text as UTF-8 into ``row`` (INSTRUCTION_BYTES,) uint8, filled up with zeros.

    Raises:
        UserError: the text is too long.
    """
    encoded = text.encode()
    if len(encoded) > INSTRUCTION_BYTES:
        raise UserError(
            f"An instruction may have {INSTRUCTION_BYTES} bytes, the environment's has {len(encoded)}: '{text}'. "
            "Give a shorter one with instruction='…'."
        )
    row[:] = np.frombuffer(encoded.ljust(INSTRUCTION_BYTES, b"\0"), np.uint8)


def read_instructions(rows: np.ndarray) -> list[str]:
    """The texts in rows (B, INSTRUCTION_BYTES) that `write_instruction` wrote; empty where nothing was written."""
    return [row.tobytes().rstrip(b"\0").decode() for row in rows]


class Episode:
    """One environment that plays episodes one after the other.

    Args:
        env: observations are a dictionary, ``info["success"]`` is there after every step. ``info["stages"]``,
            ``info["variation"]`` at reset, and ``info["instruction"]`` or ``env.unwrapped.instruction`` are kept where
            they are there.
        history: (n_obs_steps, *key.shape) per key, oldest first; filled in place, so that it may be a row of the batch
            that the policy reads. Under ``instruction``, where it is there, a row for what the environment asks for.
        max_steps: limit of control steps.
    """

    def __init__(self, env: gymnasium.Env, history: Mapping[str, np.ndarray], max_steps: int) -> None:
        self._env = env
        self._history = {key: rows for key, rows in history.items() if key != INSTRUCTION}
        self._told = history.get(INSTRUCTION)
        self._max_steps = max_steps

    def start(self, seed: int) -> None:
        """Reset; the history becomes the first observation, repeated."""
        self._seed, self._started = seed, time.perf_counter()
        self._rewards: list[float] = []
        self._actions: list[np.ndarray] = []
        self._success = False
        observation, info = self._env.reset(seed=seed)
        self._instruction = str(info.get("instruction") or getattr(self._env.unwrapped, "instruction", ""))
        if self._told is not None:
            write_instruction(self._instruction, self._told)
        self._stages: dict[str, bool] = {}
        self._variation = _plain(info.get("variation", {}))
        for key, rows in self._history.items():
            rows[:] = observation[key]

    def execute(self, chunk: np.ndarray) -> EpisodeResult | None:
        """Execute the actions ``(n, action dim)`` in order, until the episode ends.

        Returns:
            The result when the episode ended, else None.

        Raises:
            UserError: the chunk holds a number that is not finite.
        """
        if not np.isfinite(chunk).all():
            raise UserError(
                f"The policy's action is not finite in the episode of seed {self._seed} at step {len(self._actions)}; "
                "its weights or its normalisation are broken."
            )
        for action in chunk:
            observation, reward, terminated, truncated, info = self._env.step(action)
            self._actions.append(action)
            self._rewards.append(float(reward))
            self._success |= bool(info["success"])
            for stage, reached in info.get("stages", {}).items():
                self._stages[stage] = self._stages.get(stage, False) or bool(reached)
            if terminated or truncated or len(self._actions) >= self._max_steps:
                return self._result()
            for key, rows in self._history.items():
                rows[:-1] = rows[1:]
                rows[-1] = observation[key]
        return None

    def close(self) -> None:
        self._env.close()

    def _result(self) -> EpisodeResult:
        return EpisodeResult(
            seed=self._seed,
            score=max(self._rewards),
            success=self._success,
            steps=len(self._actions),
            episode_return=sum(self._rewards),
            wall_s=time.perf_counter() - self._started,
            actions=np.stack(self._actions),
            instruction=self._instruction,
            stages=self._stages,
            variation=self._variation,
        )


def _plain(values: Mapping[str, Any]) -> dict[str, Any]:
    """As they will be read back from JSON: NumPy's numbers and arrays become plain ones."""
    return json.loads(json.dumps(dict(values), default=lambda value: value.tolist()))
