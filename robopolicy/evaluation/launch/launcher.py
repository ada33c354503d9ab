"""Where the episodes of an evaluation are played, by name."""

from __future__ import annotations

from functools import partial

from robopolicy.errors import UserError, did_you_mean
from robopolicy.evaluation.launch.ray_cluster import RayCluster
from robopolicy.evaluation.launch.shards import SHARD_SIZE
from robopolicy.evaluation.rollout import Player, rollout

LAUNCHERS = ("local", "ray")


def player(
    launcher: str, *, shard_size: int = SHARD_SIZE, threads: int = 1, ray_address: str = "local", ray_gpus: float = 1.0
) -> Player:
    """What plays the episodes; with the same settings every launcher gives the same results.

    Args:
        launcher: ``local`` for this machine, see `rollout`; ``ray`` for a cluster, see `RayCluster`.
        shard_size, threads: see `rollout`.
        ray_address, ray_gpus: ``address`` and ``gpus`` of `RayCluster`.

    Raises:
        UserError: there is no such launcher, or a number is too small.
    """
    if launcher not in LAUNCHERS:
        raise UserError(f"There is no launcher '{launcher}'.{did_you_mean(launcher, LAUNCHERS)}")
    if threads < 1 or shard_size < 1 or ray_gpus <= 0:
        raise UserError(
            f"threads={threads} and shard_size={shard_size} must be at least 1, ray_gpus={ray_gpus:g} above 0."
        )
    if launcher == "local":
        return partial(rollout, shard_size=shard_size, threads=threads)
    return RayCluster(ray_address, shard_size, threads, ray_gpus).play
