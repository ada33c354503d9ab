"""Fixtures shared by all tests."""

from __future__ import annotations

import os
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
