"""Light: how much, its colour, where it comes from, how many lamps, hard or soft shadows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from robopolicy_sim.variation.factor import Factor

if TYPE_CHECKING:
    from robopolicy_sim.envs.arm_task import ArmTaskEnv


@dataclass(frozen=True)
class Lights:
    """Changes of the scene's lights: the room's ambient light, the ceiling lamp, and the window.

    Attributes:
        ambient, lamp, window: factor of each one's brightness; a window at 0 is switched off.
        tint: RGB that all light is multiplied with.
        lamp_from: where the lamp hangs [m]; it shines at the middle of the workspace.
        shadow: the lamp casts shadows.
    """

    ambient: float = 1.0
    lamp: float = 1.0
    window: float = 1.0
    tint: tuple[float, float, float] = (1.0, 1.0, 1.0)
    lamp_from: tuple[float, float, float] | None = None
    shadow: bool = True


LEVELS = {
    "darker": Lights(0.55, 0.45, 0.45),
    "brighter": Lights(1.3, 1.3, 1.5),
    "warm": Lights(tint=(1.10, 0.97, 0.80)),
    "cold": Lights(tint=(0.86, 0.97, 1.13)),
    "side": Lights(0.9, 1.4, 0.6, lamp_from=(0.5, 1.5, 1.2)),
    "one_lamp": Lights(0.5, 1.3, 0.0, lamp_from=(0.1, -0.5, 1.0)),
    "overcast": Lights(1.5, 0.4, 1.5, shadow=False),
}


def _set_lights(env: ArmTaskEnv, value: Lights | float) -> None:
    lights = value if isinstance(value, Lights) else Lights(value, value, value)
    model, tint = env.model, np.array(lights.tint)
    head = model.vis.headlight
    head.ambient[:] *= lights.ambient * tint
    head.diffuse[:] *= lights.ambient * tint
    lamp, window = model.light("ceiling").id, model.light("window").id
    for light, scale in ((lamp, lights.lamp), (window, lights.window)):
        model.light_diffuse[light] *= scale * tint
        model.light_specular[light] *= scale * tint
    model.light_active[window] = lights.window > 0
    model.light_castshadow[lamp] &= lights.shadow
    if lights.lamp_from is not None:
        position = np.array(lights.lamp_from)
        model.light_pos[lamp] = position
        model.light_dir[lamp] = -position / np.linalg.norm(position)


def _turn_lights(env: ArmTaskEnv, angle: float) -> None:
    cos, sin = np.cos(angle), np.sin(angle)
    turn = np.array([[cos, -sin, 0], [sin, cos, 0], [0, 0, 1]])
    env.model.light_pos[:] = env.model.light_pos @ turn.T
    env.model.light_dir[:] = env.model.light_dir @ turn.T


_HEADLIGHT = ("vis.headlight.ambient", "vis.headlight.diffuse")
_LIGHTS = ("light_diffuse", "light_specular", "light_active", "light_castshadow", "light_pos", "light_dir")

FACTORS = (
    Factor(
        "lighting",
        "brightness and kind of light; a number scales all light",
        _set_lights,
        levels=LEVELS,
        bounds=(0.2, 2.0),
        nominal=1.0,
        fields=(*_HEADLIGHT, *_LIGHTS),
    ),
    Factor(
        "light_angle",
        "lamps and window turned about the vertical [rad]",
        _turn_lights,
        bounds=(-np.pi, np.pi),
        nominal=0.0,
        fields=("light_pos", "light_dir"),
    ),
)
