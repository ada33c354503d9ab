"""Demonstrations moved in the plane of the table: rotated, mirrored, shifted, played faster or slower.

A vector's column names tell how it moves: ``*_x, *_y`` is a point, ``*_yaw`` a heading, ``*_r11 .. *_r32`` the first
two columns of a rotation matrix, ``*_z`` and the gripper's ``opening`` stay. The z axis points up.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from robopolicy.errors import UserError

_ROTATION = ("r11", "r21", "r31", "r12", "r22", "r32")
_UNMOVED = ("z", "opening", "gripper")


@dataclass(frozen=True)
class PlanarLayout:
    """Where the moving parts of a vector are.

    Attributes:
        points: (P, 2) columns of x and y.
        headings: (H,) columns of angles about z in radians.
        rotations: (R, 6) columns of the first two columns of a rotation matrix.
    """

    points: np.ndarray
    headings: np.ndarray
    rotations: np.ndarray

    @classmethod
    def of(cls, names: Sequence[str], what: str) -> PlanarLayout:
        """Read the layout off the column names; ``what`` names the vector in errors.

        Raises:
            UserError: it is not known how a column moves.
        """
        place = {name: i for i, name in enumerate(names)}
        points, headings, rotations, known = [], [], [], set()
        for name, i in place.items():
            prefix, last = _parts(name)
            if last == "x" and prefix + "y" in place:
                points.append([i, place[prefix + "y"]])
                known |= {name, prefix + "y"}
            elif last == "yaw":
                headings.append(i)
                known.add(name)
            elif last == _ROTATION[0] and all(prefix + entry in place for entry in _ROTATION):
                rotations.append([place[prefix + entry] for entry in _ROTATION])
                known |= {prefix + entry for entry in _ROTATION}
            elif last in _UNMOVED:
                known.add(name)
        unknown = [name for name in names if name not in known]
        if unknown or not names:
            raise UserError(
                f"{what}: it is not known how the columns {', '.join(unknown) or '(unnamed)'} move with the table's "
                "plane; known are *_x with *_y, *_z, *_yaw, *_r11 .. *_r32 and opening."
            )
        return cls(
            np.array(points, dtype=np.int64).reshape(-1, 2),
            np.array(headings, dtype=np.int64),
            np.array(rotations, dtype=np.int64).reshape(-1, 6),
        )


@dataclass(frozen=True)
class PlanarTransform:
    """A motion of the whole scene in its plane, and a change of pace.

    Attributes:
        angle: counter-clockwise about ``centre``, in radians, after mirroring.
        mirror: y is first reflected about ``centre``.
        shift: (x, y) in metres, last.
        pace: 2 plays the demonstration in half the time.
        centre: (x, y) in metres.
    """

    angle: float = 0.0
    mirror: bool = False
    shift: tuple[float, float] = (0.0, 0.0)
    pace: float = 1.0
    centre: tuple[float, float] = (0.0, 0.0)

    @property
    def matrix(self) -> np.ndarray:
        """(3, 3) orthogonal matrix of rotation and reflection."""
        cos, sin = np.cos(self.angle), np.sin(self.angle)
        rotation = np.array([[cos, -sin, 0.0], [sin, cos, 0.0], [0.0, 0.0, 1.0]])
        return rotation @ self._reflection

    @property
    def _reflection(self) -> np.ndarray:
        return np.diag([1.0, -1.0 if self.mirror else 1.0, 1.0])

    def move(self, vectors: np.ndarray, layout: PlanarLayout) -> np.ndarray:
        """Move (..., n) vectors.

        A mirrored rotation ``M R`` would be left-handed, so the body's own y axis is reflected too: ``M R diag(1, -1,
        1)``, which leaves a gripper that is symmetric in its y axis, or a block, as it is.
        """
        moved = np.array(vectors, dtype=np.float64)
        centre = np.array(self.centre)
        points = moved[..., layout.points] - centre
        moved[..., layout.points] = points @ self.matrix[:2, :2].T + centre + np.array(self.shift)
        heading = (-1 if self.mirror else 1) * moved[..., layout.headings] + self.angle
        moved[..., layout.headings] = (heading + np.pi) % (2 * np.pi) - np.pi
        frames = moved[..., layout.rotations].reshape(*moved.shape[:-1], -1, 2, 3)  # [..., column, row]
        frames = frames @ self.matrix.T * np.diag(self._reflection)[:2, None]
        moved[..., layout.rotations] = frames.reshape(*moved.shape[:-1], -1, 6)
        return moved

    def repace(self, actions: np.ndarray, layout: PlanarLayout) -> np.ndarray:
        """Resample (T, n) actions to ``round((T - 1) / pace) + 1`` steps, linearly between neighbours."""
        steps = round((len(actions) - 1) / self.pace) + 1
        times = np.linspace(0, len(actions) - 1, steps)
        before = np.minimum(times.astype(int), len(actions) - 1)
        after = np.minimum(before + 1, len(actions) - 1)
        share = (times - before)[:, None]
        difference = actions[after] - actions[before]
        turns = difference[:, layout.headings]
        difference[:, layout.headings] = (turns + np.pi) % (2 * np.pi) - np.pi
        return actions[before] + share * difference

    def to_dict(self) -> dict[str, Any]:
        """Plain values for provenance."""
        return {"angle": self.angle, "mirror": self.mirror, "shift": list(self.shift), "pace": self.pace}


def _parts(name: str) -> tuple[str, str]:
    """``tcp_r11`` to ``("tcp_", "r11")``, ``x`` to ``("", "x")``."""
    head, underscore, last = name.rpartition("_")
    return head + underscore, last
