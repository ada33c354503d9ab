"""Per-frame image codecs of datasets, under the ids and configuration keys that diffusion_policy and UMI use.

Importing this module registers the JPEG-XL and JPEG-2000 codecs with numcodecs, so that zarr can open arrays that use
them. The codecs themselves are imagecodecs'; here their configuration is narrowed to the keys that every release of
imagecodecs and the copies inside diffusion_policy and UMI understand.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import imagecodecs.numcodecs
import numcodecs
from numcodecs.abc import Codec
from numcodecs.registry import register_codec

from robopolicy.errors import UserError, did_you_mean


class _SharedKeys:
    """Writes only the configuration keys in ``shared_keys`` and ignores unknown ones on reading."""

    shared_keys: ClassVar[tuple[str, ...]]

    def get_config(self) -> dict[str, Any]:
        return {"id": self.codec_id, **{key: getattr(self, key) for key in self.shared_keys}}  # type: ignore[attr-defined]

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Any:
        return cls(**{key: config[key] for key in cls.shared_keys if key in config})


class JpegXl(_SharedKeys, imagecodecs.numcodecs.Jpegxl):
    """JPEG-XL, one image per chunk (ISO/IEC 18181)."""

    codec_id = "imagecodecs_jpegxl"
    shared_keys = (
        "level",
        "effort",
        "distance",
        "lossless",
        "decodingspeed",
        "photometric",
        "planar",
        "usecontainer",
        "index",
        "keeporientation",
        "numthreads",
    )


class Jpeg2k(_SharedKeys, imagecodecs.numcodecs.Jpeg2k):
    """JPEG 2000, one image per chunk (ISO/IEC 15444)."""

    codec_id = "imagecodecs_jpeg2k"
    shared_keys = (
        "level",
        "codecformat",
        "colorspace",
        "tile",
        "reversible",
        "bitspersample",
        "resolutions",
        "numthreads",
        "verbose",
    )


register_codec(JpegXl)
register_codec(Jpeg2k)

IMAGE_CODECS = ("jpegxl", "jpegxl-lossless", "jpeg2k", "blosc")


def blosc() -> Codec:
    """diffusion_policy's ``disk`` compressor: Zstandard 5 with bit shuffling."""
    return numcodecs.Blosc(cname="zstd", clevel=5, shuffle=numcodecs.Blosc.BITSHUFFLE)


def image_codec(name: str) -> Codec:
    """Codec of uint8 images by its name in :data:`IMAGE_CODECS`.

    ``jpegxl`` has UMI's settings (effort 3, distance 0.3), ``jpeg2k`` diffusion_policy's (level 50). One thread per
    image: zarr already works on many chunks at once.

    Raises:
        UserError: unknown name.
    """
    if name == "jpegxl":
        return JpegXl(effort=3, distance=0.3, decodingspeed=1, lossless=False, numthreads=1)
    if name == "jpegxl-lossless":
        return JpegXl(effort=3, lossless=True, numthreads=1)
    if name == "jpeg2k":
        return Jpeg2k(level=50, numthreads=1)
    if name == "blosc":
        return blosc()
    raise UserError(f"image codec '{name}' is unknown.{did_you_mean(name, IMAGE_CODECS)}")


def is_lossless(codec: Mapping[str, Any] | None) -> bool:
    """Whether decoding gives back exactly what was encoded, judged from the codec's configuration (None: raw bytes).

    Unknown image codecs count as lossy.
    """
    if codec is None:
        return True
    if codec["id"] == JpegXl.codec_id:
        return bool(codec.get("lossless"))
    return not codec["id"].startswith("imagecodecs_")
