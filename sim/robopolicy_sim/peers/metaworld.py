"""Meta-World's fifty tasks (Yu et al., Meta-World, CoRL 2019; version 3) and their scripted experts."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Mapping
from typing import Any

import mujoco
import numpy as np
from gymnasium import spaces

from robopolicy_sim.peers.base import Observation, PeerEnv, PeerInterface, require_peer

# Meta-World pins MuJoCo 3.3.0 and runs on later ones; with its dependencies pip would not install it here.
INSTALL = "pip install 'robopolicy[metaworld]' && pip install --no-deps metaworld==3.1.1"
OBJECT_ENTRIES = ("x", "y", "z", "q1", "q2", "q3", "q4")
INTERFACE = PeerInterface(
    names={
        "observation.state": ("hand_x", "hand_y", "hand_z", "opening"),
        "observation.environment_state": (
            *(f"object{i}_{entry}" for i in (1, 2) for entry in OBJECT_ENTRIES),
            *("goal_x", "goal_y", "goal_z"),
        ),
        "action": ("dx", "dy", "dz", "grip"),
    },
    units={
        "observation.state": "m; share",
        "observation.environment_state": "m; quaternion",
        "action": "cm per step; -1 open, 1 closed",
    },
    control_hz=80,
    cameras={"scene": "corner4", "front": "corner3", "wrist": "gripperPOV"},
    packages=("metaworld",),
)
HIGHEST_REWARD = 10.0  # of Meta-World's shaped reward
UPSIDE_DOWN = ("corner", "corner2", "corner3", "corner4")  # cameras that Meta-World defines so


class MetaworldEnv(PeerEnv):
    """A task of Meta-World.

    State: position of the hand and opening of the gripper. Environment state: the task's one or two objects (position,
    quaternion) and the goal, as Meta-World lists them, in its world frame; quaternions are in the order that the task
    uses, and a missing object or rotation is zeros. Both together are the present part of Meta-World's own observation.
    Action: displacement of the hand's target in cm per axis and step, gripper effort. Progress: a tenth of Meta-World's
    shaped reward, which is not 0 at the start and leaps to 1 on success. No stages, for what Meta-World reports as
    "near" and "grasped" means another thing in every task. The seed draws objects and goal from the ranges of
    Meta-World's tasks.

    Args:
        task: e.g. ``drawer-open``.
        rendering: see `PeerEnv`.

    Raises:
        gymnasium.error.DependencyNotInstalled: Meta-World is not installed.
    """

    def __init__(self, task: str, **rendering: Any) -> None:
        self._name = f"{task}-v3"
        self._task = _open_task(self._name)
        self.instruction = task.replace("-", " ")
        self._reward, self._success = 0.0, False
        super().__init__(
            self._task.model, self._task.data, INTERFACE, spaces.Box(-1.0, 1.0, (4,), np.float32), **rendering
        )

    def make_expert(self, seed: int, quality: str = "good") -> MetaworldExpert:
        """Return the task's expert; it makes no free choices, so the seed changes nothing.

        Raises:
            ValueError: the quality is not ``good``, the only one there is.
        """
        if quality != "good":
            raise ValueError(f"quality='{quality}' is not there: Meta-World's experts come in 'good' only.")
        policies = require_peer("metaworld.policies", INSTALL).ENV_POLICY_MAP
        return MetaworldExpert(policies[self._name]())

    def _begin(self, seed: int) -> None:
        self._task.seed(seed)
        self._observed, _ = self._task.reset()
        self._reward, self._success = 0.0, False

    def _advance(self, action: np.ndarray) -> None:
        self._observed, reward, _, _, info = self._task.step(action.astype(np.float32))  # as its policies act
        self._reward, self._success = float(reward), bool(info["success"])

    def _vectors(self) -> Observation:
        return {
            "observation.state": self._observed[:4],
            "observation.environment_state": np.concatenate([self._observed[4:18], self._observed[36:]]),
        }

    def _progress(self) -> float:
        return self._reward / HIGHEST_REWARD

    def _succeeded(self) -> bool:
        return self._success


class MetaworldExpert:
    """One of Meta-World's scripted policies, which decide from the present observation alone."""

    quality, mode = "good", "scripted"

    def __init__(self, policy: Any) -> None:
        self._policy = policy

    def act(self, observation: Mapping[str, np.ndarray]) -> np.ndarray:
        """Return the action (4,) float32 for ``observation.state`` (4,) and ``observation.environment_state`` (17,)."""
        objects, goal = np.split(observation["observation.environment_state"].astype(np.float64), [14])
        present = np.concatenate([observation["observation.state"].astype(np.float64), objects])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # its gains ask for more than 1 cm per step; it is clipped here
            action = self._policy.get_action(np.concatenate([present, present, goal]))
        return np.clip(action, -1, 1).astype(np.float32)


def _open_task(name: str) -> Any:
    """Meta-World's environment, its goal observable, its starts drawn from its own generator."""
    tasks = require_peer("metaworld.env_dict", INSTALL).ALL_V3_ENVIRONMENTS
    task = tasks[name]()
    task.max_path_length = sys.maxsize  # Gymnasium counts the steps
    task._set_task_called = True
    task._freeze_rand_vec, task.seeded_rand_vec = False, True
    task._partially_observable = False
    del task.sawyer_observation_space  # cached without the goal
    for name in UPSIDE_DOWN:
        camera = task.model.camera(name)
        mujoco.mju_mulQuat(
            camera.quat, camera.quat.copy(), np.array([0.0, 0.0, 0.0, 1.0])
        )  # half a turn about its view
    return task
