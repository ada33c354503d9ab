"""Removing what a killed writer left behind the last committed episode."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from zarr.core.sync import sync

from robopolicy.data.container import Container, open_container, read_ends
from robopolicy.data.durable import DurableStore, WriterLock
from robopolicy.data.layout import LABELS, resize, truncate
from robopolicy.errors import UserError


def complete_episodes(container: Container, ends: np.ndarray) -> int:
    """How many leading episodes have growing ends and all their steps in every array."""
    available = min(array.shape[0] for array in container.arrays.values())
    damaged = (np.diff(ends, prepend=0) < 0) | (ends > available)
    return int(np.argmax(damaged)) if damaged.any() else len(ends)


def remove_torn_tail(container: Container, ends: np.ndarray, lock: WriterLock, *, sweep: bool) -> list[str]:
    """Delete everything after the last episode in ``ends``; committed episodes are not touched.

    Args:
        sweep: look through all files for chunks past the told lengths, as a killed writer leaves them.

    Returns:
        What was done, one sentence each; empty when there was nothing to do.
    """
    n_steps = int(ends[-1]) if len(ends) else 0
    done = []
    if partial := lock.clear_unfinished():
        done.append(f"deleted {partial} half-written files.")
    for name, array in container.arrays.items():
        told = array.shape[0]
        if not sweep and told <= n_steps:
            continue
        deleted = truncate(array, container.path / "data" / name, n_steps)
        if told > n_steps:
            done.append(f"cut data/{name} from {told} to {n_steps} steps.")
        if deleted:
            done.append(f"deleted {deleted} files of data/{name} beyond the last episode.")
    for name in LABELS:
        if name in container.meta and container.meta[name].shape[0] > len(ends):
            resize(container.meta[name], len(ends))
    store = container.root.store
    assert isinstance(store, DurableStore)
    store.flush()
    return done


def repair(path: Path, *, drop_incomplete: bool = False) -> list[str]:
    """Make a dataset consistent again after a crash.

    Args:
        path: dataset folder.
        drop_incomplete: also remove, from the end of the dataset, episodes that lack steps in some array, and
            those after them.

    Returns:
        What was done, one sentence each; empty when the dataset was in order.

    Raises:
        UserError: no dataset, a zip file, a running writer, or incomplete episodes without ``drop_incomplete``.
    """
    if not path.is_dir():
        open_container(path, writable=True)  # names what is wrong with a missing path or a zip file
    with WriterLock(path) as lock:
        container = open_container(path, writable=True)
        ends = read_ends(container)
        kept, done = complete_episodes(container, ends), []
        if kept < len(ends):
            if not drop_incomplete:
                lengths = ", ".join(f"{name} {array.shape[0]}" for name, array in container.arrays.items())
                raise UserError(
                    f"{path}: episodes {kept}..{len(ends) - 1} are incomplete: meta/episode_ends tells {ends[-1]} "
                    f"steps, the arrays hold {lengths}. Nothing was changed. Pass --drop-incomplete to remove these "
                    "episodes, after saving a copy if their data matters."
                )
            # zarr's own resize deletes chunks before it writes the length: killed in between, ends would be missing.
            sync(container.ends.async_array.resize((kept,), delete_outside_chunks=False))
            done.append(f"removed the incomplete episodes {kept}..{len(ends) - 1}.")
        done += remove_torn_tail(container, ends[:kept], lock, sweep=True)
        container.close()
    return done
