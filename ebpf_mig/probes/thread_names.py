# SPDX-License-Identifier: Apache-2.0
"""The names of traced threads and the numbers of their vCPUs, noted while the processes live.

In: pids, threads as their events arrive. Out: `Thread` events. A thread that is gone keeps what was noted.
"""

from __future__ import annotations

from collections.abc import Iterable

from ebpf_mig.linux.procfs import comm, threads_of, vcpus_of
from ebpf_mig.recording.events import Thread


class ThreadNames:
    """Reads /proc, seldom: once for each thread as it is seen first, and when asked to look again."""

    def __init__(self) -> None:
        self._threads: dict[tuple[int, int], Thread] = {}
        self._vcpus: dict[tuple[int, int], int] = {}
        """vCPU index by process and descriptor."""

    def read(self, pids: Iterable[int]) -> None:
        """Notes the threads and vCPU descriptors that these processes have now."""
        for pid in pids:
            for tid in threads_of(pid):
                self._note(pid, tid, comm(pid, tid))
            self._vcpus |= {(pid, fd): number for fd, number in vcpus_of(pid).items()}

    def seen(self, pid: int, tid: int) -> None:
        """An event of a thread arrived: it was born after we read, and may be gone before we read again."""
        if (pid, tid) not in self._threads:
            self._note(pid, tid, comm(pid, tid))

    def ran_vcpu(self, pid: int, tid: int, fd: int) -> None:
        """A thread called KVM_RUN on that descriptor."""
        self._note(pid, tid, vcpu=self._vcpus.get((pid, fd), -1))

    def events(self, pid: int | None = None) -> list[Thread]:
        """All that was noted, or that of one process."""
        return [thread for thread in self._threads.values() if pid is None or thread.pid == pid]

    def forget(self, pid: int) -> None:
        """A process is traced no more."""
        self._threads = {key: thread for key, thread in self._threads.items() if key[0] != pid}
        self._vcpus = {key: number for key, number in self._vcpus.items() if key[0] != pid}

    def _note(self, pid: int, tid: int, name: str = "", vcpu: int = -1) -> None:
        known = self._threads.get((pid, tid), Thread(pid, tid, ""))
        self._threads[pid, tid] = Thread(pid, tid, name or known.name, vcpu if vcpu >= 0 else known.vcpu)
