"""The suites that ship fit the factors of the arm tasks."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("robopolicy_sim")

from robopolicy.cli.evaluate import suite_path  # noqa: E402
from robopolicy.evaluation.environments import environment  # noqa: E402
from robopolicy.evaluation.suite import BASE, Suite, load_suite  # noqa: E402


def images(suite: Suite) -> dict[str, np.ndarray]:
    """The first image of each setting on ``lift``."""
    found = {}
    for setting in suite.settings:
        described = environment("lift", setting.options)
        env = described.build([described.keys["observation.image.scene"]])
        observation, info = env.reset(seed=0)
        found[setting.name] = observation["observation.image.scene"].astype(float)
        varied = {} if setting.factor == BASE else {setting.factor: setting.level}
        assert info["variation"] == varied
        env.close()
    return found


@pytest.mark.parametrize("name", ["variant_aggregation", "visual_matching"])
def test_every_setting_opens_and_differs(name: str, tmp_path: Path):
    photo = tmp_path / "desk.png"
    Image.new("RGB", (96, 96), (150, 140, 120)).save(photo)
    options = {"background": {"photo": str(photo)}} if name == "visual_matching" else {}
    suite = load_suite(suite_path(name), options)
    shown = images(suite)
    names = list(shown)
    for i, one in enumerate(names):
        for other in names[i + 1 :]:
            assert np.abs(shown[one] - shown[other]).max() > 30, (one, other)
    factors = {setting.factor for setting in suite.settings if setting.in_aggregate}
    wanted = {
        "variant_aggregation": {"background", "lighting", "distractors", "table_texture"},
        "visual_matching": {"arm_colour"},
    }
    assert factors == {BASE} | wanted[name]
