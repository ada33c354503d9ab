"""Forward kinematics against MuJoCo, and rotations against SciPy."""

from __future__ import annotations

import math

import numpy as np
import pytest

pytest.importorskip("robopolicy_sim")  # selects the OpenGL backend before mujoco is imported

import mujoco
from scipy.spatial.transform import Rotation

from robopolicy.runtime import rotation
from robopolicy.runtime.kinematics import forward
from robopolicy.runtime.limits import JointFrame, Kinematics
from robopolicy_sim.arms.arm import ARMS, arm_spec
from robopolicy_sim.kinematics import ArmKinematics

Triple = tuple[float, float, float]


def triple(values: np.ndarray) -> Triple:
    x, y, z = values
    return float(x), float(y), float(z)


def chain(model: mujoco.MjModel, joints: tuple[str, ...], site: str) -> Kinematics:
    """The frames of hinges that follow each other in a model, read off its zero posture."""
    data = mujoco.MjData(model)
    mujoco.mj_kinematics(model, data)
    frames, before, at = [], np.eye(3), np.zeros(3)
    for name in joints:
        joint = model.joint(name)
        body = data.xmat[joint.bodyid[0]].reshape(3, 3)
        anchor = data.xanchor[joint.id]
        turn = Rotation.from_matrix(before.T @ body)
        frames.append(
            JointFrame(triple(before.T @ (anchor - at)), triple(turn.as_euler("xyz")), triple(model.jnt_axis[joint.id]))
        )
        before, at = body, anchor
    site_id = model.site(site).id
    tool = Rotation.from_matrix(before.T @ data.site_xmat[site_id].reshape(3, 3))
    return Kinematics(
        tuple(frames), triple(before.T @ (data.site_xpos[site_id] - at)), triple(tool.as_euler("xyz")), "MuJoCo"
    )


def random_chain(rng: np.random.Generator, joints: int) -> Kinematics:
    frames = [
        JointFrame(triple(rng.normal(size=3)), triple(rng.uniform(-3, 3, 3)), triple(rng.normal(size=3)))
        for _ in range(joints)
    ]
    return Kinematics(tuple(frames), triple(rng.normal(size=3)), triple(rng.uniform(-3, 3, 3)))


def mjcf(kinematics: Kinematics) -> str:
    """The chain as MuJoCo has it: its eulers are told to be about fixed axes."""

    def numbers(values: Triple) -> str:
        return " ".join(map(repr, values))

    opened = ""
    for index, joint in enumerate(kinematics.joints):
        opened += (
            f'<body pos="{numbers(joint.xyz)}" euler="{numbers(joint.rpy)}">'
            f'<joint name="j{index}" axis="{numbers(joint.axis)}"/><geom size="0.1"/>'
        )
    tool = f'<site name="tool" pos="{numbers(kinematics.tool_xyz)}" euler="{numbers(kinematics.tool_rpy)}"/>'
    closed = "</body>" * len(kinematics.joints)
    return f'<mujoco><compiler angle="radian" eulerseq="XYZ"/><worldbody>{opened}{tool}{closed}</worldbody></mujoco>'


@pytest.mark.parametrize("joints", [1, 2, 6, 7])
def test_random_chains_are_where_mujoco_has_them(joints: int) -> None:
    rng = np.random.default_rng(joints)
    for _ in range(5):
        kinematics = random_chain(rng, joints)
        model = mujoco.MjModel.from_xml_string(mjcf(kinematics))
        data = mujoco.MjData(model)
        angles = rng.uniform(-4, 4, (10, joints))
        positions, rotations = forward(kinematics, angles)
        for row, position, turned in zip(angles, positions, rotations, strict=True):
            data.qpos[:] = row
            mujoco.mj_kinematics(model, data)
            np.testing.assert_allclose(position, data.site("tool").xpos, atol=1e-9)
            np.testing.assert_allclose(turned, data.site("tool").xmat.reshape(3, 3), atol=1e-9)


@pytest.mark.parametrize("name", sorted(ARMS))
def test_the_simulated_arms_are_where_their_model_has_them(name: str) -> None:
    arm = ARMS[name]
    kinematics = chain(arm_spec(arm).compile(), arm.joints, arm.tcp_site)
    reference, rng = ArmKinematics(arm), np.random.default_rng(0)
    for angles in rng.uniform(-3, 3, (20, len(arm.joints))):
        position, turned = reference.forward(angles)
        found = forward(kinematics, angles)
        np.testing.assert_allclose(found[0], position, atol=1e-9)
        np.testing.assert_allclose(found[1], turned, atol=1e-9)


def test_many_rows_are_as_one_after_the_other() -> None:
    rng = np.random.default_rng(0)
    kinematics, angles = random_chain(rng, 5), rng.normal(size=(3, 4, 5))
    positions, rotations = forward(kinematics, angles)
    assert positions.shape == (3, 4, 3) and rotations.shape == (3, 4, 3, 3)
    for index in np.ndindex(3, 4):
        position, turned = forward(kinematics, angles[index])
        np.testing.assert_allclose(positions[index], position, atol=1e-12)
        np.testing.assert_allclose(rotations[index], turned, atol=1e-12)


def test_a_wrong_number_of_angles_is_named() -> None:
    with pytest.raises(ValueError, match="found 4 angles, the chain has 5"):
        forward(random_chain(np.random.default_rng(0), 5), np.zeros(4))


def test_rotations_agree_with_scipy() -> None:
    rng = np.random.default_rng(0)
    for length in (0.0, 1e-12, 1e-9, 1e-4, 0.5, 3.0, math.pi - 1e-5, math.pi - 1e-9, math.pi):
        for axis in (*np.eye(3), *-np.eye(3), *rng.normal(size=(10, 3))):
            vector = length * axis / np.linalg.norm(axis)
            matrix = rotation.from_vector(vector)
            np.testing.assert_allclose(matrix, Rotation.from_rotvec(vector).as_matrix(), atol=1e-12)
            back = rotation.from_vector(rotation.to_vector(matrix))
            np.testing.assert_allclose(back, matrix, atol=1e-8)
            if length < 3.1:
                np.testing.assert_allclose(rotation.to_vector(matrix), vector, atol=1e-12)
    rpy = rng.uniform(-3, 3, 3)
    np.testing.assert_allclose(rotation.from_rpy(rpy), Rotation.from_euler("xyz", rpy).as_matrix(), atol=1e-12)


def test_six_numbers_are_the_nearest_columns() -> None:
    rng = np.random.default_rng(0)
    for _ in range(50):
        matrix = Rotation.random(random_state=rng).as_matrix()
        np.testing.assert_allclose(rotation.from_columns(rotation.to_columns(matrix)), matrix, atol=1e-12)
        stretched = np.concatenate([3 * matrix[:, 0], 0.2 * matrix[:, 1] + 5 * matrix[:, 0]])
        np.testing.assert_allclose(rotation.from_columns(stretched), matrix, atol=1e-9)
    for none in ([0] * 6, [1, 0, 0, 2, 0, 0], [1, 0, 0, math.nan, 0, 0], [math.inf, 0, 0, 0, 1, 0]):
        assert rotation.from_columns(np.array(none, float)) is None


def test_derivatives_of_the_six_numbers_and_the_angular_velocity_belong_together() -> None:
    rng = np.random.default_rng(0)
    matrix = Rotation.random(random_state=rng).as_matrix()
    velocity, acceleration = rng.normal(size=(2, 3))
    six, rates, faster = rotation.column_motion(matrix, velocity, acceleration)
    step = 1e-4

    def later(time: float) -> np.ndarray:
        return rotation.to_columns(rotation.from_vector(velocity * time + acceleration * time**2 / 2) @ matrix)

    np.testing.assert_allclose(six, later(0.0))
    np.testing.assert_allclose(rates, (later(step) - later(-step)) / (2 * step), atol=1e-6)
    np.testing.assert_allclose(faster, (later(step) - 2 * later(0) + later(-step)) / step**2, atol=1e-4)
    np.testing.assert_allclose(rotation.turning(matrix, rates), velocity, atol=1e-12)
