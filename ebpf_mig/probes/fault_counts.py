# SPDX-License-Identifier: Apache-2.0
"""The kernel's own count of page faults of vCPU threads, read twice: when tracing begins and when it ends.

In: pids, the threads that ran vCPUs. Out: `PageFaults` events. It costs nothing in between.
"""

from __future__ import annotations

from collections.abc import Iterable

from ebpf_mig.linux import clock, procfs
from ebpf_mig.recording.events import PageFaults

Thread = tuple[int, int]
"""pid and tid."""


class FaultCounts:
    """Remembers what each thread had when tracing began. A later thread began with none."""

    def __init__(self) -> None:
        self._before: dict[Thread, tuple[int, int]] = {}

    def begin(self, pids: Iterable[int]) -> None:
        """Reads the present counts of all threads."""
        for pid in pids:
            for tid in procfs.threads_of(pid):
                if (found := procfs.page_faults(pid, tid)) is not None:
                    self._before[pid, tid] = found

    def counts(self, threads: Iterable[Thread]) -> list[PageFaults]:
        """What these threads have had since; nothing for a thread that has exited."""
        events = []
        for pid, tid in sorted(threads):
            now = procfs.page_faults(pid, tid)
            if now is None:
                continue
            before = self._before.get((pid, tid), (0, 0))
            minor, major = (max(0, later - earlier) for later, earlier in zip(now, before, strict=True))
            events.append(PageFaults(clock.monotonic_ns(), pid, tid, minor, major))
        return events

    def forget(self, pid: int) -> None:
        """Forgets a process that is no longer traced."""
        self._before = {thread: found for thread, found in self._before.items() if thread[0] != pid}
