"""From a client's frame to what the policy takes: names, shapes, types, and the history of one connection."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from robopolicy.errors import UserError, did_you_mean
from robopolicy.spec import GOAL, INSTRUCTION, KeySpec, PolicySpec

PROMPT = "prompt"
"""openpi's name of the instruction."""
OPTIONS = ("timestep", "reset", "full", "previous", "mask", "seed")
LARGEST = 2**53


@dataclass(frozen=True)
class Request:
    """One observation, ready for the policy.

    Attributes:
        observations: by key, (1, n_obs_steps, *shape); goals (1, *shape); ``instruction``, one text.
        timestep: the client's label of the newest observation.
        full: the client wants all actions from the newest observation on, not only those to execute.
        previous: (1, H, A) the chunk to continue, physical units.
        mask: (1, H) how much of it holds, in [0, 1].
        seed: of the noise.
    """

    observations: dict[str, Any]
    timestep: int | None = None
    full: bool = False
    previous: np.ndarray | None = None
    mask: np.ndarray | None = None
    seed: int | None = None


class History:
    """The observations of one connection's present episode.

    A frame may hold a key's whole history or its newest value only. In the second case the older rows come from
    earlier frames: of each row, the frame whose label is nearest; the first frame stands in for what was before it.
    Frames without a label count as one step apart. A label that does not grow begins an episode.
    """

    def __init__(self, spec: PolicySpec) -> None:
        self.spec = spec
        self._frames: deque[tuple[int, dict[str, np.ndarray]]] = deque(maxlen=spec.n_obs_steps)
        self._known = {k.key for k in spec.observations} | {GOAL + k.key for k in spec.goals}

    def request(self, frame: Any) -> Request:
        """Check a frame and put it into the history.

        Args:
            frame: what `wire.unpack` returns; names may be nested maps or joined by ``.`` or ``/``.

        Raises:
            UserError: an unknown, missing or wrong entry; the history stays as it was.
        """
        if not isinstance(frame, Mapping):
            raise UserError(f"A request is a map of observations, found {type(frame).__name__}.")
        found = dict(_flat(frame, ""))
        self._check_names(found)
        given = {k.key: self._observation(k, found) for k in self.spec.observations}
        told = self._told(found)
        previous, mask = self._chunk(found)
        timestep = _integer(found, "timestep", -LARGEST, LARGEST)
        seed = _integer(found, "seed", 0, LARGEST)
        full = _flag(found, "full")
        self._add(timestep, _flag(found, "reset"), {k: v[-1:] for k, v in given.items()})
        rows = {k: v if len(v) == self.spec.n_obs_steps else self._rows(k) for k, v in given.items()}
        return Request({k: v[None] for k, v in rows.items()} | told, timestep, full, previous, mask, seed)

    def _add(self, timestep: int | None, reset: bool, newest: dict[str, np.ndarray]) -> None:
        last = self._frames[-1][0] if self._frames else None
        if reset or (last is not None and timestep is not None and timestep <= last):
            self._frames.clear()
            last = None
        label = timestep if timestep is not None else 0 if last is None else last + 1
        self._frames.append((label, newest))

    def _rows(self, key: str) -> np.ndarray:
        """(n_obs_steps, *shape), oldest first, up to the newest frame."""
        now = self._frames[-1][0]
        wanted = range(now - self.spec.n_obs_steps + 1, now + 1)
        nearest = (min(self._frames, key=lambda frame: abs(frame[0] - label))[1] for label in wanted)
        return np.concatenate([values[key] for values in nearest])

    def _check_names(self, found: Mapping[str, Any]) -> None:
        known = self._known | set(OPTIONS) | {INSTRUCTION, PROMPT}
        for name in found:
            if name not in known:
                raise UserError(f"'{name[:80]}' is unknown to this policy.{did_you_mean(name[:80], self._known)}")

    def _observation(self, key: KeySpec, found: Mapping[str, Any]) -> np.ndarray:
        """(1 or n_obs_steps, *shape)"""
        if key.key not in found:
            raise UserError(f"The observation lacks '{key.key}'; found {sorted(found)}.")
        value = _numbers(key.key, found[key.key], key.role == "image")
        if value.shape == key.shape:
            return value[None]
        history = (self.spec.n_obs_steps, *key.shape)
        if value.shape != history:
            raise UserError(
                f"{key.key}: found shape {value.shape}, wanted {key.shape} (the newest) or {history} (a history)."
            )
        return value

    def _told(self, found: Mapping[str, Any]) -> dict[str, Any]:
        told: dict[str, Any] = {}
        for key in self.spec.goals:
            name = GOAL + key.key
            if name in found:
                told[name] = _shaped(name, found[name], key.shape, key.role == "image")[None]
            else:
                raise UserError(f"The observation lacks the goal '{name}'; found {sorted(found)}.")
        texts = [found[name] for name in (INSTRUCTION, PROMPT) if name in found]
        if texts and not self.spec.tasks:
            raise UserError(f"This policy is not told what to do; leave '{INSTRUCTION}' and '{PROMPT}' out.")
        if self.spec.tasks:
            if len(texts) != 1 or not isinstance(texts[0], str):
                known = ", ".join(repr(task.instruction) for task in self.spec.tasks[:8])
                raise UserError(f"This policy needs a text under '{INSTRUCTION}' (or '{PROMPT}'), such as {known}.")
            told[INSTRUCTION] = texts
        return told

    def _chunk(self, found: Mapping[str, Any]) -> tuple[np.ndarray | None, np.ndarray | None]:
        if ("previous" in found) != ("mask" in found):
            raise UserError("'previous' and 'mask' belong together; give both or neither.")
        if "previous" not in found:
            return None, None
        horizon = self.spec.horizon
        previous = _shaped("previous", found["previous"], (horizon, self.spec.action.dim), False)
        mask = _shaped("mask", found["mask"], (horizon,), False)
        if mask.min() < 0 or mask.max() > 1:
            raise UserError("mask: its entries lie in 0..1.")
        return previous[None], mask[None]


def _flat(values: Mapping[Any, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    for name, value in values.items():
        if not isinstance(name, str):
            raise UserError("The names in a request are texts.")
        full = prefix + name.replace("/", ".")
        if isinstance(value, Mapping):
            yield from _flat(value, full + ".")
        else:
            yield full, value


def _numbers(name: str, value: Any, image: bool) -> np.ndarray:
    if not isinstance(value, np.ndarray):
        raise UserError(f"{name}: found {type(value).__name__}, wanted an array.")
    if image:
        if value.dtype != np.uint8:
            raise UserError(f"{name}: found {value.dtype}, wanted uint8 RGB, height × width × 3.")
        return value
    with np.errstate(over="ignore", invalid="ignore"):
        numbers = value.astype(np.float32)
    if not np.isfinite(numbers).all():
        raise UserError(f"{name}: holds NaN or infinite entries.")
    return numbers


def _shaped(name: str, value: Any, shape: tuple[int, ...], image: bool) -> np.ndarray:
    numbers = _numbers(name, value, image)
    if numbers.shape != shape:
        raise UserError(f"{name}: found shape {numbers.shape}, wanted {shape}.")
    return numbers


def _integer(found: Mapping[str, Any], name: str, low: int, high: int) -> int | None:
    value = found.get(name)
    if value is None:
        return None
    if not isinstance(value, (int, np.integer)) or isinstance(value, bool) or not low <= value <= high:
        raise UserError(f"{name}: found {str(value)[:40]!r}, wanted a whole number from {low} to {high}.")
    return int(value)


def _flag(found: Mapping[str, Any], name: str) -> bool:
    value = found.get(name, False)
    if not isinstance(value, (bool, np.bool_)):
        raise UserError(f"{name}: found {str(value)[:40]!r}, wanted true or false.")
    return bool(value)
