"""A user's own robot: an ``Arm`` from any MJCF file, checked before a task uses it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import mujoco
import numpy as np

from robopolicy_sim.arms.arm import Arm, Gripper, arm_spec

SETTLING_TIME = 2.0
TIME_STEP = 0.005
_INSTABILITIES = (mujoco.mjtWarning.mjWARN_BADQPOS, mujoco.mjtWarning.mjWARN_BADQVEL, mujoco.mjtWarning.mjWARN_BADQACC)


def arm_from_mjcf(
    path: str | Path,
    *,
    joints: Sequence[str],
    home: Sequence[float],
    tcp_site: str,
    gripper_actuator: str,
    stroke: float,
    name: str | None = None,
    gripper_closed: float | None = None,
    gripper_open: float | None = None,
    pads: Sequence[str] = (),
    camera: str | None = None,
    max_velocity: Sequence[float] | None = None,
    max_acceleration: Sequence[float] | None = None,
) -> Arm:
    """Describe the arm in an MJCF file.

    The file holds one fixed arm, z up and x forward, with a position servo for each joint and one actuator for the
    gripper. Actuators may stand in any order: they are found by the joint they drive. How far the gripper's joint
    travels between closed and open is measured in a short simulation with the arm at home.

    Args:
        path: the MJCF file.
        joints: the arm's joints from base to hand.
        home: joint positions with the hand above the table, pointing down [rad].
        tcp_site: site between the finger pads; z the approach direction, y the closing direction.
        gripper_actuator: the actuator that opens and closes the gripper, on a joint or on a tendon of joints.
        stroke: distance between the pads when open [m].
        name: short name; by default the file's name.
        gripper_closed: its control value when closed; by default the lower end of its range.
        gripper_open: its control value when open; by default the upper end of its range.
        pads: geoms that touch what is grasped.
        camera: the camera on the hand.
        max_velocity: joint velocity limits [rad/s]; by default pi, because MJCF holds none.
        max_acceleration: joint acceleration limits [rad/s^2]; by default 2 pi.

    Raises:
        ValueError: the file cannot be read, a name does not exist, a joint has no position servo, ``home`` does not
            fit the joints, or the gripper does not move. The message names the file and what it holds.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path} does not exist; give the path of the arm's MJCF file.")
    draft = Arm(
        name=name or path.stem,
        xml=path,
        joints=tuple(joints),
        home=tuple(home),
        tcp_site=tcp_site,
        gripper=Gripper(gripper_actuator, 0.0, 1.0, (), 0.0, 1.0, stroke, tuple(pads)),
        max_velocity=tuple(max_velocity or [math.pi] * len(joints)),
        max_acceleration=tuple(max_acceleration or [2 * math.pi] * len(joints)),
        reach=0.0,
        camera=camera,
    )
    model = _compile(draft)
    _check_names(model, draft)
    _check_home(model, draft)
    arm = replace(
        draft,
        actuators=tuple(_servo(model, joint, path) for joint in joints),
        base=_root_body(model, joints[0], path),
        reach=_stretched_length(model, draft),
    )
    return replace(arm, gripper=_measured_gripper(model, arm, gripper_closed, gripper_open))


def _compile(arm: Arm) -> mujoco.MjModel:
    spec = arm_spec(arm)
    # As the tasks simulate it, whatever the file says.
    spec.option.timestep, spec.option.integrator = TIME_STEP, mujoco.mjtIntegrator.mjINT_IMPLICITFAST
    try:
        return spec.compile()
    except ValueError as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{arm.xml} does not compile: {reason}") from error


def _check_names(model: mujoco.MjModel, arm: Arm) -> None:
    wanted = [("joint", joint) for joint in arm.joints]
    wanted += [("site", arm.tcp_site), ("actuator", arm.gripper.actuator)]
    wanted += [("geom", pad) for pad in arm.gripper.pads] + ([("camera", arm.camera)] if arm.camera else [])
    for kind, name in wanted:
        existing = _names(model, kind)
        if name not in existing:
            found = ", ".join(existing) or "none with a name"
            raise ValueError(f"{arm.xml} has no {kind} '{name}'; its {kind}s are: {found}.")


def _names(model: mujoco.MjModel, kind: str) -> list[str]:
    count = {"joint": model.njnt, "site": model.nsite, "actuator": model.nu, "geom": model.ngeom, "camera": model.ncam}
    names = [getattr(model, kind)(i).name for i in range(count[kind])]
    return [name for name in names if name]


def _check_home(model: mujoco.MjModel, arm: Arm) -> None:
    for name, position in zip(arm.joints, arm.home, strict=True):
        joint = model.joint(name)
        if int(joint.type[0]) not in (int(mujoco.mjtJoint.mjJNT_HINGE), int(mujoco.mjtJoint.mjJNT_SLIDE)):
            raise ValueError(f"{arm.xml}: joint '{name}' is neither a hinge nor a slide; an arm's joints must be.")
        low, high = joint.range
        if model.jnt_limited[joint.id] and not low <= position <= high:
            raise ValueError(
                f"{arm.xml}: home of joint '{name}' is {position:g}, outside its range {low:g} .. {high:g}."
            )


def _root_body(model: mujoco.MjModel, joint: str, path: Path) -> str:
    name = model.body(model.body_rootid[model.joint(joint).bodyid[0]]).name
    if not name:
        raise ValueError(f"{path}: the body that joint '{joint}' is mounted on has no name; give the root body one.")
    return name


def _servo(model: mujoco.MjModel, joint: str, path: Path) -> str:
    """Return the name of the position servo that drives a joint."""
    by_joint = model.actuator_trntype == int(mujoco.mjtTrn.mjTRN_JOINT)
    driving = np.flatnonzero(by_joint & (model.actuator_trnid[:, 0] == model.joint(joint).id))
    if len(driving) != 1:
        raise ValueError(f"{path}: joint '{joint}' has {len(driving)} actuators, but it needs one position servo.")
    actuator = model.actuator(driving[0])
    gain, stiffness = actuator.gainprm[0], -actuator.biasprm[1]
    if not (gain > 0 and math.isclose(gain, stiffness)):
        raise ValueError(
            f"{path}: actuator '{actuator.name}' of joint '{joint}' is no position servo (gain {gain:g}, position "
            f"feedback {stiffness:g}; they must be equal). Use <position kp=... kv=...>."
        )
    if not actuator.name:
        raise ValueError(f"{path}: the actuator of joint '{joint}' has no name; give it one.")
    return actuator.name


def _measured_gripper(model: mujoco.MjModel, arm: Arm, closed: float | None, opened: float | None) -> Gripper:
    actuator = model.actuator(arm.gripper.actuator)
    if (closed is None or opened is None) and not model.actuator_ctrllimited[actuator.id]:
        raise ValueError(
            f"{arm.xml}: actuator '{actuator.name}' has no ctrlrange; give gripper_closed and gripper_open."
        )
    closed = float(actuator.ctrlrange[0]) if closed is None else closed
    opened = float(actuator.ctrlrange[1]) if opened is None else opened
    joint = _driven_joint(model, arm)
    at_closed, at_open = (_settled(model, arm, joint, control) for control in (closed, opened))
    if math.isclose(at_closed, at_open, abs_tol=1e-4):
        raise ValueError(
            f"{arm.xml}: joint '{joint}' stays at {at_closed:.4g} when actuator '{actuator.name}' goes from {closed:g} "
            f"to {opened:g}; check the gripper's control values, gains and force limits."
        )
    return replace(arm.gripper, closed=closed, open=opened, joints=(joint,), joint_closed=at_closed, joint_open=at_open)


def _driven_joint(model: mujoco.MjModel, arm: Arm) -> str:
    """Return the joint that shows the gripper's opening: the driven one, or the first on the driven tendon."""
    actuator = model.actuator(arm.gripper.actuator)
    kind, target = actuator.trntype[0], actuator.trnid[0]
    if kind == int(mujoco.mjtTrn.mjTRN_JOINT):
        return model.joint(target).name
    if kind == int(mujoco.mjtTrn.mjTRN_TENDON):
        wrap = model.tendon_adr[target]
        if model.wrap_type[wrap] == mujoco.mjtWrap.mjWRAP_JOINT:
            return model.joint(model.wrap_objid[wrap]).name
    raise ValueError(f"{arm.xml}: actuator '{actuator.name}' must drive a joint or a fixed tendon of joints.")


def _settled(model: mujoco.MjModel, arm: Arm, joint: str, control: float) -> float:
    """Return where a gripper joint comes to rest under a control value, with the arm held at home."""
    data = mujoco.MjData(model)
    for name, actuator, position in zip(arm.joints, arm.actuators, arm.home, strict=True):
        data.joint(name).qpos = position
        data.actuator(actuator).ctrl = position
    data.actuator(arm.gripper.actuator).ctrl = control
    for _ in range(round(SETTLING_TIME / TIME_STEP)):
        mujoco.mj_step(model, data)
    if any(data.warning[kind].number for kind in _INSTABILITIES):
        raise ValueError(
            f"{arm.xml}: the arm is unstable when its servos hold it at home with a time step of "
            f"{TIME_STEP * 1e3:g} ms; lower the servos' gains or raise the joints' armature."
        )
    return float(data.joint(joint).qpos[0])


def _stretched_length(model: mujoco.MjModel, arm: Arm) -> float:
    """Return the length of the chain from the second joint to the TCP [m], an upper bound of the reach."""
    data = mujoco.MjData(model)
    mujoco.mj_kinematics(model, data)
    points = [data.joint(name).xanchor for name in arm.joints[1:]] + [data.site(arm.tcp_site).xpos]
    return float(np.linalg.norm(np.diff(points, axis=0), axis=1).sum())
