"""What a policy's observation encoder makes of the observations of a dataset."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from robopolicy.data.images import FrameReader
from robopolicy.data.loader import dataset_key
from robopolicy.data.store import EpisodeStore
from robopolicy.data.windows import build_windows
from robopolicy.errors import UserError
from robopolicy.policies.base import Policy
from robopolicy.spec import KeySpec, check_keys

BATCH = 64


@dataclass(frozen=True)
class EncodedObservations:
    """Features of some observation histories of a dataset.

    Attributes:
        features: (histories, feature dim) float64.
        episode: (histories,) int64, the episode that each history is from.
    """

    features: np.ndarray
    episode: np.ndarray

    def __post_init__(self) -> None:
        if not np.isfinite(self.features).all():
            raise UserError(
                "The policy's encoder gives numbers that are not finite; check the dataset with: robopolicy data doctor"
            )


def encode_dataset(policy: Policy, store: EpisodeStore, limit: int) -> EncodedObservations:
    """Encode up to ``limit`` observation histories, evenly spaced over all steps of a dataset.

    A history is what the policy would see at a step: the newest ``n_obs_steps`` observations, the first one of the
    episode repeated at its beginning. Actions are not needed.

    Raises:
        UserError: the dataset is empty, lacks a key or has another shape or unit.
    """
    spec = policy.spec
    offered = {k.key: dataset_key(store, k) for k in spec.observations if k.array in store.keys}
    check_keys(offered, spec.observations, f"The dataset {store.path} and the policy")
    windows = build_windows(store.episode_ends, spec.n_obs_steps, spec.pad_before, 0)
    if not len(windows):
        raise UserError(f"{store.path}: there are no steps to encode.")
    chosen = np.unique(np.linspace(0, len(windows) - 1, limit).round().astype(np.int64))
    vectors = {k.key: _vectors(store, k) for k in spec.states}
    readers = {k.key: FrameReader(store, k.array) for k in spec.images}
    parts = []
    for rows in np.array_split(chosen, -(-len(chosen) // BATCH)):
        steps = windows.steps(rows, spec.n_obs_steps)
        batch: dict[str, Tensor] = {key: torch.from_numpy(values[steps]) for key, values in vectors.items()}
        batch |= {key: torch.from_numpy(_frames(reader, steps)) for key, reader in readers.items()}
        parts.append(_encode(policy, batch))
    return EncodedObservations(np.concatenate(parts), windows.episode[chosen])


@torch.inference_mode()
def _encode(policy: Policy, batch: Mapping[str, Tensor]) -> np.ndarray:
    on_device = {key: values.to(policy.device) for key, values in batch.items()}
    return policy.encode(on_device).double().cpu().numpy()


def _vectors(store: EpisodeStore, key: KeySpec) -> np.ndarray:
    values: np.ndarray = np.asarray(store.read(key.array), dtype=np.float32).reshape(store.n_steps, -1)
    return values if key.columns is None else values[:, list(key.columns)]


def _frames(reader: FrameReader, steps: np.ndarray) -> np.ndarray:
    """Frames (B, T, H, W, C) of steps (B, T); each frame is decoded once."""
    needed, place = np.unique(steps, return_inverse=True)
    frames = np.concatenate([reader.read(step, step + 1) for step in needed.tolist()])
    return frames[place.reshape(steps.shape)]
