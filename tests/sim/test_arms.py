"""The robot arms: kinematics and limits as published, servos, grasping, and a user's own MJCF."""

from __future__ import annotations

from functools import reduce
from pathlib import Path

import numpy as np
import pytest
from scipy.spatial.transform import Rotation

import robopolicy_sim
from robopolicy_sim.arms.arm import ARMS, PANDA, SO101, UR5E, Arm, arm_spec, find_arm
from robopolicy_sim.arms.user_mjcf import arm_from_mjcf

mujoco = pytest.importorskip("mujoco")

BENCH = Path(robopolicy_sim.__file__).parent / "scenes" / "bench.xml"
PI = np.pi

# Franka Control Interface documentation, "Denavit-Hartenberg parameters" (Craig's convention): a, d, alpha.
PANDA_DH = [
    (0, 0.333, 0),
    (0, 0, -PI / 2),
    (0, 0.316, PI / 2),
    (0.0825, 0, PI / 2),
    (-0.0825, 0.384, -PI / 2),
    (0, 0, PI / 2),
    (0.088, 0, PI / 2),
]
PANDA_FLANGE = 0.107
# Universal Robots, "DH parameters for calculations of kinematics and dynamics": a, d, alpha.
UR5E_DH = [
    (0, 0.1625, PI / 2),
    (-0.425, 0, 0),
    (-0.3922, 0, 0),
    (0, 0.1333, PI / 2),
    (0, 0.0997, -PI / 2),
    (0, 0.0996, 0),
]
# SO-ARM100, Simulation/SO101/so101_new_calib.xml: position and quaternion (wxyz) of each joint's frame in the last one.
SO101_FRAMES = [
    ((0.0388353, 0, 0.0624), (0, 0, -1, 0)),
    ((-0.0303992, -0.0182778, -0.0542), (0.5, -0.5, -0.5, -0.5)),
    ((-0.11257, -0.028, 0), (0.707107, 0, 0, 0.707107)),
    ((-0.1349, 0.0052, 0), (0.707107, 0, 0, -0.707107)),
    ((0, -0.0611, 0.0181), (0.0172091, -0.0172091, 0.706897, 0.706897)),
]
SO101_PLINTH = 0.1
SO101_GRIPPER_FRAME = ((-0.0079, -0.000218121, -0.0981274), (0.707107, 0, 0.707107, 0))

LIMITS = {
    "panda": [
        (-2.8973, 2.8973),
        (-1.7628, 1.7628),
        (-2.8973, 2.8973),
        (-3.0718, -0.0698),
        (-2.8973, 2.8973),
        (-0.0175, 3.7525),
        (-2.8973, 2.8973),
    ],
    "ur5e": [(-2 * PI, 2 * PI)] * 2 + [(-PI, PI)] + [(-2 * PI, 2 * PI)] * 3,
    "so101": [
        (-1.91986, 1.91986),
        (-1.74533, 1.74533),
        (-1.69, 1.69),
        (-1.65806, 1.65806),
        (-2.74385, 2.84121),
    ],
}
TORQUES = {"panda": [87] * 4 + [12] * 3, "ur5e": [150] * 3 + [28] * 3, "so101": [2.94] * 5}
MASSES = {
    "panda": 4.970684 + 0.646926 + 3.228604 + 3.587895 + 1.225946 + 1.666555 + 0.735522 + 0.629769 + 0.73 + 2 * 0.015,
    "ur5e": 4 + 3.761 + 8.058 + 2.846 + 1.37 + 1.3 + 0.365 + 0.925,
    "so101": 0.147 + 0.100006 + 0.103 + 0.104 + 0.079 + 0.087 + 0.012,
}


def transform(rotation: Rotation | None = None, position: tuple[float, float, float] = (0, 0, 0)) -> np.ndarray:
    pose = np.eye(4)
    pose[:3, :3] = np.eye(3) if rotation is None else rotation.as_matrix()
    pose[:3, 3] = position
    return pose


def turn(axis: str, angle: float) -> np.ndarray:
    return transform(Rotation.from_euler(axis, angle))


def panda_flange(q: np.ndarray) -> np.ndarray:
    links = [
        turn("x", alpha) @ transform(position=(a, 0, d)) @ turn("z", angle)
        for (a, d, alpha), angle in zip(PANDA_DH, q, strict=True)
    ]
    # Craig's order is Rx Tx Rz Tz; along z, turning and shifting commute.
    return reduce(np.matmul, links) @ transform(position=(0, 0, PANDA_FLANGE))


def ur5e_flange(q: np.ndarray) -> np.ndarray:
    links = [
        turn("z", angle) @ transform(position=(a, 0, d)) @ turn("x", alpha)
        for (a, d, alpha), angle in zip(UR5E_DH, q, strict=True)
    ]
    return reduce(np.matmul, links, turn("z", PI))


def so101_gripper_frame(q: np.ndarray) -> np.ndarray:
    def published(position, quaternion):
        return transform(Rotation.from_quat(np.roll(quaternion, -1)), position)

    links = [published(*frame) @ turn("z", angle) for frame, angle in zip(SO101_FRAMES, q, strict=True)]
    return transform(position=(0, 0, SO101_PLINTH)) @ reduce(np.matmul, links) @ published(*SO101_GRIPPER_FRAME)


def random_joints(arm: Arm, n: int) -> np.ndarray:
    low, high = np.array(LIMITS[arm.name]).T
    return np.random.default_rng(0).uniform(low, high, (n, len(low)))


class Scene:
    """An arm on a floor with a cube, under its own servos."""

    def __init__(
        self, arm: Arm, cube_half: float = 0.02, cube_mass: float = 0.1, *, gravity_compensation: bool = True
    ) -> None:
        spec = mujoco.MjSpec()
        spec.option.timestep = 0.005
        spec.option.integrator = mujoco.mjtIntegrator.mjINT_IMPLICITFAST
        spec.option.cone = mujoco.mjtCone.mjCONE_ELLIPTIC
        spec.option.impratio = 10
        spec.worldbody.add_geom(type=mujoco.mjtGeom.mjGEOM_PLANE, size=[2, 2, 0.1])
        spec.attach(arm_spec(arm), prefix="", frame=spec.worldbody.add_frame())
        for body in spec.bodies if not gravity_compensation else ():
            body.gravcomp = 0
        cube = spec.worldbody.add_body(name="cube", pos=[1.2, 1.2, cube_half])
        cube.add_freejoint(name="cube")
        cube.add_geom(type=mujoco.mjtGeom.mjGEOM_BOX, size=[cube_half] * 3, mass=cube_mass)
        self.arm, self.model = arm, spec.compile()
        self.data = mujoco.MjData(self.model)
        self.qpos = [self.model.joint(name).qposadr[0] for name in arm.joints]
        self.fingers = [self.model.joint(name).qposadr[0] for name in arm.gripper.joints]
        self.ctrl = [self.model.actuator(name).id for name in arm.actuators]
        self.data.qpos[self.qpos] = self.data.ctrl[self.ctrl] = arm.home
        self.data.qpos[self.fingers] = arm.gripper.joint_open
        self.command_gripper(1.0)
        mujoco.mj_forward(self.model, self.data)

    @property
    def tcp(self) -> np.ndarray:
        return self.data.site(self.arm.tcp_site).xpos

    def command_gripper(self, share: float) -> None:
        self.data.actuator(self.arm.gripper.actuator).ctrl = self.arm.gripper.command(share)

    def run(self, seconds: float) -> None:
        for _ in range(round(seconds / self.model.opt.timestep)):
            mujoco.mj_step(self.model, self.data)

    def grasp_in_free_fall(self) -> None:
        """Put the cube at the TCP and close the gripper on it with gravity off."""
        gravity = self.model.opt.gravity.copy()
        self.model.opt.gravity[:] = 0
        quaternion = np.empty(4)
        mujoco.mju_mat2Quat(quaternion, self.data.site(self.arm.tcp_site).xmat)
        self.data.joint("cube").qpos = [*self.tcp, *quaternion]
        self.command_gripper(0.0)
        self.run(1.0)
        self.model.opt.gravity[:] = gravity


@pytest.fixture(params=ARMS.values(), ids=ARMS)
def arm(request) -> Arm:
    return request.param


@pytest.mark.parametrize(
    ("arm", "site", "expected", "tolerance"),
    [
        (PANDA, "flange", panda_flange, 1e-6),
        (UR5E, "flange", ur5e_flange, 1e-6),
        # The published quaternions have six digits.
        (SO101, "gripper_frame", so101_gripper_frame, 2e-6),
    ],
    ids=["panda", "ur5e", "so101"],
)
def test_forward_kinematics_equals_the_published_tables(arm, site, expected, tolerance):
    model = arm_spec(arm).compile()
    data = mujoco.MjData(model)
    for joints in random_joints(arm, 20):
        for name, position in zip(arm.joints, joints, strict=True):
            data.joint(name).qpos = position
        mujoco.mj_kinematics(model, data)
        pose = expected(joints)
        np.testing.assert_allclose(data.site(site).xpos, pose[:3, 3], atol=tolerance)
        np.testing.assert_allclose(data.site(site).xmat.reshape(3, 3), pose[:3, :3], atol=tolerance)


def test_limits_torques_and_masses_are_the_published_ones(arm):
    model = arm_spec(arm).compile()
    for name, limit, torque in zip(arm.joints, LIMITS[arm.name], TORQUES[arm.name], strict=True):
        np.testing.assert_allclose(model.joint(name).range, limit, atol=1e-12)
        np.testing.assert_allclose(model.actuator(name).ctrlrange, limit, atol=1e-12)
        np.testing.assert_allclose(model.jnt_actfrcrange[model.joint(name).id], [-torque, torque])
    assert model.body_mass.sum() == pytest.approx(MASSES[arm.name])  # so decoration weighs nothing


def test_the_tcp_lies_between_the_pads_with_z_forward_and_y_across(arm):
    scene = Scene(arm)
    tcp = scene.data.site(arm.tcp_site)
    axes = tcp.xmat.reshape(3, 3)
    left, right = (scene.data.geom(pad).xpos for pad in arm.gripper.pads)
    across = axes.T @ (left - right)
    assert abs(across[1]) > 3 * abs(across[0])
    between = [float(axes[:, 1] @ (pad - tcp.xpos)) for pad in (left, right)]
    assert min(between) < 0 < max(between)
    flange = scene.data.body(scene.model.site(arm.tcp_site).bodyid[0]).xpos
    assert axes[:, 2] @ (tcp.xpos - flange) > 0.05


def test_home_holds_the_gripper_over_the_table_pointing_down(arm):
    scene = Scene(arm)
    # The SO-101 closes along x, in the middle of its roll; the others along y.
    down = [[0, 1, 0], [1, 0, 0], [0, 0, -1]] if arm is SO101 else np.diag([1, -1, -1])
    np.testing.assert_allclose(scene.data.site(arm.tcp_site).xmat.reshape(3, 3), down, atol=1e-3)
    x, y, z = scene.tcp
    assert 0.4 * arm.reach < x < 0.6 * arm.reach
    assert abs(y) < 1e-3
    assert 0.05 < z < 0.3
    assert scene.data.ncon == 4  # the cube on the floor; no link touches anything


def test_no_link_collides_with_another_around_home(arm):
    scene = Scene(arm)
    rng = np.random.default_rng(1)
    for _ in range(50):
        scene.data.qpos[scene.qpos] = np.array(arm.home) + rng.uniform(-0.15, 0.15, len(arm.joints))
        mujoco.mj_fwdPosition(scene.model, scene.data)
        names = {scene.model.geom(geom).name for contact in scene.data.contact for geom in contact.geom}
        assert names == {""}, names  # floor and cube are the nameless geoms


def test_servos_hold_home_against_gravity(arm):
    scene = Scene(arm)
    scene.run(2.0)
    np.testing.assert_allclose(scene.data.qpos[scene.qpos], arm.home, atol=1e-3)


def test_without_gravity_compensation_the_arm_sags(arm):
    scene = Scene(arm, gravity_compensation=False)
    scene.run(2.0)
    assert np.abs(scene.data.qpos[scene.qpos] - arm.home).max() > 1e-3


def test_servos_reach_a_new_target_and_come_to_rest(arm):
    """A torque limit in the wrong place makes the light wrist joints oscillate for ever."""
    scene = Scene(arm)
    target = np.array(arm.home) + 0.1
    scene.data.ctrl[scene.ctrl] = target
    scene.run(2.0)
    np.testing.assert_allclose(scene.data.qpos[scene.qpos], target, atol=1e-3)
    assert np.abs(scene.data.qvel[: len(arm.joints)]).max() < 1e-3


def test_the_gripper_follows_its_command(arm):
    scene = Scene(arm)
    for share in (0.0, 0.5, 1.0):
        scene.command_gripper(share)
        scene.run(1.5)
        assert arm.gripper.share(scene.data.qpos[scene.fingers]) == pytest.approx(share, abs=0.01)


def test_the_stroke_is_the_distance_between_the_open_pads(arm):
    scene = Scene(arm)
    left, right = (scene.model.geom(pad).id for pad in arm.gripper.pads)

    def distance() -> float:
        return mujoco.mj_geomDistance(scene.model, scene.data, left, right, 1.0, None)

    # The SO-101's jaw turns: open, the edges near its pivot are closest, and the stroke is meant at the middle.
    assert distance() == pytest.approx(arm.gripper.stroke, abs=0.015 if arm is SO101 else 1e-9)
    scene.data.qpos[scene.fingers] = arm.gripper.joint_closed
    mujoco.mj_kinematics(scene.model, scene.data)
    assert abs(distance()) < 1e-3


@pytest.mark.parametrize(("half", "mass"), [(0.02, 0.1), (0.015, 0.2)], ids=["40mm-100g", "30mm-200g"])
def test_a_grasped_cube_stays_in_the_hand_while_it_is_lifted(arm, half, mass):
    scene = Scene(arm, half, mass)
    scene.grasp_in_free_fall()
    share = arm.gripper.share(scene.data.qpos[scene.fingers])
    start, height = scene.data.body("cube").xpos - scene.tcp, scene.data.body("cube").xpos[2]
    jacobian = np.empty((3, scene.model.nv))
    dofs = [scene.model.joint(name).dofadr[0] for name in arm.joints]
    for _ in range(50):
        mujoco.mj_jacSite(scene.model, scene.data, jacobian, None, scene.model.site(arm.tcp_site).id)
        scene.data.ctrl[scene.ctrl] += np.linalg.pinv(jacobian[:, dofs]) @ [0, 0, 0.002]
        scene.run(0.02)
    scene.run(3.0)
    assert share > 0.1
    assert scene.data.body("cube").xpos[2] > height + 0.08
    offset = scene.data.body("cube").xpos - scene.tcp
    assert np.linalg.norm(offset) == pytest.approx(np.linalg.norm(start), abs=2e-3)


def test_without_friction_the_cube_drops():
    scene = Scene(PANDA)
    for pad in PANDA.gripper.pads:
        scene.model.geom(pad).friction = 0.001
    scene.grasp_in_free_fall()
    scene.run(1.0)
    assert scene.data.body("cube").xpos[2] < 0.1


def test_the_wrist_camera_sees_the_point_between_the_pads(arm):
    scene = Scene(arm)
    camera = scene.data.camera(arm.camera)
    point = camera.xmat.reshape(3, 3).T @ (scene.tcp - camera.xpos)
    half_angle = np.deg2rad(scene.model.camera(arm.camera).fovy[0] / 2)
    assert point[2] < -0.03  # MuJoCo's cameras look along -z
    assert np.abs(point[:2] / -point[2]).max() < np.tan(half_angle)


def test_an_arm_attaches_to_the_bench_without_a_prefix(arm):
    bench = mujoco.MjSpec.from_file(str(BENCH))
    bench.attach(arm_spec(arm), prefix="", frame=bench.worldbody.add_frame(pos=[-0.3, 0, 0]))
    model = bench.compile()
    assert model.body(arm.base).pos[0] == pytest.approx(-0.3)
    assert [model.actuator(i).name for i in range(model.nu)] == [*arm.actuators, arm.gripper.actuator]


def test_an_unknown_arm_is_answered_with_the_choices():
    with pytest.raises(ValueError, match=r"arm='pandas' is unknown; choose one of panda, ur5e, so101"):
        find_arm("pandas")


def test_an_arm_whose_values_do_not_match_its_joints_is_refused():
    with pytest.raises(ValueError, match=r"'panda': home has 2 values, but the arm has 7 joints"):
        arm_from_mjcf(PANDA.xml, **{**panda_as_user_model(), "home": (0.0, 1.0)})


# A user's own MJCF


def panda_as_user_model() -> dict:
    return {
        "joints": list(PANDA.joints),
        "home": list(PANDA.home),
        "tcp_site": "tcp",
        "gripper_actuator": "gripper",
        "stroke": 0.08,
        "camera": "wrist",
        "pads": ["pad_left", "pad_right"],
    }


def test_a_users_mjcf_gives_the_same_arm_as_the_built_in_description():
    arm = arm_from_mjcf(PANDA.xml, **panda_as_user_model())
    assert (arm.name, arm.base, arm.actuators, arm.camera) == ("panda", "base", PANDA.actuators, "wrist")
    assert arm.gripper.joint_closed == pytest.approx(0.0, abs=1e-4)
    assert arm.gripper.joint_open == pytest.approx(0.04, abs=1e-4)
    assert (arm.gripper.closed, arm.gripper.open) == (0.0, 0.04)
    # Upper arm and forearm with their elbow offsets, the wrist's offset, and the hand.
    stretched = 2 * 0.0825 + 0.316 + np.hypot(0.0825, 0.384) - 0.0825 + 0.088 + 0.107 + 0.1034
    assert arm.reach == pytest.approx(stretched, rel=0.05)


TWO_JOINTS = """
<mujoco>
  <compiler angle="radian" autolimits="true"/>
  <worldbody>
    <body name="pedestal">
      <geom size="0.05"/>
      <body pos="0 0 0.1" gravcomp="1">
        <joint name="pan" axis="0 0 1" range="-3 3" damping="1"/>
        <geom type="capsule" size="0.02" fromto="0 0 0 0.2 0 0"/>
        <body pos="0.2 0 0" gravcomp="1">
          <joint name="tilt" axis="0 1 0" range="-2 2" damping="1"/>
          <geom type="capsule" size="0.02" fromto="0 0 0 0.2 0 0"/>
          <site name="tip" pos="0.2 0 0" euler="0 1.5708 0"/>
          <body pos="0.2 0 0" gravcomp="1">
            <joint name="jaw" type="slide" axis="0 1 0" range="0 0.03" damping="5"/>
            <geom name="jaw" type="box" size="0.01 0.002 0.01"/>
          </body>
        </body>
      </body>
    </body>
  </worldbody>
  <actuator>
    <position name="hand" joint="jaw" kp="500" ctrlrange="0 0.03"/>
    <position name="servo_tilt" joint="tilt" kp="100" kv="10"/>
    <position name="servo_pan" joint="pan" kp="100" kv="10"/>
  </actuator>
  <keyframe><key name="rest" qpos="0 0 0"/></keyframe>
</mujoco>
"""
DESCRIPTION = {
    "joints": ["pan", "tilt"],
    "home": [0.0, 0.5],
    "tcp_site": "tip",
    "gripper_actuator": "hand",
    "stroke": 0.03,
}


def write_model(folder: Path, xml: str) -> Path:
    path = folder / "two_joints.xml"
    path.write_text(xml)
    return path


def test_servos_are_found_by_the_joint_they_drive(tmp_path):
    arm = arm_from_mjcf(write_model(tmp_path, TWO_JOINTS), **DESCRIPTION)
    assert arm.actuators == ("servo_pan", "servo_tilt")
    assert arm.base == "pedestal"
    assert arm.gripper.joints == ("jaw",)
    assert arm.gripper.joint_open == pytest.approx(0.03, abs=1e-3)
    assert arm.reach == pytest.approx(0.2)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"joints": ["pan", "tlt"]}, r"two_joints\.xml has no joint 'tlt'; its joints are: pan, tilt, jaw"),
        ({"tcp_site": "tcp"}, r"has no site 'tcp'; its sites are: tip"),
        ({"gripper_actuator": "grip"}, r"has no actuator 'grip'; its actuators are: hand, servo_tilt, servo_pan"),
        ({"camera": "wrist"}, r"has no camera 'wrist'; its cameras are: none with a name"),
        ({"pads": ["pad"]}, r"has no geom 'pad'; its geoms are: jaw"),
        ({"home": [0.0, 2.5]}, r"home of joint 'tilt' is 2\.5, outside its range -2 \.\. 2"),
        ({"gripper_closed": 0.03}, r"joint 'jaw' stays at 0\.03"),
    ],
)
def test_a_wrong_description_is_answered_with_what_the_file_holds(tmp_path, change, message):
    with pytest.raises(ValueError, match=message):
        arm_from_mjcf(write_model(tmp_path, TWO_JOINTS), **{**DESCRIPTION, **change})


@pytest.mark.parametrize(
    ("before", "after", "message"),
    [
        ('kp="500"', 'kp="500000000"', "the arm is unstable when its servos hold it at home"),
        ("</worldbody>", "</word>", r"two_joints\.xml is not a model that MuJoCo can read: .*[Ll]ine number=\d+"),
        ('<geom size="0.05"/>', '<geom type="mesh" mesh="x"/>', r"two_joints\.xml does not compile: .*'x'"),
        (
            '<position name="servo_pan" joint="pan" kp="100" kv="10"/>',
            '<motor name="torque" joint="pan"/>',
            r"actuator 'torque' of joint 'pan' is no position servo",
        ),
        (
            '<position name="servo_pan" joint="pan" kp="100" kv="10"/>',
            "",
            r"joint 'pan' has 0 actuators, but it needs one position servo",
        ),
        ('<body name="pedestal">', "<body>", r"the body that joint 'pan' is mounted on has no name"),
        ('kp="500" ctrlrange="0 0.03"', 'kp="500"', r"actuator 'hand' has no ctrlrange; give gripper_closed"),
    ],
)
def test_a_file_that_cannot_serve_is_refused_with_the_reason(tmp_path, before, after, message):
    assert before in TWO_JOINTS
    with pytest.raises(ValueError, match=message):
        arm_from_mjcf(write_model(tmp_path, TWO_JOINTS.replace(before, after)), **DESCRIPTION)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"nowhere\.xml does not exist"):
        arm_from_mjcf(tmp_path / "nowhere.xml", **DESCRIPTION)
