# SPDX-License-Identifier: Apache-2.0
"""Has an analyst run while there is work for it, and says when work was lost with one that was killed.

In: nothing. Out: a socket to send `Task`s to and to read `Answer`s from. The process starts when a task comes and ends
after a while without any (`analysis_worker.py`). The sockets outlive it.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import socket

from ebpf_mig.exporter.child import Child

_BUFFER_BYTES = 1 << 20
GONE = b'{"gone": true}'
"""An `Answer`: the task that was being worked on is lost, and has to be sent again."""


class Analyst:
    """Call `look` whenever `work` is readable or a child ended."""

    def __init__(self) -> None:
        self.tasks, self.work = socket_pair()
        """The end for tasks, and the end for the process."""
        work = self.work.fileno()

        def argument(ready: int) -> str:
            return json.dumps({"work": work, "ready": ready, "parent": os.getpid()})

        self.child = Child("analyst", "ebpf_mig.exporter.analysis_worker", argument, [work], expendable=True)

    @property
    def rests(self) -> bool:
        """Whether it has nothing to do, or has just been started."""
        return not self.child.status and self.child.missing != "is stopped"

    def look(self) -> None:
        """Starts the process if there is work, and replaces one that ended badly."""
        if self.child.look() and self.child.status:
            self.child.count_restart()
            with contextlib.suppress(OSError):
                self.work.send(GONE, socket.MSG_DONTWAIT)
        if self.child.status:
            self.child.start()
        elif not self.child.runs and select.select([self.work], [], [], 0)[0]:
            self.child.start_now()

    def close(self) -> None:
        """Kills the process."""
        self.child.kill()
        self.child.wait(5)
        self.tasks.close()
        self.work.close()


def socket_pair() -> tuple[socket.socket, socket.socket]:
    """A pair of sockets that keeps messages apart, however many processes read and write."""
    pair = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    for end in pair:
        end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _BUFFER_BYTES)
    return pair
