"""Fixtures shared by all tests."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def pusht_zarr() -> Path:
    """The human Push-T demonstrations (206 episodes); tests skip where the dataset is not on disk."""
    folder = Path(os.environ.get("ROBOPOLICY_DATA", REPOSITORY.parent / "shared" / "data"))
    path = folder / "pusht_cchi_v7_replay.zarr"
    if not path.exists():
        pytest.skip(f"the human Push-T dataset is not at {path}; set ROBOPOLICY_DATA to the folder that holds it")
    return path


@pytest.fixture(autouse=True, scope="session")
def _caches_of_their_own(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Compiled engines are cached for the user; tests leave nothing there."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield
