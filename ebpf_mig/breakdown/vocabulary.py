# SPDX-License-Identifier: Apache-2.0
"""The words of a breakdown: the values that its fields can have, and the base of its structs.

In: nothing. Out: enums whose values are public names in the JSON form: add, never rename. The package exports them
all.
"""

from __future__ import annotations

from collections.abc import Collection
from enum import StrEnum

import msgspec


class Side(StrEnum):
    """The side that a phase, a process or a lane belongs to."""

    SOURCE = "source"
    """The VM's old process."""
    DESTINATION = "destination"
    """The VM's new process."""
    BOTH = "both"
    """Both processes, or the network between them."""
    UNKNOWN = "unknown"
    """A traced process that is neither; no phase has this side."""


class PhaseName(StrEnum):
    """The phases, in the order in which reports print them. Each instant of the window belongs to one."""

    PAUSE = "pause"
    """From the pause request to the last vCPU's stop."""
    QUIESCE = "quiesce"
    """The source's next steps: device handlers, clock reads, draining of block devices."""
    FETCH_KERNEL = "fetch.kernel"
    """Inside the ioctls of the final dirty-log fetch."""
    FETCH_USER = "fetch.user"
    """Between these ioctls, and up to the first page sent."""
    MEMORY_SEND = "memory.send"
    """From the first send of the final pages to the last; in a snapshot, the memory is written to its file."""
    STATE_SAVE = "state.save"
    """Reading vCPU and device state."""
    STATE_SEND = "state.send"
    """Sending that state; in a snapshot, writing it to its file."""
    SYNC = "sync"
    """In a snapshot: inside fsync(2) and calls like it. Left out where it has no time."""
    EXEC = "exec"
    """Inside execve(2): the kernel ends the old program's threads, frees its memory and VM, loads the new program."""
    STARTUP = "startup"
    """The new program starts and sets its VM up, until it begins to load the state."""
    HANDOVER = "handover"
    """Everything has been sent, and the destination waits for data or for its turn."""
    MEMORY_LOAD = "memory.load"
    """In a restore: the memory is read from its file, or the file is mapped. Left out where it has no time."""
    STATE_LOAD = "state.load"
    """The destination writes vCPU and device state."""
    RESUME = "resume"
    """From the end of `state.load` to the last vCPU's start."""
    MANAGEMENT = "management"
    """The VMM is ready, and waits for its manager to tell it to go on: at pre-switchover, before `cont`."""
    UNATTRIBUTED = "unattributed"
    """Time that no rule explains."""


class Verdict(StrEnum):
    """How reliable a result is."""

    COMPLETE = "complete"
    """Nothing is known to be missing."""
    BOUNDED = "bounded"
    """Something was not traced, so the result covers only a part."""
    INCOMPLETE = "incomplete"
    """Events were lost, or the recording was cut off."""


class Result(StrEnum):
    """How a migration ended."""

    COMPLETED = "completed"
    """The guest runs on the destination."""
    FAILED = "failed"
    """The VMM or its driver reported a failure, or a process ended; the source has the guest again."""
    CANCELLED = "cancelled"
    """The VMM or its driver reported that it was cancelled."""
    SAVED = "saved"
    """The state went to a file or a pipe, and no process was seen to take over."""
    UNKNOWN = "unknown"
    """The recording does not say. `analysis.outcome` has the rules for the other values."""


class Mode(StrEnum):
    """When the memory moves."""

    PRECOPY = "precopy"
    """While the guest runs on the source; the rest in the blackout."""
    POSTCOPY = "postcopy"
    """Also after the guest's start on the destination."""
    LOCAL = "local"
    """Never: both processes share it."""
    CPR = "cpr"
    """Never: a live update (CPR). A new program on the same host takes over the memory of a guest that was stopped
    before the migration began."""
    SNAPSHOT = "snapshot"
    """To a file, for a later restore. The result is `saved`; or `completed`, if a second process loaded it."""
    RESTORE = "restore"
    """From a file that nobody was seen to write; the result is `completed`."""
    UNKNOWN = "unknown"
    """The recording does not say."""


class Transport(StrEnum):
    """What carries the migration."""

    TCP = "tcp"
    """TCP, also with TLS."""
    UNIX = "unix"
    """A UNIX socket."""
    VSOCK = "vsock"
    """A socket between a VM and its host."""
    PIPE = "pipe"
    """A pipe or a fifo, from which another process reads."""
    FILE = "file"
    """A file."""
    NONE = "none"
    """No carrier was seen."""
    UNKNOWN = "unknown"
    """The recording does not say."""


class PairedBy(StrEnum):
    """What shows that the two sides belong together, the surest first."""

    CONNECTION = "connection"
    """Both ends of one connection were seen: certain."""
    STREAM = "stream"
    """One side sent as many bytes as the other received, to the byte, and none was received before it was sent.
    Forwarders such as proxies change addresses, but not bytes."""
    FLOW = "flow"
    """One side was traced from later on. What is known of both fits in bytes and time: likely."""
    REQUEST = "request"
    """Nothing in the recording: both processes were named by the user."""


class DirtyLogMode(StrEnum):
    """How KVM reports which pages are dirty."""

    MANUAL = "manual"
    """A bitmap that KVM_CLEAR_DIRTY_LOG re-arms (KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2)."""
    LEGACY = "legacy"
    """A bitmap that KVM_GET_DIRTY_LOG re-arms by itself."""
    RING = "ring"
    """Dirty rings (KVM_CAP_DIRTY_LOG_RING)."""
    NONE = "none"
    """Nothing was logged."""
    UNKNOWN = "unknown"
    """The source, or its use of the dirty log, was not traced."""


class SwitchoverKind(StrEnum):
    """What happened to the guest after its stop on the source."""

    COMPLETED = "completed"
    """The destination runs."""
    STOPPED = "stopped"
    """The source does not run; the rest is unknown."""
    ABORTED = "aborted"
    """The source runs again."""


PHASES: tuple[tuple[PhaseName, Side], ...] = (
    (PhaseName.PAUSE, Side.SOURCE),
    (PhaseName.QUIESCE, Side.SOURCE),
    (PhaseName.FETCH_KERNEL, Side.SOURCE),
    (PhaseName.FETCH_USER, Side.SOURCE),
    (PhaseName.MEMORY_SEND, Side.SOURCE),
    (PhaseName.STATE_SAVE, Side.SOURCE),
    (PhaseName.STATE_SEND, Side.SOURCE),
    (PhaseName.SYNC, Side.SOURCE),
    (PhaseName.EXEC, Side.SOURCE),
    (PhaseName.STARTUP, Side.DESTINATION),
    (PhaseName.HANDOVER, Side.BOTH),
    (PhaseName.MEMORY_LOAD, Side.DESTINATION),
    (PhaseName.STATE_LOAD, Side.DESTINATION),
    (PhaseName.RESUME, Side.DESTINATION),
    (PhaseName.MANAGEMENT, Side.BOTH),
    (PhaseName.UNATTRIBUTED, Side.BOTH),
)
"""Every phase and its side, in the order in which reports print them. In an aborted blackout, `resume` is the source's:
see `sides_of`."""


OF_FILES = frozenset({PhaseName.SYNC, PhaseName.MEMORY_LOAD})
"""Phases of snapshots and restores. A breakdown has them only where they have time."""


def sides_of(aborted: bool, seen: Collection[PhaseName] = ()) -> tuple[tuple[PhaseName, Side], ...]:
    """The phases of a breakdown and their sides: if the source took its guest back, the source resumes. It also loads,
    if it loaded another guest in place of its own.

    `seen`: the phases that have time; those of files are left out otherwise.
    """
    shown = (row for row in PHASES if row[0] not in OF_FILES or row[0] in seen)
    return tuple((name, _resumed(name, side, seen) if aborted else side) for name, side in shown)


def _resumed(name: PhaseName, side: Side, seen: Collection[PhaseName]) -> Side:
    loads = side == Side.DESTINATION and name in seen
    return Side.SOURCE if name == PhaseName.RESUME or loads else side


IMMEDIATE = ": taken not to have run the guest"
"""The end of a note on KVM_RUN calls that returned at once."""

Span = tuple[int, int]


class Struct(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """Base: immutable, built by name. It cannot be part of a cycle, so the garbage collector does not track it."""
