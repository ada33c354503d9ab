"""Observations to compare an engine with its policy on, and to calibrate it with: real ones where there are any."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from robopolicy.data.loader import WindowLoader
from robopolicy.data.store import EpisodeStore
from robopolicy.errors import UserError
from robopolicy.policies.base import Policy
from robopolicy.spec import GOAL, TASK

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Observations:
    """Inputs of a policy.

    Attributes:
        batch: what `Policy.sample` takes.
        source: where they came from, for people.
        real: not made up.
    """

    batch: dict[str, Tensor]
    source: str
    real: bool = True

    def __len__(self) -> int:
        return len(next(iter(self.batch.values())))

    def rows(self, count: int, first: int = 0) -> dict[str, Tensor]:
        """So many of them."""
        return {key: value[first : first + count] for key, value in self.batch.items()}


def find_observations(
    policy: Policy, manifest: Mapping[str, Any], count: int, *, data: str | None = None, seed: int = 0
) -> Observations:
    """Observations of a policy's data, drawn at random; where the data are not here, made up within their ranges.

    Args:
        policy: whose keys are wanted.
        manifest: of its bundle, which says what it was trained on.
        count: how many.
        data: a dataset to take instead.
        seed: of the draw.

    Raises:
        UserError: ``data`` is no dataset or lacks a key.
    """
    config = manifest["provenance"].get("config", {})
    entries = _datasets(config.get("data", {}), data)
    present = [entry for entry in entries if Path(entry["path"]).exists()]
    if data is None and not present:
        missing = ", ".join(entry["path"] for entry in entries) or "none is named in the bundle"
        log.warning(
            "the dataset of this policy is not here (%s): observations are made up within its ranges; give data=… to "
            "measure on real ones",
            missing,
        )
        return Observations(made_up(policy, count, seed), "made up within the ranges of the training data", real=False)
    task = config.get("task", {})
    shares = [count // len(present) + (i < count % len(present)) for i in range(len(present))] if present else []
    batches = [
        _draw(policy, entry, task, share, seed)
        for entry, share in zip(present or entries, shares or [count], strict=True)
        if share
    ]
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))  # every part of it has all datasets
    batch = {key: torch.cat([b[key] for b in batches])[order] for key in batches[0]}
    return Observations(batch, ", ".join(entry["path"] for entry in present or entries))


def made_up(policy: Policy, count: int, seed: int) -> dict[str, Tensor]:
    """States uniform within the ranges of the training data, images of noise."""
    generator = torch.Generator().manual_seed(seed)
    spec = policy.spec
    tasks = torch.randint(0, max(1, len(spec.tasks)), (count,), generator=generator)
    batch: dict[str, Tensor] = {}
    for key in spec.observations:
        shape = (count, spec.n_obs_steps, *key.shape)
        if key.role == "image":
            batch[key.key] = torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)
            continue
        batch[key.key] = _between(policy, key.key, torch.rand(shape, generator=generator), tasks)
    for key in spec.goals:
        if key.role == "image":
            batch[GOAL + key.key] = torch.randint(0, 256, (count, *key.shape), generator=generator, dtype=torch.uint8)
        else:
            batch[GOAL + key.key] = _between(policy, key.key, torch.rand(count, key.dim, generator=generator), tasks)
    if spec.tasks:
        batch[TASK] = tasks
    return batch


def _between(policy: Policy, key: str, share: Tensor, tasks: Tensor) -> Tensor:
    part = policy.normalizer[key]
    low, high = (bound.nan_to_num(posinf=1, neginf=-1).cpu() for bound in (part.low, part.high))
    if policy.spec.domains > 1:
        domains = torch.tensor([task.domain for task in policy.spec.tasks])[tasks]
        low, high = (bound[domains].view(len(tasks), *[1] * (share.ndim - 2), -1) for bound in (low, high))
    return low + (high - low) * share


def _datasets(trained_on: Mapping[str, Any], data: str | None) -> list[dict[str, Any]]:
    if data is not None:
        return [{"path": data}]
    mixture: Sequence[Mapping[str, Any]] = trained_on.get("mixture") or ()
    path = trained_on.get("path")
    return [dict(entry) for entry in mixture] or ([{"path": path}] if path else [])


def _draw(
    policy: Policy, entry: Mapping[str, Any], task: Mapping[str, Any], count: int, seed: int
) -> dict[str, Tensor]:
    store = EpisodeStore.open(entry["path"], overrides=task.get("schema") or None, fps=task.get("fps"))
    instruction = entry.get("instruction")
    known = [t.instruction for t in policy.spec.tasks]
    texts = [instruction or text for text in store.tasks] if known else None
    usable = None
    if texts is not None:
        usable = np.isin(texts, known)
        if not usable.any():
            raise UserError(f"{entry['path']}: no episode has an instruction of the policy's: {', '.join(known)}.")
    loader = WindowLoader(store, policy.spec, batch_size=count, episodes=usable, instructions=texts, seed=seed)
    batch = next(iter(loader.batches()))
    batch.pop(policy.spec.action.key)
    return batch
