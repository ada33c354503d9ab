"""Robot and policy on two machines with a cable between them, that is pulled: ``unshare -rn python -m`` this module.

The machines are network namespaces, so that nothing outside sees the cable. Prints what was found as JSON.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

from tests.ros.process import until
from tests.ros.world import World

DOMAIN = 1  # nobody else is in these networks
HEARTBEAT = 3.5  # s in which a reliable writer of Fast DDS sends again what was lost
OUTAGE = 4.0  # s; for up to three the kernel itself keeps packets while it asks for the other's address
TRANSPORT = {
    "ROS_DOMAIN_ID": str(DOMAIN),
    "ROS_AUTOMATIC_DISCOVERY_RANGE": "SUBNET",
    "FASTDDS_BUILTIN_TRANSPORTS": "UDPv4",  # shared memory would need no cable
}


class Cable:
    """Between this namespace and one that it makes."""

    def __init__(self) -> None:
        self._other = subprocess.Popen(["unshare", "-n", "sleep", "600"])
        until(lambda: os.readlink(f"/proc/{self._other.pid}/ns/net") != os.readlink("/proc/self/ns/net"))
        self.within = ("nsenter", "-t", str(self._other.pid), "-n")
        run("ip", "link", "add", "robot0", "type", "veth", "peer", "name", "policy0", "netns", str(self._other.pid))
        run("ip", "address", "add", "10.77.0.1/24", "dev", "robot0")
        run(*self.within, "ip", "address", "add", "10.77.0.2/24", "dev", "policy0")
        for machine, end in (((), "robot0"), (self.within, "policy0")):
            for device in ("lo", end):
                run(*machine, "ip", "link", "set", device, "up")
            run(*machine, "ip", "route", "add", "224.0.0.0/4", "dev", end)

    def pull(self) -> None:
        run("ip", "link", "set", "robot0", "down")

    def plug(self) -> None:
        run("ip", "link", "set", "robot0", "up")
        run("ip", "route", "add", "224.0.0.0/4", "dev", "robot0")

    def close(self) -> None:
        self._other.kill()
        self._other.wait()


def run(*command: str) -> None:
    subprocess.run(command, check=True)


def pulled(world: World, cable: Cable) -> dict[str, object]:
    """What happens when the cable is pulled while the policy drives, and plugged in again."""
    policy = world.start_policy()
    world.run()
    cable.pull()
    until(lambda: policy.said("is silent"), what="the policy node's fault")
    until(world.at_rest, what="the arm at rest")
    time.sleep(OUTAGE)
    received, posture = len(world.robot.trajectories), world.robot.posture()
    state = world.client.state
    cable.plug()
    world.client.until_state("fault")
    refused = not world.client.call("start").success
    time.sleep(HEARTBEAT)
    late = len(world.robot.trajectories) - received
    moved = float(np.abs(world.robot.posture() - posture).max())
    world.run()
    found = {"before": state, "after": world.client.state, "refused": refused, "late": late, "moved": moved}
    return found | {"violations": world.violations()}


def main() -> None:
    os.environ |= TRANSPORT
    os.environ.pop("FASTDDS_DEFAULT_PROFILES_FILE", None)
    bundle, folder = map(Path, sys.argv[1:])
    cable = Cable()
    try:
        world = World(DOMAIN, folder, bundle, cable.within)
        try:
            print(json.dumps(pulled(world, cable)))
        finally:
            world.close()
    finally:
        cable.close()


if __name__ == "__main__":
    main()
