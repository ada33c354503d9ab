"""Finding the arrays of a dataset in a folder or zip file, without judging whether they fit together."""

from __future__ import annotations

import os
import threading
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import zarr
from zarr.storage import LocalStore, ZipStore

from robopolicy.data import codecs  # noqa: F401  (registers the image codecs)
from robopolicy.data.durable import DurableStore
from robopolicy.errors import UserError

_LAYOUT = "arrays under 'data/' and the episode ends in 'meta/episode_ends' (Zarr, ReplayBuffer layout)"
# Decoding with these codecs executes code that the file contains.
_UNSAFE_CODECS = {"pickle"}


class DatasetFiles(Protocol):
    """The stored files of a dataset, named relative to its root with '/'."""

    def sizes(self, prefix: str) -> dict[str, int]:
        """Bytes of every file below the folder ``prefix``, by name relative to ``prefix``."""

    def read(self, name: str) -> bytes:
        """Content of one file."""

    def top_level(self) -> list[str]:
        """Names of the files and folders in the root, sorted."""


class FolderFiles:
    """Files of a dataset in a folder."""

    def __init__(self, root: Path) -> None:
        self._root = root

    def sizes(self, prefix: str) -> dict[str, int]:
        folder = self._root / prefix
        found = {}
        for parent, _, names in os.walk(folder):
            relative = os.path.relpath(parent, folder)
            for name in names:
                key = name if relative == "." else f"{relative}/{name}"
                found[key] = os.stat(os.path.join(parent, name)).st_size
        return found

    def read(self, name: str) -> bytes:
        return (self._root / name).read_bytes()

    def top_level(self) -> list[str]:
        return sorted(os.listdir(self._root))


class ZipFiles:
    """Files of a dataset in a zip file."""

    def __init__(self, path: Path) -> None:
        self._zip = zipfile.ZipFile(path)
        self._lock = threading.Lock()

    def sizes(self, prefix: str) -> dict[str, int]:
        start = prefix.rstrip("/") + "/"
        entries = (e for e in self._zip.infolist() if e.filename.startswith(start) and not e.is_dir())
        return {e.filename[len(start) :]: e.file_size for e in entries}

    def read(self, name: str) -> bytes:
        with self._lock:
            return self._zip.read(name)

    def top_level(self) -> list[str]:
        return sorted({name.split("/")[0] for name in self._zip.namelist()})

    def close(self) -> None:
        self._zip.close()


@dataclass(frozen=True)
class Container:
    """The opened arrays of a dataset.

    Attributes:
        path: folder or zip file.
        root: root group; its attributes may hold a schema.
        arrays: numeric arrays under ``data/``, by name, sorted.
        skipped: names of the arrays under ``data/`` that are not numeric.
        ends: exclusive episode ends, int64, as stored.
        meta: further one-dimensional arrays under ``meta/``, by name, sorted.
        files: the stored files.
    """

    path: Path
    root: zarr.Group
    arrays: Mapping[str, zarr.Array]
    ends: zarr.Array
    meta: dict[str, zarr.Array]
    files: DatasetFiles
    skipped: tuple[str, ...]

    @property
    def is_zip(self) -> bool:
        return isinstance(self.files, ZipFiles)

    def close(self) -> None:
        self.root.store.close()
        if isinstance(self.files, ZipFiles):
            self.files.close()


def open_container(path: Path, *, writable: bool = False) -> Container:
    """Open the arrays of a dataset.

    Raises:
        UserError: there is no dataset at ``path``, or an array cannot be opened.
    """
    store, files = _open_store(path, writable)
    try:
        root = zarr.open_group(store, mode="r+" if writable else "r", use_consolidated=False)
    except (FileNotFoundError, KeyError, ValueError) as error:
        raise _no_dataset(path, files) from error
    data, meta = _children(path, root, "data"), _children(path, root, "meta")
    if not data or "episode_ends" not in meta:
        raise _no_dataset(path, files)
    for name, array in [*data.items(), *meta.items()]:
        _refuse_unsafe_codecs(path, name, array)
    ends = meta.pop("episode_ends")
    if ends.ndim != 1 or ends.dtype.kind not in "iu":
        raise UserError(
            f"{path}: meta/episode_ends has shape {ends.shape} and type {ends.dtype}, wanted one axis of int64."
        )
    scalars = [name for name, array in data.items() if array.ndim == 0]
    if scalars:
        raise UserError(f"{path}: data/{scalars[0]} has no time axis. Remove it or move it to meta/.")
    skipped = tuple(name for name, array in data.items() if array.dtype.kind not in "biuf")
    return Container(path, root, {n: a for n, a in data.items() if n not in skipped}, ends, meta, files, skipped)


def codec_configs(array: zarr.Array) -> list[dict[str, Any]]:
    """Configuration of each codec of an array; format 2 entries have an ``id``, format 3 entries a ``name``."""
    if array.metadata.zarr_format == 2:
        steps = [*(array.metadata.filters or ()), array.metadata.compressor]
        return [dict(step.get_config()) for step in steps if step is not None]
    return [dict(codec.to_dict()) for codec in array.metadata.codecs]


def read_ends(container: Container) -> np.ndarray:
    """Episode ends as int64 ``(E,)``."""
    return np.asarray(container.ends[:], dtype=np.int64)


def _open_store(path: Path, writable: bool) -> tuple[LocalStore | ZipStore, DatasetFiles]:
    if path.is_dir():
        store = DurableStore(path) if writable else LocalStore(path, read_only=True)
        return store, FolderFiles(path)
    if not path.exists():
        siblings = sorted(p.name for p in path.parent.glob("*.zarr*")) if path.parent.is_dir() else []
        there = f" Datasets beside it: {', '.join(siblings)}." if siblings else ""
        raise UserError(f"{path}: there is no such file or folder. Wanted a dataset folder or .zarr.zip file.{there}")
    if not zipfile.is_zipfile(path):
        raise UserError(
            f"{path}: found a file that is no zip archive, wanted a dataset folder or .zarr.zip file. "
            "Datasets in other formats must be converted first."
        )
    if writable:
        raise UserError(
            f"{path}: a zip file cannot be changed. Copy it into a folder first: "
            f"robopolicy data merge {path.name.removesuffix('.zip')} {path}"
        )
    return ZipStore(path, mode="r"), ZipFiles(path)


def _children(path: Path, root: zarr.Group, name: str) -> dict[str, zarr.Array]:
    group = root.get(name)
    if not isinstance(group, zarr.Group):
        return {}
    try:
        return dict(sorted(group.arrays()))
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{path}: an array under '{name}/' cannot be opened: {error}. If its codec is unknown, install the "
            "package that provides it, or convert the dataset where it was written."
        ) from error


def _refuse_unsafe_codecs(path: Path, name: str, array: zarr.Array) -> None:
    for config in codec_configs(array):
        codec = str(config.get("id", config.get("name")))
        if codec.removeprefix("numcodecs.") in _UNSAFE_CODECS:
            raise UserError(
                f"{path}: array '{name}' is encoded with '{codec}', which executes code from the file when it is "
                "read. Convert the dataset where it was written, if you trust it."
            )


def _no_dataset(path: Path, files: DatasetFiles) -> UserError:
    names = files.top_level()
    found = ", ".join(names[:8]) + (", ..." if len(names) > 8 else "") if names else "nothing"
    hint = "Check the path."
    if path.is_dir() and (path / "meta" / "info.json").exists():
        hint = "This looks like a LeRobot dataset; it must be converted first."
    elif isinstance(files, ZipFiles) and any(name.endswith(".zarr") for name in names):
        hint = f"The dataset lies in the folder '{names[0]}' of the zip file; unpack it and use that folder."
    return UserError(f"{path}: this is no dataset. Found {found}; wanted {_LAYOUT}. {hint}")
