"""Which environments of other projects there are; registering them imports none of those projects."""

from __future__ import annotations

from dataclasses import dataclass

from gymnasium.envs.registration import register, registry

METAWORLD_TASKS = (
    "assembly",
    "basketball",
    "bin-picking",
    "box-close",
    "button-press-topdown",
    "button-press-topdown-wall",
    "button-press",
    "button-press-wall",
    "coffee-button",
    "coffee-pull",
    "coffee-push",
    "dial-turn",
    "disassemble",
    "door-close",
    "door-lock",
    "door-open",
    "door-unlock",
    "hand-insert",
    "drawer-close",
    "drawer-open",
    "faucet-open",
    "faucet-close",
    "hammer",
    "handle-press-side",
    "handle-press",
    "handle-pull-side",
    "handle-pull",
    "lever-pull",
    "pick-place-wall",
    "pick-out-of-hole",
    "pick-place",
    "plate-slide",
    "plate-slide-side",
    "plate-slide-back",
    "plate-slide-back-side",
    "peg-insert-side",
    "peg-unplug-side",
    "soccer",
    "stick-push",
    "stick-pull",
    "push",
    "push-wall",
    "push-back",
    "reach",
    "reach-wall",
    "shelf-place",
    "sweep-into",
    "sweep",
    "window-open",
    "window-close",
)
METAWORLD_MT10_TASKS = (
    "reach",
    "push",
    "pick-place",
    "door-open",
    "drawer-open",
    "drawer-close",
    "button-press-topdown",
    "peg-insert-side",
    "window-open",
    "window-close",
)
ALOHA_TASKS = ("insertion", "transfer-cube")
ROBOSUITE_TASKS = ("Lift", "Stack", "PickPlaceCan", "NutAssemblySquare", "Door")


@dataclass(frozen=True)
class Peer:
    """One environment of another project.

    Attributes:
        name: what comes before ``-v0`` in the Gymnasium id.
        entry_point: module and class below ``robopolicy_sim.peers``.
        task: the task's name in its own project.
        max_steps: control steps of an episode.
    """

    name: str
    entry_point: str
    task: str
    max_steps: int


def _camel_case(task: str) -> str:
    return "".join(word.capitalize() for word in task.split("-"))


def _short_name(project: str, task: str) -> str:
    return f"{project}_{task.replace('-', '_')}"


# The limits are those of the projects; for robosuite, robomimic's 400.
PEERS = (
    *(Peer(f"Metaworld{_camel_case(task)}", "metaworld:MetaworldEnv", task, 500) for task in METAWORLD_TASKS),
    *(Peer(f"Aloha{_camel_case(task)}", "aloha:AlohaEnv", task, 300) for task in ALOHA_TASKS),
    *(Peer(f"Robosuite{task}", "robosuite:RobosuiteEnv", task, 400) for task in ROBOSUITE_TASKS),
)

MT50: tuple[str, ...] = tuple(_short_name("metaworld", task) for task in METAWORLD_TASKS)
"""Short names of Meta-World's fifty tasks."""

MT10: tuple[str, ...] = tuple(_short_name("metaworld", task) for task in METAWORLD_MT10_TASKS)
"""Short names of the ten tasks of Meta-World's MT10."""


def register_peers(namespace: str) -> None:
    """Register every environment in `PEERS` as ``<namespace>/<name>-v0``; calling it again changes nothing."""
    for peer in PEERS:
        env_id = f"{namespace}/{peer.name}-v0"
        if env_id not in registry:
            register(
                id=env_id,
                entry_point=f"robopolicy_sim.peers.{peer.entry_point}",
                kwargs={"task": peer.task},
                max_episode_steps=peer.max_steps,
            )
