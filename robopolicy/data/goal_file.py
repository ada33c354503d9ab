"""Goals that a user names: steps of a dataset, image files, or values."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, UnidentifiedImageError

from robopolicy.data.images import FrameReader
from robopolicy.data.loader import dataset_key
from robopolicy.data.store import EpisodeStore
from robopolicy.errors import UserError, did_you_mean
from robopolicy.spec import KeySpec, check_keys

SYNTAX = "goal=DATASET#EPISODE takes the last step of that episode, goal=DATASET#EPISODE@STEP another one"
_PLACE = re.compile(r"(?P<dataset>.+)#(?P<episode>\d+)(@(?P<step>\d+))?")
_BEHAVIOUR = re.compile(r"(?P<dataset>.+)\?behaviour=(?P<behaviour>.+)")
_IMAGES = (".png", ".jpg", ".jpeg")


@dataclass(frozen=True)
class Goal:
    """A goal and where it is from.

    Attributes:
        values: by key of the policy's goals, ``(*key.shape)``, uint8 images, float32 vectors in physical units.
        description: dataset, episode, step, and a hash of the values, for protocols.
    """

    values: Mapping[str, np.ndarray]
    description: str


def given_goal(place: str | None, keys: Sequence[KeySpec]) -> Goal | None:
    """The goal of a policy that may pursue one; None where it takes none.

    Args:
        place, keys: see `load_goal`; None: none is given.

    Raises:
        UserError: the policy takes a goal and none is given; or see `load_goal`.
    """
    if place is not None:
        return load_goal(place, keys)
    if keys:
        names = ", ".join(key.key for key in keys)
        raise UserError(f"This policy pursues a goal ({names}); give one: {SYNTAX}.")
    return None


def load_goal(place: str, keys: Sequence[KeySpec]) -> Goal:
    """Read the goal keys of a policy at one step of a dataset.

    Args:
        place: ``DATASET#EPISODE`` or ``DATASET#EPISODE@STEP``, both counted from 0; the last step is the default.
        keys: goals of the policy's spec.

    Raises:
        UserError: the policy takes no goal, ``place`` cannot be read, there is no such dataset, episode or step, or its
            arrays do not fit the keys.
    """
    if not keys:
        raise UserError(f"This policy takes no goal; leave goal={place} out.")
    found = _PLACE.fullmatch(place)
    if found is None:
        raise UserError(f"goal={place} cannot be read; {SYNTAX}. Episodes and steps count from 0.")
    with EpisodeStore.open(found["dataset"]) as store:
        _check_goal_keys(store, keys)
        first, end = store.bounds(int(found["episode"]))
        step = end - first - 1 if found["step"] is None else int(found["step"])
        if step >= end - first:
            raise UserError(f"goal={place}: episode {found['episode']} has the steps 0 to {end - first - 1}.")
        values = {k.key: _value(store, k, first + step) for k in keys}
        digest = hashlib.sha256(b"".join(values[key].tobytes() for key in sorted(values))).hexdigest()
        return Goal(values, f"{store.path.name}#{int(found['episode'])}@{step} sha256:{digest[:16]}")


def load_goals(place: Any, keys: Sequence[KeySpec], limit: int, where: str) -> list[Mapping[str, np.ndarray]]:
    """Read one or several goals.

    Args:
        place: as for `load_goal`; ``DATASET?behaviour=NAME``, the last steps of episodes with that label or part of a
            label, e.g. ``left`` for ``good:left``; an image file, where there is one key, an image; or a mapping from
            keys to vectors in physical units or image files.
        keys: what a goal is made of.
        limit: most goals that a behaviour gives; the first episodes are taken.
        where: names the source of ``place`` in errors.

    Returns:
        At least one goal, each by key, ``(*key.shape)``, uint8 images, float32 vectors in physical units.

    Raises:
        UserError: ``place`` cannot be read, what it names does not exist, or it does not fit the keys.
    """
    if isinstance(place, Mapping):
        return [_given(place, keys, where)]
    if not isinstance(place, str):
        raise UserError(f"{where}: expected text or a mapping from keys to values, found {place!r}.")
    if place.lower().endswith(_IMAGES):
        return [_given({keys[0].key: place}, keys, where)]
    if (found := _BEHAVIOUR.fullmatch(place)) is None:
        if _PLACE.fullmatch(place) is None:
            raise UserError(
                f"{where}={place} cannot be read; wanted DATASET#EPISODE, DATASET#EPISODE@STEP, "
                "DATASET?behaviour=NAME, an image file, or {key: values}."
            )
        return [load_goal(place, keys).values]
    with EpisodeStore.open(found["dataset"]) as store:
        _check_goal_keys(store, keys)
        names, wanted = store.behaviours, found["behaviour"]
        episodes = [i for i, name in enumerate(names) if wanted in (name, *name.split(":"))][:limit]
        if not episodes:
            hint = did_you_mean(wanted, {name for name in names if name}) or " Its episodes have no labels."
            raise UserError(f"{where}: no episode of {store.path} has the behaviour '{wanted}'.{hint}")
        last = [store.bounds(i)[1] - 1 for i in episodes]
        return [{key.key: _value(store, key, step) for key in keys} for step in last]


def _given(values: Mapping[str, Any], keys: Sequence[KeySpec], where: str) -> dict[str, np.ndarray]:
    """A goal of values and image files."""
    known = {key.key: key for key in keys}
    for name in values:
        if name not in known:
            raise UserError(f"{where}: unknown key '{name}'.{did_you_mean(str(name), known)}")
    if missing := [name for name in known if name not in values]:
        raise UserError(f"{where}: '{missing[0]}' is missing; a goal has {', '.join(known)}.")
    return {
        name: _read_image(values[name], key, where) if key.role == "image" else _vector(values[name], key, where)
        for name, key in known.items()
    }


def _vector(value: Any, key: KeySpec, where: str) -> np.ndarray:
    try:
        vector: np.ndarray = np.asarray(value, dtype=np.float32)
    except (TypeError, ValueError):
        vector = np.empty(0, np.float32)
    if vector.shape != key.shape or not np.isfinite(vector).all():
        raise UserError(f"{where}: '{key.key}' must be {key.dim} numbers, found {value!r}.")
    return vector


def _read_image(value: Any, key: KeySpec, where: str) -> np.ndarray:
    height, width, _ = key.shape
    try:
        with Image.open(Path(str(value))) as image:
            return np.asarray(image.convert("RGB").resize((width, height), Image.Resampling.BILINEAR))
    except (OSError, UnidentifiedImageError) as error:
        raise UserError(f"{where}: '{key.key}' must be an image file, found {value!r} ({error}).") from error


def _check_goal_keys(store: EpisodeStore, keys: Sequence[KeySpec]) -> None:
    offered = {k.key: dataset_key(store, k) for k in keys if k.array in store.keys}
    check_keys(offered, tuple(keys), f"The goal's dataset {store.path} and the policy")


def _value(store: EpisodeStore, key: KeySpec, step: int) -> np.ndarray:
    if key.role == "image":
        return FrameReader(store, key.array).read(step, step + 1)[0]
    value = np.asarray(store.read(key.array, step, step + 1), np.float32).reshape(-1)
    return value if key.columns is None else value[list(key.columns)]
