"""Memory of the policy node and of its inference process over a long run: flat, or not.

    python benchmarks/ros_soak.py [--minutes 60] [--every 30]

The load is that of ``ros_timing.py``: joint states at 100 Hz, two raw 640x480 cameras at 30 Hz, inference all the time.
Every ``--every`` seconds one line is printed; at the end the slope of a line fitted to the second half, in MB an hour,
and whether it stays below one per cent of the memory an hour.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import psutil
from ros_timing import make_bundle, make_robot


def main() -> int:
    import rclpy
    from std_srvs.srv import Trigger

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--every", type=float, default=30)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        robot, bundle = make_robot(Path(temporary) / "robot"), make_bundle(Path(temporary) / "bundle")
        words = ["--ros-args", "-p", f"robot:={robot}", "-p", f"bundle:={bundle}"]
        script = Path(__file__).with_name("ros_timing.py")
        processes = [
            subprocess.Popen([sys.executable, str(script), "--robot-process"]),
            subprocess.Popen([sys.executable, "-m", "robopolicy_ros.policy_node", *words]),
        ]
        rclpy.init()
        node = rclpy.create_node("soak")
        client = node.create_client(Trigger, "/policy/start")

        def start() -> bool:
            answer = client.call_async(Trigger.Request())
            rclpy.spin_until_future_complete(node, answer, timeout_sec=2)
            return bool(answer.done() and answer.result().success)

        try:
            deadline = time.monotonic() + 60
            while not start():
                if time.monotonic() > deadline:
                    raise SystemExit("The policy does not start.")
                time.sleep(0.2)
            rows = sample(processes[1].pid, 60 * given.minutes, given.every)
        finally:
            for process in reversed(processes):
                process.terminate()
                process.wait(20)
            node.destroy_node()
            rclpy.shutdown()
    return judge(rows)


def sample(pid: int, seconds: float, every: float) -> np.ndarray:
    """(n, 3): hours, and MB of the node and of its inference process."""
    node = psutil.Process(pid)
    (worker,) = node.children()
    began, rows = time.monotonic(), []
    while (passed := time.monotonic() - began) < seconds:
        rows.append((passed / 3600, node.memory_info().rss / 1e6, worker.memory_info().rss / 1e6))
        print(f"{passed / 60:7.1f} min   node {rows[-1][1]:7.1f} MB   inference {rows[-1][2]:7.1f} MB", flush=True)
        time.sleep(every)
    return np.array(rows)


def judge(rows: np.ndarray) -> int:
    """Print the growth; the exit code is 1 where it is more than one per cent an hour."""
    late = rows[len(rows) // 2 :]
    if len(late) < 3:
        raise SystemExit("Too few samples; run longer, or set a smaller --every.")
    worst = 0.0
    for name, column in (("node", 1), ("inference", 2)):
        slope = float(np.polyfit(late[:, 0], late[:, column], 1)[0])
        worst = max(worst, slope / late[:, column].mean())
        print(f"{name}: {slope:+.2f} MB an hour, at {late[-1, column]:.1f} MB")
    print("flat" if worst < 0.01 else "growing")
    return int(worst >= 0.01)


if __name__ == "__main__":
    sys.exit(main())
