"""Forward and inverse kinematics of an arm, on a model of the arm alone so that the scene costs nothing."""

from __future__ import annotations

import mujoco
import numpy as np
from scipy.linalg.lapack import dposv

from robopolicy_sim.arms.arm import Arm, arm_spec

LONGEST_STEP = 0.15  # m of weighted error that one step may aim at (clamping, Buss and Kim 2005)


class ArmKinematics:
    """Pose of the tool centre point (TCP) for joint angles and back, in the arm's base frame.

    Inverse kinematics takes damped least-squares steps (Wampler 1986; Nakamura and Hanafusa 1986) on the pose error,
    with the home posture as a secondary goal in the null space. For a pose out of reach it ends near it.

    Args:
        damping: of the least-squares step; larger is steadier near singularities and slower.
        posture_gain: pull towards the home posture, per step, in the null space.
        rotation_weight: metres of position error that weigh as much as one radian.
    """

    def __init__(
        self, arm: Arm, *, damping: float = 0.02, posture_gain: float = 0.05, rotation_weight: float = 0.25
    ) -> None:
        self._model = arm_spec(arm).compile()
        self._data = mujoco.MjData(self._model)
        joints = [self._model.joint(name) for name in arm.joints]
        self._qpos = np.array([joint.qposadr[0] for joint in joints])
        self._dofs = np.array([joint.dofadr[0] for joint in joints])
        self._low, self._high = np.array([joint.range for joint in joints]).T
        self._home = np.array(arm.home)
        self._site = self._model.site(arm.tcp_site).id
        self._weights = np.repeat([1.0, rotation_weight], 3)
        self._damping, self._posture_gain = damping, posture_gain
        self._jacobian = np.zeros((6, self._model.nv))

    @property
    def limits(self) -> tuple[np.ndarray, np.ndarray]:
        """Lowest and highest joint angles, each (n,) radians."""
        return self._low, self._high

    def forward(self, joints: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Position (3,) in metres and rotation matrix (3, 3) of the TCP for joint angles (n,) in radians."""
        self._data.qpos[self._qpos] = joints
        mujoco.mj_kinematics(self._model, self._data)
        return self._data.site_xpos[self._site].copy(), self._data.site_xmat[self._site].reshape(3, 3).copy()

    def inverse(
        self,
        position: np.ndarray,
        rotation: np.ndarray,
        start: np.ndarray,
        *,
        iterations: int = 10,
        tolerance: float = 2e-4,
    ) -> np.ndarray:
        """Joint angles (n,) within their limits that bring the TCP near a pose, searched from ``start``.

        Args:
            position: (3,) metres; rotation: (3, 3).
            iterations: most steps to take.
            tolerance: of the weighted error in metres, at which the search ends.
        """
        joints = np.minimum(np.maximum(start, self._low), self._high)
        wanted, found, turn = np.empty(4), np.empty(4), np.empty(3)
        mujoco.mju_mat2Quat(wanted, np.ascontiguousarray(rotation).ravel())
        error = np.empty(6)
        for _ in range(iterations):
            self._data.qpos[self._qpos] = joints
            mujoco.mj_kinematics(self._model, self._data)
            frame = self._data.site_xmat[self._site]
            mujoco.mju_mat2Quat(found, frame)
            mujoco.mju_subQuat(turn, wanted, found)  # in the tool's frame
            error[:3] = position - self._data.site_xpos[self._site]
            error[3:] = frame.reshape(3, 3) @ turn
            error *= self._weights
            size = float(error @ error) ** 0.5
            if size < tolerance:
                break
            error *= min(1.0, LONGEST_STEP / size)
            joints = np.minimum(np.maximum(joints + self._step(error, joints), self._low), self._high)
        return joints

    def _step(self, error: np.ndarray, joints: np.ndarray) -> np.ndarray:
        mujoco.mj_comPos(self._model, self._data)
        mujoco.mj_jacSite(self._model, self._data, self._jacobian[:3], self._jacobian[3:], self._site)
        jacobian = self._jacobian[:, self._dofs] * self._weights[:, None]
        gram = jacobian @ jacobian.T
        gram.flat[::7] += self._damping**2
        posture = self._posture_gain * (self._home - joints)
        # One solve for both goals: J+ (e - J p) + p moves by e in the task space and by p in its null space.
        _, solution, _ = dposv(gram, error - jacobian @ posture, overwrite_a=True)
        return jacobian.T @ solution + posture


def rotation_error(wanted: np.ndarray, found: np.ndarray) -> np.ndarray:
    """Rotation vector (3,), base frame, that turns ``found`` (3, 3) into ``wanted``; its length is at most pi."""
    quaternion, vector = np.empty(4), np.empty(3)
    mujoco.mju_mat2Quat(quaternion, (wanted @ found.T).ravel())
    mujoco.mju_quat2Vel(vector, quaternion, 1.0)
    return vector


def rotation_from_vector(vector: np.ndarray) -> np.ndarray:
    """Rotation matrix (3, 3) of a rotation vector (3,) in radians (Rodrigues)."""
    quaternion, matrix = np.empty(4), np.empty(9)
    angle = float(np.linalg.norm(vector))
    mujoco.mju_axisAngle2Quat(quaternion, vector / angle if angle > 0 else np.array([0.0, 0.0, 1.0]), angle)
    mujoco.mju_quat2Mat(matrix, quaternion)
    return matrix.reshape(3, 3)


def to_rotation_6d(rotation: np.ndarray) -> np.ndarray:
    """First two columns of a rotation matrix (3, 3), concatenated (6,) (Zhou et al., CVPR 2019)."""
    return rotation[:, :2].T.ravel()


def from_rotation_6d(vector: np.ndarray) -> np.ndarray:
    """Rotation matrix (3, 3) from two columns (6,) that need not be orthonormal: Gram-Schmidt (Zhou et al., eq. 15).

    Raises:
        ValueError: the columns are (nearly) zero or parallel.
    """
    first, second = vector[:3], vector[3:]
    length = float(np.linalg.norm(first))
    x = first / max(length, 1e-12)
    rest = second - (x @ second) * x
    height = float(np.linalg.norm(rest))
    if min(length, height) < 1e-6:
        raise ValueError(f"The 6-D rotation {np.round(vector, 4)} has zero or parallel columns; it is no rotation.")
    y = rest / height
    z = (x[1] * y[2] - x[2] * y[1], x[2] * y[0] - x[0] * y[2], x[0] * y[1] - x[1] * y[0])
    return np.column_stack([x, y, z])
