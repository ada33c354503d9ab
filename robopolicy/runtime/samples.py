"""What streams carry, free of ROS: one value of each kind of message."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, eq=False)
class Joints:
    """Named numbers (``sensor_msgs/JointState``).

    Attributes:
        names: of the entries, in any order.
        position, velocity, effort: (n,) float64; None where the message leaves them empty.
    """

    names: tuple[str, ...]
    position: np.ndarray | None = None
    velocity: np.ndarray | None = None
    effort: np.ndarray | None = None


@dataclass(frozen=True, eq=False)
class Pose:
    """A pose: position (3,) in metres, unit quaternion (4,) xyzw."""

    position: np.ndarray
    quaternion: np.ndarray


@dataclass(frozen=True, eq=False)
class Wrench:
    """Force (3,) in N, torque (3,) in Nm."""

    force: np.ndarray
    torque: np.ndarray


Image = np.ndarray
"""(height, width, 3) uint8 RGB."""

Value = Joints | Pose | Wrench | Image
