"""Factors of variation of the arm tasks: light, surfaces, cameras, distractors, physics, control.

A factor has named levels and, mostly, numbers within bounds. ``variation={"lighting": "darker"}`` sets it for all
episodes, ``randomization={"friction": {"uniform": [0.5, 1.2]}}`` draws it at each reset.
"""

from robopolicy_sim.variation.factor import BASE, Factor
from robopolicy_sim.variation.presets import PRESETS
from robopolicy_sim.variation.variations import FACTORS, Variations

__all__ = ["BASE", "FACTORS", "PRESETS", "Factor", "Variations"]
