# SPDX-License-Identifier: Apache-2.0
"""Names and ids of traced threads and the indices of their vCPUs, read while the processes live.

In: pids, threads as their events arrive. Out: `Thread` events, and the host's ids of threads in another pid namespace.
A thread that has exited keeps the values that were read before.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

from ebpf_mig.linux.descriptors import vcpus_of
from ebpf_mig.linux.namespaces import host_tids
from ebpf_mig.linux.procfs import comm, threads_of
from ebpf_mig.recording.events import Thread


class ThreadNames:
    """Reads /proc only when a thread is seen for the first time, and on request."""

    def __init__(self) -> None:
        self._threads: dict[tuple[int, int], Thread] = {}
        self._vcpus: dict[tuple[int, int], int] = {}
        """KVM's id of a vCPU, by process and descriptor."""
        self._host_tids: dict[int, dict[int, int]] = {}
        """For each process with its own pid namespace: the host's thread id by the namespace's thread id; 0: no such
        thread.
        """

    def read(self, pids: Iterable[int]) -> None:
        """Reads the current threads and vCPU descriptors of these processes."""
        for pid in pids:
            for tid in threads_of(pid):
                self._note(pid, tid, comm(pid, tid))
            self._vcpus |= {(pid, fd): number for fd, number in vcpus_of(pid).items()}
            if (found := host_tids(pid)) is not None:
                self._host_tids[pid] = self._host_tids.get(pid, {}) | found

    def seen(self, pid: int, tid: int) -> None:
        """Notes a thread of which an event arrived. It may be newer than the last reading, and exit before the next."""
        if (pid, tid) not in self._threads:
            self._note(pid, tid, comm(pid, tid))

    def ran_vcpu(self, pid: int, tid: int, fd: int) -> None:
        """Notes that a thread called KVM_RUN on that descriptor."""
        self._note(pid, tid, vcpu=self._vcpus.get((pid, fd), -1))

    def host_tid(self, pid: int, own: int) -> int:
        """The host's id of the thread with id `own` in the process's namespace (as in its tgkill(2)); 0 if unknown."""
        if pid not in self._host_tids:
            return own
        known = self._host_tids[pid]
        if own not in known:  # created since
            known |= {own: 0} | (host_tids(pid) or {})
        return known[own]

    def events(self, pid: int | None = None) -> list[Thread]:
        """All `Thread` events, or those of one process. vCPUs have the indices that the VMM uses."""
        threads = [thread for thread in self._threads.values() if pid is None or thread.pid == pid]
        own: dict[tuple[int, int], int] = {}
        for one in {thread.pid for thread in threads}:
            running = {thread.tid: thread for thread in threads if thread.pid == one and thread.vcpu >= 0}
            every = {number for (owner, _), number in self._vcpus.items() if owner == one}
            name = self._threads.get((one, one), Thread(one, one, "")).name
            own |= {(one, tid): index for tid, index in indices(running, every, name).items()}
        return [Thread(t.pid, t.tid, t.name, own.get((t.pid, t.tid), t.vcpu)) for t in threads]

    def forget(self, pid: int) -> None:
        """Forgets a process that is no longer traced."""
        self._threads = {key: thread for key, thread in self._threads.items() if key[0] != pid}
        self._vcpus = {key: number for key, number in self._vcpus.items() if key[0] != pid}
        self._host_tids.pop(pid, None)

    def _note(self, pid: int, tid: int, name: str = "", vcpu: int = -1) -> None:
        known = self._threads.get((pid, tid), Thread(pid, tid, ""))
        self._threads[pid, tid] = Thread(pid, tid, name or known.name, vcpu if vcpu >= 0 else known.vcpu)


def indices(threads: Mapping[int, Thread], numbers: Iterable[int], process: str) -> dict[int, int]:
    """The VMM's vCPU index of each vCPU thread, by tid. `numbers`: KVM's ids of all vCPUs of the process.

    On x86, KVM's id is the APIC id, which has gaps if the number of cores per socket is not a power of two. VMMs put
    their index in the thread's name (`CPU 3/KVM`, `vcpu3`, `fc_vcpu 3`). If the names have no index, or are inherited
    from the `process`, the index is the rank of the id: VMMs number their vCPUs in that order.
    """
    named = {tid: re.findall(r"\d+", thread.name) for tid, thread in threads.items()}
    found = {tid: int(words[0]) for tid, words in named.items() if len(words) == 1 and threads[tid].name != process}
    if len(found) == len(threads) == len(set(found.values())):
        return found
    ranks = {number: rank for rank, number in enumerate(sorted({*numbers, *(t.vcpu for t in threads.values())}))}
    return {tid: ranks[thread.vcpu] for tid, thread in threads.items()}
