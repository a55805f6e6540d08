"""The network between processes of this machine, made worse: packets that do not arrive, connections that are cut."""

import contextlib
import ctypes
import os
import socket
import struct
from pathlib import Path

import pytest

PIDFD_GETFD = 438
ATTACH_FILTER, DETACH_FILTER = 26, 27
_libc = ctypes.CDLL(None, use_errno=True)


@contextlib.contextmanager
def connections_of(pid):
    """The TCP connections that a process has, as sockets of this one; what is done to them is done to the process's."""
    with contextlib.ExitStack() as stack:
        process = os.pidfd_open(pid)
        stack.callback(os.close, process)
        found = []
        for place in Path(f"/proc/{pid}/fd").iterdir():
            if not str(place.readlink()).startswith("socket:"):
                continue
            descriptor = _libc.syscall(PIDFD_GETFD, process, int(place.name), 0)
            if descriptor < 0:
                pytest.skip(f"sockets of another process: {os.strerror(ctypes.get_errno())}")
            one = stack.enter_context(socket.socket(fileno=descriptor))
            with contextlib.suppress(OSError):  # it listens
                if one.family != socket.AF_UNIX and one.getpeername():
                    found.append(one)
        assert found, "nothing is connected"
        yield found


def let_nothing_in(connection):
    """Every packet to this end is thrown away when it arrives."""
    refuse_all = ctypes.create_string_buffer(struct.pack("HBBI", 0x06, 0, 0, 0))
    connection.setsockopt(socket.SOL_SOCKET, ATTACH_FILTER, struct.pack("HL", 1, ctypes.addressof(refuse_all)))


def let_all_in(connection):
    """As before."""
    connection.setsockopt(socket.SOL_SOCKET, DETACH_FILTER, struct.pack("i", 0))
