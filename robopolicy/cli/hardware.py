"""``robopolicy hardware``: the robots that come with the package, one's own, and whether all fits before it moves."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

from robopolicy.errors import UserError

HELP = """\
A robot is a folder: contract.yaml says which topics become observations and how actions become commands, safety.yaml
what no command may exceed, README.md leads from unboxing to the first policy. docs/hardware.md explains the entries.

  robopolicy hardware list                             robots that come with the package
  robopolicy hardware new my_arm                       a folder of your own to fill in
  robopolicy hardware check ur5e                       is it right in itself?
  robopolicy hardware check ur5e --bundle runs/…/bundles/last      was this policy made for it?
  robopolicy hardware check ur5e --live                does the robot that runs now do what the contract says?
"""
_CHECK = """\
Nothing is sent to the robot. Each line ends in what to do:

  OK     as it should be
  WARN   works, but you should know
  FAIL   do not start a policy

--live listens to the topics for some seconds: types, rates, gaps, stamps, joint names, radians, who else sends
commands, whether a controller listens. It needs ROS 2: on a robot the distribution's
(source /opt/ros/…/setup.bash), else pip install 'robopolicy[ros]'.

Exit code 0: no FAIL; 2: something failed.

examples:
  robopolicy hardware check fr3
  robopolicy hardware check ./my_arm --bundle runs/first/bundles/last
  robopolicy hardware check so101 --live --seconds 10 --namespace /left
"""
_NEW = """\
examples:
  robopolicy hardware new my_arm                  # every entry explained
  robopolicy hardware new lab_ur5e --from ur5e    # your table, cameras and latencies
"""


def add_parser(verbs: Any) -> None:
    """Add the verb ``hardware`` and its sub-verbs to the command line."""
    parser = verbs.add_parser(
        "hardware",
        help="robots: list, copy, check before motion",
        description=HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    subverbs = parser.add_subparsers(dest="hardware_verb", required=True, metavar="VERB")

    shown = _verb(subverbs, "list", "robots that come with the package", "")
    shown.set_defaults(run=_list)

    new = _verb(subverbs, "new", "copy a robot's folder to fill in", _NEW)
    new.add_argument("name", type=Path, metavar="NAME", help="of the robot and its folder")
    new.add_argument("--from", dest="source", default="template", metavar="ROBOT", help="name or folder to copy")
    new.set_defaults(run=_new)

    check = _verb(subverbs, "check", "contract, limits, policy and running robot fit each other", _CHECK)
    check.add_argument("robot", metavar="ROBOT", help="name, or folder with contract.yaml")
    check.add_argument("--bundle", type=Path, metavar="DIR", help="a policy for it")
    check.add_argument("--live", action="store_true", help="listen to the robot's topics")
    check.add_argument("--seconds", type=float, default=5.0, metavar="S", help="to listen (default: 5)")
    check.add_argument("--namespace", default="", metavar="NS", help="of its topics, e.g. /left")
    check.set_defaults(run=_check)


def _verb(subverbs: Any, name: str, summary: str, description: str) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = subverbs.add_parser(
        name, help=summary, description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    return parser


def _list(args: argparse.Namespace) -> int:
    from robopolicy.runtime.robots import GUIDE, hardware_folder, read_robot, shipped_robots

    for name in shipped_robots():
        contract = read_robot(name).contract
        cameras = sum(stream.image for stream in contract.streams.values())
        print(
            f"{name:<8} {len(contract.joints)} joints, {cameras} cameras, {contract.policy_rate:g} Hz"
            f"  {hardware_folder() / name / GUIDE}"
        )
    print("your own: robopolicy hardware new NAME")
    return 0


def _new(args: argparse.Namespace) -> int:
    from robopolicy.runtime.robots import copy_robot

    folder = copy_robot(args.name, args.source)
    print(f"{folder} is a copy of {args.source}. Change what its comments mark, then:")
    print(f"  robopolicy hardware check {folder if os.sep in str(folder) else f'./{folder}'}")
    return 0


def _check(args: argparse.Namespace) -> int:
    from robopolicy.runtime.check import check_bundle, check_robot, failed
    from robopolicy.runtime.robots import read_robot

    if args.seconds <= 0:
        raise UserError(f"--seconds {args.seconds:g} must be positive.")
    robot = read_robot(args.robot)
    print(f"{robot.folder}")
    findings = check_robot(robot.contract, robot.limits)
    if args.bundle is not None:
        findings += check_bundle(robot.contract, robot.limits, args.bundle)
    if args.live and not failed(findings):
        findings += _live(robot.contract, robot.limits, args)
    print_findings(findings)
    if args.live and failed(findings) and not any(f.check.startswith("command") for f in findings):
        print("The running robot was not looked at: first the lines above.")
    return 2 if failed(findings) else 0


def _live(contract: Any, limits: Any, args: argparse.Namespace) -> Any:
    try:
        from robopolicy_ros.live_check import check_live
    except ImportError as error:
        raise UserError(
            f"--live needs ROS 2, which is not usable here ({error}). On a robot: source /opt/ros/<distribution>/"
            "setup.bash and use its Python; on a PC: pip install 'robopolicy[ros]'"
        ) from error
    return check_live(contract, limits, args.seconds, args.namespace, args.bundle)


def print_findings(findings: Any) -> None:
    """One line for each check, and under it what to do."""
    width = max(len(finding.check) for finding in findings)
    for finding in findings:
        print(f"{finding.level:<4}  {finding.check:<{width}}  {finding.message}")
        if finding.advice:
            print(f"{'':<{width + 8}}-> {finding.advice}")
