"""What ros2_control's joint_trajectory_controller does with trajectories, for the simulated robot.

The settings are those that a stream of trajectories needs: ``interpolate_from_desired_state: true``, and the default
``allow_nonzero_velocity_at_trajectory_end: false``.
"""

from __future__ import annotations

import numpy as np

from robopolicy.runtime.clock import NS
from robopolicy.runtime.commanded import CommandedMotion, Points, Setpoint


class JointTrajectoryController:
    """Follows the newest trajectory along its splines and holds where it ends.

    Args:
        tolerance: distance of the measured from the desired position at which a trajectory is aborted, and the
            measured position held; None: never.

    Attributes:
        accepted: trajectories that were followed.
        refused: those that were not.
        aborted: those that left the tolerance.
    """

    def __init__(self, tolerance: float | None = None) -> None:
        self._motion = CommandedMotion()
        self._tolerance = tolerance
        self.accepted = self.refused = self.aborted = 0

    def hold(self, time: int, position: np.ndarray) -> None:
        """Forget every trajectory and rest at a position (n,)."""
        self._motion.clear()
        self._motion.follow(time, Points(np.array([time]), position[None], hold=True))

    def accept(self, time: int, points: Points) -> str:
        """Follow a trajectory from ``time`` [ns] on.

        Returns:
            Empty, or why it is refused; then the one before goes on.
        """
        problem = refusal(points, time)
        if problem:
            self.refused += 1
            return problem
        self._motion.follow(time, points)
        self._motion.forget(time - NS)  # the simulation may lag behind the clock
        self.accepted += 1
        return ""

    def at(self, time: int) -> Setpoint:
        """The desired state."""
        state = self._motion.at(time)
        assert state is not None, "hold() comes first"
        return state

    def check(self, time: int, measured: np.ndarray) -> str:
        """Compare with the measured position (n,); returns why the trajectory was aborted, or nothing."""
        error = np.abs(measured - self.at(time).position)
        if self._tolerance is None or (error <= self._tolerance).all():
            return ""
        self.hold(time, measured)
        self.aborted += 1
        return f"entry {int(error.argmax())} is {error.max():.3f} from the trajectory, at most {self._tolerance:g}"


def refusal(points: Points, now: int) -> str:
    """Why the controller refuses a trajectory that its message could be read as; empty: it does not."""
    if points.times[-1] <= now:
        return "its end lies in the past"
    if points.velocities is not None and np.abs(points.velocities[-1]).max() > 1e-6:
        return f"its last velocity is not zero: {points.velocities[-1].tolist()}"
    return ""
