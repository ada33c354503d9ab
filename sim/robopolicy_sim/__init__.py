"""Simulated manipulation tasks on MuJoCo, as Gymnasium environments with scripted experts.

Importing this package registers the environments; nothing else is needed before ``gymnasium.make``, which also accepts
``gymnasium.make("robopolicy_sim:robopolicy_sim/PushPuck-v0")`` without the import.
"""

from __future__ import annotations

from typing import Any

from gymnasium.envs.registration import register, registry

from robopolicy_sim.gl import select_gl_backend
from robopolicy_sim.peers.catalogue import register_peers

NAMESPACE = "robopolicy_sim"

ALL_ARMS = {"panda": "", "ur5e": "Ur5e", "so101": "So101"}  # what an arm adds to a task's name
LARGE_ARMS = {"panda": "", "ur5e": "Ur5e"}
# Entry point, limit of control steps, arms.
ARM_TASKS: dict[str, tuple[str, int, dict[str, str]]] = {
    "Reach": ("reach:ReachEnv", 150, LARGE_ARMS),  # the small arm's jaw is too wide for the way around the post
    "Lift": ("lift:LiftEnv", 200, ALL_ARMS),
    "PickPlace": ("pick_place:PickPlaceEnv", 250, ALL_ARMS),
    "Stack": ("stack:StackEnv", 250, ALL_ARMS),
    "ChooseObject": ("choose_object:ChooseObjectEnv", 200, ALL_ARMS),
    "PegInsert": ("peg_insert:PegInsertEnv", 350, ALL_ARMS),
    "DrawerOpen": ("drawer:DrawerOpenEnv", 200, ALL_ARMS),
    "DrawerClose": ("drawer:DrawerCloseEnv", 200, ALL_ARMS),
    "PushT": ("push_t:PushTEnv", 400, ALL_ARMS),
    "Buttons": ("buttons:ButtonsEnv", 250, ALL_ARMS),
}


def register_envs() -> None:
    """Register every task under the namespace ``robopolicy_sim``; calling it again changes nothing."""
    _register("PushPuck", "push_puck:PushPuckEnv", 150)
    _register("PushPuckRings", "push_puck_rings:PushPuckRingsEnv", 150)
    _register("TrackTarget", "track_target:TrackTargetEnv", 60)  # 6 s at its usual rate
    for task, (entry_point, max_episode_steps, arms) in ARM_TASKS.items():
        for arm, suffix in arms.items():
            _register(f"{task}{suffix}", entry_point, max_episode_steps, arm=arm)
    register_peers(NAMESPACE)


def _register(name: str, entry_point: str, max_episode_steps: int, **arguments: Any) -> None:
    env_id = f"{NAMESPACE}/{name}-v0"
    if env_id not in registry:
        register(
            id=env_id,
            entry_point=f"robopolicy_sim.envs.{entry_point}",
            max_episode_steps=max_episode_steps,
            kwargs=arguments,
        )


select_gl_backend()
register_envs()
