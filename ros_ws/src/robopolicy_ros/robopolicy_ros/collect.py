"""Records demonstrations of the simulated robot's scripted expert, unattended.

Everything passes through the topics and services of ``sim_robot_node`` and ``recorder_node``, as with a person who
teleoperates. With --robot and --dataset both are started here; otherwise they must run.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass

from tqdm import tqdm

from robopolicy.errors import UserError
from robopolicy_ros.client import Client
from robopolicy_ros.local_nodes import end_on_signals, local_nodes

_LAST_ROWS = 0.2  # s until the rows around the end of an episode are complete
_BEGIN = 15.0  # s within which a demonstration must begin


@dataclass(frozen=True)
class Collection:
    """Outcome: episodes that were played, that succeeded, and that are in the dataset."""

    played: int
    succeeded: int
    stored: int


def collect(
    client: Client,
    demonstrations: int,
    *,
    sim: str = "/sim_robot",
    recorder: str = "/recorder",
    settle: float = 0.3,
    keep_failures: bool = False,
    timeout: float = 60.0,
    progress: bool = False,
) -> Collection:
    """Play and record episodes.

    Args:
        demonstrations: to play; those that succeed are stored.
        sim, recorder: full names of the nodes.
        settle: seconds between a reset and the recording.
        keep_failures: store episodes that failed, too, marked as such.
        timeout: seconds that one episode may take.
        progress: show a progress bar.

    Raises:
        UserError: a node is not there, refuses, or falls silent.
    """
    client.watch(f"{sim}/episode")
    client.watch(f"{recorder}/state")
    client.set_parameter(recorder, "behaviour", "scripted")
    succeeded = stored = 0
    with tqdm(range(demonstrations), unit="episode", disable=not progress) as bar:
        for played in bar:
            seed = json.loads(client.trigger(f"{sim}/reset"))["seed"]
            client.wait(settle)
            success = _play(client, sim, recorder, seed, timeout)
            succeeded += success
            client.wait(_LAST_ROWS)
            stored += _store(client, recorder, success, keep_failures)
            bar.set_postfix_str(f"success {succeeded / (played + 1):.1%}")
    return Collection(demonstrations, succeeded, stored)


def _play(client: Client, sim: str, recorder: str, seed: int, timeout: float) -> bool:
    episode = f"{sim}/episode"
    task = client.said(episode).get("task", "")
    if task:
        client.set_parameter(recorder, "task", task)
    _begin(client, f"{recorder}/start")
    client.trigger(f"{sim}/demonstrate")

    def here() -> bool:
        return client.said(episode).get("seed") == seed

    def begun() -> bool:  # of latched messages in quick succession only the last one may arrive
        return here() and (client.said(episode)["demonstrating"] or client.said(episode)["over"])

    if not client.wait_for(begun, _BEGIN):
        raise UserError(f"{sim} does not begin the demonstration; it says {dict(client.said(episode))}.")
    if not client.wait_for(lambda: here() and client.said(episode)["over"], timeout):
        raise UserError(f"The episode of seed {seed} is not over after {timeout:g} s.")
    return bool(client.said(episode)["success"])


def _begin(client: Client, service: str) -> None:
    """Start recording; streams of nodes that have just come up may still be missing."""
    answer = (False, "")

    def recording() -> bool:
        nonlocal answer
        answer = client.try_trigger(service)
        return answer[0]

    if not client.wait_for(recording, _BEGIN):
        raise UserError(f"{service}: {answer[1]}")


def _store(client: Client, recorder: str, success: bool, keep_failures: bool) -> bool:
    """Store or discard the episode; one that the recorder had to stop is discarded."""
    stopped = client.said(f"{recorder}/state").get("state") == "stopped"
    if stopped or not (success or keep_failures):
        client.trigger(f"{recorder}/discard")
        return False
    client.trigger(f"{recorder}/{'success' if success else 'failure'}")
    return True


def main(args: Sequence[str] | None = None) -> int:
    """Command line of the collection."""
    parser = argparse.ArgumentParser(prog="python -m robopolicy_ros.collect", description=__doc__)
    parser.add_argument("--demonstrations", type=int, required=True, help="episodes to play")
    parser.add_argument("--robot", help="folder of the simulated robot's contract; starts the nodes")
    parser.add_argument("--dataset", help="the new dataset, a Zarr folder; with --robot")
    parser.add_argument("--task", default="drawer_close", help="simulated task; with --robot, default drawer_close")
    parser.add_argument("--first-seed", type=int, default=0, help="of the first start; with --robot, default 0")
    parser.add_argument(
        "--disturbance", type=float, default=0.0, help="pushes while the expert plays, see sim_robot_node; with --robot"
    )
    parser.add_argument("--sim", default="/sim_robot", help="full name of the simulated robot's node")
    parser.add_argument("--recorder", default="/recorder", help="full name of the recorder's node")
    parser.add_argument("--settle", type=float, default=0.3, help="seconds between a reset and the recording")
    parser.add_argument("--keep-failures", action="store_true", help="store failed episodes too, marked as such")
    chosen = parser.parse_args(args)
    if (chosen.robot is None) != (chosen.dataset is None):
        parser.error("--robot and --dataset belong together; without both, the nodes must run already.")
    nodes = {
        "sim_robot_node": {
            "robot": chosen.robot,
            "task": chosen.task,
            "seed": chosen.first_seed,
            "disturbance": chosen.disturbance,
        },
        "recorder_node": {"robot": chosen.robot, "dataset": chosen.dataset},
    }
    end_on_signals()
    try:
        with local_nodes(nodes) if chosen.robot else nullcontext(), Client("collect") as client:
            done = collect(
                client,
                chosen.demonstrations,
                sim=chosen.sim,
                recorder=chosen.recorder,
                settle=chosen.settle,
                keep_failures=chosen.keep_failures,
                progress=True,
            )
    except UserError as error:
        parser.exit(1, f"{error}\n")
    print(f"{done.played} played, {done.succeeded} succeeded, {done.stored} stored")
    return 0 if done.stored else 1


if __name__ == "__main__":
    raise SystemExit(main())
