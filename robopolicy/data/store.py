"""The dataset of episodes: read, append, close.

A dataset is a Zarr folder or zip file in the layout of diffusion_policy's ReplayBuffer (see
:mod:`robopolicy.data.layout`), so that datasets of diffusion_policy and UMI open unchanged and their tools open ours.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self

import numpy as np
import zarr

from robopolicy.data.container import Container, DatasetFiles, open_container, read_ends
from robopolicy.data.durable import DurableStore, WriterLock, complete_or_absent
from robopolicy.data.fingerprint import fingerprint
from robopolicy.data.layout import (
    LABELS,
    NAMES,
    UNKNOWN,
    create_data_array,
    create_meta_array,
    resize,
    write_past_end,
)
from robopolicy.data.repair import remove_torn_tail
from robopolicy.data.schema import (
    ATTRIBUTES_KEY,
    FILES_KEY,
    ArraySpec,
    DatasetSchema,
    infer_schema,
    override_schema,
)
from robopolicy.errors import UserError, did_you_mean

log = logging.getLogger(__name__)

Overrides = Mapping[str, Mapping[str, Any]]


class EpisodeStore:
    """Episodes of one dataset.

    Open with :meth:`open` or :meth:`create`, use as a context manager or call :meth:`close`. What has been read at
    opening (episode ends, schema, labels) stays fixed while others append; open again to see their episodes.
    """

    def __init__(
        self, container: Container, schema: DatasetSchema, ends: np.ndarray, lock: WriterLock | None = None
    ) -> None:
        self._container = container
        self._schema = schema
        self._ends = ends
        self._lock = lock
        self._names = {label: list(_attributes(container).get(key, [])) for label, key in NAMES.items()}
        self._labels = {name: _read_labels(container, name, len(ends)) for name in LABELS}

    @classmethod
    def open(
        cls,
        path: str | os.PathLike[str],
        mode: Literal["r", "a"] = "r",
        *,
        overrides: Overrides | None = None,
        fps: float | None = None,
    ) -> EpisodeStore:
        """Open a dataset for reading (``r``) or appending (``a``).

        A tail that a killed writer left is ignored when reading and removed when opening for appending.

        Args:
            path: a Zarr folder (format 2 or 3), or a ``.zarr.zip`` file for reading.
            overrides: fields of :class:`ArraySpec` by array name that replace stored or inferred ones.
            fps: replaces the stored rate.

        Raises:
            UserError: no dataset at ``path``, a damaged one, or one that another process writes.
        """
        path = Path(path)
        if mode not in ("r", "a"):
            raise UserError(f"{path}: mode '{mode}' is unknown; 'r' reads, 'a' appends.")
        lock = WriterLock(path) if mode == "a" and path.is_dir() else None
        try:
            container = open_container(path, writable=mode == "a")
            if mode == "a":
                (path / ".zmetadata").unlink(missing_ok=True)  # consolidated metadata would tell the old lengths
            ends = read_ends(container)
            _check_lengths(container, ends)
            _check_appendable(container, mode)
            schema = override_schema(_load_schema(container), overrides or {}, fps)
            if lock is not None and (done := remove_torn_tail(container, ends, lock, sweep=lock.was_killed)):
                log.warning("%s: a writer was killed during its last episode: %s", path, " ".join(done))
        except BaseException:
            if lock is not None:
                lock.release()
            raise
        return cls(container, schema, ends, lock)

    @classmethod
    def create(
        cls,
        path: str | os.PathLike[str],
        arrays: Sequence[ArraySpec],
        *,
        fps: float | None,
        zarr_format: Literal[2, 3] = 2,
        image_codec: str | None = None,
        attributes: Mapping[str, Any] | None = None,
    ) -> EpisodeStore:
        """Create an empty dataset and open it for appending.

        Args:
            path: folder to create; it must not exist or be empty.
            arrays: the arrays of each step.
            fps: steps per second.
            zarr_format: 2 (readable by diffusion_policy and UMI) or 3 (sharded, standard codecs only).
            image_codec: codec of uint8 images (:data:`robopolicy.data.codecs.IMAGE_CODECS`); default ``jpegxl`` in
                format 2, ``blosc`` in format 3.
            attributes: free provenance, JSON values.

        Raises:
            UserError: the path is taken, or the arrays are impossible.
        """
        path = Path(path)
        names = [spec.name for spec in arrays]
        if not names or len(set(names)) != len(names):
            raise UserError(f"{path}: a dataset needs at least one array and different names, found {names}.")
        schema = DatasetSchema(fps, {spec.name: spec for spec in arrays}, attributes or {})
        create_layout(path, schema, zarr_format, image_codec)
        return cls.open(path, "a")

    @property
    def path(self) -> Path:
        return self._container.path

    @property
    def schema(self) -> DatasetSchema:
        return self._schema

    @property
    def fps(self) -> float | None:
        """Steps per second; None when the dataset does not say."""
        return self._schema.fps

    @property
    def keys(self) -> tuple[str, ...]:
        """Names of the arrays."""
        return tuple(self._schema.arrays)

    @property
    def n_episodes(self) -> int:
        return len(self._ends)

    @property
    def n_steps(self) -> int:
        """Steps of all episodes together."""
        return int(self._ends[-1]) if len(self._ends) else 0

    @property
    def episode_ends(self) -> np.ndarray:
        """Exclusive end of each episode in the concatenated arrays, int64 ``(E,)``; a copy."""
        return self._ends.copy()

    @property
    def episode_lengths(self) -> np.ndarray:
        """Steps of each episode, int64 ``(E,)``."""
        return np.diff(self._ends, prepend=0)

    @property
    def zarr_format(self) -> int:
        return self._container.root.metadata.zarr_format

    @property
    def files(self) -> DatasetFiles:
        """The stored files, for sizes and undecoded chunks."""
        return self._container.files

    @property
    def every_file_stored(self) -> bool:
        """Whether a chunk without a file means damage; other writers leave out chunks of zeros."""
        return bool(_attributes(self._container).get(FILES_KEY))

    @property
    def tasks(self) -> list[str]:
        """Instruction of each episode; empty where unknown."""
        return self._named("episode_task")

    @property
    def behaviours(self) -> list[str]:
        """How each episode was done, e.g. ``good:left`` (a scripted expert's quality and mode); empty where unknown."""
        return self._named("episode_behaviour")

    @property
    def episode_success(self) -> list[bool | None]:
        """Whether each episode succeeded; None where unknown."""
        return [None if value == UNKNOWN else bool(value) for value in self._labels["episode_success"]]

    @property
    def episode_seeds(self) -> list[int | None]:
        """Seed of each episode's initial state; None where unknown."""
        return [None if value == UNKNOWN else value for value in self._labels["episode_seed"]]

    def array(self, key: str) -> zarr.Array:
        """The Zarr array behind ``key``; it may be longer than :attr:`n_steps`.

        Raises:
            UserError: no such array.
        """
        if key not in self._container.arrays:
            raise UserError(f"{self.path}: there is no array '{key}'.{did_you_mean(key, self._container.arrays)}")
        return self._container.arrays[key]

    def bounds(self, index: int) -> tuple[int, int]:
        """First step and exclusive end of an episode; negative indices count from the last.

        Raises:
            UserError: no such episode.
        """
        n = self.n_episodes
        if not -n <= index < n:
            raise UserError(f"{self.path}: there is no episode {index}; the dataset has {n} episodes.")
        index %= n
        return (int(self._ends[index - 1]) if index else 0), int(self._ends[index])

    def read(self, key: str, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Steps ``start .. stop`` (slice rules over all steps) of one array, ``(T, *shape)``, in one read.

        zarr decodes the chunks in parallel threads.
        """
        start, stop, _ = slice(start, stop).indices(self.n_steps)
        return np.asarray(self.array(key)[start : max(start, stop)])

    def episode(self, index: int, keys: Sequence[str] | None = None) -> dict[str, np.ndarray]:
        """The arrays of one episode, each ``(T, *shape)``; all keys unless ``keys`` names some."""
        start, stop = self.bounds(index)
        return {key: self.read(key, start, stop) for key in (self.keys if keys is None else keys)}

    def fingerprint(self) -> str:
        """Hash of content, order and schema, see :func:`robopolicy.data.fingerprint.fingerprint`."""
        return fingerprint(self)

    def append(
        self,
        episode: Mapping[str, np.ndarray],
        *,
        task: str = "",
        success: bool | None = None,
        seed: int | None = None,
        behaviour: str = "",
    ) -> int:
        """Append one episode and return its index. On return it is on the disk, complete.

        The chunks are written past the end that readers see; replacing the metadata of ``meta/episode_ends`` at the
        end commits the episode. The cost does not depend on the length of the dataset.

        Args:
            episode: every array of the schema, each ``(T, *shape)`` with the same T >= 1.
            task: instruction of the episode.
            success: whether it succeeded; None when unknown.
            seed: seed of its initial state, >= 0; None when unknown.
            behaviour: how it was done; empty when unknown.

        Raises:
            UserError: the store is read-only, or keys, shapes, types or lengths do not fit the schema.
        """
        if self._lock is None:
            raise UserError(f"{self.path}: opened for reading; open it with mode 'a' to append.")
        if seed is not None and seed < 0:
            raise UserError(f"{self.path}: a seed must be at least 0, found {seed}.")
        values = _fit_episode(episode, self._schema)
        start, index = self.n_steps, self.n_episodes
        stop = start + len(next(iter(values.values())))
        labels = {
            "episode_task": self._number("episode_task", task),
            "episode_success": UNKNOWN if success is None else int(success),
            "episode_seed": UNKNOWN if seed is None else int(seed),
            "episode_behaviour": self._number("episode_behaviour", behaviour),
        }
        self._write(start, index, values, labels, stop)
        for name, label in labels.items():
            self._labels[name].append(label)
        self._ends = np.append(self._ends, stop)
        return index

    def _write(
        self, start: int, index: int, values: Mapping[str, np.ndarray], labels: Mapping[str, int], stop: int
    ) -> None:
        ends, arrays = self._container.ends, self._container.arrays
        per_episode = {name: self._label_array(name) for name in labels}
        for name, steps in values.items():
            write_past_end(arrays[name], start, steps)
        for name, label in labels.items():
            write_past_end(per_episode[name], index, np.array([label]))
        write_past_end(ends, index, np.array([stop]))
        self._disk.flush()
        for name in values:
            resize(arrays[name], stop)
        for array in per_episode.values():
            resize(array, index + 1)
        self._disk.flush()
        resize(ends, index + 1)
        self._disk.flush()

    @property
    def _disk(self) -> DurableStore:
        store = self._container.root.store
        assert isinstance(store, DurableStore)
        return store

    def _label_array(self, name: str) -> zarr.Array:
        meta = self._container.root["meta"]
        assert isinstance(meta, zarr.Group)
        if name not in self._container.meta:
            self._container.meta[name] = create_meta_array(meta, name)
        return self._container.meta[name]

    def _named(self, label: str) -> list[str]:
        return [self._names[label][i] if i >= 0 else "" for i in self._labels[label]]

    def _number(self, label: str, name: str) -> int:
        """Index of a name in its list, which grows when the name is new."""
        if not name:
            return UNKNOWN
        if name not in self._names[label]:
            self._names[label].append(name)
            write_attributes(self._container.root, self._schema, self._names, every_file_stored=self.every_file_stored)
        return self._names[label].index(name)

    def close(self) -> None:
        """Give back the files and, after appending, the writer's lock."""
        self._container.close()
        if self._lock is not None:
            self._lock.release()
            self._lock = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"EpisodeStore({str(self.path)!r}, episodes={self.n_episodes}, steps={self.n_steps})"


def create_layout(
    path: Path, schema: DatasetSchema, zarr_format: Literal[2, 3] = 2, image_codec: str | None = None
) -> None:
    """Write an empty dataset at ``path``, complete or not at all.

    Raises:
        UserError: the path is taken or ends in ``.zip``, or the format or codec is unknown.
    """
    if zarr_format not in (2, 3):
        raise UserError(f"{path}: Zarr format {zarr_format} is unknown; 2 and 3 are possible.")
    if path.suffix == ".zip":
        raise UserError(f"{path}: a zip file cannot be appended to. Create a folder, e.g. {path.with_suffix('')}.")
    codec = image_codec or ("jpegxl" if zarr_format == 2 else "blosc")
    with complete_or_absent(path) as folder:
        disk = DurableStore(folder)
        root = zarr.create_group(disk, zarr_format=zarr_format, attributes={})
        data, meta = root.create_group("data"), root.create_group("meta")
        for spec in schema.arrays.values():
            create_data_array(data, spec, codec)
        for name in ("episode_ends", *LABELS):
            create_meta_array(meta, name)
        write_attributes(root, schema, {}, every_file_stored=True)
        disk.finish()


def write_attributes(
    root: zarr.Group, schema: DatasetSchema, names: Mapping[str, Sequence[str]], *, every_file_stored: bool = False
) -> None:
    """Store the schema and the lists of names in the attributes of the root group.

    Args:
        names: by label, see `layout.NAMES`.
        every_file_stored: a chunk without a file means damage, not zeros; true for datasets that we created.
    """
    lists = {key: list(names.get(label, [])) for label, key in NAMES.items()}
    root.attrs[ATTRIBUTES_KEY] = {**schema.to_attributes(), **lists, FILES_KEY: every_file_stored}


def _attributes(container: Container) -> Mapping[str, Any]:
    return container.root.attrs.get(ATTRIBUTES_KEY, {})  # type: ignore[return-value]


def _load_schema(container: Container) -> DatasetSchema:
    steps = {name: (array.shape[1:], array.dtype.name) for name, array in container.arrays.items()}
    inferred = infer_schema(steps)
    attributes = _attributes(container)
    if not attributes:
        return inferred
    stored = DatasetSchema.from_attributes(attributes, str(container.path))
    # Arrays that other tools added have no entry; entries of arrays that they removed are void.
    known = {name: spec for name, spec in stored.arrays.items() if name in container.arrays}
    return DatasetSchema(stored.fps, {**known, **_without(inferred.arrays, known)}, stored.attributes)


def _without(arrays: Mapping[str, ArraySpec], known: Mapping[str, ArraySpec]) -> dict[str, ArraySpec]:
    return {name: spec for name, spec in arrays.items() if name not in known}


def _read_labels(container: Container, name: str, n_episodes: int) -> list[int]:
    stored = container.meta.get(name)
    labels = [] if stored is None else np.asarray(stored[:n_episodes]).tolist()
    return labels + [UNKNOWN] * (n_episodes - len(labels))


def _check_appendable(container: Container, mode: str) -> None:
    if mode == "a" and container.skipped:
        raise UserError(
            f"{container.path}: the array '{container.skipped[0]}' is not numeric and would stay behind the others. "
            "Remove it, then append."
        )


def _check_lengths(container: Container, ends: np.ndarray) -> None:
    advice = f"Run 'robopolicy data doctor {container.path}' for details, 'robopolicy data repair' to mend it."
    falls = np.flatnonzero(np.diff(ends, prepend=0) < 0)
    if len(falls):
        raise UserError(
            f"{container.path}: meta/episode_ends falls at episode {falls[0]} (to {ends[falls[0]]}); ends must grow. "
            f"{advice}"
        )
    n_steps = int(ends[-1]) if len(ends) else 0
    short = {name: array.shape[0] for name, array in container.arrays.items() if array.shape[0] < n_steps}
    if short:
        found = ", ".join(f"{name} {length}" for name, length in short.items())
        raise UserError(
            f"{container.path}: arrays shorter than the {n_steps} steps in meta/episode_ends: {found}. {advice}"
        )


def _fit_episode(episode: Mapping[str, np.ndarray], schema: DatasetSchema) -> dict[str, np.ndarray]:
    """Check an episode against the schema, key by key, and convert to the stored element types."""
    problems = [f"{name}: not there." for name in schema.arrays if name not in episode]
    problems += [
        f"{name}: unknown.{did_you_mean(name, schema.arrays)}" for name in episode if name not in schema.arrays
    ]
    fitted = {}
    for name, spec in schema.arrays.items():
        if name not in episode:
            continue
        values = np.asarray(episode[name])
        if values.shape[1:] != spec.shape or values.ndim == 0:
            problems.append(f"{name}: found shape {values.shape}, wanted (T, {', '.join(map(str, spec.shape))}).")
        elif not np.can_cast(values.dtype, spec.dtype, "same_kind"):
            problems.append(f"{name}: found type {values.dtype}, wanted {spec.dtype}; convert it before appending.")
        else:
            fitted[name] = values.astype(spec.dtype, copy=False)
    lengths = {name: len(values) for name, values in fitted.items()}
    if len(set(lengths.values())) > 1:
        problems.append("lengths differ: " + ", ".join(f"{name} {n}" for name, n in lengths.items()) + ".")
    elif 0 in lengths.values():
        problems.append("the episode has no steps.")
    if problems:
        raise UserError("The episode does not fit the dataset:\n  " + "\n  ".join(problems))
    return fitted
