"""Identity of a dataset's content, stored in trained bundles."""

from __future__ import annotations

import hashlib
import json
from typing import TYPE_CHECKING

import numpy as np
import zarr

from robopolicy.data.layout import chunk_keys, file_steps

if TYPE_CHECKING:
    from robopolicy.data.store import EpisodeStore

_SAMPLED_FILES = 256


def fingerprint(store: EpisodeStore) -> str:
    """SHA-256 over schema, episode order and content, as a hexadecimal string.

    Covered exactly: schema, episode ends, tasks, success, seeds and the values of every array that is no image.
    Of images: names and sizes of all files, the bytes of up to 256 evenly spaced files, and the frames that are not
    in a full file. An edit of single pixels that keeps the compressed size can go unnoticed elsewhere. A folder and
    a zip file with the same content have the same fingerprint.
    """
    digest = hashlib.sha256()
    labels = [store.tasks, store.episode_success, store.episode_seeds]
    digest.update(json.dumps([store.schema.to_attributes(), labels], sort_keys=True).encode())
    digest.update(store.episode_ends.astype("<i8").tobytes())
    for name, spec in sorted(store.schema.arrays.items()):
        digest.update(name.encode())
        if spec.role == "image":
            _add_image_files(digest, store, name)
        else:
            digest.update(np.ascontiguousarray(store.read(name)).tobytes())
    return digest.hexdigest()


def _add_image_files(digest: hashlib._Hash, store: EpisodeStore, name: str) -> None:
    array: zarr.Array = store.array(name)
    folder = f"data/{name}"
    # The last file is rewritten by appends and may hold more than the committed frames.
    full = store.n_steps - store.n_steps % file_steps(array)
    sizes = store.files.sizes(folder)
    keys = [key for key in chunk_keys(array, 0, full) if key in sizes]
    digest.update("".join(f"{key}:{sizes[key]};" for key in keys).encode())
    for i in np.unique(np.linspace(0, len(keys) - 1, min(len(keys), _SAMPLED_FILES)).astype(int)):
        digest.update(store.files.read(f"{folder}/{keys[i]}"))
    digest.update(np.ascontiguousarray(store.read(name, full)).tobytes())
