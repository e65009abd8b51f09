# SPDX-License-Identifier: Apache-2.0
"""When new processes are looked at, to see whether they are VMs.

In: processes that made their first thread, the time. Out: those that are to be looked at now. Pure. A process creates
its VM a little after its first thread, so it is looked at several times.
"""

from __future__ import annotations

RECHECKS_S = (0.05, 0.25, 1.0, 3.0, 6.0)
"""A process creates its VM a little after its first thread. It is checked again after these times."""
CHECKS = 8192
"""Pending checks of new processes."""


class Newcomers:
    """Pending looks at new processes. Instants are in seconds of `time.monotonic`."""

    def __init__(self) -> None:
        self._looks: list[tuple[float, int]] = []

    def add(self, pid: int, now: float) -> bool:
        """Plans the looks at a new process; False if too many are pending."""
        if len(self._looks) >= CHECKS:
            return False
        self._looks += [(now + wait, pid) for wait in RECHECKS_S]
        return True

    def due(self, now: float) -> set[int]:
        """The processes to look at now. Each look is returned once."""
        due = {pid for at, pid in self._looks if at <= now}
        if due:
            self._looks = [(at, pid) for at, pid in self._looks if at > now]
        return due

    def drop(self, pid: int) -> None:
        """Plans no more looks at a process: it is a VM."""
        self._looks = [look for look in self._looks if look[1] != pid]

    def wait_ms(self, now: float, most_ms: int) -> int:
        """Time to the next look, at most `most_ms`, in ms."""
        if not self._looks:
            return most_ms
        return max(0, min(most_ms, int((min(self._looks)[0] - now) * 1000) + 1))
