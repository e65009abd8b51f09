# SPDX-License-Identifier: Apache-2.0
"""The state of one migration, or of one sign that may be a migration, and what single events say of it.

In: events of its processes. Out: a `Track`, which `tracker.py` begins, links and ends, and `taking.py` feeds.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from msgspec.structs import replace

from ebpf_mig.analysis.vcpu import IMMEDIATE_NS
from ebpf_mig.recording.events import AnyEvent, Transfer, VcpuEnter, VcpuExit, VcpuState
from ebpf_mig.tracing.lifecycle import MigrationWatch
from ebpf_mig.tracing.witness import Witness

PROBATION_NS = 2_000_000_000
"""How long a VM is traced after a sign. A destination may wait this long between two bursts."""
UNPROVEN_NS = 600_000_000_000
"""A VM that sends in bursts is traced at most this long: its first pass may be long, or its disk is busy."""
KEPT_EVENTS = 300_000
"""Events held of one migration. Beyond it, the earliest transfers are dropped: they only add to pre-copy totals."""
FILLED_BYTES = 1 << 20
"""A VM that received this much from another VM is its destination."""


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
    moved: int = 0
    """Bytes sent and received since its probation was extended last."""
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

    def merge(self, other: Track) -> None:
        """Takes the other half of its migration in."""
        self.pids += other.pids
        self.events += other.events
        self.begin_ns = min(self.begin_ns, other.begin_ns)
        self.fresh |= other.fresh
        self.logging |= other.logging
        self.watch_again()
        self.restored |= other.restored
        self.ran |= other.ran
        self.stopped |= other.stopped
        self.saved |= other.saved
        self.fetched |= other.fetched
        self.moved += other.moved
        self.received |= other.received
        self.fetchers |= other.fetchers
        self.streamed += other.streamed
        self.handed |= other.handed
        if self.witness is not None and other.witness is not None:
            self.witness.merge(other.witness)
        self.passed_on += other.passed_on
        self.thinned += other.thinned
        self.until_ns = max(self.until_ns, other.until_ns)

    def watch_again(self) -> None:
        """Its events are no longer those that its watch saw."""
        self.watch = MigrationWatch(self.pids)
        self.watch.saw(self.events)
        for pid in self.logging:
            self.watch.missed_beginning(pid)

    def thin(self) -> None:
        """Drops the earlier half of the transfers."""
        transfers = sum(isinstance(event, Transfer) for event in self.events)
        left = transfers // 2
        kept: list[AnyEvent] = []
        for event in self.events:
            if left and isinstance(event, Transfer):
                left -= 1
            else:
                kept.append(event)
        self.thinned += len(self.events) - len(kept)
        self.events = kept


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
