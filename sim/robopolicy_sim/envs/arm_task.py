"""Tasks of an arm on the bench: the arm, its control, its observations; a task adds objects, a goal and an expert."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

import mujoco
import numpy as np

from robopolicy_sim.arms.arm import Arm, arm_spec, find_arm
from robopolicy_sim.control import ArmState, JointTarget, ToolTarget, make_controller
from robopolicy_sim.envs.base import SCENES, MujocoTaskEnv, Observation
from robopolicy_sim.experts.scripted import ScriptedExpert
from robopolicy_sim.kinematics import ArmKinematics, from_rotation_6d, to_rotation_6d
from robopolicy_sim.matching.appearance import paint, place_cameras
from robopolicy_sim.matching.background import Background, PhotoLayer, PhotoRenderer
from robopolicy_sim.matching.robot_parameters import RobotParameters
from robopolicy_sim.rendering import CameraRenderer, RenderQuality
from robopolicy_sim.variation import Variations

POSE_NAMES = ("x", "y", "z", "r11", "r21", "r31", "r12", "r22", "r32")
START_SPREAD = 0.02  # rad, uniform, of each joint about the home posture
RESET_OPTIONS = ("environment_state", "variation")


class ArmTaskEnv(MujocoTaskEnv):
    """An arm at a bench.

    The world's origin is the middle of the arm's workspace, on the table; x points away from the arm. Actions and
    observations are in the frame of the arm's base, which has the same axes.

    Observations: ``observation.state``: joint angles [rad], gripper opening (0 closed, 1 open), TCP position [m] and
    6-D rotation; ``observation.environment_state``: the pose (position, 6-D rotation) of each of ``objects``, then what
    else ``goal_names`` lists.

    Args:
        arm: ``panda``, ``ur5e``, ``so101``, or an `Arm` of the user's.
        control: what an action means, see `control`.
        control_hz: control steps per second; the physics step is 5 ms, or as much shorter as whole steps need to fit.
        action_latency: seconds between a command and the moment it reaches the servos, to the nearest physics step.
        variation: levels of the factors of variation that hold in every episode, see `variation`.
        randomization: distributions of factors, drawn from at each reset, or a preset's name.
        robot_parameters: how the arm follows commands, found by system identification, see
            `matching.robot_parameters.RobotParameters`; factors of variation act on top.
        camera_poses: poses and fields of view of fixed cameras, see `matching.appearance.place_cameras`.
        colours: colours of bodies and geoms, see `matching.appearance.paint`.
        background: a photograph behind the images of a fixed camera, see `matching.background.Background`.
        rendering: see `MujocoTaskEnv`.
    """

    scene = "arm_bench.xml"
    objects: tuple[str, ...] = ()
    goal_names: tuple[str, ...] = ()
    goal_unit: str = ""
    expert_class: type[ScriptedExpert]

    def __init__(
        self,
        *,
        arm: str | Arm = "panda",
        control: str = "ee_pose",
        control_hz: float = 20,
        action_latency: float = 0.0,
        variation: Mapping[str, Any] | None = None,
        randomization: Mapping[str, Any] | str | None = None,
        robot_parameters: Mapping[str, Any] | None = None,
        camera_poses: Mapping[str, Mapping[str, Any]] | None = None,
        colours: Mapping[str, Sequence[float]] | None = None,
        background: Mapping[str, Any] | None = None,
        **rendering: Any,
    ) -> None:
        _check_timing(control_hz, action_latency)
        self.arm = find_arm(arm) if isinstance(arm, str) else arm
        self.kinematics = ArmKinematics(self.arm)
        self._home_position, self._home_rotation = self.kinematics.forward(np.array(self.arm.home))
        self.base_position = np.array([-self._home_position[0], -self._home_position[1], 0.0])
        self.scale = min(1.0, self.arm.reach / 0.85)
        self.control_hz = control_hz
        self.action_latency = action_latency
        self.table_height = 0.0
        self.controller = make_controller(control, self.arm, self.kinematics, 1 / control_hz)
        self.variations = Variations(variation or {}, randomization or {})
        self.metadata = self.metadata | {"names": self._names(), "units": self._units()}
        super().__init__(**rendering)
        model = self.model
        self._joint_qpos = np.array([model.joint(name).qposadr[0] for name in self.arm.joints])
        self._joint_dofs = np.array([model.joint(name).dofadr[0] for name in self.arm.joints])
        self._joint_ctrl = np.array([model.actuator(name).id for name in self.arm.actuators])
        self._gripper_ctrl = model.actuator(self.arm.gripper.actuator).id
        self._gripper_qpos = np.array([model.joint(name).qposadr[0] for name in self.arm.gripper.joints])
        self._tcp = model.site(self.arm.tcp_site).id
        self._pad_geoms = [model.geom(name).id for name in self.arm.gripper.pads]
        self._pending = np.zeros((0, model.nu))
        self._match(RobotParameters.from_json(robot_parameters or {}, self.arm), camera_poses or {}, colours or {})
        self._photo_layer = None if background is None else self._photo(Background.from_json(background))
        self.variations.bind(self)

    # What a task is made of.

    @abstractmethod
    def _furnish(self, spec: mujoco.MjSpec) -> None:
        """Add the task's bodies to the scene."""

    def _goal(self) -> np.ndarray:
        """Return what else the state must tell, as ``goal_names`` lists it."""
        return np.zeros(0)

    def make_expert(self, seed: int, quality: str = "good", mode: str | None = None) -> ScriptedExpert:
        """Return the scripted expert for one episode; ``seed`` settles its free choices, unless ``mode`` does."""
        return self.expert_class(self, seed=seed, quality=quality, mode=mode)

    # What tasks and experts ask and say; world frame.

    def tool_state(self) -> ArmState:
        """Measured joint angles and TCP pose, in the world frame."""
        data = self.data
        return ArmState(
            data.qpos[self._joint_qpos].copy(),
            data.site_xpos[self._tcp].copy(),
            data.site_xmat[self._tcp].reshape(3, 3).copy(),
        )

    def opening(self) -> float:
        """Measured opening of the gripper, 0 closed to 1 open."""
        return self.arm.gripper.share(self.data.qpos[self._gripper_qpos])

    def encode(self, target: ToolTarget) -> np.ndarray:
        """The action that asks for a tool pose in the world frame."""
        moved = ToolTarget(target.position - self.base_position, target.rotation, target.opening)
        return self.controller.encode(moved, self._in_base_frame(self.tool_state()))

    def position(self, body: str) -> np.ndarray:
        """Position (3,) of a body's origin."""
        return self.data.body(body).xpos.copy()

    def rotation(self, body: str) -> np.ndarray:
        """Rotation matrix (3, 3) of a body."""
        return self.data.body(body).xmat.reshape(3, 3).copy()

    def yaw(self, body: str) -> float:
        """Heading of a body's x axis in radians."""
        frame = self.data.body(body).xmat
        return float(np.arctan2(frame[3], frame[0]))

    def grasped(self, body: str) -> bool:
        """Whether both finger pads touch the body."""
        return all(self._touching(pad, self.model.body(body).id) for pad in self._pads)

    def touched_by_hand(self, body: str) -> bool:
        """Whether either finger pad touches the body."""
        return any(self._touching(pad, self.model.body(body).id) for pad in self._pads)

    def speed(self, body: str) -> float:
        """Speed of a free body in m/s."""
        start = self.model.jnt_dofadr[self.model.body(body).jntadr[0]]
        return float(np.linalg.norm(self.data.qvel[start : start + 3]))

    def pads_middle(self) -> np.ndarray:
        """Position (3,) midway between the finger pads, which is not the TCP where only one jaw moves."""
        return self.data.geom_xpos[self._pads].mean(axis=0)

    def nearness(self, body: str) -> float:
        """How near the TCP is to a body's origin: 1 when it is there, towards 0 far away; a part of progress."""
        return float(1 - np.tanh(5 * np.linalg.norm(self.tool_state().position - self.position(body))))

    def start_tool(self, position: np.ndarray) -> None:
        """Start the episode with the tool at a position (3,), pointing down, instead of the home posture."""
        joints = self.kinematics.inverse(
            position - self.base_position, self._home_rotation, np.array(self.arm.home), iterations=100
        )
        self._hold(joints)

    def place(self, body: str, position: Sequence[float] | np.ndarray, rotation: float | np.ndarray = 0.0) -> None:
        """Put a free body, at rest, or a mocap body somewhere.

        Args:
            position: (3,) in metres, z above the table.
            rotation: a yaw in radians or a matrix (3, 3).
        """
        if isinstance(rotation, np.ndarray):
            quaternion = np.empty(4)
            mujoco.mju_mat2Quat(quaternion, rotation.ravel())
        else:
            quaternion = np.array([np.cos(rotation / 2), 0, 0, np.sin(rotation / 2)])
        position = np.asarray(position) + [0, 0, self.table_height]
        mocap = self._mocap(body)
        if mocap >= 0:
            self.data.mocap_pos[mocap], self.data.mocap_quat[mocap] = position, quaternion
            return
        joint = self.model.body(body).jntadr[0]
        start = self.model.jnt_qposadr[joint]
        self.data.qpos[start : start + 3] = position
        self.data.qpos[start + 3 : start + 7] = quaternion
        self.data.qvel[self.model.jnt_dofadr[joint] :][:6] = 0

    # The rest serves the base class.

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Observation, dict[str, Any]]:
        """Start an episode.

        Args:
            options: ``{"environment_state": vector}`` puts the objects where an observation had them;
                ``{"variation": {factor: value}}`` gives values in place of this episode's draws.

        Raises:
            ValueError: an option is unknown or does not fit this environment.
        """
        options = options or {}
        unknown = [key for key in options if key not in RESET_OPTIONS]
        if unknown:
            raise ValueError(f"reset: the option '{unknown[0]}' is unknown; there are {', '.join(RESET_OPTIONS)}.")
        if seed is not None:
            # A stream of its own, so that a start does not depend on what is varied.
            self._variation_rng = np.random.default_rng((seed, 3))
        elif not hasattr(self, "_variation_rng"):
            self._variation_rng = np.random.default_rng()
        variation = self.variations.apply(self, self._variation_rng, options.get("variation"))
        self._start_state = options.get("environment_state")
        observation, info = super().reset(seed=seed)
        return observation, info | {"variation": variation}

    def _place(self, rng: np.random.Generator) -> None:
        self._place_arm(rng)
        self._place_objects(rng)
        if self._start_state is not None:
            self._place_from_state(np.asarray(self._start_state, dtype=np.float64))
        self.variations.place(self)
        mujoco.mj_forward(self.model, self.data)
        self._begin()

    @abstractmethod
    def _place_objects(self, rng: np.random.Generator) -> None:
        """Write a random start of the objects into ``self.data``."""

    def _begin(self) -> None:
        """Set what an episode keeps track of; the start is in ``self.data``."""

    def _place_from_state(self, state: np.ndarray) -> None:
        wanted = (len(self.metadata["names"]["observation.environment_state"]),)
        if state.shape != wanted:
            raise ValueError(f"options['environment_state'] has shape {state.shape}, wanted {wanted}.")
        for body, pose in zip(self.objects, state[: 9 * len(self.objects)].reshape(-1, 9), strict=True):
            position = pose[:3] + self.base_position - [0, 0, self.table_height]
            self.place(body, position, from_rotation_6d(pose[3:]))

    def _place_arm(self, rng: np.random.Generator) -> None:
        low, high = self.kinematics.limits
        joints = np.array(self.arm.home) + rng.uniform(-START_SPREAD, START_SPREAD, len(self.arm.joints))
        self._hold(np.clip(joints, low, high))

    def _hold(self, joints: np.ndarray, opening: float = 1.0) -> None:
        """Put the arm at rest at joint angles (n,), the gripper at an opening share, the servos holding both there."""
        gripper = self.arm.gripper
        self.data.qpos[self._joint_qpos] = joints
        travel = gripper.joint_open - gripper.joint_closed
        self.data.qpos[self._gripper_qpos] = gripper.joint_closed + opening * travel
        target = JointTarget(joints, opening)
        self.controller.reset(target)
        self._command = self._servo_command(target)
        self.data.ctrl[:] = self._command
        self._pending = np.tile(self._command, (round(self.action_latency / self.model.opt.timestep), 1))

    def _servo_command(self, target: JointTarget) -> np.ndarray:
        command = np.zeros(self.model.nu)
        command[self._joint_ctrl] = target.joints
        command[self._gripper_ctrl] = self.arm.gripper.command(target.opening)
        return command

    def _setpoints(self, action: np.ndarray) -> np.ndarray:
        start = self._command
        target = self.controller.step(action, self._in_base_frame(self.tool_state()))
        self._command = self._servo_command(target)
        ramp = np.arange(1, self._substeps + 1)[:, None] / self._substeps
        delayed = np.concatenate([self._pending, start + ramp * (self._command - start)])
        self._pending = delayed[self._substeps :]
        return delayed[: self._substeps]

    def _in_base_frame(self, state: ArmState) -> ArmState:
        return ArmState(state.joints, state.position - self.base_position, state.rotation)

    def _load_model(self) -> mujoco.MjModel:
        spec = mujoco.MjSpec.from_file(str(SCENES / self.scene))
        frame = spec.worldbody.add_frame(pos=self.base_position)
        frame.attach_body(arm_spec(self.arm).body(self.arm.base), "", "")
        self._furnish(spec)
        self.variations.edit(spec, self)
        return spec.compile()

    def _match(
        self,
        robot: RobotParameters,
        cameras: Mapping[str, Mapping[str, Any]],
        colours: Mapping[str, Sequence[float]],
    ) -> None:
        """Write what is known of the real set-up into the model that variations start from."""
        robot.apply(self.model, self.arm)
        if robot.action_latency is not None:
            if self.action_latency:
                raise ValueError("action_latency is given twice, once in robot_parameters; leave one out.")
            self.action_latency = robot.action_latency
        place_cameras(self.model, cameras, self.base_position)
        paint(self.model, colours)

    def _photo(self, background: Background) -> PhotoLayer:
        layer = PhotoLayer(background, self.model, self.arm.base)
        if background.camera in self._cameras:
            layer.check_size(self._image_size)
        return layer

    def _make_renderer(self, quality: RenderQuality) -> CameraRenderer:
        if self._photo_layer is None:
            return super()._make_renderer(quality)
        return PhotoRenderer(self.model, quality, self._photo_layer)

    def _build_action_space(self) -> Any:
        return self.controller.action_space

    def _vectors(self) -> Observation:
        state = self._in_base_frame(self.tool_state())
        poses = [
            part
            for body in self.objects
            for part in (self.position(body) - self.base_position, to_rotation_6d(self.rotation(body)))
        ]
        return {
            "observation.state": np.concatenate(
                [state.joints, [self.opening()], state.position, to_rotation_6d(state.rotation)]
            ),
            "observation.environment_state": np.concatenate([*poses, self._goal()]),
        }

    def _names(self) -> dict[str, tuple[str, ...]]:
        objects = tuple(f"{body}_{entry}" for body in self.objects for entry in POSE_NAMES)
        return {
            "observation.state": (*self.arm.joints, "opening", *(f"tcp_{entry}" for entry in POSE_NAMES)),
            "observation.environment_state": (*objects, *self.goal_names),
            "action": self.controller.names,
        }

    def _units(self) -> dict[str, str]:
        poses = "m; 6-D rotation" if self.objects else ""
        return {
            "observation.state": "rad; share; m; 6-D rotation",
            "observation.environment_state": "; ".join(filter(None, [poses, self.goal_unit])),
            "action": self.controller.unit,
        }

    @property
    def _pads(self) -> list[int]:
        """Geoms of the finger pads; without them a grasp could not be told."""
        if len(self._pad_geoms) < 2:
            raise ValueError(
                f"The gripper of arm '{self.arm.name}' names {len(self._pad_geoms)} finger pads, but this task needs "
                "two; give their geoms as pads=[...] to arm_from_mjcf."
            )
        return self._pad_geoms

    def _mocap(self, body: str) -> int:
        return int(self.model.body(body).mocapid[0])

    def _touching(self, geom: int, body: int) -> bool:
        pairs = self.data.contact.geom
        if len(pairs) == 0:
            return False
        bodies = self.model.geom_bodyid[pairs]
        mine = pairs == geom
        return bool((mine[:, ::-1] & (bodies == body)).any())


def _check_timing(control_hz: float, action_latency: float) -> None:
    if not isinstance(control_hz, (int, float)) or not 0 < control_hz < math.inf:
        raise ValueError(f"control_hz={control_hz!r} is no rate; give control steps per second, e.g. 20.")
    if not isinstance(action_latency, (int, float)) or not 0 <= action_latency < math.inf:
        raise ValueError(f"action_latency={action_latency!r} is no time; give seconds, 0 or more.")
