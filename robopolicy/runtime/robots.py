"""Where the robots' folders are: shipped ones by name, one's own by path."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

import robopolicy
from robopolicy.errors import UserError, did_you_mean
from robopolicy.runtime.contract import CONTRACT, Contract, read_contract
from robopolicy.runtime.limits import SAFETY, Limits, read_limits

TEMPLATE = "template"
GUIDE = "README.md"


@dataclass(frozen=True)
class Robot:
    """A robot's folder, read.

    Attributes:
        folder: that holds the files.
        contract, limits: what is in them.
    """

    folder: Path
    contract: Contract
    limits: Limits


def hardware_folder() -> Path:
    """The shipped robots: inside the installed package, or beside it in a source checkout."""
    package = Path(robopolicy.__file__).parent
    return package / "hardware" if (package / "hardware").is_dir() else package.parent / "hardware"


def shipped_robots() -> list[str]:
    """Names of the shipped robots, the template not among them."""
    return sorted(file.parent.name for file in hardware_folder().glob(f"*/{CONTRACT}") if file.parent.name != TEMPLATE)


def robot_folder(robot: str) -> Path:
    """Find a robot's folder.

    Args:
        robot: name of a shipped robot, or path of a folder with a ``contract.yaml``.

    Raises:
        UserError: neither.
    """
    for folder in (Path(robot), hardware_folder() / robot):
        if (folder / CONTRACT).is_file():
            return folder
    if Path(robot).is_dir():
        raise UserError(f"{robot} holds no {CONTRACT}. Make one with: robopolicy hardware new NAME")
    raise UserError(
        f"There is no robot '{robot}'.{did_you_mean(robot, shipped_robots())} "
        f"Wanted one of these, or a folder with {CONTRACT} and {SAFETY}."
    )


def read_robot(robot: str) -> Robot:
    """Read a robot's contract and limits.

    Raises:
        UserError: there is no such robot, or one of its files is not valid.
    """
    folder = robot_folder(robot)
    contract = read_contract(folder)
    return Robot(folder, contract, read_limits(folder, contract))


def copy_robot(name: Path, source: str) -> Path:
    """Start a robot of one's own from a shipped one.

    Args:
        name: the new folder.
        source: name or path of the robot that is copied.

    Raises:
        UserError: ``name`` exists, or ``source`` is no robot.
    """
    if name.exists():
        raise UserError(f"{name} is there already. Choose another name, or remove it.")
    folder = robot_folder(source)
    name.mkdir(parents=True)
    for file in (CONTRACT, SAFETY, GUIDE):
        if (folder / file).is_file():
            shutil.copyfile(folder / file, name / file)
    contract = name / CONTRACT
    lines = contract.read_text().splitlines(keepends=True)
    named = [f"robot: {name.name}\n" if line.startswith("robot:") else line for line in lines]
    contract.write_text("".join(named))
    return name
