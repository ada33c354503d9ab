"""Taking back the last episode of a dataset."""

from __future__ import annotations

import numpy as np
import zarr
from zarr.core.sync import sync

from robopolicy.data.container import Container, open_container, read_ends
from robopolicy.data.durable import DurableStore, WriterLock
from robopolicy.data.layout import LABELS, NAMES, UNKNOWN, file_steps, write_past_end
from robopolicy.data.repair import remove_torn_tail
from robopolicy.data.schema import ATTRIBUTES_KEY
from robopolicy.data.store import EpisodeStore
from robopolicy.errors import UserError


def remove_last_episode(store: EpisodeStore) -> EpisodeStore:
    """Remove the last episode; returns the store, opened again for appending.

    Shrinking ``meta/episode_ends`` commits the removal, as growing it commits an append. What lies behind the end is a
    torn tail from then on: it is cleared next, or, when this process is killed, by the next writer. So a kill at any
    moment leaves the dataset with the episode or without it. In format 2 the files of a dataset that was created by
    :meth:`EpisodeStore.create` are, byte by byte, what they were before the episode was appended; in format 3 the
    content is. Readers that opened the dataset earlier lose the episode too.

    Args:
        store: opened for appending; it is closed.

    Raises:
        UserError: there is no episode, the dataset is a zip file, or another process writes it.
    """
    path, n_episodes = store.path, store.n_episodes
    if n_episodes == 0:
        raise UserError(f"{path}: there is no episode to remove.")
    store.close()
    if not path.is_dir():
        open_container(path, writable=True)  # names what is wrong with a zip file
    with WriterLock(path) as lock:
        container = open_container(path, writable=True)
        ends = read_ends(container)
        if len(ends) != n_episodes:
            raise UserError(f"{path}: another process has changed the dataset. Nothing was removed; open it again.")
        _commit(container, n_episodes - 1)
        _clear_tail(container, ends[:-1], lock)
        container.close()
    return EpisodeStore.open(path, "a")


def _commit(container: Container, n_episodes: int) -> None:
    # The default of resize deletes chunks before it writes the new length: killed in between, ends would be missing.
    sync(container.ends.async_array.resize((n_episodes,), delete_outside_chunks=False))
    _disk(container).flush()


def _clear_tail(container: Container, ends: np.ndarray, lock: WriterLock) -> None:
    n_steps, n_episodes = int(ends[-1]) if len(ends) else 0, len(ends)
    remove_torn_tail(container, ends, lock, sweep=False)
    for array in container.arrays.values():
        _blank_last_file(array, n_steps, 0)
    for name in LABELS:
        if name in container.meta:
            _blank_last_file(container.meta[name], n_episodes, UNKNOWN)
    if n_episodes % file_steps(container.ends) == 0:
        first_empty = container.ends.metadata.encode_chunk_key((n_episodes // file_steps(container.ends),))
        (container.path / "meta" / "episode_ends" / first_empty).unlink(missing_ok=True)
    else:
        _blank_last_file(container.ends, n_episodes, UNKNOWN)
    _forget_unused_names(container, n_episodes)
    _disk(container).flush()


def _blank_last_file(array: zarr.Array, length: int, fill: int) -> None:
    """Overwrite what is stored beyond ``length`` in the file that holds the last entry.

    Shards are left alone: they would grow by thousands of blank chunks.
    """
    rest = -length % file_steps(array)
    if rest and array.shards is None:
        write_past_end(array, length, np.full((rest, *array.shape[1:]), fill, array.dtype))


def _forget_unused_names(container: Container, n_episodes: int) -> None:
    """Drop the newest name of each list when no episode is left that uses it."""
    stored = container.root.attrs.get(ATTRIBUTES_KEY)
    if not isinstance(stored, dict):
        return
    attributes = dict(stored)
    for label, key in NAMES.items():
        names = list(attributes.get(key) or [])
        if names and label in container.meta:
            used = np.asarray(container.meta[label][:n_episodes])
            attributes[key] = names if len(names) - 1 in used else names[:-1]
    if attributes != stored:
        container.root.attrs[ATTRIBUTES_KEY] = attributes


def _disk(container: Container) -> DurableStore:
    store = container.root.store
    assert isinstance(store, DurableStore)
    return store
