# SPDX-License-Identifier: Apache-2.0
"""The state of one migration, or of one sign that may be a migration, and what single events say of it.

In: events of its processes. Out: a `Track`, which `tracker.py` begins, feeds, merges and ends.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from msgspec.structs import replace

from ebpf_mig.analysis.reception import LOADED_BYTES, STREAM_BYTES
from ebpf_mig.analysis.vcpu import IMMEDIATE_NS
from ebpf_mig.linux import kvm
from ebpf_mig.recording.events import RECEIVE, AnyEvent, Ioctl, Transfer, VcpuEnter, VcpuExit, VcpuState
from ebpf_mig.tracing.lifecycle import LARGE_BYTES, MigrationWatch
from ebpf_mig.tracing.witness import Witness

FILLED_BYTES = 1 << 20
"""A VM that received this much from another VM is its destination."""
SLOTS = 3
"""A display fetches the dirty logs of fewer memslots than this."""


@dataclass
class Track:
    """Its state so far."""

    pids: list[int]
    trigger: str
    begin_ns: int
    until_ns: int
    fresh: set[int]
    watch: MigrationWatch
    witness: Witness | None = None
    events: list[AnyEvent] = field(default_factory=list)
    passed_on: list[AnyEvent] = field(default_factory=list)
    """What processes between the two sides sent and received."""
    logging: set[int] = field(default_factory=set)
    fetched: set[tuple[int, int]] = field(default_factory=set)
    restored: set[int] = field(default_factory=set)
    ran: set[int] = field(default_factory=set)
    stopped: set[int] = field(default_factory=set)
    saved: set[int] = field(default_factory=set)
    received: dict[int, int] = field(default_factory=dict)
    fetchers: set[tuple[int, int]] = field(default_factory=set)
    streamed: Counter[tuple[int, int]] = field(default_factory=Counter)
    """Bytes sent in large calls since the process first fetched a dirty log, by (pid, tid)."""
    handed: dict[int, int] = field(default_factory=dict)
    """By pid: bytes sent by the threads that fetch dirty logs, while the VM was stopped."""
    last_ns: int = 0
    thinned: int = 0
    doubtful: bool = False
    """More than one process fits as its other side, or as that of one that fits it."""

    @property
    def proven(self) -> bool:
        """Whether this is a migration: RAM is logged, or a VM was loaded or replaced itself, and then ran."""
        if self.logging or self.between_vms or self.watch.saved:
            return True
        return bool((self.fresh | self.watch.executed) & self.watch.arrived)

    @property
    def between_vms(self) -> bool:
        """Whether one VM fills another that has not run. This holds even if the beginning was missed."""
        return len(self.pids) > 1 and any(self.received.get(pid, 0) >= FILLED_BYTES for pid in self.fresh)


def has_run(track: Track, pid: int) -> bool:
    """Whether its guest has run: not if each entry into KVM_RUN returned at once, for an old kick."""
    exits = [e for e in track.events if isinstance(e, VcpuExit) and e.pid == pid]
    at_once = {e.enter_ns for e in exits if e.on_cpu_ns <= IMMEDIATE_NS}
    return any(isinstance(e, VcpuEnter) and e.pid == pid and e.at_ns not in at_once for e in track.events)


def as_of(event: AnyEvent, at_ns: int) -> AnyEvent | None:
    """An account that was read later, as far as it holds at `at_ns`; None if it has nothing of that time.

    What a vCPU did later belongs to the next migration. If it has entered KVM_RUN again, the instants of the call
    before are lost; without them, the account still says that the vCPU ran.
    """
    if isinstance(event, Transfer):
        return event if event.end_ns <= at_ns else None
    if not isinstance(event, VcpuState):
        return event
    if event.enter_ns <= at_ns:
        return replace(event, at_ns=at_ns, exit_ns=event.exit_ns if event.exit_ns <= at_ns else 0)
    if event.runs <= 1 and not event.out_ns:
        return None
    return replace(event, at_ns=at_ns, enter_ns=0, exit_ns=0)


def switches_on(event: Ioctl) -> bool:
    """Whether RAM is logged from now on. A display logs one small slot only, a migration all slots."""
    return event.cmd in kvm.MEMSLOT and event.size >= LARGE_BYTES and bool(event.flags & kvm.MEM_LOG_DIRTY_PAGES)


def take_ioctl(track: Track, event: Ioctl) -> None:
    if switches_on(event):
        track.logging.add(event.pid)
    if event.cmd in kvm.DIRTY_LOG:
        track.fetched.add((event.pid, event.slot))
        track.fetchers.add((event.pid, event.tid))
    if event.pid in track.stopped and kvm.name_of(event.cmd) in kvm.VCPU_STATE_GET:
        track.saved.add(event.pid)
    if kvm.name_of(event.cmd) in kvm.VCPU_STATE_SET:
        track.restored.add(event.pid)


def take_transfer(track: Track, event: Transfer) -> None:
    if event.direction == RECEIVE:
        track.received[event.pid] = track.received.get(event.pid, 0) + event.bytes
        return
    if event.bytes >= STREAM_BYTES * event.calls and any(pid == event.pid for pid, _ in track.fetchers):
        track.streamed[event.pid, event.tid] += event.bytes
    if event.pid in track.stopped - track.fresh and (event.pid, event.tid) in track.fetchers:
        track.handed[event.pid] = track.handed.get(event.pid, 0) + event.bytes


def found_out(track: Track) -> set[int]:
    """Sources whose beginning was missed.

    They send the stream, and the thread that fetches dirty logs does so itself, or others do, for many slots (multifd).
    Or they are stopped, their registers are read, and the thread that fetches sends. Nobody sends where the rate of
    dirty pages is measured. A display is served by the main thread, which fetches few slots and may send pictures.
    """
    suspects = {pid for pid, _ in track.fetchers} - track.logging
    return {pid for pid in suspects if _streams(track, pid) or (pid in track.saved and _handed(track, pid))}


def _streams(track: Track, pid: int) -> bool:
    slots = sum(one == pid for one, _ in track.fetched)
    senders = {tid for (one, tid), size in track.streamed.items() if one == pid and size >= LOADED_BYTES}
    if slots >= SLOTS and senders - {pid}:
        return True
    return any(pid == one and tid in senders and (tid != pid or slots >= SLOTS) for one, tid in track.fetchers)


def _handed(track: Track, pid: int) -> bool:
    return track.handed.get(pid, 0) >= LOADED_BYTES
