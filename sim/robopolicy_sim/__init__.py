"""Simulated manipulation tasks on MuJoCo, as Gymnasium environments with scripted experts.

Importing this package registers the environments; nothing else is needed before ``gymnasium.make``, which also accepts
``gymnasium.make("robopolicy_sim:robopolicy_sim/PushPuck-v0")`` without the import.
"""

from __future__ import annotations

from gymnasium.envs.registration import register, registry

from robopolicy_sim.gl import select_gl_backend

NAMESPACE = "robopolicy_sim"


def register_envs() -> None:
    """Register every task under the namespace ``robopolicy_sim``; calling it again changes nothing."""
    tasks = {"PushPuck-v0": ("push_puck:PushPuckEnv", 150)}
    for name, (entry_point, max_episode_steps) in tasks.items():
        env_id = f"{NAMESPACE}/{name}"
        if env_id not in registry:
            register(
                id=env_id,
                entry_point=f"robopolicy_sim.envs.{entry_point}",
                max_episode_steps=max_episode_steps,
            )


select_gl_backend()
register_envs()
