# SPDX-License-Identifier: Apache-2.0
"""Detects whether the source's process or its sending thread has ended.

In: a pid on this host, or another host. Out: descriptors to poll, and answers. A process here is watched with pidfds.
One on another host is checked by a command there, rarely while it migrates, since a login takes CPU time.
"""

from __future__ import annotations

import contextlib
import os
import time
from typing import Protocol

from ebpf_mig.linux import procfs
from ebpf_mig.vmm.base import RemoteEnd
from ebpf_mig.vmm.call import Call, readable

_WORKER = "migration-worke"
"""Comm of the sending thread, cut to 15 characters (vmm/src/migration/worker.rs, v53)."""
LOOK_S = 0.5
"""How often a thread's /proc is read if the kernel has no thread pidfds (before Linux 6.9)."""
_COMMS = ("-maxdepth", "2", "-name", "comm", "-exec", "cat", "{}", "+")
FIRST_LOOK_S, MOST_LOOK_S = 10.0, 80.0
"""When a process on another host is first checked. The pauses then double up to this."""


class SourceEnd(Protocol):
    """The interface to observe the source while it migrates."""

    far: bool
    """Whether it is on another host."""

    def fds(self) -> list[int]:
        """Descriptors that become readable when the process or its sending thread ends."""

    def exit_fds(self) -> list[int]:
        """Descriptors that become readable when the process ends."""

    def patience(self) -> float:
        """How long to wait before the source must be checked again; s."""

    def hurry(self) -> float:
        """Interval in s after the migration's end, when frequent checks are harmless."""

    def gone(self) -> bool:
        """Whether the process is known to have ended."""

    def gave_up(self, send: Call) -> bool:
        """Whether the send call has returned and no sending thread is left."""

    def close(self) -> None:
        """Closes its descriptors."""


class NearSource:
    """A source on this host."""

    far = False

    def __init__(self, pid: int, pidfd: int) -> None:
        self._pid, self._pidfd = pid, pidfd
        self._tid: int | None = None
        self._fd = -1

    def fds(self) -> list[int]:
        return [self._pidfd, *([self._fd] if self._fd >= 0 else [])]

    def exit_fds(self) -> list[int]:
        return [self._pidfd]

    def patience(self) -> float:
        return LOOK_S if self._tid and self._fd < 0 else float("inf")

    def hurry(self) -> float:
        return float("inf")

    def gone(self) -> bool:
        return bool(readable([self._pidfd], 0))

    def gave_up(self, send: Call) -> bool:
        self._look(send)
        return self._tid is not None and not procfs.exists(self._pid, self._tid)

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def _look(self, send: Call) -> None:
        """Called once, when the send call has returned. From v53 on it returns at once."""
        if self._tid is not None or not send.done.is_set() or send.error is not None:
            return
        threads = procfs.threads_of(self._pid)
        self._tid = next((tid for tid in threads if procfs.comm(self._pid, tid) == _WORKER), 0)
        if self._tid:
            with contextlib.suppress(OSError):  # PIDFD_THREAD is O_EXCL, include/uapi/linux/pidfd.h (6.9)
                self._fd = os.pidfd_open(self._tid, os.O_EXCL)


class FarSource:
    """A source on another host."""

    far = True

    def __init__(self, there: RemoteEnd) -> None:
        self._there, self._pid = there, there.pid
        self._pause = FIRST_LOOK_S
        self._next = time.monotonic() + self._pause
        self._threads: list[str] | None = None
        """Names of its threads at the last check; empty: it has ended. None: not known."""

    def fds(self) -> list[int]:
        return []

    def exit_fds(self) -> list[int]:
        return []

    def patience(self) -> float:
        return max(0.0, self._next - time.monotonic()) if self._pid else float("inf")

    def hurry(self) -> float:
        self._pause = LOOK_S
        self._next = min(self._next, time.monotonic() + self._pause)
        return LOOK_S

    def gone(self) -> bool:
        self._look()
        return self._threads == []

    def gave_up(self, send: Call) -> bool:
        if not send.done.is_set() or send.error is not None:
            return False
        self._look()
        return bool(self._threads) and _WORKER not in (self._threads or ())

    def close(self) -> None:
        pass

    def _look(self) -> None:
        """The thread names of the command itself and of the process. The first shows that the command ran, so that no
        output is not taken for an end. After an end or a failure it does not ask again."""
        if not self._pid or self._threads == [] or time.monotonic() < self._next:
            return
        places = [procfs.path("self", "comm"), procfs.path(self._pid, "task")]
        names = self._there.output("find", *places, *_COMMS).splitlines()
        self._threads = names[1:] if names else None
        self._pid = self._pid if names else 0
        self._next = time.monotonic() + self._pause
        self._pause = min(2 * self._pause, MOST_LOOK_S)
