"""Does a goal-conditioned policy reach the goal that it is given, and does guidance help?

Task: push a puck into one of two rings, left or right of the bench's middle, in MuJoCo. The policy sees pusher and
puck, not the ring; in half of the demonstrations the puck goes to either side. Its goal is a later position of the
puck (a future state of the same episode); asked to put the puck at a side, it has to take the goal from there alone.
Every start is played towards both sides, without a goal (λ = 0) and with classifier-free guidance of several weights.

Records and trains in the folder --work what is not there yet; about fifteen minutes on one core.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from fresh_process import wait_passively
from results import machine, print_table, save_json
from tqdm import tqdm

from robopolicy.cli.compose import compose_config
from robopolicy.cli.train import start
from robopolicy.data.schema import ArraySpec
from robopolicy.data.store import EpisodeStore
from robopolicy.evaluation.statistics import Interval, wilson
from robopolicy.policies.base import Policy
from robopolicy.policies.bundle import load_bundle
from robopolicy.simulator import make_environment
from robopolicy.spec import GOAL

ENVIRONMENT = "robopolicy_sim/PushPuck-v0"
STATE, PUCK = "observation.state", "observation.puck"
RINGS = {"left": np.array([0.0, 0.12]), "right": np.array([0.0, -0.12])}  # m
START = 0.05  # m, half side of the square in which the puck starts
MAX_STEPS = 150
TASK = """\
name: two_goals
environment: ''
environment_options: {}
fps: null
n_obs_steps: 2
horizon: 16
n_action_steps: 8
multitask: null
goals: [observation.puck]
goal_horizon: null
observations:
  - {key: observation.pusher, source: observation.state, columns: [0, 1]}
  - {key: observation.puck, source: observation.state, columns: [2, 3]}
action: {key: action}
schema: {}
"""


def main() -> None:
    args = parse_arguments()
    torch.set_num_threads(1)
    wait_passively()
    args.work.mkdir(parents=True, exist_ok=True)
    data, run = args.work / "two_goals.zarr", args.work / args.policy
    if not data.exists():
        record(data, args.demonstrations)
    if not (run / "bundles" / "last").exists():
        train(args.work, data, run, args.policy, args.steps)
    policy, _ = load_bundle(run / "bundles" / "last")
    rows, records = [], []
    for guidance in args.guidance:
        policy.sampler = replace(policy.sampler, guidance=guidance)
        asked, other, steps = play(policy, args.episodes, args.first_seed)
        n = 2 * args.episodes
        rows.append((f"{guidance:g}", _text(wilson(asked, n)), _text(wilson(other, n)), f"{steps:.0f}"))
        records.append({"guidance": guidance, "asked": asked, "other": other, "n": n, "mean_steps": steps})
    about = machine()
    print(f"{about['processor']}, {args.policy}, {policy.sampler.name} {policy.sampler.steps} steps")
    columns = ("λ", "asked ring reached", "other ring reached", "steps where reached")
    print_table(f"Two goals, {args.episodes} starts towards both", columns, rows)
    save_json(args.json, records, about)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder of the dataset and the run")
    parser.add_argument("--policy", default="beso", help="architecture (default: %(default)s)")
    parser.add_argument("--demonstrations", type=int, default=200, help="recorded episodes (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=3000, help="updates (default: %(default)s)")
    parser.add_argument("--episodes", type=int, default=100, help="starts, each towards both (default: %(default)s)")
    parser.add_argument("--first-seed", type=int, default=500_000, help="seed of the first start")
    parser.add_argument(
        "--guidance", type=float, nargs="+", default=[0, 0.5, 1, 1.5, 2, 3], help="weights λ (default: %(default)s)"
    )
    parser.add_argument("--json", help="also write the numbers to this file")
    return parser.parse_args()


def start_state(seed: int, ring: np.ndarray) -> np.ndarray:
    """A state (6,) to start from: pusher, puck, ring in metres."""
    rng = np.random.default_rng(seed)
    while True:
        pusher, puck = rng.uniform(-0.26, 0.26, 2), rng.uniform(-START, START, 2)
        if np.linalg.norm(pusher - puck) > 0.12:
            return np.concatenate([pusher, puck, ring])


def record(path: Path, episodes: int) -> None:
    """Demonstrations of the scripted expert, alternately to the left and to the right ring."""
    env = make_environment(ENVIRONMENT)
    arrays = [
        ArraySpec(STATE, (6,), "float32", "state", unit="m"),
        ArraySpec("action", (2,), "float32", "action", unit="m"),
    ]
    with EpisodeStore.create(path, arrays, fps=env.metadata["render_fps"]) as store:
        for seed in tqdm(range(episodes), desc="recording", unit="episode"):
            side = ("left", "right")[seed % 2]
            observation, info = env.reset(seed=seed, options={"state": start_state(seed, RINGS[side])})
            expert = env.unwrapped.make_expert(seed)
            steps: list[tuple[np.ndarray, np.ndarray]] = []
            while len(steps) < MAX_STEPS and not info.get("success"):
                action = expert.act(observation)
                steps.append((observation[STATE], action))
                observation, _, _, _, info = env.step(action)
            if info["success"]:
                states, actions = map(np.stack, zip(*steps, strict=True))
                store.append({STATE: states, "action": actions}, behaviour=side, success=True, seed=seed)


def train(work: Path, data: Path, run: Path, policy: str, steps: int) -> None:
    (work / "task").mkdir(exist_ok=True)
    (work / "task" / "two_goals.yaml").write_text(TASK)
    overrides = ["task=two_goals", f"policy={policy}", "train=pusht_cpu", f"data.path={data}", f"out={run}"]
    start(compose_config("train", [*overrides, f"train.steps={steps}"], work), resume=False)


def play(policy: Policy, episodes: int, first_seed: int) -> tuple[int, int, float]:
    """Play every start towards both rings, all side by side.

    Returns:
        Episodes in which the puck came to rest in the ring that was asked for, in the other one, and the mean number of
        steps of the former.
    """
    cases = [(seed, side) for seed in range(first_seed, first_seed + episodes) for side in RINGS]
    envs = [make_environment(ENVIRONMENT) for _ in cases]
    first = [
        env.reset(seed=seed, options={"state": start_state(seed, RINGS[side])})[0][STATE]
        for env, (seed, side) in zip(envs, cases, strict=True)
    ]
    history = np.repeat(np.stack(first)[:, None], policy.spec.n_obs_steps, axis=1)
    goals = np.stack([RINGS[side] for _, side in cases]).astype(np.float32)
    tolerance = envs[0].unwrapped.geometry.tolerance
    generators = [torch.Generator().manual_seed(seed) for seed, _ in cases]
    inside = np.zeros((len(cases), 2), dtype=int)  # control steps in a row in the asked and in the other ring
    reached = np.zeros((len(cases), 2), dtype=bool)
    steps = np.zeros(len(cases), dtype=int)
    for _ in tqdm(range(0, MAX_STEPS, policy.spec.n_action_steps), desc=f"λ {policy.sampler.guidance:g}", leave=False):
        running = np.flatnonzero(~reached.any(axis=1))
        if not len(running):
            break
        observations = {
            "observation.pusher": history[running, :, :2],
            PUCK: history[running, :, 2:4],
            GOAL + PUCK: goals[running],
        }
        chunks = policy.act(observations, [generators[i] for i in running])
        for i, chunk in zip(running, chunks, strict=True):
            for action in chunk:
                observation, *_ = envs[i].step(action)
                history[i] = np.concatenate([history[i, 1:], observation[STATE][None]])
                puck = observation[STATE][2:4]
                distance = np.array([np.linalg.norm(puck - goals[i]), np.linalg.norm(puck + goals[i])])
                inside[i] = np.where(distance <= tolerance, inside[i] + 1, 0)
                reached[i] |= inside[i] >= envs[i].unwrapped.config.dwell_steps
                steps[i] += 1
                if reached[i].any():
                    break
    for env in envs:
        env.close()
    asked = reached[:, 0]
    return int(asked.sum()), int(reached[:, 1].sum()), float(steps[asked].mean()) if asked.any() else float("nan")


def _text(rate: Interval) -> str:
    return f"{rate.value:.3f} [{rate.low:.3f}, {rate.high:.3f}]"


if __name__ == "__main__":
    main()
