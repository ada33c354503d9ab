"""Episodes per second of evaluation on one machine: robopolicy's launchers against gymnasium's AsyncVectorEnv.

Every side plays the same seeds of push_puck with the same small untrained policy (all of its episodes last to the step
limit), with one torch thread, in a process of its own. "start" is the time of an evaluation with one control step per
episode: worker processes, environments, Ray. The rate is that of a second evaluation, from the first call of its policy
on. AsyncVectorEnv has one process for each episode of a batch and is used as evaluation loops usually do: a batch runs
until its last episode has ended.

The scores of all sides are compared: those of robopolicy's launchers must be equal to the last bit.
"""

from __future__ import annotations

import argparse
import logging
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

from fresh_process import run_fresh, wait_passively
from results import machine, print_table, save_json

PEER = "AsyncVectorEnv"
PEER_NAME = "gymnasium AsyncVectorEnv"


@dataclass(frozen=True)
class Options:
    """What all cases share; see --help."""

    episodes: int
    batch_size: int
    shard_size: int
    image: str


@dataclass(frozen=True)
class Case:
    name: str
    launcher: str
    workers: int = 0


@dataclass(frozen=True)
class Result:
    """Times in seconds; ``scores`` by seed."""

    name: str
    start: float
    rate: float
    scores: list[float]


def main() -> None:
    args = parse_arguments()
    options = Options(args.episodes, args.batch_size, args.shard_size, args.image)
    about = machine()
    wait_passively()
    cases = [Case(f"robopolicy, {n} workers", "local", n) for n in range(args.workers + 1)]
    cases += [Case(f"robopolicy, Ray, {args.workers} tasks", "ray", args.workers), Case(PEER_NAME, PEER)]
    results = []
    for case in cases:
        print(f"measuring {case.name}", file=sys.stderr, flush=True)
        results.append(run_fresh(measure, case, options))
    print(agreement(results))
    peer = results[-1].rate
    print(f"{about['processor']}, {about['cores']} cores, load before {about['load_before']:.1f}")
    print_table(
        f"push_puck, {options.episodes} episodes, batches of {options.batch_size}, shards of {options.shard_size}",
        ["", "start s", "episodes/s", f"of {PEER}"],
        [[r.name, f"{r.start:.1f}", f"{r.rate:.2f}", f"{r.rate / peer:.2f} x"] for r in results],
    )
    save_json(args.json, [asdict(r) for r in results], about)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="example: python benchmarks/evaluation_scale.py --episodes 64",
    )
    parser.add_argument("--episodes", type=int, default=64, help="episodes of each case (default: %(default)s)")
    parser.add_argument(
        "--batch-size", type=int, default=16, help="episodes side by side, processes of the peer (default: %(default)s)"
    )
    parser.add_argument("--shard-size", type=int, default=16, help="episodes per shard (default: %(default)s)")
    parser.add_argument("--workers", type=int, default=2, help="most worker processes (default: %(default)s)")
    parser.add_argument("--image", default="", help="camera that the policy sees, too, e.g. scene (default: none)")
    parser.add_argument("--json", metavar="FILE", help="also write all numbers to this file")
    return parser.parse_args()


def measure(case: Case, options: Options) -> Result:
    """Time one case, in a process of its own."""
    import torch

    from robopolicy.evaluation.environments import environment

    logging.getLogger("robopolicy").setLevel(logging.WARNING)
    torch.set_num_threads(1)
    world = environment("push_puck")
    policy = small_policy(world, options.image)
    seeds = range(100_000, 100_000 + options.episodes)
    play = player_of(case, options)
    began = time.perf_counter()
    play(policy, replace(world, max_steps=1), seeds)
    start = time.perf_counter() - began
    first_calls = note_first_call(policy)
    began = time.perf_counter()
    scores = play(policy, world, seeds)
    running_since = first_calls[0] if first_calls else began  # Ray's tasks have workers that are ready
    return Result(case.name, start, options.episodes / (time.perf_counter() - running_since), scores)


def note_first_call(policy: Any) -> list[float]:
    """The list will hold the time at which ``act`` was first called in this process: everything has started then."""
    times: list[float] = []
    act = policy.act

    def timed(*args: Any) -> Any:
        if not times:
            times.append(time.perf_counter())
        return act(*args)

    policy.act = timed
    return times


def small_policy(world: Any, image: str) -> Any:
    """`configs/policy/diffusion_unet_small.yaml`, untrained."""
    import numpy as np
    import torch

    from robopolicy.data.normalize import Normalizer, fit_normalizer
    from robopolicy.policies.registry import build_policy
    from robopolicy.spec import PolicySpec

    torch.manual_seed(0)
    keys = ["observation.state", *([f"observation.image.{image}"] if image else [])]
    spec = PolicySpec(tuple(world.keys[key] for key in keys), world.action, world.fps)
    reach = np.array([[-0.3], [0.3]])
    parts = {key.key: fit_normalizer(reach.repeat(key.dim, 1), "minmax") for key in (*spec.states, spec.action)}
    config = {"down_dims": [32, 64, 128], "step_embed_dim": 128}
    return build_policy("diffusion_unet", config, spec, Normalizer.from_parts(parts)).eval()


def player_of(case: Case, options: Options) -> Callable[..., list[float]]:
    if case.launcher == PEER:
        return partial(play_vectorised, batch_size=options.batch_size)
    from robopolicy.evaluation.launch.launcher import player

    play = player(case.launcher, shard_size=options.shard_size)

    def scores(policy: Any, world: Any, seeds: Sequence[int]) -> list[float]:
        results = play(policy, world, seeds, batch_size=options.batch_size, workers=case.workers, progress=False)
        return [result.score for result in results]

    return scores


def play_vectorised(policy: Any, world: Any, seeds: Sequence[int], *, batch_size: int) -> list[float]:
    """The usual loop: batches of episodes in gymnasium's AsyncVectorEnv, each until all of its episodes have ended."""
    from gymnasium.vector import AsyncVectorEnv

    env = AsyncVectorEnv([partial(world.make, policy.spec)] * min(batch_size, len(seeds)))
    scores: list[float] = []
    for first in range(0, len(seeds), batch_size):
        scores += play_batch(policy, env, list(seeds[first : first + batch_size]), world.max_steps)
    env.close()
    return scores


def play_batch(policy: Any, env: Any, seeds: list[int], max_steps: int) -> list[float]:
    import numpy as np
    import torch

    count = len(seeds)
    seeds = seeds + seeds[:1] * (env.num_envs - count)  # the vector has a fixed size
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    observation, _ = env.reset(seed=seeds)
    history = {
        key.key: np.stack([observation[key.key]] * policy.spec.n_obs_steps, 1) for key in policy.spec.observations
    }
    running, best, step = np.ones(env.num_envs, bool), np.zeros(env.num_envs), 0
    while running.any() and step < max_steps:
        for action in policy.act(history, generators).swapaxes(0, 1)[: max_steps - step]:
            observation, reward, terminated, _, _ = env.step(action)
            best = np.where(running, np.maximum(best, reward), best)
            running &= ~terminated
            step += 1
            for key, rows in history.items():
                rows[:, :-1] = rows[:, 1:]
                rows[:, -1] = observation[key]
    return best[:count].tolist()


def agreement(results: Sequence[Result]) -> str:
    """Compare the scores; raises AssertionError where robopolicy's launchers differ."""
    reference = results[0].scores
    for result in results[:-1]:
        assert result.scores == reference, f"the scores of '{result.name}' differ from those of '{results[0].name}'"
    equal = sum(a == b for a, b in zip(results[-1].scores, reference, strict=True))
    return f"scores: equal on all sides of robopolicy; {equal} of {len(reference)} equal to the last bit on {PEER}"


if __name__ == "__main__":
    main()
