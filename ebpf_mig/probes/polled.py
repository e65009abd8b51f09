# SPDX-License-Identifier: Apache-2.0
"""Values that must be polled: tcp_info, CPU time withheld by quotas or a hypervisor, and our own overhead.

In: the events as they arrive. They trigger a reading: a fetch, a kick, an entry into KVM_RUN. Out: `TcpInfo`,
`OwnCost`, `CpuQuota` and `CpuSteal` events, usually at least `APART_NS` apart, since each reading has a cost.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from ebpf_mig.linux import clock, kvm, procfs
from ebpf_mig.linux.cgroup import Quota
from ebpf_mig.probes.tcp_info import TcpReader
from ebpf_mig.recording.events import (
    SEND,
    AnyEvent,
    CpuQuota,
    CpuSteal,
    Ioctl,
    Kick,
    OwnCost,
    Socket,
    Transfer,
    VcpuEnter,
)

APART_NS = 100_000_000
APART_IN_STOP_NS = 20_000_000
"""The state from a kick until a vCPU runs again."""
APART_AT_EDGES_NS = 2_000_000
"""The events at which a window may begin or end."""
COST_APART_NS = 30_000_000
"""Longest time between two readings of our own cost, from the first fetch on. So a window begins at most this long
after a reading.
"""
PATIENCE_S = 0.2
TCP_READ_BYTES = 65536
"""A socket that sent less than this is not the main migration socket; its tcp_info is not read."""


class Polled:
    """Decides when to read, and reads. `cost`: (ns, runs) of our programs so far, None if the kernel does not count."""

    def __init__(self, cost: Callable[[], tuple[int, int] | None], *, tcp: bool = True) -> None:
        """`tcp`: also read tcp_info, which takes a thread and 15 MB."""
        self._cost = cost
        self._with_tcp = tcp
        self._tcp: TcpReader | None = None
        self._sockets: dict[int, Socket] = {}
        self._bytes: dict[int, int] = {}
        self._stopped: set[int] = set()
        self._quotas: dict[int, Quota] = {}
        self._virtual = procfs.is_virtual()
        self._last_ns = self._last_cost_ns = self._last_groups_ns = 0
        self._fetching = False

    @property
    def stopped(self) -> bool:
        """Whether a process kicked its vCPUs and none has run since, as far as the events say."""
        return bool(self._stopped)

    def begin(self) -> None:
        """Starts to prepare, in a thread; idempotent."""
        if self._with_tcp:
            self._tcp = self._tcp or TcpReader()

    def open(self) -> None:
        """Prepares to read; idempotent."""
        self.begin()
        if self._tcp is not None:
            self._tcp.wait()

    def in_stop(self, edges: Sequence[AnyEvent]) -> list[AnyEvent]:
        """The readings that are due after kicks and entries into KVM_RUN, where a window may begin or end, and between
        them: why a thread had no CPU shows only in readings shortly before and after it.
        """
        edge = False
        for event in edges:
            if isinstance(event, Kick):
                edge = edge or event.pid not in self._stopped
                self._stopped.add(event.pid)
            elif isinstance(event, VcpuEnter):
                edge = edge or bool(self._stopped)
                self._stopped.clear()
        apart = APART_AT_EDGES_NS if edge else APART_IN_STOP_NS
        if not (edge or self._stopped) or clock.monotonic_ns() - self._last_ns <= apart:
            return []
        if not edge:
            self._look_up_groups()
        if not self._stopped:
            self._ask()
        return self._read()

    def due(self, events: Sequence[AnyEvent]) -> list[AnyEvent]:
        """The readings that are due after other events; `events` may be empty."""
        worth = False
        for event in events:
            if isinstance(event, Transfer):
                if event.direction == SEND:
                    self._bytes[event.socket] = self._bytes.get(event.socket, 0) + event.bytes
                worth = worth or event.pid in self._stopped
            elif isinstance(event, Socket):
                self._sockets[event.socket] = event
                worth = True
            elif isinstance(event, Ioctl) and event.cmd in kvm.DIRTY_LOG:
                worth = self._fetching = True
        answers: list[AnyEvent] = [*self._tcp.answers()] if self._tcp else []
        now = clock.monotonic_ns()
        if worth and now - self._last_ns > (APART_IN_STOP_NS if self._stopped else APART_NS):
            return answers + self.take()
        return answers + (self._own_cost() if self._fetching and now - self._last_cost_ns > COST_APART_NS else [])

    def last(self) -> list[AnyEvent]:
        """A last reading and all outstanding answers. Takes up to `PATIENCE_S`."""
        readings = self.take()
        return readings + (self._tcp.answers(PATIENCE_S) if self._tcp else [])

    def take(self) -> list[AnyEvent]:
        """Reads our own cost, the quotas and the stolen time now. tcp_info arrives later, through `due`."""
        self._look_up_groups()
        self._ask()
        return self._read()

    def _look_up_groups(self) -> None:
        """Threads can be moved to other groups at any time, and a migration's threads are new.

        Not at the edges of a window: with many threads, it takes longer than all the rest.
        """
        if (now := clock.monotonic_ns()) - self._last_groups_ns > APART_NS:
            self._last_groups_ns = now
            for pid, quota in self._quotas.items():
                quota.include(procfs.control_groups(pid))

    def _read(self) -> list[AnyEvent]:
        self._last_ns = clock.monotonic_ns()
        return self._own_cost() + self._held() + self._stolen()

    def _ask(self) -> None:
        for inode, socket in list(self._sockets.items()):
            if self._tcp is not None and self._bytes.get(inode, 0) >= TCP_READ_BYTES:
                self._tcp.ask(socket)

    def follow(self, pid: int) -> None:
        """Starts to read the values of a process."""
        self._quotas[pid] = Quota(procfs.control_groups(pid))

    def _held(self) -> list[AnyEvent]:
        readings = [(pid, quota.held_ns(), clock.monotonic_ns()) for pid, quota in self._quotas.items()]
        return [CpuQuota(at, pid, held) for pid, held, at in readings if held is not None]

    def _stolen(self) -> list[AnyEvent]:
        """For all processes together, since they see the same CPUs."""
        stolen, now = procfs.stolen_ns() if self._virtual else {}, clock.monotonic_ns()
        rows = {-1: sum(stolen.values())} | {cpu: ns for cpu, ns in stolen.items() if ns}
        return [CpuSteal(now, pid, cpu, ns) for pid in self._quotas for cpu, ns in rows.items()]

    def _own_cost(self) -> list[AnyEvent]:
        self._last_cost_ns = clock.monotonic_ns()
        cost = self._cost()
        return [] if cost is None else [OwnCost(self._last_cost_ns, *cost)]

    def forget(self, pid: int) -> None:
        """Stops reading the values of a process."""
        self._stopped.discard(pid)
        self._quotas.pop(pid, None)
        for inode in [inode for inode, socket in self._sockets.items() if socket.pid == pid]:
            del self._sockets[inode]
            self._bytes.pop(inode, None)

    def close(self) -> None:
        """Stops all reading; idempotent."""
        if self._tcp is not None:
            self._tcp.close()
        self._tcp = None
