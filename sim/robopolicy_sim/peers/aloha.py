"""gym-aloha's two tasks of two ViperX arms (Zhao et al., ALOHA and ACT, RSS 2023)."""

from __future__ import annotations

import logging
from typing import Any

import numpy as np
from gymnasium import spaces

from robopolicy_sim.peers.base import Observation, PeerEnv, PeerInterface, require_peer

INSTALL = "pip install 'robopolicy[aloha]'"
CONTROL_HZ = 50
ARM_ENTRIES = ("waist", "shoulder", "elbow", "forearm_roll", "wrist_angle", "wrist_rotate", "opening")
POSE_ENTRIES = ("x", "y", "z", "qx", "qy", "qz", "qw")
ARMS = tuple(f"{side}_{entry}" for side in ("left", "right") for entry in ARM_ENTRIES)
N_ARM_QPOS = 16  # six joints and two fingers per arm
INSTRUCTIONS = {
    "insertion": "insert the peg into the socket",
    "transfer-cube": "pick up the cube with the right arm and hand it to the left arm",
}
OBJECTS = {"insertion": ("peg", "socket"), "transfer-cube": ("cube",)}
# What gym-aloha's reward of 1, 2, 3 and 4 stands for.
STAGES = {
    "insertion": ("touched_both", "lifted_both", "peg_at_socket", "inserted"),
    "transfer-cube": ("touched", "lifted", "touched_by_left", "handed_over"),
}


class AlohaEnv(PeerEnv):
    """A task of gym-aloha.

    State and action: the six joints and the gripper's opening of the left arm, then of the right arm; actions are
    absolute targets. Environment state: pose of the cube, or of peg and socket, in the world frame. Progress: a quarter
    of gym-aloha's reward, which counts the stages. The seed draws the objects' positions just as gym-aloha does.

    Unlike gym-aloha's own class this one renders only the cameras that are asked for, and its action space has the
    joints' true limits.

    Args:
        task: ``insertion`` or ``transfer-cube``.
        rendering: see `PeerEnv`.

    Raises:
        gymnasium.error.DependencyNotInstalled: gym-aloha is not installed.
    """

    def __init__(self, task: str, **rendering: Any) -> None:
        self.instruction = INSTRUCTIONS[task]
        self._name = task
        self._simulation = _open_simulation(task)
        self._reward = self._highest_reward = 0
        physics = self._simulation.physics
        interface = PeerInterface(
            names={
                "observation.state": ARMS,
                "observation.environment_state": tuple(f"{body}_{e}" for body in OBJECTS[task] for e in POSE_ENTRIES),
                "action": ARMS,
            },
            units={
                "observation.state": "rad; share",
                "observation.environment_state": "m; quaternion",
                "action": "rad; share",
            },
            control_hz=CONTROL_HZ,
            cameras={"scene": "angle", "front": "front_close"},
            packages=("gym-aloha", "dm-control"),
        )
        super().__init__(physics.model.ptr, physics.data.ptr, interface, _action_space(physics.model.ptr), **rendering)

    def _begin(self, seed: int) -> None:
        tasks = require_peer("gym_aloha.tasks.sim", INSTALL)
        sampling = require_peer("gym_aloha.utils", INSTALL)
        insertion = self._name == "insertion"
        # A global of gym-aloha's: the next start.
        tasks.BOX_POSE[0] = (
            np.concatenate(sampling.sample_insertion_pose(seed)) if insertion else sampling.sample_box_pose(seed)
        )
        self._simulation.reset()
        self._reward = self._highest_reward = 0

    def _advance(self, action: np.ndarray) -> None:
        self._reward = int(self._simulation.step(action).reward)
        self._highest_reward = max(self._highest_reward, self._reward)

    def _vectors(self) -> Observation:
        physics = self._simulation.physics
        poses = self.data.qpos[N_ARM_QPOS:].reshape(-1, 7)
        return {
            "observation.state": self._simulation.task.get_qpos(physics),
            "observation.environment_state": poses[:, [0, 1, 2, 4, 5, 6, 3]].ravel(),  # MuJoCo's quaternions: w first
        }

    def _progress(self) -> float:
        return self._reward / self._simulation.task.max_reward

    def _succeeded(self) -> bool:
        return self._reward == self._simulation.task.max_reward

    def _stages(self) -> dict[str, bool]:
        return {name: self._highest_reward > i for i, name in enumerate(STAGES[self._name])}


def _open_simulation(task: str) -> Any:
    """gym-aloha's scene and task in dm_control's loop, without the three images that its observation would render."""
    logging.getLogger("absl").setLevel(logging.WARNING)  # dm_control announces itself at import
    constants = require_peer("gym_aloha.constants", INSTALL)
    tasks = require_peer("gym_aloha.tasks.sim", INSTALL)
    engine = require_peer("dm_control.mujoco", INSTALL)
    control = require_peer("dm_control.rl.control", INSTALL)
    name = task.replace("-", "_")
    simulated = tasks.InsertionTask() if task == "insertion" else tasks.TransferCubeTask()
    simulated.get_observation = lambda physics: {}
    physics = engine.Physics.from_xml_path(str(constants.ASSETS_DIR / f"bimanual_viperx_{name}.xml"))
    return control.Environment(physics, simulated, time_limit=float("inf"), control_timestep=constants.DT)


def _action_space(model: Any) -> spaces.Box:
    """Limits of the twelve joints in radians, 0 to 1 for the two grippers."""
    low, high = (model.jnt_range[:N_ARM_QPOS, side].reshape(2, 8)[:, :7].copy() for side in (0, 1))
    low[:, 6], high[:, 6] = 0.0, 1.0
    return spaces.Box(low.ravel().astype(np.float32), high.ravel().astype(np.float32))
