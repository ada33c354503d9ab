"""``robopolicy teleoperate``"""

from __future__ import annotations

import argparse
import math
import os
from contextlib import ExitStack, closing
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from robopolicy.cli.record import parse_options
from robopolicy.errors import UserError, require_extra
from robopolicy.simulator import task_id

if TYPE_CHECKING:
    from robopolicy.teleoperation.command import AxisMap, Device

HELP = """\
Record demonstrations of a simulated task that you give yourself.

  robopolicy teleoperate --task lift --out demos.zarr
  robopolicy teleoperate --task lift --out demos.zarr --append --cameras scene,wrist
  robopolicy teleoperate --task lift --out demos.zarr --device spacemouse --episodes 50
  robopolicy teleoperate --task lift_ur5e --out ur5e.zarr --option control=ee_delta_target
  robopolicy teleoperate --task push_puck --out demos.zarr --device gamepad --speed 0.25

A window shows the scene. Start an episode, steer the tool to the goal. Success ends the episode and stores it; or stop
it and say how it went. The next start appears at once.

  the session        Enter        start / stop the episode
  (any device)       Y            store it as a success
                     N            store it as a failure
                     Backspace    take back: the episode that runs, else the last one stored in this session
                     Esc          quit; the episode that runs is not stored

  keyboard           W S  A D     away / near, left / right
                     R F          up / down
                     I K  U O     tilt forward / back, roll left / right
                     J L          turn left / right
                     Space        close / open the gripper
                     Shift        a quarter of the speed, while held

  gamepad            left stick   away, near, left, right     right stick   up, down, turn
                     cross        tilt                        shoulders     roll
                     right trigger   close the gripper        start         start / stop
                     A  B         success / failure           back          undo

  spacemouse         cap          push to move, turn to rotate
                     left button  close / open the gripper    right button  start / stop

Directions are as you see them in the window (--frame view) or along the axes of the arm's base (--frame base).

The window tells when this machine cannot keep the task's control rate; --view-height 240 makes it faster.

An episode that is stored is on disk; a crash costs the one that runs, at most. Each episode starts from the first seed
from --seed on that the dataset does not hold yet. The dataset is like one of `robopolicy record`; look at it with
  robopolicy data show demos.zarr
"""


def add_parser(verbs: Any) -> None:
    parser = verbs.add_parser(
        "teleoperate",
        help="record demonstrations that you give yourself",
        description=HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--task", required=True, help="short name, e.g. lift, or a Gymnasium id")
    parser.add_argument("--out", required=True, metavar="PATH", help="the dataset, a Zarr folder")
    parser.add_argument("--device", choices=("keyboard", "gamepad", "spacemouse"), default="keyboard")
    parser.add_argument("--episodes", type=int, metavar="N", help="end after N episodes (default: when you quit)")
    parser.add_argument("--seed", type=int, default=0, help="first seed to use (default 0)")
    parser.add_argument("--append", action="store_true", help="add to an existing dataset")
    parser.add_argument("--cameras", default="", metavar="A,B", help="cameras to record (default: the task's own)")
    parser.add_argument("--image-size", type=int, default=96, metavar="PX", help="side of their images (default 96)")
    parser.add_argument(
        "--option",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="argument of the environment, e.g. control=ee_delta_target or variation={lighting: darker}; repeatable",
    )
    parser.add_argument("--time-limit", type=float, default=60.0, metavar="S", help="seconds per episode (default 60)")
    parser.add_argument("--speed", type=float, metavar="M/S", help="full speed of the tool (default 0.15)")
    parser.add_argument("--turn-speed", type=float, metavar="RAD/S", help="full turning speed (default 0.8)")
    parser.add_argument("--dead-zone", type=float, metavar="SHARE", help="deflection that counts as none, 0 to 1")
    parser.add_argument("--expo", type=float, metavar="SHARE", help="0 linear, 1 finest about the centre")
    parser.add_argument("--view-height", type=int, metavar="PX", help="of the scene's image; smaller is faster")
    parser.add_argument("--frame", choices=("view", "base"), default="view", help="what 'away' means (default view)")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    os.environ.setdefault("PYGAME_HIDE_SUPPORT_PROMPT", "1")
    require_extra("pygame", "teleop")
    from robopolicy.teleoperation import live
    from robopolicy.teleoperation.actions import action_adapter
    from robopolicy.teleoperation.rate import RateKeeper
    from robopolicy.teleoperation.session import Session, open_dataset
    from robopolicy.teleoperation.window import Window

    _check(args)
    env = live.make_playable(task_id(args.task), time_limit=args.time_limit, **_environment_options(args))
    with ExitStack() as stack:
        stack.callback(env.close)
        adapter = action_adapter(env)
        env.reset(seed=args.seed)
        # The dataset comes last, so that none is left behind where a display or a device is missing.
        window = stack.enter_context(closing(Window(f"robopolicy: {args.task}")))
        heading = live.view_heading(env) if args.frame == "view" else 0.0
        device = stack.enter_context(closing(_open_device(args, heading)))
        source = {
            "source": "teleoperation",
            "env_id": env.spec.id,
            "environment_options": parse_options(args.option),
            "device": args.device,
        }
        store = open_dataset(args.out, env, append=args.append, attributes=source)
        session = stack.enter_context(Session(env, store, adapter, seed=args.seed, episodes=args.episodes))
        live.run(session, device, window, env, RateKeeper(env.metadata["render_fps"]))
        report = session.report
    print(
        f"{report.path}: {report.recorded} episodes, {report.steps} steps recorded, {report.succeeded} of them "
        f"successes; the dataset now holds {report.episodes_in_dataset} episodes."
    )
    return 0


def _check(args: argparse.Namespace) -> None:
    from robopolicy.data.record import EVALUATION_SEEDS_FROM

    for name in ("episodes", "time_limit", "image_size", "view_height"):
        value = getattr(args, name)
        if value is not None and (value <= 0 or not math.isfinite(value)):
            raise UserError(f"--{name.replace('_', '-')} must be positive, found {value}.")
    if not 0 <= args.seed < EVALUATION_SEEDS_FROM:
        raise UserError(
            f"--seed must lie in 0 to {EVALUATION_SEEDS_FROM - 1}, found {args.seed}; those above are for evaluation."
        )


def _environment_options(args: argparse.Namespace) -> dict[str, Any]:
    options = parse_options(args.option)
    if cameras := tuple(name for name in args.cameras.split(",") if name):
        options |= {"cameras": cameras, "image_size": args.image_size}
    if args.view_height is not None:
        options["render_size"] = (args.view_height, args.view_height * 4 // 3)
    return options


def _open_device(args: argparse.Namespace, heading: float) -> Device:
    from robopolicy.teleoperation.devices import gamepad, keyboard, spacemouse

    if args.device == "gamepad":
        return gamepad.Gamepad(_tuned(gamepad.AXES, args, heading))
    if args.device == "spacemouse":
        return spacemouse.SpaceMouse.open(_tuned(spacemouse.AXES, args, heading))
    return keyboard.Keyboard(_tuned(keyboard.AXES, args, heading))


def _tuned(axes: AxisMap, args: argparse.Namespace, heading: float) -> AxisMap:
    """The device's own response with what the user wants otherwise."""
    wishes = {
        "linear_speed": args.speed,
        "angular_speed": args.turn_speed,
        "dead_zone": args.dead_zone,
        "expo": args.expo,
    }
    return replace(axes, heading=heading, **{name: value for name, value in wishes.items() if value is not None})
