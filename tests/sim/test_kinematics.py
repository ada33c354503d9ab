import numpy as np
import pytest

pytest.importorskip("robopolicy_sim")

from scipy.spatial.transform import Rotation

from robopolicy_sim.arms.arm import ARMS, Arm
from robopolicy_sim.kinematics import (
    ArmKinematics,
    from_rotation_6d,
    rotation_error,
    rotation_from_vector,
    to_rotation_6d,
)


@pytest.fixture(params=sorted(ARMS))
def arm(request: pytest.FixtureRequest) -> Arm:
    return ARMS[request.param]


def test_inverse_finds_the_pose_of_nearby_joint_angles(arm: Arm) -> None:
    kinematics = ArmKinematics(arm)
    rng = np.random.default_rng(0)
    low, high = kinematics.limits
    for _ in range(20):
        goal = np.clip(np.array(arm.home) + rng.uniform(-0.25, 0.25, len(arm.joints)), low, high)
        position, rotation = kinematics.forward(goal)
        joints = kinematics.inverse(position, rotation, np.array(arm.home), iterations=60)
        found, frame = kinematics.forward(joints)
        assert np.linalg.norm(found - position) < 1e-3
        assert np.linalg.norm(rotation_error(rotation, frame)) < 5e-3


def test_a_pose_out_of_reach_gives_joint_angles_within_their_limits(arm: Arm) -> None:
    kinematics = ArmKinematics(arm)
    low, high = kinematics.limits
    joints = kinematics.inverse(np.array([0.0, 3.0, 0.2]), np.eye(3), np.array(arm.home), iterations=50)
    assert (joints >= low).all() and (joints <= high).all()
    position, _ = kinematics.forward(joints)
    assert position[1] > 0.4 * arm.reach  # stretched towards the goal


def test_redundant_arm_drifts_back_to_its_home_posture() -> None:
    arm = ARMS["panda"]
    kinematics = ArmKinematics(arm)
    home = np.array(arm.home)
    position, rotation = kinematics.forward(home)
    # The elbow turned about the line from shoulder to wrist, the tool brought back by steps without a posture goal.
    turned = home + [0.4, 0, -0.4, 0, 0, 0, 0]
    turned = ArmKinematics(arm, posture_gain=0.0).inverse(position, rotation, turned, iterations=100)
    assert np.abs(turned - home).max() > 0.1
    joints = turned
    for _ in range(100):  # at the goal a search ends at once, so the tool is nudged as in a control loop
        joints = kinematics.inverse(position + [0, 0, 1e-3], rotation, joints, iterations=3)
        joints = kinematics.inverse(position, rotation, joints, iterations=3)
    assert np.abs(joints - home).max() < 0.5 * np.abs(turned - home).max()


def test_rotation_vectors_agree_with_scipy() -> None:
    rng = np.random.default_rng(1)
    for angle in (0.0, 1e-7, 0.3, 2.0, np.pi - 1e-3):
        axis = rng.normal(size=3)
        vector = angle * axis / np.linalg.norm(axis)
        start = Rotation.random(random_state=rng).as_matrix()
        turned = Rotation.from_rotvec(vector).as_matrix() @ start
        np.testing.assert_allclose(rotation_from_vector(vector) @ start, turned, atol=1e-9)
        np.testing.assert_allclose(rotation_error(turned, start), vector, atol=1e-6)


def test_six_d_rotation_round_trip_and_repair() -> None:
    rotation = Rotation.from_euler("xyz", [0.3, -1.1, 2.0]).as_matrix()
    vector = to_rotation_6d(rotation)
    np.testing.assert_array_equal(vector, [*rotation[:, 0], *rotation[:, 1]])
    np.testing.assert_allclose(from_rotation_6d(vector), rotation, atol=1e-12)
    repaired = from_rotation_6d(2.0 * vector + 0.05)
    np.testing.assert_allclose(repaired @ repaired.T, np.eye(3), atol=1e-12)
    with pytest.raises(ValueError, match="parallel"):
        from_rotation_6d(np.array([1.0, 0, 0, 2.0, 0, 0]))
