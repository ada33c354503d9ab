from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

pytest.importorskip("robopolicy_sim")
pytest.importorskip("pygame")

from robopolicy.teleoperation.live import make_playable  # noqa: E402
from robopolicy.teleoperation.window import Window  # noqa: E402


@pytest.fixture
def push_puck() -> Iterator[Any]:
    env = make_playable("robopolicy_sim/PushPuck-v0", time_limit=20)
    yield env
    env.close()


@pytest.fixture
def window(monkeypatch: pytest.MonkeyPatch) -> Iterator[Window]:
    """A real window on SDL's display without a screen."""
    monkeypatch.setenv("SDL_VIDEODRIVER", "dummy")
    opened = Window("test")
    yield opened
    opened.close()
