# SPDX-License-Identifier: Apache-2.0
"""The names and ids of traced threads and the numbers of their vCPUs, noted while the processes live.

In: pids, threads as their events arrive. Out: `Thread` events, and the host's ids of threads that a process knows by
ids of its own pid namespace. A thread that is gone keeps what was noted.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

from ebpf_mig.linux.namespaces import host_tids
from ebpf_mig.linux.procfs import comm, threads_of, vcpus_of
from ebpf_mig.recording.events import Thread


class ThreadNames:
    """Reads /proc, seldom: once for each thread as it is seen first, and when asked to look again."""

    def __init__(self) -> None:
        self._threads: dict[tuple[int, int], Thread] = {}
        self._vcpus: dict[tuple[int, int], int] = {}
        """KVM's id of a vCPU by process and descriptor."""
        self._host_tids: dict[int, dict[int, int]] = {}
        """By process that has a pid namespace, the host's thread ids by those of that namespace; 0: no such thread."""

    def read(self, pids: Iterable[int]) -> None:
        """Notes the threads and vCPU descriptors that these processes have now."""
        for pid in pids:
            for tid in threads_of(pid):
                self._note(pid, tid, comm(pid, tid))
            self._vcpus |= {(pid, fd): number for fd, number in vcpus_of(pid).items()}
            if (found := host_tids(pid)) is not None:
                self._host_tids[pid] = self._host_tids.get(pid, {}) | found

    def seen(self, pid: int, tid: int) -> None:
        """An event of a thread arrived: it was born after we read, and may be gone before we read again."""
        if (pid, tid) not in self._threads:
            self._note(pid, tid, comm(pid, tid))

    def ran_vcpu(self, pid: int, tid: int, fd: int) -> None:
        """A thread called KVM_RUN on that descriptor."""
        self._note(pid, tid, vcpu=self._vcpus.get((pid, fd), -1))

    def host_tid(self, pid: int, own: int) -> int:
        """The host's id of the thread that the process calls `own`, as in its tgkill(2); 0 if it is not known."""
        if pid not in self._host_tids:
            return own
        known = self._host_tids[pid]
        if own not in known:  # born since
            known |= {own: 0} | (host_tids(pid) or {})
        return known[own]

    def events(self, pid: int | None = None) -> list[Thread]:
        """All that was noted, or that of one process; vCPUs by the numbers that the VMM gives them."""
        threads = [thread for thread in self._threads.values() if pid is None or thread.pid == pid]
        own: dict[tuple[int, int], int] = {}
        for one in {thread.pid for thread in threads}:
            running = {thread.tid: thread for thread in threads if thread.pid == one and thread.vcpu >= 0}
            every = {number for (owner, _), number in self._vcpus.items() if owner == one}
            name = self._threads.get((one, one), Thread(one, one, "")).name
            own |= {(one, tid): index for tid, index in indices(running, every, name).items()}
        return [Thread(t.pid, t.tid, t.name, own.get((t.pid, t.tid), t.vcpu)) for t in threads]

    def forget(self, pid: int) -> None:
        """A process is traced no more."""
        self._threads = {key: thread for key, thread in self._threads.items() if key[0] != pid}
        self._vcpus = {key: number for key, number in self._vcpus.items() if key[0] != pid}
        self._host_tids.pop(pid, None)

    def _note(self, pid: int, tid: int, name: str = "", vcpu: int = -1) -> None:
        known = self._threads.get((pid, tid), Thread(pid, tid, ""))
        self._threads[pid, tid] = Thread(pid, tid, name or known.name, vcpu if vcpu >= 0 else known.vcpu)


def indices(threads: Mapping[int, Thread], numbers: Iterable[int], process: str) -> dict[int, int]:
    """The VMM's own index of the vCPU of each thread, by tid. `numbers`: KVM's ids of all vCPUs of the process.

    KVM's id is the APIC id on x86, which has holes where a socket's cores are no power of two. VMMs put their index in
    the thread's name (`CPU 3/KVM`, `vcpu3`, `fc_vcpu 3`). Where the names do not number the threads, or are inherited
    from the `process`, it is the rank among the ids: VMMs number their vCPUs in that order.
    """
    named = {tid: re.findall(r"\d+", thread.name) for tid, thread in threads.items()}
    found = {tid: int(words[0]) for tid, words in named.items() if len(words) == 1 and threads[tid].name != process}
    if len(found) == len(threads) == len(set(found.values())):
        return found
    ranks = {number: rank for rank, number in enumerate(sorted({*numbers, *(t.vcpu for t in threads.values())}))}
    return {tid: ranks[thread.vcpu] for tid, thread in threads.items()}
