# SPDX-License-Identifier: Apache-2.0
"""A process that the kernel kills when we end or let go of it, whatever user it runs as and even while it is stopped.

In: a running child. Out: a `Leash`. prctl(2)'s parent-death signal is forgotten when a process changes its identity,
and does not arrive at another user's process without CAP_KILL. Instead the child holds one end of a pair of sockets
that nobody writes to. The kernel is asked to send SIGKILL to the child once the other end, ours, is closed (fcntl(2),
F_SETSIG, F_SETOWN; the permission is checked against who asked, see sigio_perm in fs/fcntl.c).
"""

from __future__ import annotations

import fcntl
import os
import signal
import socket


class Leash:
    """Give `theirs` to the child, then `tie` it. Our end is inherited by nobody."""

    def __init__(self) -> None:
        self._ours, self._theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)

    @property
    def theirs(self) -> int:
        """The descriptor that the child inherits and keeps open."""
        return self._theirs.fileno()

    def tie(self, pid: int) -> None:
        """From now on the child dies with us."""
        fd = self._theirs.fileno()
        fcntl.fcntl(fd, fcntl.F_SETOWN, pid)
        fcntl.fcntl(fd, fcntl.F_SETSIG, signal.SIGKILL)
        fcntl.fcntl(fd, fcntl.F_SETFL, fcntl.fcntl(fd, fcntl.F_GETFL) | os.O_ASYNC)
        self._theirs.close()

    def let_go(self) -> None:
        """Kills the child; idempotent."""
        self._ours.close()
        self._theirs.close()


def is_stopped(pid: int) -> bool:
    """Whether a child that runs is stopped, by SIGSTOP say."""
    try:
        return os.waitid(os.P_PID, pid, os.WSTOPPED | os.WNOHANG | os.WNOWAIT) is not None
    except ChildProcessError:  # it has ended
        return False
