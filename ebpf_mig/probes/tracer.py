# SPDX-License-Identifier: Apache-2.0
"""Tracing as the rest of the program sees it: pids in, events out.

`Tracer(pids)` compiles and loads (privilege, LLVM, half a second), `arm()` attaches (milliseconds), `poll()` hands
over events, `finish()` detaches and reads what the kernel still holds. All of it ends with the process.

A tracer made without pids is one for a node: `add` and `remove` say whom to trace, `arm` and `disarm` alternate, and
nothing is compiled again.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import time
from collections.abc import Sequence
from pathlib import Path

import msgspec

from ebpf_mig import kvm
from ebpf_mig.errors import PreflightError
from ebpf_mig.events import AnyEvent, Ioctl, OffCpu, Samples, Socket, Thread
from ebpf_mig.probes import attach, btf
from ebpf_mig.probes.functions import AUTO, Choice
from ebpf_mig.probes.loader import BpfStatistics
from ebpf_mig.probes.privilege import require_privilege
from ebpf_mig.probes.readings import Readings
from ebpf_mig.probes.records import KIND_NAMES, WORDS, decode, open_runs, vcpu_state
from ebpf_mig.probes.sampler import Sampler, cost_ns

RING_BYTES = 8 << 20
_KVM_MODULE = "/sys/kernel/btf/kvm"
_NONE = 0xFFFF
"""OFF_NONE of bpf/common.h."""
_USER_REGS_AT = {"x86_64": 16384 - 168, "aarch64": 16384 - 336}
"""From the end of a task's kernel stack, where its registers are, for kernels before 5.15: THREAD_SIZE without KASAN,
`struct pt_regs` (arch/x86/include/asm/page_64_types.h, arch/arm64/include/asm/memory.h and ptrace.h, Linux 5.10)."""
_NOWHERE = 0x7FFFFFF0
"""An offset that no lock has: its waits are then booked as those of other locks."""
_OFFSETS = {
    "OFF_task_pid": ("task_struct", "pid"),
    "OFF_task_tgid": ("task_struct", "tgid"),
    "OFF_task_stack": ("task_struct", "stack"),
    "OFF_task_files": ("task_struct", "files"),
    "OFF_files_fdt": ("files_struct", "fdt"),
    "OFF_fdtable_fd": ("fdtable", "fd"),
    "OFF_file_inode": ("file", "f_inode"),
    "OFF_file_private": ("file", "private_data"),
    "OFF_inode_ino": ("inode", "i_ino"),
    "OFF_inode_mode": ("inode", "i_mode"),
    "OFF_socket_sk": ("socket", "sk"),
    "OFF_socket_file": ("socket", "file"),
    "OFF_alloc_socket": ("socket_alloc", "socket"),
    "OFF_alloc_inode": ("socket_alloc", "vfs_inode"),
    "OFF_sock_socket": ("sock", "sk_socket"),
    "OFF_unix_peer": ("unix_sock", "peer"),
    "OFF_skc_family": ("sock_common", "skc_family"),
    "OFF_skc_daddr": ("sock_common", "skc_daddr"),
    "OFF_skc_rcv_saddr": ("sock_common", "skc_rcv_saddr"),
    "OFF_skc_dport": ("sock_common", "skc_dport"),
    "OFF_skc_num": ("sock_common", "skc_num"),
    "OFF_skc_v6_daddr": ("sock_common", "skc_v6_daddr"),
    "OFF_skc_v6_rcv_saddr": ("sock_common", "skc_v6_rcv_saddr"),
    "OFF_skb_data": ("sk_buff", "data"),
    "OFF_skb_len": ("sk_buff", "len"),
    "OFF_skb_cb": ("sk_buff", "cb"),
    "OFF_tcp_una": ("tcp_sock", "snd_una"),
    "OFF_tcp_nxt": ("tcp_sock", "snd_nxt"),
    "OFF_tcp_write": ("tcp_sock", "write_seq"),
    "OFF_tcp_wnd": ("tcp_sock", "snd_wnd"),
    "OFF_tcp_rcv_nxt": ("tcp_sock", "rcv_nxt"),
}


_STATE = ("task_struct", "__state")
_STATE_BEFORE_5_14 = ("task_struct", "state")
_SCHEDULER = {"schedule", "__schedule", "preempt_schedule_common"}
_MAX_FRAMES = 12
_PF_USER_WORKER = 0x4000
"""include/linux/sched.h, Linux 6.4: a thread of the process that never runs in user space."""


class Tracer:
    """Traces the given processes, or those that are added later; use as a context manager."""

    def __init__(self, pids: Sequence[int] = (), handed: attach.Plan | None = None, tier: str = AUTO) -> None:
        """`handed`: what another process loaded, without pids; else it is loaded here, with LLVM, from that tier.

        What stays on a node for long does without TCP's account of the connections: it costs memory and a slower arm.
        """
        self.pids = tuple(pids)
        self.attached: dict[str, str] = {}
        self._statistics = BpfStatistics()
        self._plan = handed or _loaded(self.pids, tier, self._statistics)
        self._program = self._plan.program
        self._seen = handed is not None
        self._threads: dict[tuple[int, int], Thread] = {}
        self._stacks: dict[str, tuple[str, ...]] = {}
        self._vcpus: dict[tuple[int, int], int] = {}
        self._names: dict[str, str] = {}
        self._sampler, self._no_samples = self._make_sampler(self._plan.sampler_fd)
        self._readings = Readings(self._total_cost, tcp=handed is None)
        self._sockets: dict[int, set[int]] = {}
        """Socket inodes that the kernel half has told of, by pid: it tells each once."""
        self._late: list[AnyEvent] = []

    def _make_sampler(self, program_fd: int) -> tuple[Sampler, str]:
        """A sampler, and why it takes no samples although its program was loaded."""
        try:
            return Sampler(program_fd, self._tell_period, cost_ns(program_fd) if program_fd >= 0 else 0), ""
        except OSError as error:
            return Sampler(-1, self._tell_period), f"perf_event_open: {error.strerror or error}"

    def __enter__(self) -> Tracer:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def arm(self) -> None:
        """Attaches; from here on every system call of the host pays a little."""
        self._statistics.open()
        self._program.open_ring("events")
        self._program.symbol(0)  # reads all of /proc/kallsyms once, which must not happen amid a migration
        self._readings.open()
        self._look_around(self.pids)
        self._add_processes(self.pids)
        self.attached = attach.arm(self._plan, self._statistics, seen=self._seen)
        self._seen = True
        if self._no_samples:
            self.attached["split"] = f"absent: {self._no_samples}"

    def poll(self, timeout_ms: int) -> list[AnyEvent]:
        """Events that arrived until `timeout_ms` from now, or until one came that is not to wait."""
        late, self._late = self._late, []
        events: list[AnyEvent] = []
        for record in self._program.poll(0 if late else timeout_ms):
            event = self._decode(record)
            if isinstance(event, Samples):
                self._sampler.take(self._named(event))
                continue
            if isinstance(event, Ioctl):
                events += self._sampler.of(event)
            events.append(event)
        if events:
            self._sampler.follow(events)
        return late + events + self._readings.due(events)

    def describe(self, fds: list[int]) -> attach.Handover:
        """For another process: what was loaded, its descriptors added to `fds`."""
        return attach.hand_over(self._plan, self.attached, fds)

    def finish(self) -> list[AnyEvent]:
        """Detaches and hands over the rest: buffered records, open runs, each vCPU's account, thread names."""
        now = time.monotonic_ns()
        self._sampler.close()
        readings = self._readings.last()
        attach.disarm(self._plan)
        rest = self.poll(0) + readings
        return rest + self._accounts(now) + list(self._threads.values())

    def add(self, pid: int) -> None:
        """Traces one more process, at once if armed; for a tracer made without pids."""
        self.pids = (*self.pids, pid)
        self._add_processes([pid])  # first: a migration under way does not wait for us to know its threads' names
        self._look_around([pid])

    def remove(self, pid: int) -> list[AnyEvent]:
        """Traces a process no more; hands over what the kernel and we still hold about it. Call `poll` after it."""
        processes, threads = self._program.table("processes"), self._program.table("threads")
        with contextlib.suppress(KeyError):
            del processes[ctypes.c_uint32(pid)]
        self._late = self.poll(0)
        self._sampler.forget(pid)
        self._readings.forget(pid)
        rest = self._accounts(time.monotonic_ns(), pid)
        rest += [thread for thread in self._threads.values() if thread.pid == pid]
        for tid, words in self._program.hash_items("threads", WORDS["THREAD_WORDS"]).items():
            if words[0] == pid:
                with contextlib.suppress(KeyError):
                    del threads[ctypes.c_uint32(tid)]
        self.pids = tuple(other for other in self.pids if other != pid)
        self._threads = {key: thread for key, thread in self._threads.items() if key[0] != pid}
        self._vcpus = {key: index for key, index in self._vcpus.items() if key[0] != pid}
        self._forget_sockets(pid)
        return rest

    def _forget_sockets(self, pid: int) -> None:
        """Makes room in the kernel's tables; and should the process be traced again, its sockets are told again."""
        streams, owners = self._program.table("streams"), self._program.table("tcp_owners")
        for inode in self._sockets.pop(pid, ()):
            with contextlib.suppress(KeyError):
                del streams[ctypes.c_uint64(inode)]
        for sock in [sock for sock, owner in owners.items() if owner.pid == pid]:
            with contextlib.suppress(KeyError):
                del owners[sock]

    def disarm(self) -> None:
        """Detaches; `arm` attaches again. What was known of sockets and stacks is forgotten."""
        self._sampler.close()
        self._readings.close()
        attach.disarm(self._plan)
        self._program.close_ring()
        self._statistics.close()
        for table in ("streams", "stacks", "tcp_owners"):
            self._program.table(table).clear()
        self._stacks.clear()
        self._sockets.clear()

    def _accounts(self, now: int, pid: int | None = None) -> list[AnyEvent]:
        """The open runs and vCPU accounts of all threads, or of one process's."""
        found: list[AnyEvent] = []
        threads = self._program.hash_items("threads", WORDS["THREAD_WORDS"])
        streams = self._program.hash_items("streams", 2)
        self._look_around(self.pids)
        for tid, words in threads.items():
            if pid is not None and words[0] != pid:
                continue
            found += open_runs(tid, words, streams)
            state = vcpu_state(now, tid, words)
            if state:
                found.append(state)
                self._name(state.pid, tid, vcpu=self._vcpus.get((state.pid, state.fd), -1))
        return found

    def losses(self) -> tuple[dict[str, int], dict[str, int]]:
        """(lost, unpaired) by kind of event, zeros left out."""
        return self._counts("lost"), self._counts("unpaired")

    def own_cost(self) -> tuple[dict[str, int], dict[str, int]]:
        """(run time in ns, runs) of our programs so far; empty where the kernel does not count."""
        if not self._statistics.enabled:
            return {}, {}
        statistics = self._program.run_statistics()
        return {k: v[0] for k, v in statistics.items()}, {k: v[1] for k, v in statistics.items()}

    def close(self) -> None:
        """Detaches; idempotent."""
        self._sampler.close()
        self._readings.close()
        self._program.close()
        self._statistics.close()

    def _total_cost(self) -> tuple[int, int] | None:
        runtime, runs = self.own_cost()
        return (sum(runtime.values()), sum(runs.values())) if runs else None

    def _tell_period(self, period_ns: int) -> None:
        self._program.table("sampling")[ctypes.c_int(0)] = ctypes.c_uint64(period_ns)

    def _named(self, sample: Samples) -> Samples:
        """A sample's addresses as names of functions; an address costs one look-up ever."""
        for address in sample.stack:
            if address not in self._names:
                self._names[address] = self._program.symbol(int(address))
        return msgspec.structs.replace(sample, stack=tuple(self._names[address] for address in sample.stack))

    def _decode(self, record: bytes) -> AnyEvent:
        event = decode(record)
        thread = (getattr(event, "pid", 0), getattr(event, "tid", 0))
        if thread[1] and thread not in self._threads:
            self._name(*thread, _comm(*thread))  # born after we looked around, may be gone at the end
        if isinstance(event, Socket):
            self._sockets.setdefault(event.pid, set()).add(event.socket)
        if isinstance(event, OffCpu) and event.stack:
            return msgspec.structs.replace(event, stack=self._symbols(event.stack[0]))
        return event

    def _symbols(self, stack_id: str) -> tuple[str, ...]:
        """Function names of a stack in the kernel's stack map, the scheduler's own left out; resolved once an id."""
        if stack_id not in self._stacks:
            frames = self._program.kernel_stack("stacks", int(stack_id))
            begin = 1 + max((i for i, frame in enumerate(frames) if frame in _SCHEDULER), default=-1)
            self._stacks[stack_id] = frames[begin : begin + _MAX_FRAMES]
        return self._stacks[stack_id]

    def _look_around(self, pids: Sequence[int]) -> None:
        """Notes thread names and vCPU descriptors while the processes live; gone ones keep what was noted."""
        for pid in pids:
            for tid in threads_of(pid):
                self._name(pid, tid, _comm(pid, tid))
            for link in Path(f"/proc/{pid}/fd").glob("[0-9]*"):
                with contextlib.suppress(OSError):
                    kind, _, number = str(link.readlink()).rpartition(":")
                    if kind == "anon_inode:kvm-vcpu":
                        self._vcpus[pid, int(link.name)] = int(number)

    def _name(self, pid: int, tid: int, name: str = "", vcpu: int = -1) -> None:
        known = self._threads.get((pid, tid), Thread(pid, tid, ""))
        self._threads[pid, tid] = Thread(pid, tid, name or known.name, vcpu if vcpu >= 0 else known.vcpu)

    def _counts(self, table: str) -> dict[str, int]:
        sums = self._program.per_cpu_sums(table)
        return {KIND_NAMES.get(kind, str(kind)): n for kind, n in enumerate(sums) if n}

    def _add_processes(self, pids: Sequence[int]) -> None:
        """Fills the tables; a vCPU that sits in KVM_RUN already (halted, say) is known from the start."""
        processes, threads = self._program.table("processes"), self._program.table("threads")
        for pid in pids:
            inside = {tid: fd for tid in threads_of(pid) if (fd := in_kvm_run(pid, tid)) is not None}
            for tid, fd in inside.items():
                threads[ctypes.c_uint32(tid)] = threads.Leaf(tgid=pid, counted=1, vcpu_fd=fd)
            processes[ctypes.c_uint32(pid)] = processes.Leaf(running=len(inside))


def _loaded(pids: Sequence[int], tier: str, statistics: BpfStatistics) -> attach.Plan:
    require_privilege()
    present = btf.tracepoints(btf.VMLINUX, [name for extra in attach.EXTRAS for name, _ in extra.hooks])
    try:
        return attach.load_best(
            tier, lambda choice: _defines(pids, present, choice), present, statistics, again=not pids
        )
    finally:
        btf.forget()


def _comm(pid: int, tid: int) -> str:
    """A thread's name, empty if it is gone."""
    try:
        return Path(f"/proc/{pid}/task/{tid}/comm").read_text().strip()
    except OSError:
        return ""


def threads_of(pid: int) -> list[int]:
    """The thread ids of a process, none if it is gone."""
    return [int(task.name) for task in Path(f"/proc/{pid}/task").glob("[0-9]*")]


def in_kvm_run(pid: int, tid: int) -> int | None:
    """The vCPU's descriptor if a thread sleeps inside KVM_RUN, else None.

    /proc/PID/task/TID/syscall begins with ioctl's number, fd, request.
    Since Linux 6.13 a VM's `kvm-nx-lpage-recovery` is among its threads, born inside a vCPU's KVM_RUN and showing its
    registers for ever; the flags in `stat` give it away.
    """
    try:
        fields = Path(f"/proc/{pid}/task/{tid}/syscall").read_text().split()
        flags = int(Path(f"/proc/{pid}/task/{tid}/stat").read_text().rpartition(")")[2].split()[6])
    except (OSError, ValueError, IndexError):
        return None
    asleep = len(fields) > 2 and fields[2] == hex(kvm.RUN) and not flags & _PF_USER_WORKER
    return int(fields[1], 16) if asleep else None


def _defines(
    pids: Sequence[int],
    tracepoints: set[str],
    choice: Choice = Choice(),  # noqa: B008 - it is frozen
) -> dict[str, str | int]:
    test = "||".join(f"(t)=={pid}" for pid in pids)
    defines: dict[str, str | int] = dict(WORDS)
    if pids:
        defines["EBPF_MIG_TARGETS(t)"] = f"({test})"
    defines["EBPF_MIG_RING_PAGES"] = RING_BYTES // os.sysconf("SC_PAGESIZE")
    defines["OFF_CPU_KNOWN"] = int("sched_switch" in tracepoints)
    defines["LOCKS_KNOWN"] = int("contention_begin" in tracepoints)
    defines["KVM_FUNCTIONS"] = int("kvm" in choice.groups)
    defines["SOCKET_FUNCTIONS"] = int("socket" in choice.groups)
    defines["SPLIT_KNOWN"] = int("split" in choice.groups)
    defines["TASK_REGS_HELPER"] = int(choice.task_regs)
    defines["USER_REGS_AT"] = _USER_REGS_AT.get(os.uname().machine, 0)
    defines |= _kvm_offsets()
    found = btf.offsets(btf.VMLINUX, [*_OFFSETS.values(), _STATE, _STATE_BEFORE_5_14])
    defines["OFF_task_state"] = found[_STATE] or found[_STATE_BEFORE_5_14] or 0
    for name, member in _OFFSETS.items():
        offset = found[member]
        if offset is None:
            raise PreflightError(f"the kernel's BTF has no {member[0]}.{member[1]}", "ebpf-mig doctor")
        defines[name] = offset
    return defines


def _kvm_offsets() -> dict[str, int]:
    """Where `struct kvm` keeps its locks, by vmlinux's BTF or that of kvm.ko; far off where neither tells."""
    members = {"OFF_kvm_mmu_lock": ("kvm", "mmu_lock"), "OFF_kvm_slots_lock": ("kvm", "slots_lock")}
    manual = ("kvm", "manual_dirty_log_protect")
    found = btf.offsets(btf.VMLINUX, [*members.values(), manual])
    if None in found.values() and Path(_KVM_MODULE).exists():
        found = btf.offsets(_KVM_MODULE, [*members.values(), manual], base=btf.VMLINUX)
    locks = {name: _NOWHERE if found[member] is None else found[member] or 0 for name, member in members.items()}
    return locks | {"OFF_kvm_manual": found[manual] or _NONE}
