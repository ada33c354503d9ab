"""The policy node's command loop while it infers and two cameras stream: periods, missed cycles, latency by stage.

    python benchmarks/ros_timing.py [--seconds 300] [--bundle RUN/bundles/best --robot FOLDER] [--delays 0 0.3]

The robot is a process of its own that publishes joint states at 100 Hz and two raw 640x480 images at 30 Hz, so that the
node deserialises about 55 MB/s. Without a bundle an untrained image policy is made and exported. ``--delays`` lists
seconds by which inference is made slower; the command loop should not notice. The last column compares the loop with
a peer that infers in a thread of the same process (same engine, same period, no images), measured in the same run.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np

REPOSITORY = Path(__file__).resolve().parent.parent
PACKAGE = REPOSITORY / "ros_ws" / "src" / "robopolicy_ros"
os.environ.setdefault("ROS_AUTOMATIC_DISCOVERY_RANGE", "LOCALHOST")
os.environ.setdefault("ROS_DOMAIN_ID", str(1 + os.getpid() % 100))
os.environ.setdefault("FASTDDS_DEFAULT_PROFILES_FILE", str(PACKAGE / "config" / "fastdds.xml"))

CONTRACT = """
robot: timing
policy_rate: 10
command_rate: 100
joints: [j1, j2, j3, j4, j5, j6]
measured: joints
streams:
  joints: {topic: joint_states, type: sensor_msgs/msg/JointState, rate: 100, stale_after: 0.3}
  left: {topic: left/image_raw, type: sensor_msgs/msg/Image, rate: 30, stale_after: 0.5, size: [480, 640], depth: 1}
  right: {topic: right/image_raw, type: sensor_msgs/msg/Image, rate: 30, stale_after: 0.5, size: [480, 640], depth: 1}
observations:
  observation.state:
    parts: [{stream: joints, align: interpolate, field: position, names: [j1, j2, j3, j4, j5, j6]}]
  observation.image.left: {parts: [{stream: left, align: nearest, resize: [48, 64]}]}
  observation.image.right: {parts: [{stream: right, align: nearest, resize: [48, 64]}]}
action: {names: [j1, j2, j3, j4, j5, j6], unit: rad}
commands:
  arm:
    topic: commands
    type: sensor_msgs/msg/JointState
    entries: [0, 1, 2, 3, 4, 5]
    names: [j1, j2, j3, j4, j5, j6]
"""
AXIS = {"lower": -2.5, "upper": 2.5, "velocity": 1.0, "acceleration": 5.0, "jerk": 200.0}


def make_robot(folder: Path) -> Path:
    """The robot's folder: limits are wide, as nothing moves."""
    import yaml

    folder.mkdir()
    (folder / "contract.yaml").write_text(CONTRACT)
    limits = {"source": "made up for this benchmark", "axes": {f"j{i}": AXIS for i in range(1, 7)}}
    limits |= {"max_chunk_age": 1.2, "max_open_loop": 1.2, "max_tracking_error": 0.5, "max_start_jump": 0.5}
    (folder / "safety.yaml").write_text(yaml.safe_dump(limits))
    return folder


def make_bundle(path: Path) -> Path:
    """An untrained policy with two cameras, as an ONNX Runtime engine."""
    import torch

    from robopolicy.data.normalize import Normalizer, fit_normalizer
    from robopolicy.export.build import ExportConfig, build_engine
    from robopolicy.export.observations import find_observations
    from robopolicy.policies.bundle import load_bundle, save_bundle
    from robopolicy.policies.registry import build_policy
    from robopolicy.spec import KeySpec, PolicySpec

    torch.manual_seed(0)
    images = tuple(KeySpec(f"observation.image.{side}", (48, 64, 3), role="image") for side in ("left", "right"))
    state, action = KeySpec("observation.state", (6,)), KeySpec("action", (6,), role="action", unit="rad")
    spec = PolicySpec((state, *images), action, 10, 2, 16, 6)
    ranges = {"observation.state": np.ones(6), "action": np.full(6, 0.05)}
    parts = {key: fit_normalizer(np.stack([-high, high]), "minmax") for key, high in ranges.items()}
    process = {"process": {"name": "flow"}, "sampler": {"name": "euler", "steps": 5}}
    save_bundle(build_policy("diffusion_mlp", process, spec, Normalizer.from_parts(parts)).eval(), path)
    policy, about = load_bundle(path)
    config = ExportConfig(exporter="torchscript", observations=4, backend="onnxruntime")
    build_engine(policy, about, path, config, find_observations(policy, about, 8), "robopolicy export")
    return path


def publish_robot() -> None:
    """The robot's process."""
    import rclpy
    from rclpy.executors import ExternalShutdownException, SingleThreadedExecutor
    from rclpy.qos import QoSProfile, ReliabilityPolicy
    from sensor_msgs.msg import Image, JointState

    from robopolicy_ros.messages import image_message

    rclpy.init()
    node = rclpy.create_node("robot")
    best = QoSProfile(depth=1, reliability=ReliabilityPolicy.BEST_EFFORT)
    message = image_message(np.random.default_rng(0).integers(0, 256, (480, 640, 3), np.uint8))
    states = node.create_publisher(JointState, "joint_states", 10)
    cameras = [node.create_publisher(Image, f"{side}/image_raw", best) for side in ("left", "right")]
    where = {f"j{i}": 0.0 for i in range(1, 7)}
    node.create_subscription(JointState, "commands", lambda m: where.update(zip(m.name, m.position, strict=True)), 10)

    def state() -> None:
        said = JointState(name=list(where), position=list(where.values()))
        said.header.stamp = node.get_clock().now().to_msg()
        states.publish(said)

    def image() -> None:
        message.header.stamp = node.get_clock().now().to_msg()
        for camera in cameras:
            camera.publish(message)

    node.create_timer(0.01, state)
    node.create_timer(1 / 30, image)
    executor = SingleThreadedExecutor()
    executor.add_node(node)
    with contextlib.suppress(ExternalShutdownException):
        executor.spin()


def measure(robot: Path, bundle: Path, delay: float, seconds: float) -> dict[str, dict[str, str]]:
    """The node's own diagnostics after some seconds of driving, by part."""
    import rclpy
    from diagnostic_msgs.msg import DiagnosticArray
    from std_srvs.srv import Trigger

    given = {"robot": robot, "bundle": bundle, "extra_delay": delay, "auto_activate": "true"}
    words = [word for name, value in given.items() for word in ("-p", f"{name}:={value}")]
    processes = [
        subprocess.Popen([sys.executable, __file__, "--robot-process"]),
        subprocess.Popen([sys.executable, "-m", "robopolicy_ros.policy_node", "--ros-args", *words]),
    ]
    rclpy.init()
    node = rclpy.create_node("timing")
    found: dict[str, dict[str, str]] = {}

    def hear(message: DiagnosticArray) -> None:
        for status in message.status:
            found[status.name.split(": ")[1]] = {pair.key: pair.value for pair in status.values} | {"": status.message}

    node.create_subscription(DiagnosticArray, "/diagnostics", hear, 10)
    client = node.create_client(Trigger, "/policy/start")
    try:
        deadline = time.monotonic() + 60
        while True:
            answer = client.call_async(Trigger.Request())
            rclpy.spin_until_future_complete(node, answer, timeout_sec=2)
            if answer.done() and answer.result().success:
                break
            if time.monotonic() > deadline:
                raise SystemExit(f"The policy does not start: {answer.result() if answer.done() else 'no answer'}")
            time.sleep(0.2)
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            rclpy.spin_once(node, timeout_sec=0.5)
    finally:
        for process in reversed(processes):
            process.terminate()
            process.wait(20)
        node.destroy_node()
        rclpy.shutdown()
    return found


def peer_periods(bundle: Path, seconds: float) -> np.ndarray:
    """Periods [ms] of a 100 Hz loop beside a thread that infers all the time in the same process."""
    from robopolicy.export.open import open_policy

    policy = open_policy(bundle, threads=1)
    rng = np.random.default_rng(0)
    blank = {
        key.key: np.zeros((1, policy.spec.n_obs_steps, *key.shape), np.uint8 if key.role == "image" else np.float32)
        for key in policy.spec.observations
    }
    ending = threading.Event()

    def infer() -> None:
        while not ending.is_set():
            policy.sample(blank, policy.draw_noise(1, rng))

    thread = threading.Thread(target=infer)
    thread.start()
    times, following, end = [], time.monotonic(), time.monotonic() + seconds
    while time.monotonic() < end:
        following += 0.01
        time.sleep(max(0.0, following - time.monotonic()))
        times.append(time.monotonic())
    ending.set()
    thread.join()
    return 1e3 * np.diff(times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=300)
    parser.add_argument("--delays", type=float, nargs="+", default=[0.0, 0.3])
    parser.add_argument("--robot", type=Path)
    parser.add_argument("--bundle", type=Path)
    parser.add_argument("--robot-process", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.robot_process:
        return publish_robot()
    with tempfile.TemporaryDirectory() as temporary:
        robot = given.robot or make_robot(Path(temporary) / "robot")
        bundle = given.bundle or make_bundle(Path(temporary) / "bundle")
        for delay in given.delays:
            found = measure(robot, bundle, delay, given.seconds)
            print(f"\ninference + {delay:g} s: {found['state']['']}")
            loop, policy, streams = found["command loop"], found["policy"], found["streams"]
            for part in (loop, policy, {key: value for key, value in streams.items() if key.endswith("gaps")}):
                for name, value in part.items():
                    if name:
                        print(f"  {name:34} {value}")
            print(json.dumps({"delay": delay, **loop, **policy}))
        periods = peer_periods(bundle, min(given.seconds, 30))
        worst = " ".join(f"{value:.2f}" for value in (*np.percentile(periods, [50, 99]), periods.max()))
        print(f"\npeer: inference in a thread\n  {'loop period p50 p99 max [ms]':34} {worst}")


if __name__ == "__main__":
    main()
