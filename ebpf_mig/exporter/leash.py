# SPDX-License-Identifier: Apache-2.0
"""Has the kernel kill a child when we end or release it, even if it is stopped or runs as another user; or before
others when memory runs out.

In: a running child. Out: a `Leash`. prctl(2)'s parent-death signal is not enough: it is cleared when a process changes
its identity, and does not reach another user's process without CAP_KILL. Instead the child holds one end of a socket
pair that nobody writes to. When the other end, ours, is closed, the kernel sends SIGKILL to the child (fcntl(2),
F_SETSIG, F_SETOWN). It checks permission against the process that asked for the signal (sigio_perm in fs/fcntl.c).
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import signal
import socket

from ebpf_mig.linux import procfs

_KILLED_FIRST = 1000
"""proc(5), oom_score_adj: the highest value. With 500, another process was killed in its place in 2 of 7 tries."""


class Leash:
    """Pass `theirs` to the child, then call `tie`. No other process inherits our end."""

    def __init__(self) -> None:
        self._ours, self._theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)

    @property
    def theirs(self) -> int:
        """The descriptor that the child inherits and keeps open."""
        return self._theirs.fileno()

    def tie(self, pid: int) -> None:
        """From now on, the child dies when we do."""
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
    """Whether a child that has not ended is stopped, e.g. by SIGSTOP."""
    try:
        return os.waitid(os.P_PID, pid, os.WSTOPPED | os.WNOHANG | os.WNOWAIT) is not None
    except ChildProcessError:  # it has ended
        return False


def kill_first(pid: int) -> None:
    """Has the kernel kill a child before others when memory runs out, in its group or on its machine.

    Nothing happens if that is not allowed.
    """
    with contextlib.suppress(OSError), open(procfs.path(pid, "oom_score_adj"), "w") as file:  # noqa: PTH123
        file.write(str(_KILLED_FIRST))
