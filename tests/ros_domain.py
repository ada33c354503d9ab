"""A ROS domain of one's own for every test process, on this machine only."""

from __future__ import annotations

import fcntl
import os
import socket
import tempfile
from functools import cache
from pathlib import Path

PROFILE = Path(__file__).resolve().parents[1] / "ros_ws" / "src" / "robopolicy_ros" / "config" / "fastdds.xml"
_DOMAINS = range(1, 102)  # above, Linux's ephemeral ports begin
_PARTICIPANTS = 10  # of a domain whose ports are looked at


@cache
def own_domain() -> int:
    """A domain that no other process on this machine uses; it is this one's until it ends."""
    first = os.getpid() % len(_DOMAINS)
    for domain in (*_DOMAINS[first:], *_DOMAINS[:first]):
        if _locked(domain) and not any(map(_taken, _ports(domain))):
            return domain
    raise AssertionError(f"Every ROS domain from {_DOMAINS[0]} to {_DOMAINS[-1]} is in use.")


def domain_environment() -> dict[str, str]:
    """Variables for this process and those that it starts."""
    return {
        "ROS_DOMAIN_ID": str(own_domain()),
        "ROS_AUTOMATIC_DISCOVERY_RANGE": "LOCALHOST",
        "FASTDDS_DEFAULT_PROFILES_FILE": str(PROFILE),
    }


def _locked(domain: int) -> bool:
    """Lock a file until this process ends, which no two workers of pytest can."""
    file = os.open(Path(tempfile.gettempdir()) / f"ros_domain_{domain}_{os.getuid()}.lock", os.O_RDWR | os.O_CREAT)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(file)
        return False
    return True


def _ports(domain: int) -> list[int]:
    """On which the participants of a domain listen (DDSI-RTPS 2.5, 9.6.2.3)."""
    return [7400 + 250 * domain + 10 + 2 * participant for participant in range(_PARTICIPANTS)]


def _taken(port: int) -> bool:
    """Whether somebody listens there who takes no part in the locks."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.bind(("", port))
        except OSError:
            return True
    return False
