"""What a policy is given, checked key by key."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from robopolicy.errors import UserError, did_you_mean
from robopolicy.spec import GOAL, KeySpec, PolicySpec


def checked_observations(
    spec: PolicySpec, observations: Mapping[str, Any], goal: Mapping[str, np.ndarray]
) -> dict[str, np.ndarray]:
    """The observation history (B, n_obs_steps, *shape) and the goals (B, *shape) of a call.

    Args:
        spec: the policy's.
        observations: by key; goals under ``goal.<key>``.
        goal: values for goals that are not among the observations, by key without prefix.

    Raises:
        UserError: a key is missing or has a wrong shape.
    """
    steps = spec.n_obs_steps
    checked = {k.key: checked_array(k.key, k, (steps, *k.shape), observations) for k in spec.observations}
    rows = len(next(iter(checked.values())))
    for key in spec.goals:
        name = GOAL + key.key
        given = observations
        if name not in observations and key.key in goal:
            given = {name: np.repeat(np.asarray(goal[key.key])[None], rows, axis=0)}
        checked[name] = checked_array(name, key, key.shape, given)
    found = {key: len(value) for key, value in checked.items()}
    if len(set(found.values())) > 1 or not rows:
        raise UserError(f"The observations need one number of rows, at least 1; found {found}.")
    return checked


def checked_array(name: str, key: KeySpec, wanted: tuple[int, ...], observations: Mapping[str, Any]) -> np.ndarray:
    """The array (B, *wanted) of a key, uint8 for images and else finite float32; a `UserError` where it is not so."""
    if name not in observations:
        raise UserError(f"The observation lacks '{name}'; found {sorted(observations)}.")
    value = np.asarray(observations[name])
    if key.role == "image" and value.dtype != np.uint8:
        raise UserError(f"{name}: found an image of {value.dtype}, wanted uint8 from 0 to 255.")
    value = value if key.role == "image" else value.astype(np.float32, copy=False)
    if value.shape[1:] != wanted:
        raise UserError(f"{name}: found shape {value.shape}, wanted (batch, {', '.join(map(str, wanted))}).")
    if key.role != "image" and not np.isfinite(value).all():
        raise UserError(f"{name}: found numbers that are not finite: {value[~np.isfinite(value)][:3].tolist()}.")
    return value


def task_indices(spec: PolicySpec, texts: Sequence[str | None]) -> np.ndarray:
    """Indices (B,) int64 of instructions among the policy's tasks.

    Raises:
        UserError: a text is missing or none of them.
    """
    known = {task.instruction: i for i, task in enumerate(spec.tasks)}
    for text in texts:
        if text is None:
            raise UserError(f"This policy needs an instruction, one of: {', '.join(map(repr, known))}.")
        if str(text) not in known:
            raise UserError(f"'{text}' is none of the policy's tasks.{did_you_mean(str(text), known)}")
    return np.array([known[str(text)] for text in texts], np.int64)
