"""Normalisers: per key, exact, fitted once on the training data, saved with the policy.

Every mode is an affine map per dimension, ``normalised = x * scale + offset``. A constant dimension is shifted to zero
and keeps its scale, so that noise at run time is not blown up.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal, get_args

import numpy as np
import torch
from torch import Tensor, nn

from robopolicy.errors import UserError, did_you_mean

Mode = Literal["minmax", "gaussian", "quantile", "identity"]
MODES: tuple[Mode, ...] = get_args(Mode)
CONSTANT_RANGE = 1e-4
"""A dimension whose range (or deviation) is below this counts as constant (Diffusion Policy's ``range_eps``)."""


class AffineNormalizer(nn.Module):
    """``normalised = x * scale + offset`` per dimension, with both (D,) as buffers.

    ``low`` and ``high`` (D,) keep the range of the training data, in physical units. With several domains (datasets
    that are normalised apart) all four are (domains, D), and every row of a batch names its domain.
    """

    scale: Tensor
    offset: Tensor
    low: Tensor
    high: Tensor

    def __init__(self, dim: int, domains: int = 1) -> None:
        super().__init__()
        shape = (dim,) if domains == 1 else (domains, dim)
        self.register_buffer("scale", torch.ones(shape))
        self.register_buffer("offset", torch.zeros(shape))
        self.register_buffer("low", torch.full(shape, -torch.inf))
        self.register_buffer("high", torch.full(shape, torch.inf))

    @classmethod
    def stack(cls, parts: Sequence[AffineNormalizer]) -> AffineNormalizer:
        """One normaliser with a domain for each of several of the same dimension."""
        if len(parts) == 1:
            return parts[0]
        stacked = cls(parts[0].scale.shape[-1], len(parts))
        for name in ("scale", "offset", "low", "high"):
            getattr(stacked, name).copy_(torch.stack([getattr(part, name) for part in parts]))
        return stacked

    def normalize(self, x: Tensor, domain: Tensor | None = None) -> Tensor:
        """Map physical units (B, ..., D) to normalised values; domain (B,) where there are several."""
        return x * _of_rows(self.scale, domain, x) + _of_rows(self.offset, domain, x)

    def unnormalize(self, x: Tensor, domain: Tensor | None = None) -> Tensor:
        """Map normalised values (B, ..., D) back to physical units."""
        return (x - _of_rows(self.offset, domain, x)) / _of_rows(self.scale, domain, x)

    def bounds(self, domain: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Smallest and largest normalised value of the training data, (D,), or (B, 1, D) for domain (B,)."""
        low, high = self.low * self.scale + self.offset, self.high * self.scale + self.offset
        return (low, high) if domain is None else (low[domain, None], high[domain, None])


def _of_rows(values: Tensor, domain: Tensor | None, x: Tensor) -> Tensor:
    """Each row's values, shaped to broadcast against x (B, ..., D)."""
    if domain is None:
        return values
    return values[domain].view(domain.shape[0], *[1] * (x.ndim - 2), -1)


def fit_normalizer(values: np.ndarray, mode: Mode, angles: tuple[int, ...] = ()) -> AffineNormalizer:
    """Fit the affine map of one key.

    Args:
        values: (N, D) training data in physical units.
        mode: ``minmax`` maps the range to [-1, 1]; ``gaussian`` gives mean 0 and standard deviation 1; ``quantile``
            maps the 1 % and 99 % quantiles to -1 and 1 (values outside go beyond); ``identity`` changes nothing.
        angles: dimensions left unchanged, since a network sees their sine and cosine.

    Raises:
        UserError: unknown mode, or values that are not finite.
    """
    if mode not in MODES:
        raise UserError(f"Unknown normalisation '{mode}'.{did_you_mean(mode, MODES)}")
    values = np.asarray(values, dtype=np.float64)
    if not np.isfinite(values).all():
        step, dim = np.argwhere(~np.isfinite(values))[0]
        raise UserError(
            f"Cannot normalise: step {step}, dimension {dim} is {values[step, dim]}. See `robopolicy data doctor`."
        )
    low, high = values.min(axis=0), values.max(axis=0)
    normalizer = AffineNormalizer(values.shape[1])
    normalizer.low.copy_(torch.from_numpy(low))
    normalizer.high.copy_(torch.from_numpy(high))
    if mode == "identity":
        return normalizer
    if mode == "gaussian":
        centre, spread = values.mean(axis=0), values.std(axis=0)
    else:
        lower, upper = (low, high) if mode == "minmax" else np.quantile(values, (0.01, 0.99), axis=0)
        centre, spread = (lower + upper) / 2, (upper - lower) / 2
    constant = spread * (1 if mode == "gaussian" else 2) < CONSTANT_RANGE
    scale = 1 / np.where(constant, 1.0, spread)
    offset = -centre * scale
    scale[list(angles)], offset[list(angles)] = 1.0, 0.0
    normalizer.scale.copy_(torch.from_numpy(scale))
    normalizer.offset.copy_(torch.from_numpy(offset))
    return normalizer


class Normalizer(nn.ModuleDict):
    """The normalisers of a policy, by key. Dots in key names are stored as '/' (module names hold no dots)."""

    @classmethod
    def from_parts(cls, parts: Mapping[str, AffineNormalizer]) -> Normalizer:
        return cls({key.replace(".", "/"): part for key, part in parts.items()})

    def __getitem__(self, key: str) -> AffineNormalizer:  # type: ignore[override]
        part = super().__getitem__(key.replace(".", "/"))
        assert isinstance(part, AffineNormalizer)
        return part
