"""What `robopolicy hardware check` finds without a robot: the shipped files are right, broken ones are named."""

from __future__ import annotations

import argparse
import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from safetensors.numpy import save_file

from robopolicy.cli import hardware
from robopolicy.errors import UserError
from robopolicy.manifest import file_sha256
from robopolicy.runtime.check import Finding, check_bundle, check_robot, failed
from robopolicy.runtime.contract import read_contract
from robopolicy.runtime.kinematics import forward
from robopolicy.runtime.robots import (
    Robot,
    copy_robot,
    hardware_folder,
    read_robot,
    robot_folder,
    shipped_robots,
)
from robopolicy.spec import KeySpec, PolicySpec

ALL = [*shipped_robots(), "template"]


@pytest.fixture(params=ALL)
def robot(request: pytest.FixtureRequest) -> Robot:
    return read_robot(request.param)


@pytest.fixture
def ur5e() -> Robot:
    return read_robot("ur5e")


def levels(findings: list[Finding]) -> dict[str, str]:
    return {finding.check: finding.level for finding in findings}


def only(findings: list[Finding], level: str) -> str:
    return "\n".join(f"{f.check}: {f.message} {f.advice}" for f in findings if f.level == level)


def write_policy(folder: Path, robot: Robot, low: np.ndarray, high: np.ndarray, **changes: Any) -> Path:
    """A bundle as `robopolicy train` writes it, as far as it can be read without building the network."""
    keys = ("observation.state", *(key for key in robot.contract.observations if ".image." in key))
    spec = PolicySpec(
        observations=tuple(replace(robot.contract.observation_specs[key], source="", unit="") for key in keys),
        action=replace(robot.contract.action_spec, unit=""),
        fps=robot.contract.policy_rate,
    )
    spec = replace(spec, **changes)
    folder.mkdir()
    save_file({"weight": np.zeros(1, np.float32)}, folder / "model.safetensors")
    tensors = {"action.low": low, "action.high": high, "action.scale": low * 0 + 1, "action.offset": low * 0}
    save_file({name: np.asarray(v, np.float32) for name, v in tensors.items()}, folder / "normalizer.safetensors")
    files = {name: file_sha256(folder / name) for name in ("model.safetensors", "normalizer.safetensors")}
    content = {"format_version": 2, "kind": "policy", "architecture": {}, "task": {}, "provenance": {}, "files": files}
    plain = yaml.safe_load(re.sub("!!python/tuple", "", yaml.dump(spec.to_dict())))
    (folder / "bundle.yaml").write_text(yaml.safe_dump(content | {"spec": plain}))
    return folder


def inner_range(robot: Robot) -> tuple[np.ndarray, np.ndarray]:
    """Actions that lie well inside the limits."""
    axes = [robot.limits.axes[name] for name in robot.contract.action.names]
    middle = np.array([(axis.lower + axis.upper) / 2 for axis in axes])
    spread = np.array([(axis.upper - axis.lower) / 4 for axis in axes])
    return middle - spread, middle + spread


def test_every_shipped_robot_has_a_guide_and_passes(robot: Robot) -> None:
    findings = check_robot(robot.contract, robot.limits)
    assert not failed(findings), only(findings, "FAIL")
    assert (robot.folder / "README.md").stat().st_size > 1000
    assert robot.limits.source and robot.limits.notes


def test_template_numbers_are_pointed_out() -> None:
    robot = read_robot("template")
    assert "invented" in only(check_robot(robot.contract, robot.limits), "WARN")


def test_the_limits_are_a_part_of_what_the_makers_allow() -> None:
    fastest = {"fr3": (2.62,) * 4 + (5.26, 4.18, 5.26), "ur5e": (math.pi,) * 6, "so101": (4.71,) * 5}
    for name, vendor in fastest.items():
        robot = read_robot(name)
        for joint, velocity in zip(robot.contract.joints, vendor, strict=True):
            assert 0.25 <= robot.limits.axes[joint].velocity / velocity <= 0.5


def test_braking_keeps_the_fr3_below_its_velocity_limits_near_the_ends() -> None:
    """The FR3 allows sqrt(c d) - b at a distance d from a joint's (harder) end."""
    limits = read_robot("fr3").limits
    curves = {
        "fr3_joint1": (0.30, 12.0, 2.7501),
        "fr3_joint2": (0.20, 5.17, 1.7918),
        "fr3_joint3": (0.20, 7.0, 2.9065),
        "fr3_joint5": (0.35, 34.0, 2.8101),
        "fr3_joint6": (0.35, 11.0, 4.5205),
        "fr3_joint7": (0.35, 34.0, 3.0196),
    }
    for joint, (b, c, end) in curves.items():
        axis = limits.axes[joint]
        q = np.linspace(0.0, axis.upper - axis.margin, 2000)
        ours = np.minimum(axis.velocity, np.sqrt(2 * axis.acceleration * (axis.upper - axis.margin - q)))
        assert (ours <= np.sqrt(c * (end - q)) - b).all(), joint


@pytest.mark.parametrize(
    ("name", "arm", "site", "drop"),
    [("fr3", "panda", "tcp", 0.0), ("ur5e", "ur5e", "flange", 0.163), ("so101", "so101", "tcp", 0.0)],
)
def test_kinematics_agree_with_the_simulated_arm(name: str, arm: str, site: str, drop: float) -> None:
    """FR3 and Panda share their Denavit-Hartenberg parameters."""
    pytest.importorskip("robopolicy_sim", reason="the simulation is not installed: pip install 'robopolicy[sim]'")
    import mujoco

    from robopolicy_sim.arms.arm import arm_spec, find_arm

    model = arm_spec(find_arm(arm)).compile()
    data = mujoco.MjData(model)
    kinematics = read_robot(name).limits.kinematics
    assert kinematics is not None
    joints = [model.joint(joint).qposadr[0] for joint in find_arm(arm).joints]
    base = np.array([0.0, 0.0, 0.1]) if arm == "so101" else np.zeros(3)  # the simulated one stands on a plinth
    rng = np.random.default_rng(0)
    for _ in range(50):
        q = rng.uniform(-1.5, 1.5, len(joints))
        data.qpos[joints] = q
        mujoco.mj_kinematics(model, data)
        position, rotation = forward(kinematics, q)
        found, matrix = data.site(site).xpos - base, data.site(site).xmat.reshape(3, 3)
        assert position - drop * rotation[:, 2] == pytest.approx(found, abs=1e-6)
        assert rotation == pytest.approx(matrix, abs=1e-6)


@pytest.mark.parametrize(
    ("name", "home"),
    [
        ("fr3", (0.0, -math.pi / 4, 0.0, -3 * math.pi / 4, 0.0, math.pi / 2, math.pi / 4)),
        ("ur5e", (0.0, -math.pi / 2, math.pi / 2, -math.pi / 2, -math.pi / 2, 0.0)),
        ("so101", (0.0, -0.28, 0.78, 1.07, 0.05)),
    ],
)
def test_the_start_posture_of_the_guide_lies_inside(name: str, home: tuple[float, ...]) -> None:
    from robopolicy.runtime.graph_check import check_posture
    from robopolicy.runtime.samples import Joints

    robot = read_robot(name)
    findings = check_posture(robot.contract, robot.limits, Joints(robot.contract.joints, np.array(home)))
    assert levels(findings) == {"posture": "OK", "workspace now": "OK"}, only(findings, "FAIL")


# Robots that are wrong in themselves.


def test_missing_limit_is_named(tmp_path: Path) -> None:
    folder = copy_robot(tmp_path / "arm", "ur5e")
    file = folder / "safety.yaml"
    file.write_text(re.sub(r"\n  elbow_joint:.*", "", file.read_text()))
    with pytest.raises(UserError, match="elbow_joint of the contract's action.names have no limits"):
        read_robot(str(folder))


def test_box_in_millimetres_is_out_of_reach(ur5e: Robot) -> None:
    assert ur5e.limits.workspace is not None
    box = replace(ur5e.limits.workspace, x=(200.0, 800.0))
    findings = check_robot(ur5e.contract, replace(ur5e.limits, workspace=box))
    assert "no posture reaches the box" in only(findings, "FAIL")


def test_limits_in_degrees(ur5e: Robot) -> None:
    axis = replace(ur5e.limits.axes["elbow_joint"], lower=-180.0, upper=180.0)
    limits = replace(ur5e.limits, axes=ur5e.limits.axes | {"elbow_joint": axis})
    assert "Degrees?" in only(check_robot(ur5e.contract, limits), "FAIL")


def test_stream_that_is_stale_after_one_message(ur5e: Robot) -> None:
    streams = ur5e.contract.streams | {"joints": replace(ur5e.contract.streams["joints"], stale_after=0.002)}
    findings = check_robot(replace(ur5e.contract, streams=streams), ur5e.limits)
    assert "stream joints" in only(findings, "FAIL")


# Policies of this and of other robots.


def test_its_own_policy_fits(robot: Robot, tmp_path: Path) -> None:
    bundle = write_policy(tmp_path / "bundle", robot, *inner_range(robot))
    findings = check_bundle(robot.contract, robot.limits, bundle)
    assert not failed(findings), only(findings, "FAIL")
    assert levels(findings) == dict.fromkeys(("keys", "rate", "open loop", "action range"), "OK")


def test_order_of_joints_in_the_limits_does_not_matter(ur5e: Robot, tmp_path: Path) -> None:
    shuffled = replace(ur5e.limits, axes=dict(reversed(ur5e.limits.axes.items())))
    bundle = write_policy(tmp_path / "bundle", ur5e, *inner_range(ur5e))
    assert not failed(check_bundle(ur5e.contract, shuffled, bundle))


def test_policy_that_was_trained_on_degrees(ur5e: Robot, tmp_path: Path) -> None:
    low, high = inner_range(ur5e)
    bundle = write_policy(tmp_path / "bundle", ur5e, np.degrees(low), np.degrees(high))
    text = only(check_bundle(ur5e.contract, ur5e.limits, bundle), "FAIL")
    assert "action shoulder_pan_joint" in text
    assert "Degrees?" in text


def test_unit_of_the_action_is_compared(ur5e: Robot, tmp_path: Path) -> None:
    bundle = write_policy(
        tmp_path / "bundle", ur5e, *inner_range(ur5e), action=KeySpec("action", (7,), "action", unit="deg")
    )
    assert "found unit 'rad', wanted 'deg'" in only(check_bundle(ur5e.contract, ur5e.limits, bundle), "FAIL")


def test_policy_of_another_robot(ur5e: Robot, tmp_path: Path) -> None:
    fr3 = read_robot("fr3")
    bundle = write_policy(tmp_path / "bundle", fr3, *inner_range(fr3))
    text = only(check_bundle(ur5e.contract, ur5e.limits, bundle), "FAIL")
    assert "observation.state: found shape (7,), wanted (8,)" in text
    assert "action: action: found shape (7,), wanted (8,)" in text


def test_policy_of_a_robot_of_the_same_size(tmp_path: Path) -> None:
    """Shapes alone would let it through."""
    robot = read_robot("fr3")
    low, high = inner_range(robot)
    low[3], high[3] = 0.4, 1.5  # the FR3's fourth joint is never positive
    bundle = write_policy(tmp_path / "bundle", robot, low, high)
    text = only(check_bundle(robot.contract, robot.limits, bundle), "FAIL")
    assert "action fr3_joint4: trained on 0.4 to 1.5" in text
    assert "another robot" in text


def test_policy_of_another_rate(ur5e: Robot, tmp_path: Path) -> None:
    bundle = write_policy(tmp_path / "bundle", ur5e, *inner_range(ur5e), fps=10.0)
    assert "acts at 10 Hz, the contract's policy_rate is 20" in only(
        check_bundle(ur5e.contract, ur5e.limits, bundle), "FAIL"
    )


def test_policy_that_wants_a_camera_that_is_not_there(ur5e: Robot, tmp_path: Path) -> None:
    keys = (KeySpec("observation.image.wirst", (240, 320, 3), "image"),)
    bundle = write_policy(tmp_path / "bundle", ur5e, *inner_range(ur5e), observations=keys)
    text = only(check_bundle(ur5e.contract, ur5e.limits, bundle), "FAIL")
    assert "Did you mean 'observation.image.wrist'?" in text


def test_actions_in_the_margin_are_a_warning(ur5e: Robot, tmp_path: Path) -> None:
    low, high = inner_range(ur5e)
    high[2] = ur5e.limits.axes["elbow_joint"].upper - 0.01
    findings = check_bundle(ur5e.contract, ur5e.limits, write_policy(tmp_path / "bundle", ur5e, low, high))
    assert not failed(findings)
    assert "action elbow_joint" in only(findings, "WARN")


def test_long_execution_is_a_warning(ur5e: Robot, tmp_path: Path) -> None:
    bundle = write_policy(tmp_path / "bundle", ur5e, *inner_range(ur5e), horizon=32, n_action_steps=16)
    assert "open loop" in only(check_bundle(ur5e.contract, ur5e.limits, bundle), "WARN")


def test_several_domains_are_checked_together(ur5e: Robot, tmp_path: Path) -> None:
    low, high = inner_range(ur5e)
    good = write_policy(tmp_path / "good", ur5e, np.stack([low, low]), np.stack([high, high]))
    bad = write_policy(tmp_path / "bad", ur5e, np.stack([low, low]), np.stack([high, 60 * high]))
    assert not failed(check_bundle(ur5e.contract, ur5e.limits, good))
    assert failed(check_bundle(ur5e.contract, ur5e.limits, bad))


def test_damaged_bundle(ur5e: Robot, tmp_path: Path) -> None:
    bundle = write_policy(tmp_path / "bundle", ur5e, *inner_range(ur5e))
    with (bundle / "normalizer.safetensors").open("ab") as file:
        file.write(b"x")
    assert "truncated or changed" in only(check_bundle(ur5e.contract, ur5e.limits, bundle), "FAIL")


# Folders and the command line.


def run(*words: str) -> int:
    parser = argparse.ArgumentParser()
    hardware.add_parser(parser.add_subparsers())
    args = parser.parse_args(["hardware", *words])
    return int(args.run(args))


def test_unknown_robot_gets_a_suggestion() -> None:
    with pytest.raises(UserError, match="Did you mean 'ur5e'"):
        robot_folder("ur5")


def test_folder_without_contract(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds no contract.yaml"):
        robot_folder(str(tmp_path))


def test_new_robot_is_a_named_copy(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("new", str(tmp_path / "lab_arm"), "--from", "ur5e") == 0
    assert read_contract(tmp_path / "lab_arm").robot == "lab_arm"
    assert read_robot(str(tmp_path / "lab_arm")).limits == read_robot("ur5e").limits
    assert "robopolicy hardware check" in capsys.readouterr().out
    with pytest.raises(UserError, match="is there already"):
        run("new", str(tmp_path / "lab_arm"))


def test_list_names_every_robot(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("list") == 0
    out = capsys.readouterr().out
    assert [line.split()[0] for line in out.splitlines()[:3]] == ["fr3", "so101", "ur5e"]
    assert str(hardware_folder() / "ur5e" / "README.md") in out


def test_check_prints_a_line_for_each_check(ur5e: Robot, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("check", "ur5e") == 0
    good = write_policy(tmp_path / "good", ur5e, *inner_range(ur5e))
    assert run("check", "ur5e", "--bundle", str(good)) == 0
    assert "OK    action range" in capsys.readouterr().out
    bad = write_policy(tmp_path / "bad", ur5e, *inner_range(ur5e), fps=7.0)
    assert run("check", "ur5e", "--bundle", str(bad)) == 2
    out = capsys.readouterr().out
    assert re.search(r"^FAIL  rate .*7 Hz", out, re.MULTILINE)
    assert "-> At another rate" in out


def test_seconds_must_be_positive() -> None:
    with pytest.raises(UserError, match="--seconds"):
        run("check", "ur5e", "--live", "--seconds", "0")


def test_check_without_ros_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "rclpy", None)
    monkeypatch.delitem(sys.modules, "robopolicy_ros.live_check", raising=False)
    with pytest.raises(UserError, match=r"pip install 'robopolicy\[ros\]'"):
        run("check", "ur5e", "--live")
