"""How dataset arrays are cut into chunks, and writing and truncating them along the time axis.

The layout is diffusion_policy's ReplayBuffer: arrays under ``data/`` concatenated over time, their first axis the time
step, and ``meta/episode_ends``. Growing an array is split in two: :func:`write_past_end` stores the chunks while the
array's metadata still tells the old length, :func:`zarr.Array.resize` then makes them visible in one file replacement.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from numcodecs.abc import Codec
from zarr.codecs import BloscCodec

from robopolicy.data.codecs import blosc, image_codec
from robopolicy.data.schema import ArraySpec
from robopolicy.errors import UserError

CHUNK_BYTES = 2_000_000  # diffusion_policy's get_optimal_chunks aims at this size
SHARD_CHUNKS = 8
IMAGE_SHARD_BYTES = 16_000_000
META_CHUNK = 4096
# Per-episode entries under meta/ beside episode_ends; they may be longer than it, readers cut them.
LABELS = ("episode_task", "episode_success", "episode_seed", "episode_behaviour")
NAMES = {
    "episode_task": "tasks",
    "episode_behaviour": "behaviours",
}  # labels that index a list of names in the attributes
UNKNOWN = -1  # fill value of the per-episode entries under meta/


def chunk_steps(spec: ArraySpec) -> int:
    """Time steps in one chunk of about :data:`CHUNK_BYTES`; the other axes are not cut."""
    return max(1, CHUNK_BYTES // max(1, spec.frame_bytes))


def is_frame_image(spec: ArraySpec) -> bool:
    """Whether an array is stored one frame per chunk with an image codec (uint8 images)."""
    return spec.role == "image" and spec.dtype == "uint8"


def create_data_array(group: zarr.Group, spec: ArraySpec, codec_name: str, n_steps: int = 0) -> zarr.Array:
    """Create ``data/<name>`` with ``n_steps`` steps in the format (2 or 3) of ``group``.

    Args:
        codec_name: codec of uint8 images, see :data:`robopolicy.data.codecs.IMAGE_CODECS`; other arrays use Blosc.
    """
    shape = (n_steps, *spec.shape)
    if group.metadata.zarr_format == 3:
        return _create_sharded(group, spec, shape, codec_name)
    codec, steps = blosc(), chunk_steps(spec)
    if is_frame_image(spec):
        codec, steps = image_codec(codec_name), 1
    return create_array(group, spec.name, shape, (steps, *spec.shape), spec.dtype, codec)


def _create_sharded(group: zarr.Group, spec: ArraySpec, shape: tuple[int, ...], codec_name: str) -> zarr.Array:
    if is_frame_image(spec):
        if codec_name != "blosc":
            raise UserError(
                f"array '{spec.name}': Zarr format 3 is written with standard codecs only, found image codec "
                f"'{codec_name}', wanted 'blosc'. Use format 2 for {codec_name}."
            )
        steps, per_shard = 1, max(1, IMAGE_SHARD_BYTES // spec.frame_bytes)
    else:
        steps, per_shard = max(1, chunk_steps(spec) // SHARD_CHUNKS), SHARD_CHUNKS
    return group.create_array(
        spec.name,
        shape=shape,
        dtype=spec.dtype,
        chunks=(steps, *spec.shape),
        shards=(steps * per_shard, *spec.shape),
        compressors=BloscCodec(cname="zstd", clevel=5, shuffle="bitshuffle"),
        fill_value=0,
    )


def create_array(
    group: zarr.Group, name: str, shape: tuple[int, ...], chunks: tuple[int, ...], dtype: Any, codec: Codec | None
) -> zarr.Array:
    """Create a format 2 array with one compressor (None: raw bytes)."""
    return group.create_array(name, shape=shape, dtype=dtype, chunks=chunks, compressors=codec, fill_value=0)


def create_meta_array(group: zarr.Group, name: str) -> zarr.Array:
    """Create an empty, uncompressed int64 array of per-episode entries."""
    return group.create_array(
        name, shape=(0,), dtype="int64", chunks=(META_CHUNK,), compressors=None, fill_value=UNKNOWN
    )


def write_past_end(array: zarr.Array, start: int, values: np.ndarray) -> None:
    """Store ``values`` at steps ``start ...`` of an array whose metadata may still tell a shorter length.

    The metadata is left alone: until the array is resized, readers do not see the new steps.
    """
    length = max(array.shape[0], start + len(values))
    grown = _with_length(array, length)
    grown[start : start + len(values)] = values


def _with_length(array: zarr.Array, length: int) -> zarr.Array:
    metadata: Any = array.metadata.update_shape((length, *array.shape[1:]))
    # Chunks of zeros are stored too, so that a missing file always means damage.
    return zarr.Array(zarr.AsyncArray(metadata, array.store_path, {"write_empty_chunks": True}))


def resize(array: zarr.Array, length: int) -> None:
    """Set the number of time steps that an array tells."""
    if array.shape[0] != length:
        array.resize((length, *array.shape[1:]))


def file_steps(array: zarr.Array) -> int:
    """Time steps in one file of an array: a shard's where it has shards, else a chunk's."""
    return int((array.shards or array.chunks)[0])


def chunk_keys(array: zarr.Array, start: int, stop: int) -> Iterator[str]:
    """Names, relative to the array, of the files that hold steps ``start .. stop`` (exclusive)."""
    if stop <= start:
        return
    sizes = array.shards or array.chunks
    others = [range(math.ceil(n / size)) for n, size in zip(array.shape[1:], sizes[1:], strict=True)]
    for first in range(start // sizes[0], math.ceil(stop / sizes[0])):
        for rest in np.ndindex(*(len(r) for r in others)):
            yield array.metadata.encode_chunk_key((first, *rest))


def chunk_time_index(relative_path: str) -> int | None:
    """Index along time of a chunk file (``12.0.0``, ``12/0/0`` or ``c/12/0/0``); None for other files."""
    match = re.fullmatch(r"(?:c[/.])?(\d+)((?:[/.]\d+)*)", relative_path)
    return int(match.group(1)) if match else None


def truncate(array: zarr.Array, folder: Path, length: int) -> int:
    """Cut an array to ``length`` steps and delete the chunk files beyond; returns how many files went.

    Chunks that a killed writer stored past the told length are deleted too. Steps before ``length`` stay untouched.
    """
    resize_down = array.shape[0] > length
    n_files = math.ceil(length / file_steps(array))
    deleted = 0
    for parent, _, names in os.walk(folder):
        for name in names:
            path = Path(parent, name)
            index = chunk_time_index(path.relative_to(folder).as_posix())
            if index is not None and index >= n_files:
                path.unlink()
                deleted += 1
    if resize_down:
        resize(array, length)
    return deleted
