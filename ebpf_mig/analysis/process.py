# SPDX-License-Identifier: Apache-2.0
"""One traced process: its events, and what follows from them alone.

In: its events of each kind, in time order. Out: a `Process`: its vCPUs' timelines, its sockets and streams, the threads
that fetch, and other facts that several steps of the analysis need.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import defaultdict
from dataclasses import dataclass, field
from functools import cached_property
from operator import attrgetter, sub
from typing import TypeVar

from ebpf_mig.analysis import vcpu
from ebpf_mig.analysis.reception import Reception
from ebpf_mig.analysis.vcpu import Timeline
from ebpf_mig.breakdown import Side
from ebpf_mig.linux import kvm
from ebpf_mig.recording import events as ev


def key_of(transfer: ev.Transfer) -> int:
    """The socket's inode; if it is unknown, a negative number made from the file descriptor."""
    return transfer.socket if transfer.socket else -1 - transfer.fd


_begin, _end = attrgetter("begin_ns"), attrgetter("end_ns")
_Timed = TypeVar("_Timed", ev.Ioctl, ev.Transfer)


def begun(events: list[_Timed], since: int) -> list[_Timed]:
    """The events that began at `since` or later. `events` are in order of their begin."""
    return events[bisect_left(events, since, key=_begin) :]


@dataclass(frozen=True)
class Process:
    """One traced process. Every list is in time order. Derived values are computed once, on first use."""

    pid: int
    target: ev.Target | None = None
    ioctls: list[ev.Ioctl] = field(default_factory=list)
    enters: list[ev.VcpuEnter] = field(default_factory=list)
    exits: list[ev.VcpuExit] = field(default_factory=list)
    states: list[ev.VcpuState] = field(default_factory=list)
    kicks: list[ev.Kick] = field(default_factory=list)
    transfers: list[ev.Transfer] = field(default_factory=list)
    socket_events: list[ev.Socket] = field(default_factory=list)
    thread_events: list[ev.Thread] = field(default_factory=list)
    slots: list[ev.Slot] = field(default_factory=list)
    off_cpu: list[ev.OffCpu] = field(default_factory=list)
    segments: list[ev.Segment] = field(default_factory=list)
    retransmits: list[ev.Retransmit] = field(default_factory=list)
    spans: list[ev.VcpuSpan] = field(default_factory=list)
    vcpu_sleeps: list[ev.VcpuSleep] = field(default_factory=list)
    page_faults: list[ev.PageFaults] = field(default_factory=list)
    samples: list[ev.Samples] = field(default_factory=list)
    tcp: list[ev.TcpInfo] = field(default_factory=list)
    user_stacks: list[ev.UserStack] = field(default_factory=list)
    modules: list[ev.Module] = field(default_factory=list)
    run_delays: list[ev.RunDelay] = field(default_factory=list)
    quotas: list[ev.CpuQuota] = field(default_factory=list)
    steals: list[ev.CpuSteal] = field(default_factory=list)
    execs: list[ev.Exec] = field(default_factory=list)
    calls: list[ev.Call] = field(default_factory=list)
    born: ev.Exec | None = None
    """The execve(2) with which it replaced another process of the same pid that had a VM, too."""
    socket_errors: list[ev.SocketError] = field(default_factory=list)

    @property
    def hint(self) -> str:
        """The role that the user gave it: a `Side`."""
        return self.target.role if self.target else Side.UNKNOWN

    @property
    def was_seen(self) -> bool:
        """Whether the kernel reported any event of it. Thread names do not count, because they come from /proc."""
        calls = self.ioctls or self.enters or self.exits or self.states or self.kicks or self.transfers
        return bool(calls or self.socket_events or self.off_cpu or self.spans)

    @cached_property
    def dirty_log(self) -> list[ev.Ioctl]:
        """The ioctls that fetch or clear the dirty log."""
        return [ioctl for ioctl in self.ioctls if kvm.is_dirty_log(ioctl.cmd)]

    @cached_property
    def other_ioctls(self) -> list[ev.Ioctl]:
        """All other ioctls."""
        return [ioctl for ioctl in self.ioctls if not kvm.is_dirty_log(ioctl.cmd)]

    @cached_property
    def ring_resets(self) -> dict[int, list[ev.Ioctl]]:
        """Resets of dirty rings, by the tid of the thread that made them."""
        result: dict[int, list[ev.Ioctl]] = defaultdict(list)
        for ioctl in self.dirty_log:
            if ioctl.cmd == kvm.RESET_DIRTY_RINGS:
                result[ioctl.tid].append(ioctl)
        return dict(result)

    @cached_property
    def run_delay(self) -> dict[tuple[int, int], int]:
        """How long a thread could run at the end of a sleep, in ns, by its tid and the end of the sleep."""
        return {(delay.tid, delay.at_ns): delay.delay_ns for delay in self.run_delays}

    @cached_property
    def user_frames(self) -> dict[tuple[int, int], tuple[str, ...]]:
        """The user half of the stack of a wait, innermost function first, by its tid and its end.

        A frame without a name is the file's name and the offset. The last item is in parentheses if frames are missing.
        """
        files = {module.number: module.path.rpartition("/")[2] for module in self.modules}
        return {(stack.tid, stack.at_ns): _frames(stack, files) for stack in self.user_stacks}

    def user_half(self, wait: ev.OffCpu, stack: tuple[str, ...]) -> tuple[str, ...]:
        """The user frames of the part of a wait that has this stack: none where it could run and had no CPU."""
        return () if stack[:1] and stack[0].startswith("(") else self.user_frames.get((wait.tid, wait.end_ns), ())

    @cached_property
    def held(self) -> list[tuple[int, int]]:
        """(instant, ns that quotas had withheld by then) of each reading, in order."""
        return sorted((reading.at_ns, reading.held_ns) for reading in self.quotas)

    @cached_property
    def cpus(self) -> int:
        """How many CPUs the host has, as far as is known: those whose stolen time was read; at least 1."""
        return max(1, len({event.cpu for event in self.steals if event.cpu >= 0}))

    @cached_property
    def stolen(self) -> list[tuple[int, dict[int, int]]]:
        """(instant, time stolen so far by CPU) of each reading, in order; CPU -1: all together."""
        found: dict[int, dict[int, int]] = defaultdict(dict)
        for event in self.steals:
            found[event.at_ns][event.cpu] = event.stolen_ns
        return sorted(found.items(), key=lambda reading: reading[0])

    @cached_property
    def memslots(self) -> list[ev.Ioctl]:
        """The ioctls that set memslots."""
        return [ioctl for ioctl in self.other_ioctls if kvm.is_memslot(ioctl.cmd)]

    @cached_property
    def places(self) -> dict[int, tuple[int, int]]:
        """The place of each slot, where known: (guest physical address, bytes). A deleted slot keeps its last place."""
        found = {slot.slot: (slot.addr, slot.size) for slot in self.slots if slot.size > 0}
        found.update({i.slot: (i.addr, i.size) for i in self.memslots if i.size > 0})
        return found

    @property
    def largest_slot(self) -> int | None:
        """The largest slot with a known place."""
        known = self.places
        return max(known, key=lambda slot: (known[slot][1], -slot), default=None)

    @cached_property
    def fetchers(self) -> frozenset[int]:
        """Threads that fetch for a migration: more than one slot, the largest known slot, or dirty rings."""
        slots: dict[int, set[int]] = defaultdict(set)
        rings: set[int] = set()
        for tid, cmd, slot in {(ioctl.tid, ioctl.cmd, ioctl.slot) for ioctl in self.dirty_log}:
            if kvm.name_of(cmd) == "RESET_DIRTY_RINGS":
                rings.add(tid)
            else:
                slots[tid].add(slot)
        largest = self.largest_slot
        several = {tid for tid, fetched in slots.items() if len(fetched) > 1 or largest in fetched}
        if not several and slots:
            most = max(len(fetched) for fetched in slots.values())
            several = {tid for tid, fetched in slots.items() if len(fetched) == most}
        vcpus = {line.tid for line in self.vcpus.values()}
        return frozenset(several | (rings - vcpus))

    @cached_property
    def was_loaded(self) -> bool:
        """Whether the state with which its guest first ran came in over a connection."""
        started = min((line.first_run for line in self.vcpus.values() if line.first_run is not None), default=None)
        if started is None:
            return False
        calls = (i for i in self.ioctls if i.begin_ns < started)
        files = {key for key, socket in self.sockets.items() if socket.family == ev.FILE}
        return Reception.of(calls, (t for t in self.transfers if t.begin_ns < started and t.socket not in files)).loaded

    @cached_property
    def _longest_ns(self) -> int:
        return max(map(sub, map(_end, self.transfers), map(_begin, self.transfers)), default=0)

    def ended(self, transfers: list[ev.Transfer], since: int) -> list[ev.Transfer]:
        """Those of its `transfers` (in order) that ended at `since` or later. Earlier ones are not scanned."""
        late = begun(transfers, since - self._longest_ns)
        return [t for t in late if t.end_ns >= since]

    @cached_property
    def streams(self) -> dict[tuple[int, int], list[ev.Transfer]]:
        """Transfers in order, by direction and socket (a key as made by `key_of`)."""
        result: dict[tuple[int, int], list[ev.Transfer]] = defaultdict(list)
        for transfer in self.transfers:
            result[transfer.direction, transfer.socket or key_of(transfer)].append(transfer)
        return dict(result)

    @cached_property
    def sockets(self) -> dict[int, ev.Socket]:
        """Each socket, by inode. If there are several events on one socket, the last counts."""
        return {socket.socket: socket for socket in self.socket_events}

    @cached_property
    def threads(self) -> dict[int, ev.Thread]:
        """Thread names by tid. If there are two for a tid, the one with a vCPU index counts."""
        return {thread.tid: thread for thread in sorted(self.thread_events, key=lambda t: (t.vcpu, t.name))}

    @cached_property
    def tcp_by_socket(self) -> dict[int, list[ev.TcpInfo]]:
        """`tcp_info` readings by socket inode."""
        result: dict[int, list[ev.TcpInfo]] = defaultdict(list)
        for reading in self.tcp:
            result[reading.socket].append(reading)
        return dict(result)

    @cached_property
    def kicks_by_tid(self) -> dict[int, list[ev.Kick]]:
        """Kicks by the tid of the thread that they were sent to."""
        result: dict[int, list[ev.Kick]] = defaultdict(list)
        for kick in self.kicks:
            result[kick.target_tid].append(kick)
        return dict(result)

    @cached_property
    def vcpus(self) -> dict[int, Timeline]:
        """Timelines of the vCPUs that were seen to run, by vCPU index. Threads without an index get the free ones."""
        enters: dict[int, list[ev.VcpuEnter]] = defaultdict(list)
        exits: dict[int, list[ev.VcpuExit]] = defaultdict(list)
        states: dict[int, list[ev.VcpuState]] = defaultdict(list)
        for enter in self.enters:
            enters[enter.tid].append(enter)
        for exit_ in self.exits:
            exits[exit_.tid].append(exit_)
        for state in self.states:
            states[state.tid].append(state)
        found: dict[int, Timeline] = {}
        nameless: list[Timeline] = []
        for tid in sorted(enters.keys() | exits.keys() | states.keys()):
            kicked = [kick.at_ns for kick in self.kicks_by_tid.get(tid, ())]
            line = vcpu.build(tid, enters[tid], exits[tid], states[tid], kicked)
            if not line.ran:
                continue
            index = self.threads[tid].vcpu if tid in self.threads else -1
            if index >= 0 and index not in found:
                found[index] = line
            else:
                nameless.append(line)
        free = 0
        for line in nameless:
            while free in found:
                free += 1
            found[free] = line
        return dict(sorted(found.items()))

    @cached_property
    def gaps(self) -> list[tuple[int, int | None]]:
        """The stretches in which none of its vCPUs ran guest code."""
        return vcpu.common(list(self.vcpus.values()))


def _frames(stack: ev.UserStack, files: dict[int, str]) -> tuple[str, ...]:
    places = zip(stack.names, stack.modules, stack.offsets, strict=False)
    frames = [name or f"{files.get(number) or '?'}+{offset:#x}" for name, number, offset in places]
    return (*frames, f"({stack.end})") if stack.end else tuple(frames)
