"""``robopolicy identify`` and ``robopolicy identify-camera``"""

from __future__ import annotations

import argparse
import csv
import json
import os
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from tqdm import tqdm

from robopolicy.errors import UserError, require_extra
from robopolicy.simulator import make_environment, task_id

if TYPE_CHECKING:
    from robopolicy.data.store import EpisodeStore

STATE, ACTION = "observation.state", "action"

HELP = """\
Fit the simulated arm to recordings of the real one: servo gains, friction, latency, gripper.

  robopolicy identify data/real.zarr --task lift --out robot.json
  robopolicy identify data/real.zarr --task lift --out robot.json --control ee_delta_target --steps 1000 --workers 4

The dataset holds what was commanded (action) and what was measured before it (observation.state: joint angles, gripper
opening, TCP position and 6-D rotation in the base frame), as record and teleoperate write them. The commands are
replayed in simulation from the first measured joint angles, and the parameters are searched with which the TCP moves as
it was measured. What is found is judged on episodes that were not fitted.

Use the result wherever a simulated task takes options:

  robopolicy eval bundle=… environment_options='{robot_parameters: {file: robot.json}}'

Free motions at different speeds that start at rest tell most. Contacts and loads are not simulated in the replay.
"""

CAMERA_HELP = """\
Find where a fixed camera is, from at least six points whose place on the bench and in the image is known.

  robopolicy identify-camera points.csv --camera scene --size 640x480 --out camera.json

points.csv has the columns x,y,z (metres, in the frame of the arm's base) and u,v (pixels to the right and down from the
image's top left corner). Touch points with the tool and read x,y,z from the robot. The file holds the option
camera_poses of simulated tasks.
"""


def add_parser(verbs: Any) -> None:
    parser = verbs.add_parser(
        "identify",
        help="fit the simulated arm to recordings of the real one",
        description=HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("data", metavar="ZARR", help="recordings of the real arm")
    parser.add_argument("--task", required=True, help="a simulated task with this arm, e.g. lift or lift_ur5e")
    parser.add_argument("--out", required=True, type=Path, metavar="JSON", help="where to write the parameters")
    parser.add_argument("--steps", type=int, default=400, metavar="N", help="candidates to replay (default 400)")
    parser.add_argument("--control", help="what the actions mean (default: what the dataset says, else ee_pose)")
    parser.add_argument("--episodes", type=int, default=12, metavar="N", help="episodes to fit, at most (default 12)")
    parser.add_argument("--held-out", type=int, default=6, metavar="N", help="episodes to judge on (default 6)")
    parser.add_argument("--max-latency", type=float, default=0.2, metavar="S", help="seconds (default 0.2)")
    parser.add_argument("--seed", type=int, default=0, help="of the search and the choice of episodes (default 0)")
    parser.add_argument("--workers", type=int, metavar="N", help="processes (default: one for each core)")
    parser.set_defaults(run=run)

    camera = verbs.add_parser(
        "identify-camera",
        help="find where a fixed camera is",
        description=CAMERA_HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    camera.add_argument("points", type=Path, metavar="CSV", help="columns x,y,z,u,v")
    camera.add_argument("--camera", default="scene", help="its name in simulation (default scene)")
    camera.add_argument("--size", required=True, metavar="WxH", help="of the image in pixels, e.g. 640x480")
    camera.add_argument("--out", required=True, type=Path, metavar="JSON", help="where to write the pose")
    camera.set_defaults(run=run_camera)


def run(args: argparse.Namespace) -> int:
    from robopolicy.data.store import EpisodeStore

    _check(args)
    identification = require_extra("robopolicy_sim.matching.identification", "sim")
    candidates = require_extra("robopolicy_sim.matching.candidates", "sim")
    with EpisodeStore.open(args.data) as store:
        arm, names = arm_of(args.task)
        control, control_hz = _commands(store, args.control), _rate(store)
        fitted, held_out = choose_episodes(store.n_episodes, args.episodes, args.held_out, args.seed)
        motions = read_motions(store, names, arm, [*fitted, *held_out])
        source = {"path": str(store.path), "fingerprint": store.fingerprint()}
    args.out.parent.mkdir(parents=True, exist_ok=True)
    with tqdm(total=args.steps, unit="candidate", desc="identify") as bar:
        try:
            found = identification.identify(
                arm,
                motions[: len(fitted)],
                held_out=motions[len(fitted) :],
                control=control,
                control_hz=control_hz,
                evaluations=args.steps,
                bounds=candidates.Bounds(action_latency=(0.0, args.max_latency)),
                seed=args.seed,
                workers=(os.cpu_count() or 1) if args.workers is None else args.workers,
                progress=lambda done, loss: _show(bar, done, loss),
            )
        except ValueError as error:
            raise UserError(f"{args.data}: {error}") from error
    data = source | {"fitted_episodes": fitted, "held_out_episodes": held_out}
    write_result(args.out, found, arm.name, control, control_hz, data)
    print_result(found, len(fitted), len(held_out), arm.joints)
    print(f"written: {args.out}; use it with environment_options='{{robot_parameters: {{file: {args.out}}}}}'")
    return 0


def run_camera(args: argparse.Namespace) -> int:
    from robopolicy.evaluation.results import write_json

    camera = require_extra("robopolicy_sim.matching.camera", "sim")
    points, pixels = read_points(args.points)
    try:
        fit = camera.fit_camera(points, pixels, _image_size(args.size))
    except ValueError as error:
        raise UserError(f"{args.points}: {error}") from error
    args.out.parent.mkdir(parents=True, exist_ok=True)
    write_json(args.out, {"camera_poses": {args.camera: fit.to_json()}})
    print(f"{len(points)} points, root mean square error {fit.error:.2f} pixels; written: {args.out}")
    print(json.dumps(fit.to_json()))
    return 0


def arm_of(task: str) -> tuple[Any, tuple[str, ...]]:
    """The arm of a simulated task and the names of the state's entries.

    Raises:
        UserError: there is no such task, or it has no arm.
    """
    env = make_environment(task_id(task))
    arm, names = getattr(env.unwrapped, "arm", None), env.metadata.get("names", {}).get(STATE, ())
    env.close()
    if arm is None:
        raise UserError(f"The task '{task}' has no arm to identify; choose e.g. lift.")
    return arm, tuple(names)


def choose_episodes(count: int, fitted: int, held_out: int, seed: int) -> tuple[list[int], list[int]]:
    """Episodes to fit and others to judge on, drawn at random; a small dataset gives at most a third to judging."""
    order = np.random.default_rng(seed).permutation(count).tolist()
    held_out = min(held_out, count // 3)
    return sorted(order[held_out : held_out + fitted]), sorted(order[:held_out])


def read_motions(store: EpisodeStore, names: Sequence[str], arm: Any, episodes: Sequence[int]) -> list[Any]:
    """Commands and measured states of episodes, as `robopolicy_sim.matching.replay.Motion`.

    Raises:
        UserError: the arrays are not there, or are another arm's.
    """
    motion = require_extra("robopolicy_sim.matching.replay", "sim").Motion
    stored = store.schema.arrays[STATE].names if STATE in store.schema.arrays else ()
    if stored and tuple(stored) != tuple(names):
        raise UserError(
            f"{store.path}: {STATE} holds {', '.join(stored)}; the state of the arm '{arm.name}' is {', '.join(names)}."
        )
    motions = []
    for episode in episodes:
        arrays = store.episode(episode, (ACTION, STATE))
        try:
            motions.append(motion.from_arrays(arrays[ACTION], arrays[STATE], len(arm.joints)))
        except ValueError as error:
            raise UserError(f"{store.path}: episode {episode} does not fit the arm '{arm.name}': {error}") from error
    return motions


def write_result(path: Path, found: Any, arm: str, control: str, control_hz: float, data: dict[str, Any]) -> None:
    """Write parameters with all that is needed to judge and repeat them, as JSON."""
    from robopolicy.evaluation.environments import package_version
    from robopolicy.evaluation.results import write_json

    error = {"before": asdict(found.before), "after": asdict(found.after)}
    if found.held_out_before is not None:
        error |= {"held_out_before": asdict(found.held_out_before), "held_out_after": asdict(found.held_out_after)}
    search = {"evaluations": found.evaluations, "seed": found.seed, "bounds": asdict(found.bounds)}
    versions = {name: package_version(name) for name in ("robopolicy", "mujoco", "scipy", "numpy")}
    write_json(
        path,
        {
            "arm": arm,
            "robot_parameters": found.parameters.to_json(),
            "control": control,
            "control_hz": control_hz,
            "error": error,
            "search": search,
            "data": data,
            "versions": versions,
        },
    )


def print_result(found: Any, fitted: int, held_out: int, joints: Sequence[str]) -> None:
    """Print the errors in mm and mrad and the parameters."""
    print("mean TCP error of the replay           before               after")
    print(_error_line(f"{fitted} fitted episodes", found.before, found.after))
    if found.held_out_before is not None:
        print(_error_line(f"{held_out} held-out episodes", found.held_out_before, found.held_out_after))
    else:
        print("no held-out episodes: the dataset has fewer than 3, so nothing shows whether the fit holds elsewhere")
    values = found.parameters.to_json()
    for name, unit in (("stiffness", "N m/rad"), ("damping", "N m s/rad"), ("friction", "N m")):
        if name in values:
            row = ", ".join(f"{joint} {value:.4g}" for joint, value in zip(joints, values[name], strict=True))
            print(f"{name} [{unit}]: {row}")
    if "action_latency" in values:
        print(f"latency: {values['action_latency'] * 1e3:.0f} ms")
    if "gripper_damping" in values:
        print(f"gripper damping: {values['gripper_damping']:.4g}")


def read_points(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Points (N, 3) in metres and pixels (N, 2) from a CSV file with the columns x,y,z,u,v.

    Raises:
        UserError: the file is not there, or a column or number is missing.
    """
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:  # spreadsheets write a byte order mark
            rows = list(csv.DictReader(file, skipinitialspace=True))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path}: cannot be read as a CSV table: {error}") from error
    try:
        values = np.array([[float(row[name]) for name in "xyzuv"] for row in rows]).reshape(-1, 5)
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path}: wanted the columns x,y,z,u,v with numbers; found {error}.") from error
    return values[:, :3], values[:, 3:]


def _check(args: argparse.Namespace) -> None:
    for name, least in (("steps", 50), ("episodes", 1), ("held_out", 0), ("workers", 1)):
        value = getattr(args, name)
        if value is not None and value < least:
            raise UserError(f"--{name.replace('_', '-')} is {value}, wanted at least {least}.")
    if not args.max_latency > 0:
        raise UserError(f"--max-latency is {args.max_latency}, wanted seconds above 0.")


def _commands(store: EpisodeStore, control: str | None) -> str:
    """What the dataset's actions mean.

    Raises:
        UserError: they are not what was executed.
    """
    attributes = store.schema.attributes
    if attributes.get("noise"):
        raise UserError(
            f"{store.path}: it was recorded with noise {attributes['noise']}, so that its actions are not what the "
            "robot was told. Identify it from a recording without noise."
        )
    return control or attributes.get("environment_options", {}).get("control", "ee_pose")


def _rate(store: EpisodeStore) -> float:
    if store.n_episodes == 0:
        raise UserError(f"{store.path}: there are no episodes.")
    if store.fps is None:
        raise UserError(f"{store.path}: the dataset does not say its rate, which the replay needs.")
    return float(store.fps)


def _show(bar: Any, done: int, loss: float) -> None:
    bar.total = max(bar.total, done)
    bar.set_postfix_str(f"loss {loss:.5f}", refresh=False)
    bar.update(done - bar.n)


def _error_line(name: str, before: Any, after: Any) -> str:
    ends = [f"{error.position * 1e3:7.2f} mm {error.rotation * 1e3:7.2f} mrad" for error in (before, after)]
    return f"{name:<30}{'  '.join(ends)}  (loss {before.loss:.5f} -> {after.loss:.5f})"


def _image_size(text: str) -> tuple[int, int]:
    """(height, width) from ``640x480``."""
    width, _, height = text.partition("x")
    if not (width.isdigit() and height.isdigit() and int(width) > 0 and int(height) > 0):
        raise UserError(f"--size is '{text}', wanted WIDTHxHEIGHT in pixels, e.g. 640x480.")
    return int(height), int(width)
