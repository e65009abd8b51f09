# SPDX-License-Identifier: Apache-2.0
"""The BPF tables of a tracing program: traced processes, the state of their threads, and known sockets.

In: a `BpfProgram` of `bpf/trace.bpf.c`, pids. Out: events made from the entries. Members are read by name.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
from collections.abc import Iterable

from ebpf_mig.linux import kvm, procfs
from ebpf_mig.linux.bpf import iterate
from ebpf_mig.linux.descriptors import vcpus_of
from ebpf_mig.linux.procfs import in_kvm_run, may_run_vcpu, threads_of
from ebpf_mig.probes.program import BpfProgram
from ebpf_mig.probes.records import open_batches, open_requests, stream_key, vcpu_sleep, vcpu_state
from ebpf_mig.recording.events import OwnRuns, Socket, Transfer, VcpuSleep, VcpuState
from ebpf_mig.recording.kinds import RECORD_NAMES

_WAITS = {
    "x86_64": frozenset({7, 23, 35, 128, 202, 230, 232, 270, 271, 281}),
    "aarch64": frozenset({22, 72, 73, 98, 101, 115, 137}),
}
"""Numbers of the system calls that only wait: poll, select, epoll_wait, futex, nanosleep, clock_nanosleep,
rt_sigtimedwait and their variants (arch/x86/entry/syscalls/syscall_64.tbl, include/uapi/asm-generic/unistd.h).
"""
_NOTHING_SEEN = dict.fromkeys(("enter_ns", "exit_ns", "ret", "runs", "in_ns", "out_ns", "max_gap_ns"), 0)


class ProcessTable:
    """The traced processes and their threads."""

    def __init__(self, program: BpfProgram, walker_fd: int = -1) -> None:
        """`walker_fd`: the program of `bpf/inside_kvm.bpf.c`; -1 if there is none."""
        self._program, self._walker_fd = program, walker_fd
        self._running: dict[int, set[int]] = {}
        """By pid: threads that ran inside KVM_RUN when tracing began."""

    def add(self, pids: Iterable[int]) -> None:
        """Starts to trace these processes. A vCPU already inside KVM_RUN (halted, say) is counted at once."""
        processes, threads = self._program.table("processes"), self._program.table("threads")
        for pid in pids:
            tids = threads_of(pid)
            inside = {tid: fd for tid in tids if (fd := in_kvm_run(pid, tid)) is not None}
            for tid, fd in inside.items():
                threads[ctypes.c_uint32(tid)] = threads.Leaf(tgid=pid, counted=1, vcpu_fd=fd)
            processes[ctypes.c_uint32(pid)] = processes.Leaf(running=len(inside))
            self._running[pid] = self.inside(pid).keys() - inside.keys()

    def inside(self, pid: int) -> dict[int, int]:
        """The threads of a traced process that are inside KVM_RUN now, or in another ioctl of a vCPU.

        The values are KVM's ids of the vCPUs, -1 if unknown.

        Where the kernel cannot be asked, each thread on a CPU counts, too: /proc says of it only that it runs. A worker
        of the VMM that is busy all the time then looks like a vCPU.
        """
        if self._walker_fd < 0:
            return {tid: -1 for tid in threads_of(pid) if may_run_vcpu(pid, tid)}
        found = self._program.table("inside_kvm")
        found.clear()
        iterate(self._walker_fd)
        return {tid.value: state.vcpu_id for tid, state in found.items() if state.tgid == pid}

    def guest_runs(self, pid: int) -> bool:
        """Whether a vCPU of a traced process is inside KVM_RUN now, by the programs' own count."""
        with contextlib.suppress(KeyError):
            return bool(self._program.table("processes")[ctypes.c_uint32(pid)].running > 0)
        return False

    def follow(self, pid: int) -> None:
        """Starts to trace a process that is no VMM. Its calls are coalesced at any time, as if a vCPU of it ran. Those
        that are further apart than `HOP_GAP_NS` are not.
        """
        processes = self._program.table("processes")
        processes[ctypes.c_uint32(pid)] = processes.Leaf(running=1, passes_on=1)

    def remove(self, pid: int) -> None:
        """Stops tracing a process; the accounts of its threads stay."""
        processes = self._program.table("processes")
        with contextlib.suppress(KeyError):
            del processes[ctypes.c_uint32(pid)]

    def accounts(self, now_ns: int, pid: int | None = None) -> list[Transfer | VcpuState]:
        """The open batches and the vCPU accounts of all threads, or of one process's."""
        events: list[Transfer | VcpuState] = []
        streams = {key.value: stream for key, stream in self._program.table("streams").items()}
        for key, thread in self._program.table("threads").items():
            if pid is not None and thread.tgid != pid:
                continue
            events += open_batches(key.value, thread, streams)
            if (state := vcpu_state(now_ns, key.value, thread)) is not None:
                events.append(state)
        for _, queue in self._program.table("queues").items():
            if pid in (None, queue.tgid):
                events += open_requests(queue, streams)
        return events

    def sleeps(self, pid: int | None = None) -> list[VcpuSleep]:
        """The sleeps of all vCPUs, or of one process's, so far."""
        sums = self._program.table("vcpu_sleeps").items()
        return [vcpu_sleep(key.value, one) for key, one in sums if pid in (None, one.tgid)]

    def silent_vcpus(self, now_ns: int, pid: int | None = None) -> list[VcpuState]:
        """Accounts of vCPUs that were inside KVM_RUN all the time, and so have none in the kernel half.

        Without them, a busy guest would seem to be paused. Each was inside when tracing began, made no traced call, and
        is inside at the end.
        """
        busy = {one: tids for one, tids in self._running.items() if tids and pid in (None, one)}
        known = {key.value for key, _ in self._program.table("threads").items()} if busy else set()
        return [
            VcpuState(now_ns, one, tid, fd=_descriptor(one, tid, inside[tid]), **_NOTHING_SEEN)
            for one, tids in busy.items()
            if (inside := self.inside(one))
            for tid in sorted((tids - known) & inside.keys())
        ]

    def missed_returns(self, pid: int | None = None) -> int:
        """The number of threads, of all processes or one, whose last call is over although its return was not seen.

        The BPF programs count a missed return when the thread makes its next call; these threads made none. Between two
        looks at their call in flight, they wait in a system call that cannot contain it. For use while armed.
        """
        waiting = {tid: call for tid, call in self._in_flight(pid).items() if _only_waits(call[0], tid)}
        after = self._in_flight(pid) if waiting else {}
        return sum(after.get(tid) == call for tid, call in waiting.items())

    def _in_flight(self, pid: int | None) -> dict[int, tuple[int, int]]:
        """(pid, begin in ns) of the call in flight of each thread; not of KVM_RUN, whose return is a tracepoint."""
        return {
            key.value: (thread.tgid, thread.enter)
            for key, thread in self._program.table("threads").items()
            if thread.nr and thread.a1 & 0xFFFFFFFF != kvm.RUN and pid in (None, thread.tgid)
        }

    def forget(self, pid: int) -> None:
        """Frees its entries in the tables of threads and of requests."""
        self._running.pop(pid, None)
        threads = self._program.table("threads")
        for tid in [tid for tid, thread in threads.items() if thread.tgid == pid]:
            with contextlib.suppress(KeyError):
                del threads[tid]
        for name in ("vcpu_sleeps", "queues", "requests"):
            table = self._program.table(name)
            for key in [key for key, one in table.items() if one.tgid == pid]:
                with contextlib.suppress(KeyError):
                    del table[key]


def _descriptor(pid: int, tid: int, vcpu_id: int) -> int:
    """The descriptor of the vCPU that a thread runs, by where it sleeps, or else by KVM's id of it; -1: unknown."""
    if (fd := in_kvm_run(pid, tid)) is not None:
        return fd
    return min((fd for fd, number in vcpus_of(pid).items() if number == vcpu_id), default=-1)


def _only_waits(pid: int, tid: int) -> bool:
    """Whether a thread sleeps in one of `_WAITS`; False if nothing shows where it is."""
    try:
        number = procfs.text(pid, "task", tid, "syscall").partition(" ")[0]
    except OSError:
        return False
    return number.isdecimal() and int(number) in _WAITS.get(os.uname().machine, ())


def own_runs(program: BpfProgram, now_ns: int) -> list[OwnRuns]:
    """The sums of each CPU on which our programs ran."""
    found = []
    for key, o in program.table("own_runs").items():
        if o.runs or o.other_runs:
            since, until = (o.since_ns, o.until_ns) if o.runs else (now_ns, now_ns)
            found.append(
                OwnRuns(since, until, now_ns, key.value, o.run_ns, o.runs, o.calls, o.other_runs, o.other_calls)
            )
    return found


class SocketTable:
    """The sockets that the BPF programs have reported, each once, and how many of their bytes."""

    def __init__(self, program: BpfProgram) -> None:
        self._program = program
        self._inodes: dict[int, set[int]] = {}
        """Socket inodes by pid."""
        self._reported: dict[int, dict[tuple[int, int], int]] = {}
        """By pid, and by inode and direction: the bytes in the batches that came by the ring."""

    def seen(self, socket: Socket) -> None:
        """Notes a socket that the BPF programs reported."""
        self._inodes.setdefault(socket.pid, set()).add(socket.socket)

    def moved(self, batch: Transfer) -> None:
        """Notes a batch that came by the ring."""
        sums, key = self._reported.setdefault(batch.pid, {}), (batch.socket, batch.direction)
        sums[key] = max(sums.get(key, 0) if batch.position else 0, batch.position + batch.bytes)

    def follows(self, batch: Transfer) -> bool:
        """Whether an open batch follows what came by the ring. If not, a batch before it, or it, is being written."""
        return batch.position == self._reported.get(batch.pid, {}).get((batch.socket, batch.direction), 0)

    def forget(self, pid: int) -> None:
        """Frees the entries of a process. If it is traced again, its sockets are reported again."""
        streams, owners = self._program.table("streams"), self._program.table("tcp_owners")
        self._reported.pop(pid, None)
        for inode in self._inodes.pop(pid, ()):
            with contextlib.suppress(KeyError):
                del streams[ctypes.c_uint64(stream_key(pid, inode))]
        for sock in [sock for sock, owner in owners.items() if owner.pid == pid]:
            with contextlib.suppress(KeyError):
                del owners[sock]

    def clear(self) -> None:
        """Frees all entries."""
        self._program.table("streams").clear()
        self._program.table("tcp_owners").clear()
        self._inodes.clear()
        self._reported.clear()


def counts(program: BpfProgram, table: str) -> dict[str, int]:
    """The counts by kind of event in a table (`lost` or `unpaired`), without zeros."""
    sums = program.per_cpu_sums(table)
    return {RECORD_NAMES.get(kind, str(kind)): n for kind, n in enumerate(sums) if n}
