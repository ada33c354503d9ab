"""Statistics against NumPy in float64 on everything at once."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from robopolicy.data import layout, statistics
from robopolicy.data.schema import ArraySpec
from robopolicy.data.statistics import ArrayStatistics, array_statistics
from robopolicy.data.store import EpisodeStore

from .episodes import IMAGE, write_dataset


def expect(found: ArrayStatistics, columns: np.ndarray, quantiles: float = 1e-9) -> None:
    columns = columns.astype(np.float64)
    np.testing.assert_array_equal(found.count, len(columns))
    for name in ("min", "max", "mean", "std"):
        np.testing.assert_allclose(getattr(found, name), getattr(columns, name)(axis=0), rtol=1e-9, err_msg=name)
    for q, name in ((0.01, "q01"), (0.5, "q50"), (0.99, "q99")):
        np.testing.assert_allclose(getattr(found, name), np.quantile(columns, q, axis=0), atol=quantiles, err_msg=name)


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Many blocks, the last one short."""
    monkeypatch.setattr(statistics, "_BLOCK_BYTES", 20_000)
    monkeypatch.setattr(layout, "CHUNK_BYTES", 10_000)


def test_vectors(tmp_path: Path) -> None:
    write_dataset(tmp_path / "d.zarr")
    with EpisodeStore.open(tmp_path / "d.zarr") as store:
        expect(array_statistics(store, "action"), store.read("action"))


def test_images_per_channel_without_overflow(tmp_path: Path, small_blocks: None) -> None:
    write_dataset(tmp_path / "d.zarr")
    with EpisodeStore.open(tmp_path / "d.zarr") as store:
        found = array_statistics(store, IMAGE)
        expect(found, store.read(IMAGE).reshape(-1, 3))
        assert (found.std > 10).all() and found.exact_quantiles


@pytest.mark.parametrize(("fractional", "exact"), [(False, True), (True, False)])
def test_float_images(tmp_path: Path, small_blocks: None, fractional: bool, exact: bool) -> None:
    rng = np.random.default_rng(0)
    brightness = np.linspace(60, 180, 50)[:, None, None, None]  # blocks differ in their mean
    images = rng.normal(brightness, 30, (50, 16, 16, 3)).clip(0, 255) * [1.0, 0.5, 0.1]
    images = (images if fractional else images.round()).astype(np.float32)
    with EpisodeStore.create(tmp_path / "d", [ArraySpec("img", (16, 16, 3), "float32", "image")], fps=1) as store:
        store.append({"img": images})
        found = array_statistics(store, "img")
    assert found.exact_quantiles is exact
    expect(found, images.reshape(-1, 3), quantiles=1e-9)  # small enough that the sample is everything


def test_values_that_are_not_finite_are_left_out(tmp_path: Path) -> None:
    values = np.array([[1.0, np.nan], [np.inf, np.nan], [3.0, np.nan]], np.float32)
    with EpisodeStore.create(tmp_path / "d", [ArraySpec("q", (2,), "float32", "state")], fps=1) as store:
        store.append({"q": values})
        found = array_statistics(store, "q")
    assert found.count.tolist() == [2, 0]
    assert (found.mean[0], found.max[0]) == (2.0, 3.0)
    assert found.to_dict()["mean"] == [2.0, None]


def test_push_t(pusht_zarr: Path) -> None:
    with EpisodeStore.open(pusht_zarr) as store:
        expect(array_statistics(store, "keypoint"), store.read("keypoint").reshape(store.n_steps, -1))
