# SPDX-License-Identifier: Apache-2.0
"""The tracing interface for the rest of the program: pids in, events out.

`Tracer(pids)` compiles and loads (needs privileges and LLVM, half a second). `arm()` attaches (milliseconds). `poll()`
returns events. `finish()` detaches and reads what the kernel still holds. Everything ends with the process.

A tracer without pids is for a node: `add` and `remove` select the traced processes, `arm` and `disarm` alternate, and
nothing is compiled again.
"""

from __future__ import annotations

import ctypes
import os
from collections import Counter
from collections.abc import Callable, Sequence
from threading import Thread

import msgspec

from ebpf_mig.linux import clock
from ebpf_mig.probes import attach, own_rates
from ebpf_mig.probes.backlog import Backlog
from ebpf_mig.probes.fault_counts import FaultCounts
from ebpf_mig.probes.hook_points import AIO_SYNC, EXTRAS, IO_URING
from ebpf_mig.probes.loader import read_symbols
from ebpf_mig.probes.plan import SAMPLER, Plan
from ebpf_mig.probes.polled import Polled
from ebpf_mig.probes.records import decode
from ebpf_mig.probes.run_statistics import BpfStatistics
from ebpf_mig.probes.stack_sampler import sampler
from ebpf_mig.probes.stacks import Stacks
from ebpf_mig.probes.tables import ProcessTable, SocketTable, counts, own_runs
from ebpf_mig.probes.thread_names import ThreadNames
from ebpf_mig.probes.tiers import AUTO
from ebpf_mig.probes.user_stacks import UserStacks
from ebpf_mig.recording.events import (
    RECURSION_MISSES,
    AnyEvent,
    Ioctl,
    Kick,
    OffCpu,
    OwnCost,
    Samples,
    Socket,
    Transfer,
    VcpuState,
)
from ebpf_mig.recording.kinds import MISSED_RETURN

_QUEUED = (IO_URING, AIO_SYNC)
_DETAIL = {SAMPLER, *(program for extra in EXTRAS if extra not in _QUEUED for _, program in extra.all_hooks)}
"""Programs that an interrupt handler can re-enter, for example by a lock wait. Their recursion misses lose no call."""
CALIBRATION_NS = 100_000_000
"""How long the kernel counts the run time of our programs, from when they are attached. In a migration, they run some
thousand times meanwhile.
"""
SNAPSHOTS = 8
"""How often the open batches of a process are read at most, if each time another one has ended meanwhile."""


class Tracer:
    """Traces the given processes, or those added later. Use it as a context manager."""

    def __init__(
        self,
        pids: Sequence[int] = (),
        plan: Plan | None = None,
        tier: str = AUTO,
        *,
        user_stacks: bool = False,
        moves_plainly: Callable[[int], bool] = bool,
    ) -> None:
        """`plan`: a plan without pids that another process loaded. Otherwise the programs are loaded here, with LLVM,
        for `tier`, if wanted with `user_stacks`: the user half of the stacks of waits.
        `moves_plainly`: whether a process may move its guest by read(2) and write(2) on files. QEMU does not.

        With such a plan, on a node, tcp_info is not read: it costs memory and makes arming slower. Nor are the rates of
        our own cost measured, which belong to no single VM.
        """
        self.pids = tuple(pids)
        self.attached: dict[str, str] = {}
        self._statistics = BpfStatistics()
        self._polled = Polled(self._total_cost, tcp=plan is None)
        self._symbols: Thread | None = None
        self._user_stacks = UserStacks() if user_stacks else None
        self._plan = plan or self._load(tier)
        self._seen = plan is not None
        self._on_node = plan is not None and not self.pids
        self._program = self._plan.program
        self._processes, self._sockets = ProcessTable(self._program, self._plan.walker_fd), SocketTable(self._program)
        self.backlog = Backlog(self._processes.guest_runs)
        self._threads, self._stacks = ThreadNames(), Stacks(self._program)
        self._sampler, self._no_samples = sampler(self._plan.sampler_fd, self._set_period)
        self._faults = FaultCounts()
        self._late: list[AnyEvent] = []
        self._calibrated_ns = 0
        """When the kernel need not count any longer."""
        self._missed_returns = 0
        self._moves_plainly = moves_plainly
        self._armed = self._costly = False
        """Whether hooks are attached, and with them those for which every process pays."""

    def _load(self, tier: str) -> Plan:
        try:
            return attach.load(
                self.pids, tier, self._statistics, self._prepare, user_stacks=self._user_stacks is not None
            )
        except BaseException:
            self._polled.close()
            raise

    def _prepare(self) -> None:
        """Starts what `arm` needs, in threads: the compiler does not hold Python's lock."""
        self._polled.begin()
        self._symbols = read_symbols()

    def __enter__(self) -> Tracer:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def arm(self, *, everything: bool = False) -> None:
        """Attaches. From now on, with the tracepoint tier, every system call on the host is slightly slower. With the
        others, read(2) and write(2) are, if a process needs it or `everything` is wanted.
        """
        self._statistics.open()
        self._program.open_ring("events")
        if self._symbols is not None:
            self._symbols.join()
        self._stacks.prepare()
        self._polled.open()
        for pid in self.pids:
            self._polled.follow(pid)
        self._threads.read(self.pids)
        self._faults.begin(self.pids)
        if self._user_stacks is not None:
            self._user_stacks.prepare(self.pids)
        self._processes.add(self.pids)
        self._program.table("reading_process")[ctypes.c_int(0)] = ctypes.c_uint64(os.getpid())
        alone_ns = 0.0 if self._on_node else own_rates.time_call()
        self._costly = everything or any(map(self._moves_plainly, self.pids))
        self.attached = attach.arm(self._plan, self._statistics, seen=self._seen, by_everybody=self._costly)
        self._armed = True
        if not self._on_node:
            self._late.append(own_rates.measure(alone_ns, self._program.run_statistics))
            self._late += self._polled.take()  # a reader without a CPU may read the next values after the blackout
        self._calibrated_ns = clock.monotonic_ns() + CALIBRATION_NS
        self._seen = True
        if self._no_samples:
            self.attached["split"] = f"absent: {self._no_samples}"

    def poll(self, timeout_ms: int) -> list[AnyEvent]:
        """The events that arrive within `timeout_ms`. Off a node, `Backlog` may hold them back."""
        if self._on_node:
            return self._everything(timeout_ms)
        late = self._fetch(timeout_ms)
        records = self.backlog.take(clock.monotonic_ns())
        return late if records is None else late + self._events(records)

    def _everything(self, timeout_ms: int = 0) -> list[AnyEvent]:
        """The events that arrived, also those that were held back."""
        return self._fetch(timeout_ms) + self._events(self.backlog.release())

    def _fetch(self, timeout_ms: int) -> list[AnyEvent]:
        """Moves records from the ring to the backlog. Returns what is known without decoding them."""
        late, self._late = self._late, []
        held = self.backlog.holds
        edges = self.backlog.add(self._program.poll(0 if late else timeout_ms), clock.monotonic_ns())
        if edges:
            self._sampler.follow(edges)
        return late + self._polled.in_stop(edges) if edges or held else late

    def _events(self, records: Sequence[bytes]) -> list[AnyEvent]:
        events: list[AnyEvent] = []
        for record in records:
            if self._user_stacks is not None and self._user_stacks.take(record):
                continue
            event = self._decode(record)
            if isinstance(event, Samples):
                self._sampler.take(self._stacks.named_sample(event))
                continue
            if isinstance(event, Ioctl):
                events += self._sampler.of(event)
            events.append(event)
        if events:
            self._sampler.follow(events)
        return events + self._polled.due(events) + self._calibration()

    def _calibration(self) -> list[AnyEvent]:
        """The kernel's count of our programs' run time beside their own sums, once. Then the kernel stops counting:
        that costs each run about as much as the sums do (docs/overhead.md).

        Not while vCPUs are stopped, since the kernel patches its code on all CPUs for it (static_branch_dec of
        bpf_stats_enabled_key). On a node the count is a metric, and goes on.
        """
        now = clock.monotonic_ns()
        if self._on_node or now < self._calibrated_ns or self._polled.stopped or not self._statistics.enabled:
            return []
        sums, cost = own_runs(self._program, now), self._total_cost()
        self._statistics.close()
        return [*sums, OwnCost(now, *cost)] if cost is not None else []

    def _decode(self, record: bytes) -> AnyEvent:
        event = decode(record)
        if tid := getattr(event, "tid", 0):
            self._threads.seen(event.pid, tid)  # type: ignore[union-attr]
        if isinstance(event, Socket):
            self._sockets.seen(event)
        if isinstance(event, Transfer):
            self._sockets.moved(event)
        if isinstance(event, Kick):
            return msgspec.structs.replace(event, target_tid=self._threads.host_tid(event.pid, event.target_tid))
        return self._stacks.named_wait(event) if isinstance(event, OffCpu) else event

    def finish(self) -> list[AnyEvent]:
        """Detaches and returns the remaining events: buffered records, open batches, each vCPU's account, thread
        names.
        """
        now = clock.monotonic_ns()
        last: list[AnyEvent] = [*own_runs(self._program, now)]
        self._sampler.close()
        last += self._polled.last()
        self._missed_returns += self._processes.missed_returns()
        self._detach()
        rest = self._everything() + last
        rest += [*self._accounts(now), *self._threads.events()]
        return rest + self._user_stacks.events() if self._user_stacks is not None else rest

    def add(self, pid: int) -> None:
        """Traces one more process, at once if armed. Only for a tracer without pids."""
        self.pids = (*self.pids, pid)
        self._processes.add([pid])  # first: a running migration does not wait until we know the names of its threads
        if self._armed and not self._costly and self._moves_plainly(pid):
            attach.arm_costly(self._plan)
            self._costly = True
        self._threads.read([pid])
        self._faults.begin([pid])
        if self._user_stacks is not None:
            self._user_stacks.prepare([pid])
        self._polled.follow(pid)

    def follow(self, pid: int) -> None:
        """Also traces the sends and receives of a process that is no VMM. Only for a tracer without pids; `remove` ends
        it."""
        self._processes.follow(pid)

    def runs_vcpu(self, pid: int) -> bool:
        """Whether a thread of a traced process is inside KVM_RUN, or in another ioctl of a vCPU, at this moment."""
        return bool(self._processes.inside(pid))

    def remove(self, pid: int) -> list[AnyEvent]:
        """Stops tracing a process and returns its remaining events. Call `poll` afterwards."""
        self._missed_returns += self._processes.missed_returns(pid)
        self._processes.remove(pid)
        self._late = self._everything()
        self.backlog.forget(pid)
        self._sampler.forget(pid)
        self._polled.forget(pid)
        rest = self._accounts(clock.monotonic_ns(), pid)
        rest += self._threads.events(pid)
        self._processes.forget(pid)
        self.pids = tuple(other for other in self.pids if other != pid)
        self._threads.forget(pid)
        self._faults.forget(pid)
        self._sockets.forget(pid)
        return rest

    def pending(self, pid: int) -> list[Transfer]:
        """Transfers of a process that `poll` has not returned: in the ring, or still being coalesced in the kernel.
        They come as events later, too.

        A batch can end while the tables are read. It is in the ring then, and what follows it has a wrong position. Or
        its program is still writing: it has counted the bytes, and the record is not there yet. So the tables are read
        again until no batch of the process has ended meanwhile, and each open one follows what came by the ring. If
        that never holds, what came by the ring is all that is returned.
        """
        self._late = self._everything()
        for _ in range(SNAPSHOTS):
            batches = [e for e in self._processes.accounts(clock.monotonic_ns(), pid) if isinstance(e, Transfer)]
            before = len(self._late)
            self._late = self._everything()
            ended = any(isinstance(event, Transfer) and event.pid == pid for event in self._late[before:])
            if not ended and all(map(self._sockets.follows, batches)):
                break
        else:
            batches = []
        return [event for event in [*self._late, *batches] if isinstance(event, Transfer) and event.pid == pid]

    def so_far(self, pid: int) -> list[AnyEvent]:
        """The accounts and thread names of a process that remains traced. Open batches come as events later, too."""
        return [*self._accounts(clock.monotonic_ns(), pid), *self._threads.events(pid)]

    def disarm(self) -> None:
        """Detaches; `arm` attaches again. Forgets all sockets and stacks."""
        self._sampler.close()
        self._polled.close()
        self._detach()
        self._program.close_ring()
        self._statistics.close()
        self._sockets.clear()
        self._stacks.clear()

    def _detach(self) -> None:
        attach.disarm(self._plan, by_everybody=self._costly)
        self._armed = self._costly = False

    def _accounts(self, now: int, pid: int | None = None) -> list[AnyEvent]:
        """The open batches and vCPU accounts of all threads, or of one process's."""
        self._threads.read(self.pids if pid is None else [pid])
        events: list[AnyEvent] = [*self._processes.accounts(now, pid), *self._processes.silent_vcpus(now, pid)]
        for event in events:
            if isinstance(event, VcpuState) and event.fd >= 0:
                self._threads.ran_vcpu(event.pid, event.tid, event.fd)
        events += self._faults.counts({(e.pid, e.tid) for e in events if isinstance(e, VcpuState)})
        return events + [self._stacks.named_sleep(sleep) for sleep in self._processes.sleeps(pid)]

    def losses(self) -> tuple[dict[str, int], dict[str, int]]:
        """(lost, unpaired) by kind of event, without zeros."""
        missed = sum(self.missed_runs().values())
        lost = Counter(counts(self._program, "lost"))
        lost += Counter({RECURSION_MISSES: missed, MISSED_RETURN[1]: self._missed_returns})
        return dict(lost), counts(self._program, "unpaired")

    def missed_runs(self) -> dict[str, int]:
        """How often the kernel skipped each of our programs that see calls, without zeros."""
        ran = self._program.run_statistics()
        return {name: misses for name, (_, _, misses) in ran.items() if misses and name not in _DETAIL}

    def own_cost(self) -> tuple[dict[str, int], dict[str, int]]:
        """(run time in ns, runs) of each of our programs so far; empty if the kernel does not count, or no longer."""
        if not self._statistics.enabled:
            return {}, {}
        statistics = self._program.run_statistics()
        return {k: v[0] for k, v in statistics.items()}, {k: v[1] for k, v in statistics.items()}

    def close(self) -> None:
        """Detaches; idempotent."""
        self._sampler.close()
        self._polled.close()
        self._program.close()
        self._statistics.close()

    def _total_cost(self) -> tuple[int, int] | None:
        runtime, runs = self.own_cost()
        return (sum(runtime.values()), sum(runs.values())) if runs else None

    def _set_period(self, period_ns: int) -> None:
        self._program.table("sampling")[ctypes.c_int(0)] = ctypes.c_uint64(period_ns)
