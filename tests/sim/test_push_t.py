"""Push-T with an arm: the T's geometry, the pushing model, the task, its expert."""

from __future__ import annotations

import mujoco
import numpy as np
import pytest

pytest.importorskip("robopolicy_sim")

from robopolicy_sim.envs.push_t import COVERAGE, HOLD_STEPS, PushTEnv
from robopolicy_sim.envs.tee import FEET, Tee, add_tee, rest_height, rotated
from robopolicy_sim.experts.push_t import PushTExpert
from robopolicy_sim.experts.pushing import PushModel, PushPlanner, cost

TEE = Tee(0.03)
GOAL = np.array([0.05, -0.02, 0.7])


@pytest.fixture(scope="module")
def env() -> PushTEnv:
    return PushTEnv()


# The T.


def test_the_origin_is_the_centroid() -> None:
    x, y = TEE.outline.T
    following = np.roll(TEE.outline, -1, axis=0)
    cross = x * following[:, 1] - y * following[:, 0]
    np.testing.assert_allclose(cross.sum() / 2, 7 * TEE.unit**2)
    np.testing.assert_allclose(((TEE.outline + following) * cross[:, None]).sum(axis=0), 0, atol=1e-12)


def test_coverage_is_the_share_of_the_area_that_points_find() -> None:
    rng = np.random.default_rng(0)
    poses = GOAL + rng.normal(size=(8, 3)) * [0.03, 0.03, 0.8]
    points = rng.uniform(-0.09, 0.09, (30_000, 2)) + GOAL[:2]

    def inside(pose: np.ndarray) -> np.ndarray:
        return TEE.distance(rotated(points - pose[:2], -pose[2]))[0] < 0

    goal = inside(GOAL)
    counted = np.array([(inside(pose) & goal).sum() / goal.sum() for pose in poses])
    np.testing.assert_allclose(TEE.coverage(poses, GOAL), counted, atol=0.02)
    assert np.ptp(counted) > 0.3


@pytest.mark.parametrize(
    ("shift", "turn", "expected"),
    [
        ([0, 0], 0, 1),
        ([0, 0], 2 * np.pi, 1),
        ([1, 0], 0, (3 + 0) / 7),  # the bar keeps 3 of 4 units, the stem nothing
        ([0, -1], 0, (1 + 2) / 7),  # the bar covers one unit of the stem, the stem two
        ([4, 0], 0, 0),  # side by side
        ([0, 0.25], 0, (0.75 * 4 + 2.75 + 0.25) / 7),
        ([9, 9], 1, 0),
    ],
)
def test_coverage_of_shifted_blocks(shift: list[float], turn: float, expected: float) -> None:
    moved = GOAL + [*rotated(TEE.unit * np.array(shift, float), GOAL[2]), turn]
    assert TEE.coverage(moved, GOAL) == pytest.approx(expected, abs=1e-6)


def test_distance_and_normal() -> None:
    unit = TEE.unit
    points = unit * np.array([[0.0, 19 / 14 + 1], [1.5, -1.0], [0.0, -37 / 14 - 2], [2 + 3, 19 / 14 + 4], [1.9, 6 / 7]])
    distances, normals = TEE.distance(points)
    np.testing.assert_allclose(distances, unit * np.array([1, 1, 2, 5, -0.1]), atol=1e-12)
    np.testing.assert_allclose(normals, np.array([[0, 1], [1, 0], [0, -1], [0.6, 0.8], [1, 0]]), atol=1e-12)


# The model of pushing.


@pytest.fixture(scope="module")
def physics() -> mujoco.MjModel:
    """The T on a table with a rod on two slides."""
    spec = mujoco.MjSpec()
    spec.option.timestep, spec.option.impratio = 0.005, 10
    spec.option.cone = mujoco.mjtCone.mjCONE_ELLIPTIC
    spec.option.integrator = mujoco.mjtIntegrator.mjINT_IMPLICITFAST
    spec.worldbody.add_body(name="bench").add_geom(type=mujoco.mjtGeom.mjGEOM_PLANE, size=[1, 1, 0.1])
    rod = spec.worldbody.add_body(name="rod", pos=[0, 0, 0.03])
    rod.add_joint(name="x", type=mujoco.mjtJoint.mjJNT_SLIDE, axis=[1, 0, 0])
    rod.add_joint(name="y", type=mujoco.mjtJoint.mjJNT_SLIDE, axis=[0, 1, 0])
    rod.add_geom(
        type=mujoco.mjtGeom.mjGEOM_CYLINDER, size=[0.01, 0.025, 0], mass=1, friction=[0.25, 0.005, 0.0001], priority=2
    )
    for joint in ("x", "y"):
        actuator = spec.add_actuator(name=joint, target=joint, trntype=mujoco.mjtTrn.mjTRN_JOINT)
        actuator.set_to_position(kp=10_000, kv=300)
    add_tee(spec, "tee", TEE, [1, 0, 0, 1], ground="bench")
    return spec.compile()


def pushed_in_mujoco(model: mujoco.MjModel, start: np.ndarray, direction: np.ndarray, length: float) -> np.ndarray:
    """Pose (3,) of a T that started at the origin, after a push at 0.1 m/s."""
    data = mujoco.MjData(model)
    data.qpos[:2] = start
    data.qpos[2:] = [0, 0, rest_height(), 1, 0, 0, 0]
    for travelled in np.minimum(np.arange(0, length + 0.01, 0.0005), length):
        data.ctrl[:] = start + travelled * direction
        mujoco.mj_step(model, data)
    x, y = data.body("tee").xpos[:2]
    frame = data.body("tee").xmat
    return np.array([x, y, np.arctan2(frame[3], frame[0])])


def pushes(count: int) -> tuple[np.ndarray, np.ndarray]:
    planner = PushPlanner(PushModel(TEE, 0.01, 0.25), np.array([[-1.0, -1.0], [1.0, 1.0]]))
    found = planner.pushes(np.zeros(3), np.array([0.1, 0.1, 0.5]), np.random.default_rng(3), count=3 * count)
    chosen = found[:: max(1, len(found) // count)][:count]
    return np.stack([push.start for push in chosen]), np.stack([push.direction for push in chosen])


def test_the_model_predicts_what_mujoco_does(physics: mujoco.MjModel) -> None:
    starts, directions = pushes(24)
    length = 0.05
    lengths = np.arange(0.0015, length + 1e-9, 0.0015)
    predicted = PushModel(TEE, 0.01, 0.25).roll_out(np.zeros(3), starts, directions, lengths)[-1]
    found = np.stack([pushed_in_mujoco(physics, s, d, lengths[-1]) for s, d in zip(starts, directions, strict=True)])
    moved = np.linalg.norm(found[:, :2], axis=1)
    missed = np.linalg.norm(predicted[:, :2] - found[:, :2], axis=1)
    assert np.median(moved) > 0.015 and np.median(np.abs(found[:, 2])) > 0.15
    assert np.median(missed) < 0.2 * np.median(moved)
    assert np.median(np.abs(predicted[:, 2] - found[:, 2])) < 0.25 * np.median(np.abs(found[:, 2]))


def test_a_push_through_the_centroid_only_translates() -> None:
    model = PushModel(TEE, 0.01, 0.25)
    top = TEE.outline[1, 1] + 0.01
    lengths = np.arange(0.001, 0.0401, 0.001)
    pose = model.roll_out(np.zeros(3), np.array([[0.0, top]]), np.array([[0.0, -1.0]]), lengths)[-1, 0]
    np.testing.assert_allclose(pose, [0, -0.04, 0], atol=1e-6)


def test_the_rod_never_ends_inside_the_block() -> None:
    starts, directions = pushes(200)
    lengths = np.arange(0.0015, 0.1, 0.0015)
    poses = PushModel(TEE, 0.01, 0.25).roll_out(np.zeros(3), starts, directions, lengths)
    rods = starts + lengths[:, None, None] * directions
    gap, _ = TEE.distance(rotated(rods - poses[..., :2], -poses[..., 2]))
    assert np.quantile(gap, 0.01) > 0.01 - 0.001


def test_the_block_stands_on_its_feet(physics: mujoco.MjModel) -> None:
    data = mujoco.MjData(physics)
    data.qpos[:] = [0.3, 0.3, 0, 0, rest_height(), 1, 0, 0, 0]
    data.ctrl[:] = 0.3
    for _ in range(200):
        mujoco.mj_step(physics, data)
    assert data.ncon == len(FEET)
    assert data.body("tee").xpos[2] == pytest.approx(rest_height(), abs=5e-4)


# The task.


def put(env: PushTEnv, pose: np.ndarray) -> None:
    env.place("tee", [*pose[:2], rest_height()], pose[2])
    mujoco.mj_forward(env.model, env.data)


def stay(env: PushTEnv) -> np.ndarray:
    """The action that leaves the rod where it is, away from the block."""
    expert = PushTExpert(env, seed=0)
    expert.opening = 1.0
    return env.encode(next(expert.wait(1)))


def test_success_takes_the_coverage_for_some_steps(env: PushTEnv) -> None:
    env.reset(seed=3)
    action, goal = stay(env), env.pose("goal")
    for away, covered in ((0.012, False), (0.001, True)):
        put(env, goal + [away, 0, 0])
        ends = [env.step(action)[2] for _ in range(HOLD_STEPS)]
        assert (env.step(action)[1] > COVERAGE) == covered
        assert ends == [False] * (HOLD_STEPS - 1) + [covered]


def test_starts_are_far_from_the_goal_and_out_of_touch(env: PushTEnv) -> None:
    for seed in range(60):
        _, info = env.reset(seed=seed)
        assert info["progress"] < 0.06
        rod = env.tool_state().position
        gap, _ = env.tee.distance(rotated(rod[:2] - env.pose("tee")[:2], -env.pose("tee")[2]))
        assert gap > env.model.geom("rod").size[0]
        assert rod[2] == pytest.approx(env.tool_height, abs=2e-3)


def test_the_gripper_keeps_the_rod(env: PushTEnv) -> None:
    observation, _ = env.reset(seed=0)
    opening = env.opening()
    action = stay(env)
    for command in (0.0, 1.0):
        action[-1] = command
        for _ in range(5):
            env.step(action)
        assert env.opening() == pytest.approx(opening, abs=0.02)


def test_the_marks_pose_is_observed(env: PushTEnv) -> None:
    observation, _ = env.reset(seed=5)
    state = dict(
        zip(
            env.metadata["names"]["observation.environment_state"],
            observation["observation.environment_state"],
            strict=True,
        )
    )
    x, y, yaw = env.pose("goal")
    found = [state[name] for name in ("goal_x", "goal_y", "goal_cos_yaw", "goal_sin_yaw")]
    np.testing.assert_allclose(found, [x - env.base_position[0], y, np.cos(yaw), np.sin(yaw)], atol=1e-6)
    np.testing.assert_allclose([state["tee_x"], state["tee_y"]], env.pose("tee")[:2] - env.base_position[:2], atol=1e-6)


# Its expert.


def test_the_cost_is_least_at_the_goal() -> None:
    poses = np.random.default_rng(0).normal(size=(500, 3)) * [0.02, 0.02, 0.5] + GOAL
    assert cost(TEE, GOAL[None], GOAL)[0] == pytest.approx(0, abs=1e-6)
    assert (cost(TEE, poses, GOAL) > 0.01).all()


@pytest.mark.parametrize(("seed", "friction", "mass"), [(1, 0.6, 0.5), (2, 1.4, 3.0)])
def test_the_expert_succeeds_whatever_friction_and_mass(seed: int, friction: float, mass: float) -> None:
    env = PushTEnv()
    model = env.model
    model.geom_friction[[i for i in range(model.ngeom) if "foot" in model.geom(i).name], 0] *= friction
    block = model.body("tee").id
    model.body_mass[block] *= mass
    model.body_inertia[block] *= mass
    observation, info = env.reset(seed=seed)
    expert = env.make_expert(seed)
    for _ in range(400):
        observation, *_, info = env.step(expert.act(observation))
        if info["success"]:
            break
    assert info["success"]


@pytest.mark.parametrize(("mode", "sign"), [("left", 1), ("right", -1)])
def test_modes_go_around_on_different_sides(env: PushTEnv, mode: str, sign: int) -> None:
    env.reset(seed=0)
    # The rod starts between the block and the mark.
    env.start_tool(np.array([0.20, 0.0, env.tool_height]))
    env.place("goal", [0.2, 0.0, 0.0], 0.0)
    block = np.array([0.05, 0.0, 0.0])
    put(env, block)
    env._begin()
    expert = env.make_expert(0, mode=mode)
    turned, before = 0.0, None
    for _ in range(30):
        env.step(expert.act(None))
        if np.linalg.norm(env.pose("tee")[:2] - block[:2]) > 0.003:
            break
        offset = env.tool_state().position[:2] - block[:2]
        angle = np.arctan2(offset[1], offset[0])
        turned += 0.0 if before is None else (angle - before + np.pi) % (2 * np.pi) - np.pi
        before = angle
    assert sign * turned > np.pi / 2
