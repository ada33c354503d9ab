"""An engine that is guided while it samples: towards goals and away from others, by an exported gradient (DynaGuide).

The walk from noise to a chunk is done here, in numbers that were tabulated when the engine was built; the denoiser and
the gradient of the dynamics model's log weight are graphs. It computes what `robopolicy.steering.dynaguide` does.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from robopolicy.errors import UserError
from robopolicy.inference.engine import Candidates, Guidance
from robopolicy.inference.policy import ExportedPolicy
from robopolicy.inference.session import Session
from robopolicy.spec import TASK, PolicySpec

GUIDED = ("encoder", "denoiser", "dynamics_encoder", "guidance", "goal_encoder")
"""The graphs that a guided engine runs."""
SHARED = ("t", "signal", "noise", "temperature", "goals", "sides")
"""Inputs of the graphs ``denoiser`` and ``guidance`` that all rows have in common."""


@dataclass(frozen=True)
class GuidedSteps:
    """A sampler and its guidance as numbers, N network calls, and the goals that were exported.

    Attributes:
        rows: (N, 8) float32, see `robopolicy.diffusion.step_table.StepTable`.
        draws: (N,) int64, which noise each call adds; 0: none.
        levels: (N,) what the denoiser is told.
        start: (1,) deviation of x at the first call.
        signal, noise: (N,) levels of what the gradient is taken at.
        gain: (N,) by how much a gradient moves the clean estimate at scale 1; 0 where guidance does not act.
        goals: (G, Z) latents of goals, one in each of G places.
        sides: (G,) 1 for a goal to reach, -1 for one to avoid, 0 for a place that is empty.
        action_map: (4, A) scale, offset, lowest and highest normalised action; empty where the encoder gives them.
    """

    rows: np.ndarray
    draws: np.ndarray
    levels: np.ndarray
    start: np.ndarray
    signal: np.ndarray
    noise: np.ndarray
    gain: np.ndarray
    goals: np.ndarray
    sides: np.ndarray
    action_map: np.ndarray

    @classmethod
    def load(cls, path: Path) -> GuidedSteps:
        """Read the file of an engine.

        Raises:
            UserError: it cannot be read.
        """
        try:
            return cls(**load_file(path))
        except (SafetensorError, OSError, TypeError) as error:
            raise UserError(f"{path} cannot be read: {error}. Build the engine again.") from error

    def save(self, path: Path) -> None:
        """Write the file of an engine."""
        save_file({name: np.ascontiguousarray(value) for name, value in vars(self).items()}, path)


class GuidedPolicy(ExportedPolicy):
    """Runs the graphs of a policy call by call, and moves each clean estimate along the gradient of its goals.

    Args:
        name, spec, noises, candidates, fingerprint: see `ExportedPolicy`.
        sessions: ``encoder``, ``denoiser``, ``dynamics_encoder``, ``guidance``, ``goal_encoder``, and a critic's.
        steps: the sampler, and the goals to begin with.
        guidance: strength, and what the gradient is taken at.
        weight: of classifier-free guidance; 1: none.

    Attributes:
        scale: strength, from the next chunk on; 0 samples without guidance.
        temperature: from the next chunk on; small, only the nearest goal counts.
    """

    def __init__(
        self,
        name: str,
        spec: PolicySpec,
        sessions: Mapping[str, Session],
        noises: int,
        steps: GuidedSteps,
        guidance: Guidance,
        weight: float = 1.0,
        candidates: Candidates | None = None,
        fingerprint: str = "",
    ) -> None:
        super().__init__(name, spec, sessions, noises, candidates, fingerprint)
        self.scale, self.temperature = guidance.scale, guidance.temperature
        self._steps, self._space, self._weight = steps, guidance.space, np.float32(weight)
        self._goals, self._sides = steps.goals, steps.sides

    def set_goals(self, positive: Sequence[Mapping[str, Any]] = (), negative: Sequence[Mapping[str, Any]] = ()) -> None:
        """Pursue other goals from the next chunk on.

        Args:
            positive: goals to reach, any of them: each a mapping from the outcome's keys to values, (*shape), physical
                units, images uint8.
            negative: goals to stay away from.

        Raises:
            UserError: there is no goal, more than the engine has places for, or one lacks a key or has a wrong shape;
                then the goals before stay.
        """
        given = [*positive, *negative]
        if not 1 <= len(given) <= len(self._sides):
            raise UserError(f"set_goals: found {len(given)} goals, wanted 1 to {len(self._sides)}.")
        columns: dict[str, np.ndarray] = {}
        for spec in self.sessions["goal_encoder"].inputs:
            for i, goal in enumerate(given):
                shape, wanted = np.shape(goal[spec.name]) if spec.name in goal else None, spec.shape[1:]
                if shape != wanted:
                    raise UserError(f"set_goals: '{spec.name}' of goal {i} must have shape {wanted}, found {shape}.")
            columns[spec.name] = np.stack([np.asarray(goal[spec.name], spec.dtype) for goal in given])
        latents = self._run("goal_encoder", columns, len(given))["latents"]
        goals, sides = np.zeros_like(self._goals), np.zeros_like(self._sides)
        goals[: len(given)] = latents
        sides[: len(positive)], sides[len(positive) : len(given)] = 1, -1
        self._goals, self._sides = goals, sides

    def _sampled(
        self, sampling: Mapping[str, np.ndarray], observations: Mapping[str, np.ndarray], rows: int, count: int
    ) -> np.ndarray:
        steps = self._steps
        noise, mask = sampling["noise"], sampling["mask"][..., None]
        seen = self._seen(observations, rows, count)
        maps = sampling["action_map"] if "action_map" in sampling else steps.action_map[None]
        scale, offset, low, high = (maps[:, i, None] for i in range(4))
        target = sampling["previous"] * scale + offset
        x = noise[:, 0] * steps.start
        before = (x, x)
        for i, row in enumerate(steps.rows):
            clean = np.clip(self._estimate(x, i, sampling), low, high)
            if self.scale and steps.gain[i]:
                point = x if self._space == "noisy" else clean
                moved = clean + np.float32(self.scale) * steps.gain[i] * self._gradient(point, i, seen)
                clean = np.clip(moved, low, high)
            clean = clean + mask * (target - clean)
            after = row[3] * x + row[4] * clean + row[5] * before[0] + row[6] * before[1]
            if steps.draws[i]:
                after = after + row[7] * noise[:, steps.draws[i]]
            before, x = (x, clean), after
        return (x - offset) / scale

    def _seen(self, observations: Mapping[str, np.ndarray], rows: int, count: int) -> dict[str, np.ndarray]:
        """What the gradient needs of the observations (rows, …), for ``count`` chunks of each."""
        if not self.scale:
            return {}
        seen = self._run("dynamics_encoder", observations, rows)
        if TASK in observations:
            seen[TASK] = observations[TASK]
        return {name: np.repeat(value, count, axis=0) for name, value in seen.items()}

    def _estimate(self, x: np.ndarray, i: int, found: Mapping[str, np.ndarray]) -> np.ndarray:
        """The clean estimate (R, H, A) of the i-th call, not clipped; ``found`` is from the encoder."""
        inputs = {"x": x, "t": self._steps.levels[i : i + 1]}
        told = self._run("denoiser", {**found, **inputs}, len(x), SHARED)["clean"]
        if self._weight == 1:
            return told
        blind = {name.replace("untold_", "cond_"): value for name, value in found.items() if name.startswith("untold_")}
        untold = self._run("denoiser", {**found, **blind, **inputs}, len(x), SHARED)["clean"]
        return untold + self._weight * (told - untold)

    def _gradient(self, point: np.ndarray, i: int, seen: Mapping[str, np.ndarray]) -> np.ndarray:
        """Of the log weight of chunks (R, H, A), normalised, at the levels of the i-th call; (R, H, A)."""
        inputs = {
            "chunk": point,
            "signal": self._steps.signal[i : i + 1],
            "noise": self._steps.noise[i : i + 1],
            "temperature": np.array([self.temperature], np.float32),
            "goals": self._goals,
            "sides": self._sides,
        }
        return self._run("guidance", {**seen, **inputs}, len(point), SHARED)["gradient"]
