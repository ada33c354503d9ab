"""New datasets out of episodes of existing ones: merge, split, drop.

The inputs are never changed and an output is complete or absent. Images that are stored one frame per chunk are copied
without decoding; where that is impossible they are encoded losslessly, so that no image is compressed with loss twice.
"""

from __future__ import annotations

import json
import logging
import os
import tempfile
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import zarr

from robopolicy.data.codecs import is_lossless
from robopolicy.data.container import codec_configs
from robopolicy.data.durable import DurableStore, check_free, complete_or_absent, sync_path
from robopolicy.data.layout import (
    LABELS,
    UNKNOWN,
    chunk_keys,
    create_data_array,
    create_meta_array,
    is_frame_image,
    resize,
    write_past_end,
)
from robopolicy.data.schema import ArraySpec, DatasetSchema
from robopolicy.data.store import EpisodeStore, write_attributes
from robopolicy.errors import UserError

log = logging.getLogger(__name__)

_BLOCK_BYTES = 64_000_000
_COPY_THREADS = 8


@dataclass(frozen=True)
class Part:
    """Episodes of one dataset, in the order in which they are wanted."""

    store: EpisodeStore
    episodes: tuple[int, ...]

    def runs(self) -> Iterator[tuple[int, int]]:
        """First and exclusive last step of each stretch of neighbouring episodes."""
        bounds = [self.store.bounds(i) for i in self.episodes]
        while bounds:
            start, stop = bounds.pop(0)
            while bounds and bounds[0][0] == stop:
                stop = bounds.pop(0)[1]
            yield start, stop


def merge(out: Path, inputs: Sequence[Path]) -> None:
    """Write all episodes of ``inputs``, in order, to the new dataset ``out`` (folder or ``.zarr.zip``).

    Raises:
        UserError: the schemas do not fit (one line for each key), or ``out`` exists.
    """
    if not inputs:
        raise UserError(f"{out}: nothing to merge; name at least one dataset.")
    stores = [EpisodeStore.open(path) for path in inputs]
    write_parts(out, [Part(store, tuple(range(store.n_episodes))) for store in stores])


def split(path: Path, train: Path, validation: Path, *, ratio: float, seed: int) -> tuple[int, int]:
    """Write a random share ``ratio`` of the episodes to ``validation`` and the others to ``train``.

    The same seed and ratio pick the same episodes as diffusion_policy's ``get_val_mask``.

    Returns:
        Number of training and of validation episodes.

    Raises:
        UserError: the ratio leaves one side empty, or an output exists.
    """
    if train == validation:
        raise UserError(f"{train}: the two outputs of a split must differ.")
    store = EpisodeStore.open(path)
    n = store.n_episodes
    if not 0 < ratio < 1 or n < 2:
        raise UserError(f"{path}: cannot split {n} episodes with ratio {ratio}; it must lie between 0 and 1, n >= 2.")
    for out in (train, validation):
        check_free(out)
    held_out = min(max(1, round(n * ratio)), n - 1)
    chosen = np.zeros(n, dtype=bool)
    chosen[np.random.default_rng(seed).choice(n, size=held_out, replace=False)] = True
    for out, mask in ((train, ~chosen), (validation, chosen)):
        write_parts(out, [Part(store, tuple(np.flatnonzero(mask).tolist()))])
    return n - held_out, held_out


def drop(path: Path, out: Path, episodes: Sequence[int]) -> int:
    """Write all episodes of ``path`` except ``episodes`` to ``out``; returns how many are left.

    Raises:
        UserError: an episode does not exist, none is left, or ``out`` exists.
    """
    store = EpisodeStore.open(path)
    unknown = sorted(i for i in set(episodes) if not 0 <= i < store.n_episodes)
    if unknown:
        raise UserError(f"{path}: there is no episode {unknown[0]}; episodes are 0..{store.n_episodes - 1}.")
    kept = tuple(i for i in range(store.n_episodes) if i not in set(episodes))
    if not kept:
        raise UserError(f"{path}: all {store.n_episodes} episodes would be dropped.")
    write_parts(out, [Part(store, kept)])
    return len(kept)


def write_parts(out: Path, parts: Sequence[Part]) -> None:
    """Write the episodes of ``parts``, in order, as a new dataset in the Zarr format of the first one.

    Raises:
        UserError: the schemas do not fit, or ``out`` exists.
    """
    schema = _common_schema([part.store for part in parts])
    with complete_or_absent(out) as unfinished:
        if out.suffix != ".zip":
            _write_folder(unfinished, schema, parts)
            return
        with tempfile.TemporaryDirectory(dir=unfinished.parent) as work:
            folder = Path(work, "dataset")
            _write_folder(folder, schema, parts)
            _zip_folder(folder, unfinished)


def _write_folder(folder: Path, schema: DatasetSchema, parts: Sequence[Part]) -> None:
    disk = DurableStore(folder)
    zarr_format: Literal[2, 3] = 3 if parts[0].store.zarr_format == 3 else 2
    root = zarr.create_group(disk, zarr_format=zarr_format)
    data, meta = root.create_group("data"), root.create_group("meta")
    for spec in schema.arrays.values():
        whole = all([_has_all_files(part.store, spec.name) for part in parts])
        same = _same_frame_chunks([part.store.array(spec.name) for part in parts])
        if zarr_format == 2 and same and whole:
            _copy_frames(disk, spec.name, parts)
        else:
            _copy_values(data, spec, parts)
    lengths = [part.store.episode_lengths[i] for part in parts for i in part.episodes]
    _write_meta(meta, "episode_ends", np.cumsum(lengths, dtype=np.int64))
    names = _write_labels(meta, parts)
    complete = all(part.store.every_file_stored for part in parts)
    write_attributes(root, schema, names, every_file_stored=complete)
    disk.finish()


def _same_frame_chunks(arrays: Sequence[zarr.Array]) -> bool:
    """Whether all arrays hold one whole step per chunk, encoded in the same way."""
    first = arrays[0]

    def encoding(array: zarr.Array) -> dict[str, Any]:
        length_free = array.metadata.update_shape((0, *array.shape[1:])).to_dict()
        return {key: value for key, value in length_free.items() if key not in ("attributes", "fill_value")}

    whole_steps = first.metadata.zarr_format == 2 and first.chunks == (1, *first.shape[1:])
    return whole_steps and all(encoding(array) == encoding(first) for array in arrays)


def _has_all_files(store: EpisodeStore, name: str) -> bool:
    """Whether each chunk of an array has its file.

    Raises:
        UserError: a file is missing from a dataset that stores all of them.
    """
    sizes = store.files.sizes(f"data/{name}")
    missing = [key for key in chunk_keys(store.array(name), 0, store.n_steps) if key not in sizes]
    if missing and store.every_file_stored:
        raise UserError(
            f"{store.path}: the file data/{name}/{missing[0]} is missing ({len(missing)} in all). "
            f"Run 'robopolicy data doctor {store.path}' to see which episodes are damaged."
        )
    return not missing


def _copy_frames(disk: DurableStore, name: str, parts: Sequence[Part]) -> None:
    """Copy an array chunk by chunk without decoding (format 2, one step per chunk)."""
    folder = f"data/{name}"
    metadata = json.loads(parts[0].store.files.read(f"{folder}/.zarray"))
    metadata["shape"][0] = sum(stop - start for part in parts for start, stop in part.runs())
    disk.write(f"{folder}/.zarray", json.dumps(metadata, indent=4).encode())
    rest = (0,) * (len(metadata["shape"]) - 1)

    def copy(job: tuple[EpisodeStore, int, int]) -> None:
        store, step, position = job
        encode_key = store.array(name).metadata.encode_chunk_key
        source, target = encode_key((step, *rest)), encode_key((position, *rest))
        disk.write(f"{folder}/{target}", store.files.read(f"{folder}/{source}"))

    steps = ((part.store, step) for part in parts for start, stop in part.runs() for step in range(start, stop))
    with ThreadPoolExecutor(_COPY_THREADS) as pool:
        for _ in pool.map(copy, ((store, step, position) for position, (store, step) in enumerate(steps))):
            pass


def _copy_values(data: zarr.Group, spec: ArraySpec, parts: Sequence[Part]) -> None:
    """Decode an array and encode it losslessly in the layout of new datasets."""
    configs = [config for part in parts for config in codec_configs(part.store.array(spec.name))]
    plain = all(is_lossless(config) and "jpegxl" not in config["id"] for config in configs if "id" in config)
    codec = "blosc" if plain or data.metadata.zarr_format == 3 else "jpegxl-lossless"
    if is_frame_image(spec) and not plain:
        log.warning("%s: the inputs are encoded differently; the images are encoded again, losslessly.", spec.name)
    array = create_data_array(data, spec, codec)
    block, position = max(1, _BLOCK_BYTES // max(1, spec.frame_bytes)), 0
    for part in parts:
        for start, stop in part.runs():
            for first in range(start, stop, block):
                values = part.store.read(spec.name, first, min(first + block, stop))
                write_past_end(array, position, values)
                position += len(values)
    resize(array, position)


def _write_labels(meta: zarr.Group, parts: Sequence[Part]) -> dict[str, list[str]]:
    """Write the per-episode entries; returns the lists of names that some of them index."""
    episodes = [(part.store, i) for part in parts for i in part.episodes]
    success = [store.episode_success[i] for store, i in episodes]
    seeds = [store.episode_seeds[i] for store, i in episodes]
    texts = {
        "episode_task": [store.tasks[i] for store, i in episodes],
        "episode_behaviour": [store.behaviours[i] for store, i in episodes],
    }
    names = {label: list(dict.fromkeys(text for text in column if text)) for label, column in texts.items()}
    columns = {
        label: [names[label].index(text) if text else UNKNOWN for text in column] for label, column in texts.items()
    }
    columns["episode_success"] = [UNKNOWN if value is None else int(value) for value in success]
    columns["episode_seed"] = [UNKNOWN if seed is None else seed for seed in seeds]
    for label in LABELS:
        _write_meta(meta, label, np.array(columns[label], dtype=np.int64))
    return names


def _write_meta(meta: zarr.Group, name: str, values: np.ndarray) -> None:
    array = create_meta_array(meta, name)
    write_past_end(array, 0, values)
    resize(array, len(values))


def _zip_folder(folder: Path, out: Path) -> None:
    """Pack a dataset folder; entries are stored, not deflated, as zarr's zip store writes them."""
    with zipfile.ZipFile(out, "w", zipfile.ZIP_STORED) as archive:
        for parent, _, names in sorted(os.walk(folder)):
            for name in sorted(names):
                archive.write(Path(parent, name), Path(parent, name).relative_to(folder))
    sync_path(out)


def _common_schema(stores: Sequence[EpisodeStore]) -> DatasetSchema:
    first, problems = stores[0], []
    arrays = dict(first.schema.arrays)
    rates = {store.fps for store in stores if store.fps is not None}
    if len(rates) > 1:
        problems.append("fps: " + ", ".join(f"{store.path.name} has {store.fps}" for store in stores) + ".")
    for other in stores[1:]:
        theirs = other.schema.arrays
        problems += [f"{name}: not in {other.path}." for name in arrays if name not in theirs]
        problems += [f"{name}: only in {other.path}." for name in theirs if name not in arrays]
        for name in arrays.keys() & theirs.keys():
            arrays[name], differences = _common_spec(arrays[name], theirs[name])
            problems += [f"{name}: {text} in {other.path}." for text in differences]
    if problems:
        raise UserError(f"These datasets do not fit {first.path}:\n  " + "\n  ".join(sorted(problems)))
    sources = [dict(store.schema.attributes) for store in stores]
    attributes: Mapping[str, Any] = sources[0]
    if any(source != sources[0] for source in sources):
        attributes = {"sources": sources}
    return DatasetSchema(rates.pop() if rates else None, arrays, attributes)


def _common_spec(ours: ArraySpec, theirs: ArraySpec) -> tuple[ArraySpec, list[str]]:
    """Join two descriptions of one array; an empty entry fits every other."""
    differences = []
    for entry in ("shape", "dtype", "role", "unit", "frame", "rotation", "names"):
        have, other = getattr(ours, entry), getattr(theirs, entry)
        if have != other and ((have and other) or entry == "shape"):
            differences.append(f"{entry} {have or 'unknown'} here, {other or 'unknown'}")
        elif not have and other:
            ours = replace(ours, **{entry: other})
    return ours, differences
