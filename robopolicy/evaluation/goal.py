"""Goals of an evaluation: what a goal-conditioned policy is to reach, taken from a step of a dataset."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from robopolicy.data.images import FrameReader
from robopolicy.data.loader import dataset_key
from robopolicy.data.store import EpisodeStore
from robopolicy.errors import UserError
from robopolicy.spec import KeySpec, check_keys

SYNTAX = "goal=DATASET#EPISODE takes the last step of that episode, goal=DATASET#EPISODE@STEP another one"
_PLACE = re.compile(r"(?P<dataset>.+)#(?P<episode>\d+)(@(?P<step>\d+))?")


@dataclass(frozen=True)
class Goal:
    """A goal and where it is from.

    Attributes:
        values: by key of the policy's goals, ``(*key.shape)``, uint8 images, float32 vectors in physical units.
        description: dataset, episode, step, and a hash of the values, for protocols.
    """

    values: Mapping[str, np.ndarray]
    description: str


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
        offered = {k.key: dataset_key(store, k) for k in keys if k.array in store.keys}
        check_keys(offered, tuple(keys), f"The goal's dataset {store.path} and the policy")
        first, end = store.bounds(int(found["episode"]))
        step = end - first - 1 if found["step"] is None else int(found["step"])
        if step >= end - first:
            raise UserError(f"goal={place}: episode {found['episode']} has the steps 0 to {end - first - 1}.")
        values = {k.key: _value(store, k, first + step) for k in keys}
        digest = hashlib.sha256(b"".join(values[key].tobytes() for key in sorted(values))).hexdigest()
        return Goal(values, f"{store.path.name}#{int(found['episode'])}@{step} sha256:{digest[:16]}")


def _value(store: EpisodeStore, key: KeySpec, step: int) -> np.ndarray:
    if key.role == "image":
        return FrameReader(store, key.array).read(step, step + 1)[0]
    value = np.asarray(store.read(key.array, step, step + 1), np.float32).reshape(-1)
    return value if key.columns is None else value[list(key.columns)]
