"""Randomizations by name."""

from __future__ import annotations

from typing import Any

from robopolicy_sim.variation.distractors import MAX_COUNT
from robopolicy_sim.variation.factor import BASE
from robopolicy_sim.variation.surfaces import ARM_COLOURS, BACKGROUNDS, TABLE_TEXTURES

PRESETS: dict[str, dict[str, Any]] = {
    # What differs between two set-ups of the same bench.
    "mild": {
        "lighting": {"uniform": [0.75, 1.25]},
        "light_angle": {"uniform": [-0.5, 0.5]},
        "table_colour": {"uniform": [[0.85] * 3, [1.0] * 3]},
        "camera_yaw": {"uniform": [-0.05, 0.05]},
        "camera_pitch": {"uniform": [-0.03, 0.03]},
        "camera_distance": {"uniform": [0.96, 1.04]},
        "camera_fov": {"uniform": [0.97, 1.03]},
        "friction": {"uniform": [0.8, 1.2]},
        "object_mass": {"uniform": [0.7, 1.5]},
        "gain": {"uniform": [0.9, 1.1]},
        "damping": {"uniform": [0.9, 1.1]},
        "action_latency": {"uniform": [0.0, 0.02]},
    },
    # What differs between labs.
    "strong": {
        "lighting": {"uniform": [0.4, 1.6]},
        "light_angle": {"uniform": [-3.14, 3.14]},
        "table_texture": {"choice": [BASE, *TABLE_TEXTURES]},
        "table_colour": {"uniform": [[0.6] * 3, [1.0] * 3]},
        "background": {"choice": [BASE, *BACKGROUNDS]},
        "arm_colour": {"choice": [BASE, *ARM_COLOURS]},
        "camera_yaw": {"uniform": [-0.15, 0.15]},
        "camera_pitch": {"uniform": [-0.08, 0.08]},
        "camera_distance": {"uniform": [0.9, 1.1]},
        "camera_fov": {"uniform": [0.93, 1.07]},
        "distractors": {"choice": list(range(MAX_COUNT + 1))},
        "friction": {"uniform": [0.6, 1.5]},
        "object_mass": {"uniform": [0.4, 3.0]},
        "table_height": {"uniform": [-0.02, 0.02]},
        "gain": {"uniform": [0.7, 1.3]},
        "damping": {"uniform": [0.7, 1.4]},
        "action_latency": {"uniform": [0.0, 0.05]},
    },
}
