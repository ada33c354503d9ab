"""Evaluates a policy on the simulated robot over DDS: reset, start the policy, wait for success or the time limit.

With --robot and --bundle ``sim_robot_node`` and ``policy_node`` are started here; otherwise they must run. Seeds are
those that are kept for evaluation, as in ``robopolicy eval``, so that both can be compared start by start.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from robopolicy.errors import UserError
from robopolicy.evaluation.statistics import wilson
from robopolicy_ros.client import Client
from robopolicy_ros.local_nodes import end_on_signals, local_nodes

FIRST_SEED = 100_000
_AT_REST = ("idle", "armed", "holding", "fault")
_RETRY = 0.2  # s between tries to start: after a reset streams must be fresh again
_STOP = 10.0  # s within which a policy must come to rest
_LOADING = 120.0  # s within which a policy must be loaded


@dataclass(frozen=True)
class Episode:
    """Outcome of one episode.

    Attributes:
        seed: of its start.
        success: the simulator says so.
        seconds: from the policy's start to the end.
        ended: why: ``success``, ``time`` or the policy's own reason.
    """

    seed: int
    success: bool
    seconds: float
    ended: str


def evaluate(
    client: Client,
    episodes: int,
    *,
    sim: str = "/sim_robot",
    policy: str = "/policy",
    first_seed: int = FIRST_SEED,
    time_limit: float = 10.0,
    settle: float = 0.3,
    tell_task: bool = False,
    progress: bool = False,
) -> list[Episode]:
    """Play episodes.

    Args:
        sim, policy: full names of the nodes.
        first_seed: of the first episode; it counts up.
        time_limit: seconds of an episode after the policy's start.
        settle: seconds between a reset and the start.
        tell_task: set the policy's parameter ``instruction`` to the episode's task.
        progress: show a progress bar.

    Raises:
        UserError: a node is not there, refuses, or falls silent.
    """
    client.watch(f"{sim}/episode")
    client.watch(f"{policy}/state")
    client.set_parameter(sim, "seed", first_seed)
    played: list[Episode] = []
    with tqdm(range(episodes), unit="episode", disable=not progress) as bar:
        for _ in bar:
            _come_to_rest(client, policy)
            start = json.loads(client.trigger(f"{sim}/reset"))
            if tell_task:
                client.set_parameter(policy, "instruction", start["task"])
            client.wait(settle)
            played.append(_play(client, sim, policy, start["seed"], time_limit))
            bar.set_postfix_str(f"success {sum(e.success for e in played) / len(played):.1%}")
    _come_to_rest(client, policy)
    return played


def report(episodes: Sequence[Episode]) -> dict[str, Any]:
    """Success with its 95 % Wilson interval, and every episode; JSON values."""
    successes = sum(episode.success for episode in episodes)
    rate = wilson(successes, len(episodes))
    return {
        "episodes": len(episodes),
        "successes": successes,
        "success": rate.value,
        "interval": [rate.low, rate.high],
        "played": [asdict(episode) for episode in episodes],
    }


def _play(client: Client, sim: str, policy: str, seed: int, time_limit: float) -> Episode:
    _start(client, policy)
    began = time.monotonic()

    def success() -> bool:
        said = client.said(f"{sim}/episode")
        return bool(said.get("seed") == seed and said["success"])

    def state() -> str:
        return str(client.said(f"{policy}/state").get("state", ""))

    client.wait_for(lambda: state() not in ("idle", "armed"), 1.0)
    client.wait_for(lambda: success() or state() in _AT_REST, time_limit)
    seconds = round(time.monotonic() - began, 3)
    if success():
        return Episode(seed, True, seconds, "success")
    if state() in _AT_REST:
        return Episode(seed, False, seconds, str(client.said(f"{policy}/state").get("reason") or state()))
    return Episode(seed, False, seconds, "time")


def _start(client: Client, policy: str) -> None:
    deadline = time.monotonic() + _STOP
    while True:
        started, message = client.try_trigger(f"{policy}/start")
        if started:
            return
        if time.monotonic() > deadline:
            raise UserError(f"{policy} does not start: {message}")
        client.wait(_RETRY)


def _come_to_rest(client: Client, policy: str) -> None:
    """Stop the policy; a fault is reset, since every episode begins anew."""
    state = f"{policy}/state"
    if not client.wait_for(lambda: client.said(state).get("state", "unconfigured") != "unconfigured", _LOADING):
        raise UserError(f"{policy} says {dict(client.said(state))} on {state}. Is policy_node running, and active?")
    if client.said(state)["state"] not in _AT_REST:
        client.try_trigger(f"{policy}/stop")
        if not client.wait_for(lambda: client.said(state)["state"] in _AT_REST, _STOP):
            raise UserError(f"{policy} does not come to rest; it says {dict(client.said(state))}.")
    if client.said(state)["state"] == "fault":
        client.trigger(f"{policy}/reset_fault")
    elif client.said(state)["state"] == "holding":
        client.trigger(f"{policy}/stop")


def _setting(text: str) -> tuple[str, str]:
    """Name and value of a ``NAME=VALUE``."""
    name, equals, value = text.partition("=")
    if not name or not equals:
        raise argparse.ArgumentTypeError(f"found '{text}', wanted NAME=VALUE")
    return name, value


def main(args: Sequence[str] | None = None) -> int:
    """Command line of the evaluation."""
    parser = argparse.ArgumentParser(prog="python -m robopolicy_ros.evaluate", description=__doc__)
    parser.add_argument("--episodes", type=int, default=50, help="to play; default 50")
    parser.add_argument("--first-seed", type=int, default=FIRST_SEED, help=f"default {FIRST_SEED}")
    parser.add_argument("--time-limit", type=float, default=10.0, help="seconds of an episode; default 10")
    parser.add_argument("--robot", help="folder of the simulated robot's contract; starts the nodes")
    parser.add_argument("--bundle", help="the policy; with --robot")
    parser.add_argument("--engine", default="", help="of the bundle; with --robot, default its only one, else torch")
    parser.add_argument("--task", default="drawer_close", help="simulated task; with --robot, default drawer_close")
    parser.add_argument(
        "--set", nargs="*", type=_setting, default=[], metavar="NAME=VALUE", help="parameters of the policy's node"
    )
    parser.add_argument("--sim", default="/sim_robot", help="full name of the simulated robot's node")
    parser.add_argument("--policy", default="/policy", help="full name of the policy's node")
    parser.add_argument("--tell-task", action="store_true", help="tell the policy each episode's instruction")
    parser.add_argument("--out", type=Path, help="file for the outcome of every episode, JSON")
    chosen = parser.parse_args(args)
    if chosen.episodes < 1:
        parser.error(f"--episodes={chosen.episodes} must be at least 1.")
    if (chosen.robot is None) != (chosen.bundle is None):
        parser.error("--robot and --bundle belong together; without both, the nodes must run already.")
    policy = {"robot": chosen.robot, "bundle": chosen.bundle, "engine": chosen.engine}
    nodes = {
        "sim_robot_node": {"robot": chosen.robot, "task": chosen.task},
        "policy_node": policy | dict(chosen.set),
    }
    end_on_signals()
    try:
        with local_nodes(nodes) if chosen.robot else nullcontext(), Client("evaluate") as client:
            played = evaluate(
                client,
                chosen.episodes,
                sim=chosen.sim,
                policy=chosen.policy,
                first_seed=chosen.first_seed,
                time_limit=chosen.time_limit,
                tell_task=chosen.tell_task,
                progress=True,
            )
    except UserError as error:
        parser.exit(1, f"{error}\n")
    outcome = report(played)
    if chosen.out is not None:
        chosen.out.write_text(json.dumps(outcome, indent=2) + "\n")
    low, high = outcome["interval"]
    print(f"{outcome['successes']} of {len(played)} succeeded: {outcome['success']:.1%} ({low:.1%} to {high:.1%})")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
