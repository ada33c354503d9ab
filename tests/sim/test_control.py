import numpy as np
import pytest

pytest.importorskip("robopolicy_sim")

from robopolicy_sim.arms.arm import ARMS
from robopolicy_sim.control import (
    CONTROLS,
    LEASH,
    ArmState,
    Controller,
    JointTarget,
    ToolTarget,
    make_controller,
)
from robopolicy_sim.kinematics import ArmKinematics, rotation_error, rotation_from_vector

PANDA = ARMS["panda"]
PERIOD = 0.05


def at_home(control: str) -> tuple[Controller, ArmState]:
    kinematics = ArmKinematics(PANDA)
    controller = make_controller(control, PANDA, kinematics, PERIOD)
    home = np.array(PANDA.home)
    controller.reset(JointTarget(home, 1.0))
    return controller, ArmState(home, *kinematics.forward(home))


@pytest.mark.parametrize("control", CONTROLS)
def test_encode_is_the_inverse_of_step(control: str) -> None:
    controller, state = at_home(control)
    wanted = ToolTarget(
        state.position + [0.01, -0.015, 0.008],
        rotation_from_vector(np.array([0.02, 0.03, -0.05])) @ state.rotation,
        0.3,
    )
    action = controller.encode(wanted, state)
    assert action.dtype == np.float32 and controller.action_space.contains(action)
    target = controller.step(action, state)
    position, rotation = controller.kinematics.forward(target.joints)
    np.testing.assert_allclose(position, wanted.position, atol=5e-4)
    assert np.linalg.norm(rotation_error(wanted.rotation, rotation)) < 2e-3
    assert target.opening == pytest.approx(0.3)


@pytest.mark.parametrize("control", CONTROLS)
def test_joint_targets_keep_the_speed_limits(control: str) -> None:
    controller, state = at_home(control)
    before = np.array(PANDA.home)
    for _ in range(10):
        far = ToolTarget(state.position + [0.1, 0.6, -0.1], state.rotation, 1.0)
        after = controller.step(controller.encode(far, state), state).joints
        assert (np.abs(after - before) <= np.array(PANDA.max_velocity) * PERIOD + 1e-9).all()
        before = after


def test_deltas_add_up_from_the_target_but_not_from_a_tool_that_lags() -> None:
    step = np.array([0.01, 0, 0, 0, 0, 0, 1.0], np.float32)
    reached = {}
    for control in ("ee_delta_target", "ee_delta_current"):
        controller, state = at_home(control)  # the measured state stays: an arm that has not moved yet
        for _ in range(5):
            target = controller.step(step, state)
        reached[control] = controller.kinematics.forward(target.joints)[0] - state.position
    np.testing.assert_allclose(reached["ee_delta_target"], [0.05, 0, 0], atol=1e-3)
    np.testing.assert_allclose(reached["ee_delta_current"], [0.01, 0, 0], atol=1e-3)


def test_an_accumulated_target_stays_within_its_leash() -> None:
    controller, state = at_home("ee_delta_target")
    for _ in range(100):
        target = controller.step(np.array([-0.03, 0, 0, 0, 0, 0, 1.0], np.float32), state)
    distance = np.linalg.norm(controller.kinematics.forward(target.joints)[0] - state.position)
    assert distance == pytest.approx(LEASH, abs=2e-3)


def test_six_numbers_that_are_no_rotation_leave_the_tool_as_it_is_turned() -> None:
    controller, state = at_home("ee_pose")
    action = controller.encode(ToolTarget(state.position + [0.01, 0, 0], state.rotation, 1.0), state)
    action[3:9] = 0
    _, rotation = controller.kinematics.forward(controller.step(action, state).joints)
    assert np.linalg.norm(rotation_error(state.rotation, rotation)) < 2e-3


def test_an_unknown_control_is_refused_with_the_choices() -> None:
    with pytest.raises(ValueError, match="ee_pose, ee_delta_current, ee_delta_target, joint_position"):
        make_controller("impedance", PANDA, ArmKinematics(PANDA), PERIOD)
