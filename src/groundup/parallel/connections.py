"""What ranks are connected by: an interface that is there, and connections that notice when nothing comes through any more,
since a machine without power says no goodbye."""

import os
import socket
import sys
from collections.abc import Mapping
from pathlib import Path

from groundup.base.errors import DistributedError

INTERFACES = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")
FIRST_LOOK_SECONDS, NEXT_LOOK_SECONDS, NUM_LOOKS = 30, 10, 9
"""When a connection on which nothing is under way is looked at, how often, and how many looks without an answer end it. What
is under way is sent again for a quarter of an hour, by the kernel's own count. A network that is away for less long costs
time alone, and no bit is another."""


def missing_interfaces(environment: Mapping[str, str] = os.environ) -> list[str]:
    """Variables that name an interface which this machine does not have."""
    here = [name for _, name in socket.if_nameindex()]
    asked = {name: environment[name] for name in INTERFACES if environment.get(name)}
    return [name for name, value in asked.items() if not any(_is_meant(one, value) for one in here)]


def _is_meant(interface: str, wanted: str) -> bool:
    """NCCL's way to name interfaces: several by commas, `=` before an exact name, `^` before those that are not meant."""
    if wanted.startswith("^"):
        return interface not in wanted[1:].split(",")
    return any(interface.startswith(name.removeprefix("=")) for name in wanted.split(","))


def no_interface(rank: int, host: str, name: str, value: str) -> DistributedError:
    """A rank whose machine lacks what a variable names."""
    return DistributedError(
        "E-NET-INTERFACE",
        what=f"rank {rank} (on {host}) has no interface {name}={value}",
        next="name one that `ip link` shows there, or unset the variable",
    )


def watch_connections() -> None:
    """Let every connection of this process on which nothing is under way fail once its other end does not answer any more.

    The other end's kernel answers, also for a process that is stopped or computes for a day. (TCP_USER_TIMEOUT, which would hurry
    what is under way too, ends connections to a process that is only slow to read.) The libraries that connect ranks wait
    for ever and give no handle to their sockets; those are found among what this process has open. On Linux alone.
    """
    if sys.platform != "linux":
        return
    for place in Path("/proc/self/fd").iterdir():
        try:
            if not str(place.readlink()).startswith("socket:"):
                continue
            connection = socket.socket(fileno=os.dup(int(place.name)))
        except OSError:  # closed since
            continue
        with connection:
            if connection.family in (socket.AF_INET, socket.AF_INET6) and connection.type == socket.SOCK_STREAM:
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
                connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, FIRST_LOOK_SECONDS)
                connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, NEXT_LOOK_SECONDS)
                connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, NUM_LOOKS)
