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
import time
from collections.abc import Sequence

import msgspec

from ebpf_mig.linux import btf
from ebpf_mig.linux.capabilities import require_privilege
from ebpf_mig.linux.procfs import comm, in_kvm_run, threads_of, vcpus_of
from ebpf_mig.probes import attach
from ebpf_mig.probes.loader import BpfStatistics
from ebpf_mig.probes.macros import defines
from ebpf_mig.probes.polled import Readings
from ebpf_mig.probes.records import decode, open_batches, vcpu_state
from ebpf_mig.probes.stack_sampler import Sampler, cost_ns
from ebpf_mig.probes.tiers import AUTO
from ebpf_mig.recording.events import RECURSION_MISSES, AnyEvent, Ioctl, OffCpu, Samples, Socket, Thread
from ebpf_mig.recording.kinds import RECORD_NAMES

_SCHEDULER = {"schedule", "__schedule", "preempt_schedule_common"}
_MAX_FRAMES = 12
_DETAIL = {attach.SAMPLER, *(program for extra in attach.EXTRAS for _, program in extra.hooks)}
"""Programs that an interrupt may meet again, as in a lock wait of its handler: their misses cost no call."""


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
        for tid in [tid for tid, thread in threads.items() if thread.tgid == pid]:
            with contextlib.suppress(KeyError):
                del threads[tid]
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
        threads = {key.value: thread for key, thread in self._program.table("threads").items()}
        streams = {key.value: stream for key, stream in self._program.table("streams").items()}
        self._look_around(self.pids)
        for tid, thread in threads.items():
            if pid is not None and thread.tgid != pid:
                continue
            found += open_batches(tid, thread, streams)
            state = vcpu_state(now, tid, thread)
            if state:
                found.append(state)
                self._name(state.pid, tid, vcpu=self._vcpus.get((state.pid, state.fd), -1))
        return found

    def losses(self) -> tuple[dict[str, int], dict[str, int]]:
        """(lost, unpaired) by kind of event, zeros left out; recursion misses are those of programs that see calls."""
        ran = self._program.run_statistics()
        missed = sum(misses for name, (_, _, misses) in ran.items() if name not in _DETAIL)
        return self._counts("lost") | ({RECURSION_MISSES: missed} if missed else {}), self._counts("unpaired")

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
            self._name(*thread, comm(*thread))  # born after we looked around, may be gone at the end
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
                self._name(pid, tid, comm(pid, tid))
            self._vcpus |= {(pid, fd): number for fd, number in vcpus_of(pid).items()}

    def _name(self, pid: int, tid: int, name: str = "", vcpu: int = -1) -> None:
        known = self._threads.get((pid, tid), Thread(pid, tid, ""))
        self._threads[pid, tid] = Thread(pid, tid, name or known.name, vcpu if vcpu >= 0 else known.vcpu)

    def _counts(self, table: str) -> dict[str, int]:
        sums = self._program.per_cpu_sums(table)
        return {RECORD_NAMES.get(kind, str(kind)): n for kind, n in enumerate(sums) if n}

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
            tier, lambda choice: defines(pids, present, choice), present, statistics, again=not pids
        )
    finally:
        btf.forget()
