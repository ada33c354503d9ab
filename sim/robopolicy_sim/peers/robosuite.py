"""Five tasks of robosuite (Zhu et al., robosuite, arXiv:2009.12293, 2020; version 1.5) with the Panda arm."""

from __future__ import annotations

import logging
from typing import Any

import numpy as np
from gymnasium import spaces

from robopolicy_sim.kinematics import to_rotation_6d
from robopolicy_sim.peers.base import Observation, PeerEnv, PeerInterface, require_peer

# robosuite depends on mink 0.0.5, which refuses NumPy 2 and is only needed for humanoids.
INSTALL = "pip install 'robopolicy[robosuite]' && pip install --no-deps robosuite==1.5.2"
CONTROL_HZ = 20
JOINTS = tuple(f"joint{i}" for i in range(1, 8))
TCP = tuple(f"tcp_{entry}" for entry in ("x", "y", "z", "r11", "r21", "r31", "r12", "r22", "r32"))
INSTRUCTIONS = {
    "Lift": "lift the cube",
    "Stack": "stack the red cube on the green cube",
    "PickPlaceCan": "put the can into its bin",
    "NutAssemblySquare": "put the square nut on the square peg",
    "Door": "open the door",
}
COLLISION_GEOMS, HIDDEN_GEOMS = 0, 3  # groups; robosuite hides the first when it renders, MuJoCo from the second on


class RobosuiteEnv(PeerEnv):
    """A task of robosuite with its default controller, operational space control of the pose.

    State: joint angles, gripper opening, TCP position and 6-D rotation in the frame of the arm's base. Environment
    state: robosuite's own ``object-state``, in its world frame, with quaternions xyzw. Action: robosuite's, from -1 to
    1: displacement of the TCP in shares of 5 cm, rotation vector in shares of 0.5 rad, gripper (-1 open, 1 closed).
    Progress: robosuite's shaped reward. There is no scripted expert.

    The seed draws the arm's start and the objects' poses. Sizes that robosuite draws when it builds a scene (of Lift's
    cube, within 2 mm) are those of seed 0.

    Args:
        task: ``Lift``, ``Stack``, ``PickPlaceCan``, ``NutAssemblySquare`` or ``Door``.
        rendering: see `PeerEnv`. The detailed meshes settle the cost of an image here, so ``fast`` gains little.

    Raises:
        gymnasium.error.DependencyNotInstalled: robosuite is not installed.
    """

    def __init__(self, task: str, **rendering: Any) -> None:
        self.instruction = INSTRUCTIONS[task]
        self._suite = _open_suite(task)
        self._observed: dict[str, np.ndarray] = self._suite.reset()
        self._reward = 0.0
        model, data = self._suite.sim.model._model, self._suite.sim.data._data
        model.geom_group[model.geom_group == COLLISION_GEOMS] = HIDDEN_GEOMS
        base = self._suite.robots[0].robot_model.root_body
        self._base = (data.body(base).xpos.copy(), data.body(base).xmat.reshape(3, 3).copy())
        self._tcp = model.site(self._suite.robots[0].gripper["right"].important_sites["grip_site"]).id
        self._fingers = [model.joint(name).id for name in self._suite.robots[0].gripper["right"].joints]
        interface = PeerInterface(
            names={
                "observation.state": (*JOINTS, "opening", *TCP),
                "observation.environment_state": self._object_names(),
                "action": ("dx", "dy", "dz", "rx", "ry", "rz", "grip"),
            },
            units={
                "observation.state": "rad; share; m; 6-D rotation",
                "observation.environment_state": "m; rad; quaternion",
                "action": "5 cm; 0.5 rad; -1 open, 1 closed",
            },
            control_hz=CONTROL_HZ,
            cameras={"scene": "agentview", "front": "frontview", "wrist": "robot0_eye_in_hand"},
            packages=("robosuite",),
        )
        low, high = self._suite.action_spec
        action_space = spaces.Box(low.astype(np.float32), high.astype(np.float32))
        super().__init__(model, data, interface, action_space, **rendering)

    def _begin(self, seed: int) -> None:
        # The generator is shared by the arm and the placement of objects, so its state changes, not the object.
        self._suite.rng.bit_generator.state = np.random.default_rng(seed).bit_generator.state
        self._observed = self._suite.reset()
        self._reward = float(self._suite.reward())

    def _advance(self, action: np.ndarray) -> None:
        self._observed, reward, _, _ = self._suite.step(action)
        self._reward = float(reward)

    def _vectors(self) -> Observation:
        position, rotation = self._base
        tcp_position = rotation.T @ (self.data.site_xpos[self._tcp] - position)
        tcp_rotation = rotation.T @ self.data.site_xmat[self._tcp].reshape(3, 3)
        state = [self._observed["robot0_joint_pos"], [self._opening()], tcp_position, to_rotation_6d(tcp_rotation)]
        return {
            "observation.state": np.concatenate(state),
            "observation.environment_state": self._observed["object-state"],
        }

    def _opening(self) -> float:
        """Distance of the fingers as a share of the largest."""
        travel = np.abs(self.model.jnt_range[self._fingers]).max(axis=1)
        return float(np.mean(np.abs(self.data.qpos[self.model.jnt_qposadr[self._fingers]]) / travel))

    def _progress(self) -> float:
        return self._reward

    def _succeeded(self) -> bool:
        return bool(self._suite._check_success())

    def _object_names(self) -> tuple[str, ...]:
        names: list[str] = []
        for name, observable in self._suite._observables.items():
            if observable.modality == "object" and observable.is_enabled() and observable.is_active():
                names += [f"{name}_{i}" for i in range(np.size(observable.obs))]
        return tuple(names)


def _open_suite(task: str) -> Any:
    """robosuite's environment; a reset keeps the model, which a renderer needs and which is far faster."""
    logging.getLogger("robosuite_logs").addFilter(_is_serious)  # it speaks of optional parts at every import
    return require_peer("robosuite", INSTALL).make(
        task,
        robots="Panda",
        has_renderer=False,
        has_offscreen_renderer=False,
        use_camera_obs=False,
        reward_shaping=True,
        control_freq=CONTROL_HZ,
        ignore_done=True,
        hard_reset=False,
        seed=0,
    )


def _is_serious(record: logging.LogRecord) -> bool:
    return record.levelno >= logging.ERROR
