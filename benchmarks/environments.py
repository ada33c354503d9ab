"""Control steps and images per second of the simulated tasks, against Meta-World and robosuite, in one run.

A control step is all that `step` does, its image included; resets are timed apart. The actions are those of the task's
expert, played beforehand, or else uniform in the action space; an episode is restarted when it ends, at the latest
after `EPISODE` steps. One process uses one core. Beside the rates by the clock on the wall there is the rate per second
of processor time, which says what a core of its own would do and depends little on what else the machine is doing. The
other projects are measured through their own interface ("own") and, to see what that costs, behind ours. Each round
opens every case in fresh processes, so that a busy machine slows all of them; the numbers are medians over the rounds.

Steps of different projects are not the same amount of work: the column Hz tells how many make a simulated second.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from functools import cache
from multiprocessing import get_context
from typing import Any

import numpy as np
from fresh_process import run_fresh
from results import machine, print_table, save_json

SIZES = (None, 96, 224)  # side of the image in pixels; None: no image
EPISODE = 50
CONTROL_HZ = {"metaworld_reach": 80, "robosuite_lift": 20}
# ours, theirs, what was asked for
COMPARISONS = (("lift", "robosuite_lift (own)", 4.0), ("reach", "metaworld_reach (own)", 1.0))


@dataclass(frozen=True)
class Case:
    """One row: an environment by its short name, through our interface or through its project's own."""

    task: str
    own: bool = False

    @property
    def name(self) -> str:
        return f"{self.task} (own)" if self.own else self.task


@dataclass(frozen=True)
class Rates:
    """What one round measured of one case; control steps per second by size of the image.

    Attributes:
        hz: control steps in a simulated second.
        reset_ms: milliseconds of processor time of a reset, without an image.
        cpu: of one process, per second of processor time.
        one, all_cores: of one process, and of one process per core together, by the clock on the wall.
    """

    case: str
    hz: float
    reset_ms: float
    cpu: dict[str, float]
    one: dict[str, float]
    all_cores: dict[str, float]


@dataclass(frozen=True)
class ImageRates:
    """Images per second of processor time, by size: the environment's, and `mujoco.Renderer`'s on the same scene.

    Attributes:
        default: the renderer with the quality that the scene's file asks for, MuJoCo's own unless it says otherwise.
        same: the renderer with the environment's quality.
    """

    case: str
    environment: dict[str, float]
    default: dict[str, float]
    same: dict[str, float]


@cache
def opened(case: Case, size: int | None) -> Any:
    """The environment, kept by the worker from one measurement to the next."""
    import gymnasium

    import robopolicy_sim  # noqa: F401  (registers the environments, selects OpenGL's backend)
    from robopolicy.simulator import task_id

    if case.own:
        from peers.simulators import RAW

        return RAW[case.task](size)
    images = {} if size is None else {"cameras": ("scene",), "image_size": size}
    return gymnasium.make(task_id(case.task), disable_env_checker=True, max_episode_steps=-1, **images)


@cache
def actions_of(case: Case, seed: int) -> np.ndarray:
    """What is done in an episode, (steps, action dim)."""
    env = opened(case, None)
    if not hasattr(env.unwrapped, "make_expert"):
        low, high = env.action_space.low, env.action_space.high
        return np.random.default_rng(seed).uniform(low, high, (EPISODE, *low.shape)).astype(np.float32)
    expert = env.unwrapped.make_expert(seed)
    observation, _ = env.reset(seed=seed)
    actions: list[np.ndarray] = []
    ended = False
    while not ended and len(actions) < EPISODE:
        actions.append(expert.act(observation))
        observation, _, ended, _, _ = env.step(actions[-1])
    return np.array(actions)


def step_rates(case: Case, size: int | None, seconds: float) -> tuple[float, float, float]:
    """Control steps per second of processor time and of the wall's, milliseconds of a reset, over about ``seconds``."""
    env = opened(case, size)
    wall = cpu = 0.0
    steps, resets = 0, []
    while wall <= seconds:
        actions = actions_of(case, len(resets))
        began = time.process_time()
        env.reset(seed=len(resets))
        started_cpu, started = time.process_time(), time.perf_counter()
        resets.append(started_cpu - began)
        for action in actions:
            ended = env.step(action)[2]
            steps += 1
            if ended or wall + time.perf_counter() - started > seconds:
                break
        wall += time.perf_counter() - started
        cpu += time.process_time() - started_cpu
    return steps / cpu, steps / wall, 1000 * statistics.median(resets)


def control_hz(case: Case) -> float:
    return CONTROL_HZ[case.task] if case.own else opened(case, None).metadata["render_fps"]


def measure_steps(case: Case, seconds: float) -> Rates:
    """Measure one case in fresh processes, one per core."""
    cores = os.cpu_count() or 1
    cpu, one, all_cores, reset_ms = {}, {}, {}, 0.0
    with ExitStack() as stack:
        pools = [stack.enter_context(ProcessPoolExecutor(1, get_context("spawn"))) for _ in range(cores)]
        hz = pools[0].submit(control_hz, case).result()
        for size in SIZES:
            for ready in [pool.submit(step_rates, case, size, 0.0) for pool in pools]:  # compiles, opens OpenGL
                ready.result()
            cpu[_label(size)], one[_label(size)], reset = pools[0].submit(step_rates, case, size, seconds).result()
            together = [pool.submit(step_rates, case, size, seconds) for pool in pools]
            all_cores[_label(size)] = sum(rates.result()[1] for rates in together)
            reset_ms = reset if size is None else reset_ms
    return Rates(case.name, hz, reset_ms, cpu, one, all_cores)


def measure_images(case: Case, seconds: float) -> ImageRates:
    """Measure ``render()`` and `mujoco.Renderer` on the same scene and state, alternating; runs in a fresh process."""
    import gymnasium

    import robopolicy_sim  # noqa: F401
    from robopolicy.simulator import task_id

    def make(size: int) -> Any:
        env = gymnasium.make(task_id(case.task), render_mode="rgb_array", render_size=(size, size)).unwrapped
        env.reset(seed=0)
        return env

    import mujoco

    sides: dict[str, dict[str, float]] = {"environment": {}, "default": {}, "same": {}}
    for size in SIZES[1:]:
        ours, untouched = make(size), make(size)
        renderers = {"default": mujoco.Renderer(untouched.model, size, size)}
        ours.render()  # sets the quality in its model
        renderers["same"] = mujoco.Renderer(ours.model, size, size)
        renderers["same"].scene.flags[mujoco.mjtRndFlag.mjRND_SHADOW] = 0
        camera = ours.model.camera(getattr(ours, "_camera_names", {}).get("scene", "scene")).id

        def alone(renderer: mujoco.Renderer, data: mujoco.MjData, camera: int = camera) -> None:
            renderer.update_scene(data, camera)
            renderer.render()

        sides["environment"][str(size)] = _rate(ours.render, seconds)
        sides["same"][str(size)] = _rate(lambda: alone(renderers["same"], ours.data), seconds)  # noqa: B023
        sides["default"][str(size)] = _rate(lambda: alone(renderers["default"], untouched.data), seconds)  # noqa: B023
        for closing in (*renderers.values(), ours, untouched):
            closing.close()
    return ImageRates(case.name, **sides)


def _rate(render: Callable[[], object], seconds: float) -> float:
    """Images per second of processor time."""
    render()
    images, began, began_cpu = 0, time.perf_counter(), time.process_time()
    while time.perf_counter() - began < seconds:
        render()
        images += 1
    return images / (time.process_time() - began_cpu)


def _label(size: int | None) -> str:
    return "state" if size is None else str(size)


def usable_cases(tasks: Sequence[str] | None) -> list[Case]:
    """Our tasks with the first arm, then the others; those whose package is missing are left out with a note."""
    import gymnasium

    import robopolicy_sim  # noqa: F401
    from robopolicy.simulator import simulated_tasks

    known = simulated_tasks()
    arms = ("_ur5e", "_so101")
    foreign = ("metaworld_", "aloha_", "robosuite_")
    ours = [task for task in known if not task.startswith(foreign) and not task.endswith(arms)]
    cases = [Case(task) for task in tasks or [*ours, *CONTROL_HZ]]
    usable = []
    for case in cases:
        try:
            gymnasium.make(known[case.task], disable_env_checker=True).close()
        except (gymnasium.error.Error, ImportError, KeyError) as error:
            print(f"{case.name} is left out: {error}", file=sys.stderr)
            continue
        usable.append(case)
        if case.task in CONTROL_HZ:
            usable.append(Case(case.task, own=True))
    return usable


def print_steps(rates: Sequence[Rates]) -> None:
    columns = ["environment", "Hz", "reset ms", *_columns()]
    rows = [
        [r.case, f"{r.hz:g}", f"{r.reset_ms:.1f}"]
        + [f"{side[_label(s)]:,.0f}" for s in SIZES for side in (r.cpu, r.one, r.all_cores)]
        for r in rates
    ]
    print_table("Control steps per second of processor time (cpu) and of the wall's, by processes", columns, rows)


def print_ratios(rates: Sequence[Rates]) -> None:
    by_name = {r.case: r for r in rates}
    rows = []
    for ours, theirs, asked in COMPARISONS:
        if ours in by_name and theirs in by_name:
            a, b = (asdict(by_name[name]) for name in (ours, theirs))
            ratios = [a[n][_label(s)] / b[n][_label(s)] for s in SIZES for n in ("cpu", "one", "all_cores")]
            rows.append([f"{ours} / {theirs}", *(f"{ratio:.2f}" for ratio in ratios), f">= {asked:g}"])
    print_table("Ratios to the other projects' own interfaces", ["steps/s", *_columns(), "asked, state"], rows)


def _columns() -> list[str]:
    return [f"{_label(size)} {side}" for size in SIZES for side in ("cpu", "x1", f"x{os.cpu_count() or 1}")]


def print_images(rates: Sequence[ImageRates]) -> None:
    columns = ["scene"]
    for size in SIZES[1:]:
        columns += [f"{size}: ours", "default", "ratio", "same", "ratio"]
    rows = []
    for r in rates:
        row = [r.case]
        for size in map(str, SIZES[1:]):
            ours, default, same = r.environment[size], r.default[size], r.same[size]
            row += [f"{ours:,.0f}", f"{default:,.0f}", f"{ours / default:.2f}", f"{same:,.0f}", f"{ours / same:.2f}"]
        rows.append(row)
    print_table("Images per second of processor time, and mujoco.Renderer alone on the same scene", columns, rows)


def median_rates(rounds: Sequence[Rates]) -> Rates:
    def medians(side: str) -> dict[str, float]:
        return {_label(s): statistics.median(getattr(r, side)[_label(s)] for r in rounds) for s in SIZES}

    reset_ms = statistics.median(r.reset_ms for r in rounds)
    return Rates(rounds[0].case, rounds[0].hz, reset_ms, medians("cpu"), medians("one"), medians("all_cores"))


def median_images(rounds: Sequence[ImageRates]) -> ImageRates:
    sides = {
        side: {str(s): statistics.median(getattr(r, side)[str(s)] for r in rounds) for s in SIZES[1:]}
        for side in ("environment", "default", "same")
    }
    return ImageRates(rounds[0].case, **sides)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", help="short names, separated by commas (default: ours, Meta-World, robosuite)")
    parser.add_argument("--seconds", type=float, default=1.0, help="length of one measurement (default 1)")
    parser.add_argument("--rounds", type=int, default=3, help="measurements of each number (default 3)")
    parser.add_argument("--json", help="save the numbers here")
    args = parser.parse_args(argv)
    # One process, one core; rendering in software would use all of them otherwise.
    os.environ |= {"LP_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}
    about = machine()
    cases = run_fresh(usable_cases, args.tasks.split(",") if args.tasks else None)
    steps: dict[str, list[Rates]] = defaultdict(list)
    images: dict[str, list[ImageRates]] = defaultdict(list)
    for done in range(args.rounds):
        for case in cases:
            print(f"round {done + 1} of {args.rounds}: {case.name}", file=sys.stderr)
            steps[case.name].append(measure_steps(case, args.seconds))
            if not case.own:
                images[case.name].append(run_fresh(measure_images, case, args.seconds))
    step_rates = [median_rates(rounds) for rounds in steps.values()]
    image_rates = [median_images(rounds) for rounds in images.values()]
    print_steps(step_rates)
    print_ratios(step_rates)
    print_images(image_rates)
    measured = {"steps": [asdict(r) for r in step_rates], "images": [asdict(r) for r in image_rates]}
    save_json(args.json, measured, about)


if __name__ == "__main__":
    main()
