# SPDX-License-Identifier: Apache-2.0
"""A blocking call to a VMM in a thread of its own, and waiting for several of them and for processes.

In: a function; file descriptors. Out: a descriptor that becomes readable at the call's end; which descriptors are
readable.
"""

from __future__ import annotations

import os
import select
import threading
from collections.abc import Callable, Sequence

from ebpf_mig.errors import VmmError


class Call:
    """A blocking call in a thread of its own; `fd` becomes readable when it has returned."""

    def __init__(self) -> None:
        self.error: VmmError | None = None
        self.begun = False
        self.done = threading.Event()
        self.fd = os.eventfd(0, os.EFD_CLOEXEC)

    def start(self, name: str, act: Callable[[], object]) -> None:
        """Starts `act` and keeps its VmmError."""

        def work() -> None:
            try:
                act()
            except VmmError as error:
                self.error = error
            self.finish()

        self.begun = True
        threading.Thread(target=work, name=name, daemon=True).start()

    def finish(self) -> None:
        """Signals the end."""
        self.done.set()
        os.eventfd_write(self.fd, 1)

    def close(self) -> None:
        """Closes the descriptor, unless the call may still return."""
        if self.fd >= 0 and (self.done.is_set() or not self.begun):
            os.close(self.fd)
            self.fd = -1


def readable(fds: Sequence[int], timeout_s: float) -> set[int]:
    """Waits until a descriptor is readable. Returns the readable ones."""
    waiter = select.poll()
    for fd in fds:
        waiter.register(fd, select.POLLIN)
    return {fd for fd, _ in waiter.poll(None if timeout_s == float("inf") else max(0, timeout_s) * 1000)}
