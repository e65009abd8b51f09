# SPDX-License-Identifier: Apache-2.0
"""The BPF tables of a tracing program: traced processes, the state of their threads, and known sockets.

In: a `BpfProgram` of `bpf/trace.bpf.c`, pids. Out: events made from the entries. Members are read by name.
"""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Iterable

from ebpf_mig.linux.procfs import in_kvm_run, threads_of
from ebpf_mig.probes.program import BpfProgram
from ebpf_mig.probes.records import open_batches, stream_key, vcpu_state
from ebpf_mig.recording.events import Socket, Transfer, VcpuState
from ebpf_mig.recording.kinds import RECORD_NAMES


class ProcessTable:
    """The traced processes and their threads."""

    def __init__(self, program: BpfProgram) -> None:
        self._program = program

    def add(self, pids: Iterable[int]) -> None:
        """Starts to trace these processes. A vCPU already inside KVM_RUN (halted, say) is counted at once."""
        processes, threads = self._program.table("processes"), self._program.table("threads")
        for pid in pids:
            inside = {tid: fd for tid in threads_of(pid) if (fd := in_kvm_run(pid, tid)) is not None}
            for tid, fd in inside.items():
                threads[ctypes.c_uint32(tid)] = threads.Leaf(tgid=pid, counted=1, vcpu_fd=fd)
            processes[ctypes.c_uint32(pid)] = processes.Leaf(running=len(inside))

    def follow(self, pid: int) -> None:
        """Starts to trace a process that is no VMM. Its calls are coalesced at any time, as if a vCPU of it ran."""
        processes = self._program.table("processes")
        processes[ctypes.c_uint32(pid)] = processes.Leaf(running=1)

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
        return events

    def forget(self, pid: int) -> None:
        """Frees entries in the table of threads."""
        threads = self._program.table("threads")
        for tid in [tid for tid, thread in threads.items() if thread.tgid == pid]:
            with contextlib.suppress(KeyError):
                del threads[tid]


class SocketTable:
    """The sockets that the BPF programs have reported; each is reported once."""

    def __init__(self, program: BpfProgram) -> None:
        self._program = program
        self._inodes: dict[int, set[int]] = {}
        """Socket inodes by pid."""

    def seen(self, socket: Socket) -> None:
        """Notes a socket that the BPF programs reported."""
        self._inodes.setdefault(socket.pid, set()).add(socket.socket)

    def forget(self, pid: int) -> None:
        """Frees the entries of a process. If it is traced again, its sockets are reported again."""
        streams, owners = self._program.table("streams"), self._program.table("tcp_owners")
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


def counts(program: BpfProgram, table: str) -> dict[str, int]:
    """The counts by kind of event in a table (`lost` or `unpaired`), without zeros."""
    sums = program.per_cpu_sums(table)
    return {RECORD_NAMES.get(kind, str(kind)): n for kind, n in enumerate(sums) if n}
